"""A miniature GSM8K: word problems of two or three steps, and drills of the facts they need.

Owns the templates, the ranges of the numbers and the scoring rule. A document reads

    Q: Mia has 14 apples. She buys 23 more and gives 9 to Tom. How many apples does Mia have now?
    A: 14 + 23 = 37
    37 - 9 = 28
    #### 28

Ranges, kept by every step: operands of + and - are 0..99 and results 0..198;
products have one factor in 2..9 and the other in 2..12; quotients are exact, with a divisor in
2..9 and a result in 2..12. The format follows GSM8K (Cobbe et al. 2021): steps, then `#### n`.
"""

import operator
import random
import re
from dataclasses import dataclass

from hobbit_jax.synthetic_tasks.drawing import Split, draw, paragraphs

_HE = ("Tom", "Ben", "Sam", "Leo", "Max", "Jack", "Omar", "Paul", "Noah", "Ivan")
_SHE = ("Mia", "Anna", "Lily", "Emma", "Zoe", "Ruth", "Nina", "Eva", "Sara", "Kate")
_THINGS = (
    *("apples", "books", "cards", "coins", "marbles", "pencils", "stickers", "shells"),
    *("cookies", "stamps", "balls", "eggs", "flowers", "toys", "beads", "stones"),
)
_GOODS = ("pens", "cups", "hats", "tickets", "lamps", "plates", "scarves", "cakes", "kites")
_ONE = ("bag", "chair", "shirt", "clock", "ball", "jacket", "map", "radio")
_BOXES = ("boxes", "bags", "packs", "jars", "baskets")

_RANGES = {  # which numbers a letter of a template stands for
    **dict.fromkeys("abc", (2, 99)),  # amounts
    **dict.fromkeys("hij", (2, 40)),  # small amounts
    **dict.fromkeys("pqr", (2, 9)),  # counts of groups, prices, divisors
    **dict.fromkeys("uvw", (2, 12)),  # sizes of groups
}


@dataclass(frozen=True)
class Template:
    """One kind of problem: its wordings, and its steps over letters and earlier results.

    A step is "x op y"; `_` is the result of the step before, `_1` that of the first step.
    """

    steps: tuple[str, ...]
    texts: tuple[str, ...]


# A line of steps, and a line for each wording.
TEMPLATES = tuple(
    Template(tuple(steps.split("; ")), tuple(texts))
    for steps, *texts in paragraphs("word_problems.txt")
)


@dataclass(frozen=True)
class Problem:
    """A word problem; `prompt + solution` is the training document.

    The split goes by the solution, which has no names or wording in it: so no worked solution of a
    held-out problem occurs in training, not even under another story.
    """

    prompt: str
    solution: str
    answer: int

    @property
    def content(self) -> str:
        """What decides the split."""
        return self.solution


def _in_range(left: int, op: str, right: int, result: int) -> bool:
    if op in "+-":
        return 0 <= left <= 99 and 0 <= right <= 99 and result >= 0
    if op == "*":
        return 2 <= min(left, right) <= 9 and max(left, right) <= 12
    return 2 <= right <= 9 and 2 <= result <= 12 and result * right == left


_OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def _work(steps: tuple[str, ...], numbers: dict[str, int]) -> list[str] | None:
    """The worked lines "14 + 23 = 37", or None where a step leaves its range."""
    values, lines = dict(numbers), []
    for index, step in enumerate(steps, start=1):
        left, op, right = step.split()
        left, right = (int(x) if x.isdigit() else values[x] for x in (left, right))
        result = _OPS[op](left, right)
        if not _in_range(left, op, right, result):
            return None
        lines.append(f"{left} {op} {right} = {result}")
        values["_"] = values[f"_{index}"] = result
    return lines


def _make(rng: random.Random) -> Problem:
    template = rng.choice(TEMPLATES)
    letters, lines = sorted(set(re.findall("[a-z]", " ".join(template.steps)))), None
    # Redrawing the numbers under the same template keeps the templates equally frequent: those
    # that divide need many more tries than those that add.
    while lines is None:
        numbers = {x: rng.randint(*_RANGES[x]) for x in letters}
        lines = _work(template.steps, numbers)
    name, he = rng.choice([(n, "he") for n in _HE] + [(n, "she") for n in _SHE])
    friend = rng.choice([n for n in _HE + _SHE if n != name])
    third = rng.choice([n for n in _HE + _SHE if n not in (name, friend)])
    words = {"N": name, "M": friend, "K": third, "he": he, "He": he.capitalize()}
    words |= {"things": rng.choice(_THINGS), "goods": rng.choice(_GOODS)}
    words |= {"one": rng.choice(_ONE), "boxes": rng.choice(_BOXES)}
    question = rng.choice(template.texts).format(**words, **numbers)
    answer = int(lines[-1].split()[-1])
    solution = " " + "\n".join([*lines, f"#### {answer}"]) + "\n"
    return Problem(f"Q: {question}\nA:", solution, answer)


def generate(seed: int, count: int, split: Split) -> list[Problem]:
    """`count` problems of one split, the same for a seed on every platform and Python.

    Raises:
      ValueError: unknown split.
    """
    return draw(_make, seed, count, split)


_ANSWER = re.compile(r"####\s*\$?\s*(-?\d+)")


def score(problem: Problem, completion: str) -> bool:
    """Whether the first integer after `####` is the answer; text from the next "Q:" on is cut."""
    found = _ANSWER.search(completion.split("Q:")[0])
    return found is not None and int(found.group(1)) == problem.answer


_DRILL_LINES = 12


def _fact(rng: random.Random) -> str:
    op = rng.choice("++--*/")
    if op == "+":
        left, right = rng.randrange(100), rng.randrange(100)
    elif op == "-":
        one, other = rng.randrange(100), rng.randrange(100)
        left, right = max(one, other), min(one, other)
    else:
        left, right = rng.randrange(2, 10), rng.randrange(2, 13)
        if op == "/":
            left, right = left * right, left
        elif rng.randrange(2):
            left, right = right, left
    return f"{left} {op} {right} = {_OPS[op](left, right)}\n"


def drills(seed: int, count: int, split: Split) -> list[str]:
    """`count` documents of 12 lines like "37 + 25 = 62\\n", uniform over the facts of each op.

    A third of the lines each is + and -, a sixth * and /. `split` keeps whole documents apart; a
    fact may occur in both, for there are only about 200 products and quotients.

    Raises:
      ValueError: unknown split.
    """

    def make(rng: random.Random) -> Problem:
        text = "".join(_fact(rng) for _ in range(_DRILL_LINES))
        return Problem(text, text, answer=0)

    return [drill.prompt for drill in draw(make, seed, count, split)]
