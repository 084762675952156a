"""The mini tasks: true arithmetic, disjoint splits, reproducible text, and a fair judge."""

import hashlib
import re
import time

import pytest

from hobbit_jax.synthetic_tasks import arithmetic, functions

FAMILIES = pytest.mark.parametrize("family", [arithmetic, functions])
SPLITS = pytest.mark.parametrize("split", ["train", "heldout"])

_STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def assert_true_and_in_range(line: str) -> int:
    match = _STEP.fullmatch(line)
    assert match, line
    left, op, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
    if op == "+":
        assert left + right == result, line
    elif op == "-":
        assert left - right == result, line
    elif op == "*":
        assert left * right == result, line
    else:
        assert left == right * result, line
    if op in "+-":
        assert max(left, right) <= 99, line
        assert 0 <= result <= 198, line
    else:
        small, large = sorted((left, right) if op == "*" else (right, result))
        assert 2 <= small <= 9, line
        assert large <= 12, line
        assert op == "*" or right <= 9, line
    return result


@SPLITS
def test_every_worked_step_is_true_and_uses_known_numbers(split):
    for problem in arithmetic.generate(1, 2000, split):
        document = problem.prompt + problem.solution
        *lines, last = problem.solution.removeprefix(" ").removesuffix("\n").split("\n")
        known = set(re.findall(r"\d+", problem.prompt))
        if " cows " in problem.prompt:  # the one template with numbers that nobody says: legs
            known |= {"4", "2"}
        for line in lines:
            assert set(re.findall(r"\d+", line.split("=")[0])) <= known, document
            known.add(str(assert_true_and_in_range(line)))
        assert 2 <= len(lines) <= 3, document
        assert last == f"#### {problem.answer}", document
        assert lines[-1].endswith(f"= {problem.answer}"), document
        assert problem.prompt.startswith("Q: "), document
        assert problem.prompt.endswith("?\nA:"), document


@SPLITS
def test_drills_are_true_and_cover_the_tables(split):
    documents = arithmetic.drills(0, 400, split)
    lines = [line for document in documents for line in document.splitlines()]
    for line in lines:
        if line[-1] != "=":
            match = _STEP.fullmatch(line)
            assert match, line
            assert_true_and_in_range(line)
    products = {line for line in lines if "*" in line or "/" in line}
    wanted = {f"{a} * {b} = {a * b}" for a in range(2, 10) for b in range(2, 13)}
    wanted |= {f"{a * b} / {a} = {b}" for a in range(2, 10) for b in range(2, 13)}
    assert wanted <= products
    assert len(documents) == len(set(documents)) == 400


def test_arithmetic_score():
    problem = next(p for p in arithmetic.generate(0, 50, "train") if p.answer > 9)
    answer = problem.answer
    right = [
        problem.solution,
        f"####{answer}",
        f"x\n####  ${answer}.\n#### 1",
        f" #### {answer}\nQ:",
    ]
    wrong = [
        *("", str(answer), f"#### {answer}0", f"#### -{answer}", f"#### {answer + 1}"),
        *(f"#### 1\n#### {answer}", f"Q: more\nA: #### {answer}", "#### ", f"### {answer}"),
    ]
    assert [arithmetic.score(problem, text) for text in right] == [True] * len(right)
    assert [arithmetic.score(problem, text) for text in wrong] == [False] * len(wrong)


@SPLITS
def test_arithmetic_solutions_score(split):
    assert all(arithmetic.score(p, p.solution) for p in arithmetic.generate(0, 200, split))


@FAMILIES
def test_splits_are_disjoint(family):
    train = family.generate(0, 3000, "train")
    heldout = family.generate(0, 500, "heldout")
    for kind in ("prompt", "content"):
        assert not {getattr(p, kind) for p in train} & {getattr(p, kind) for p in heldout}
    assert not {p.solution for p in train} & {p.solution for p in heldout}
    assert len({p.content for p in heldout}) == 500
    assert len({p.prompt for p in train}) == 3000


@FAMILIES
def test_unknown_split_is_an_error(family):
    with pytest.raises(ValueError, match="'test'"):
        family.generate(0, 1, "test")


@pytest.mark.parametrize(
    ("family", "digest"),
    [
        (arithmetic, "7e7a7a9c5cf3b084cef2c97fe8c16101"),
        (functions, "6aaa80e2eae5b8e25803a0fee961c2a4"),
    ],
)
def test_text_is_the_same_everywhere(family, digest):
    """Recorded once; a change here means that a trained reference model no longer fits its split.

    That every template, piece and wording occurs, and that tests tell functions apart, was held of
    this very text up to revision d070f0e.
    """
    text = repr(family.generate(0, 2000, "train") + family.generate(0, 500, "heldout"))
    if family is arithmetic:
        text += repr(family.drills(0, 400, "train"))
    assert hashlib.blake2b(text.encode(), digest_size=16).hexdigest() == digest


@SPLITS
def test_reference_solutions_score(split):
    problems = functions.generate(2, 80, split)
    assert all(functions.score(p, p.solution) for p in problems)


def test_the_solution_of_another_problem_is_wrong():
    """The tests tell programs apart, even those of one signature and similar meaning."""
    by_prompt = {p.content: p for p in functions.generate(6, 1500, "train")}
    problems = [p for p in by_prompt.values() if p.prompt.startswith(("def f(xs)", "def f(x)"))]
    pairs = [(p, q) for p in problems[:10] for q in problems[:10] if p.prompt[:7] == q.prompt[:7]]
    verdicts = [functions.score(p, q.solution) for p, q in pairs]
    assert len(pairs) > 40
    assert [(p.solution, q.solution) for (p, q), v in zip(pairs, verdicts, strict=True) if v] == [
        (p.solution, p.solution) for p in problems[:10]
    ]


# How programs are confined is held in test_code_runner.py; these try to pass for right answers.
HOSTILE = {
    "empty": "",
    "syntax": "    return (\n",
    "wrong": "    return x + 1\n",
    "float": "    return float(x * 2)\n",
    "loop": "    while True:\n        pass\n",
    "exit": "    raise SystemExit(0)\n",
    "raises": "    return 1 // 0\n",
    "long": "    return 'x' * 10**8\n",
    "prints": "    print('[0, 2, 4]')\n    return 0\n",
    "forges": "    import os\n    for fd in range(3, 50):\n        try:\n"
    "            os.write(fd, b'[0, 2]')\n        except OSError:\n            pass\n"
    "    os._exit(0)\n",
    "equal_to_all": "    class Any(int):\n        __eq__ = lambda s, o: True\n    return Any(1)\n",
    "nul": "    return '\0'\n",
    "surrogate": "    return '\ud800'\n",
}
DOUBLE = functions.Problem(
    prompt='def double(x):\n    """Return x times 2."""\n',
    solution="    return x * 2\n",
    name="double",
    tests=tuple(((x,), 2 * x) for x in (0, 1, 2, -3, 50)),
    content="return {0} * 2",
)


def test_hostile_candidates_are_wrong_and_harm_no_other():
    completions = [text for bad in HOSTILE.values() for text in (bad, DOUBLE.solution)]
    start = time.monotonic()
    verdicts = [functions.score(DOUBLE, text, timeout_s=1.0) for text in completions]
    assert time.monotonic() - start < 20  # two of them wait for the timeout, one would sleep 30 s
    assert verdicts[1::2] == [True] * len(HOSTILE)
    assert dict(zip(HOSTILE, verdicts[::2], strict=True)) == dict.fromkeys(HOSTILE, False)


def test_a_completion_ends_where_its_body_ends():
    extra = [
        "\ndef other(y):\n    while True: pass\n",
        "x = 1 / 0\n",
        "\n\n# done\n!!",
        "Q: Mia has",
    ]
    assert all(functions.score(DOUBLE, DOUBLE.solution + text) for text in extra)
    assert functions.score(DOUBLE, "\n    y = x + x\n\n    return y")
    assert not functions.score(DOUBLE, "x = 1\n    return x * 2\n")


def test_printing_does_not_spoil_a_right_answer():
    assert functions.score(DOUBLE, "    print('noise', flush=True)\n    return x * 2\n")
