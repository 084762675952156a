"""A miniature GSM8K: word problems of two or three steps, and drills of the facts they need.

Owns the templates, the ranges of the numbers and the scoring rule. A document reads

    Q: Mia has 14 apples. She buys 23 more and gives 9 to Tom. How many apples does Mia have now?
    A: 14 + 23 = 37
    37 - 9 = 28
    #### 28

Ranges, kept by every step (`in_range`): operands of + and - are 0..99 and results 0..198;
products have one factor in 2..9 and the other in 2..12; quotients are exact, with a divisor in
2..9 and a result in 2..12. The format follows GSM8K (Cobbe et al. 2021): steps, then `#### n`.
"""

import operator
import random
import re
from dataclasses import dataclass

from hobbit_jax.synthetic_tasks.split import Split, draw

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


TEMPLATES = (
    Template(
        ("a + b", "_ - c"),
        (
            "{N} has {a} {things}. {He} buys {b} more and gives {c} to {M}. "
            "How many {things} does {N} have now?",
            "{N} had {a} {things} and got {b} more from {M}. Then {he} lost {c}. "
            "How many {things} are left?",
        ),
    ),
    Template(
        ("a - b", "_ + c"),
        (
            "{N} has {a} {things}. {He} sells {b} and then finds {c}. "
            "How many {things} does {N} have now?",
            "There are {a} {things} in a box. {N} takes {b} out and {M} puts {c} in. "
            "How many {things} are in the box?",
        ),
    ),
    Template(
        ("a - b", "_ - c"),
        (
            "{N} had {a} {things}. {He} gave {b} to {M} and lost {c}. How many are left?",
            "A shop has {a} {things}. It sells {b} on Monday and {c} on Tuesday. "
            "How many {things} are left?",
        ),
    ),
    Template(
        ("a + b", "_ + c"),
        (
            "{N} has {a} {things}, {M} has {b} and {K} has {c}. How many do they have together?",
            "{N} finds {a} {things} on Monday, {b} on Tuesday and {c} on Friday. "
            "How many {things} did {he} find in total?",
        ),
    ),
    Template(
        ("p * u", "_ + a"),
        (
            "{N} has {a} {things}. {He} buys {p} {boxes} with {u} {things} each. "
            "How many {things} does {N} have now?",
            "{N} buys {p} {boxes} of {u} {things} and gets {a} more from {M}. "
            "How many {things} does {he} have?",
        ),
    ),
    Template(
        ("p * u", "_ - h"),
        (
            "{N} has {p} {boxes} with {u} {things} in each. {He} gives {h} {things} to {M}. "
            "How many {things} are left?",
            "There are {p} rows of {u} chairs in a room. People sit on {h} chairs. "
            "How many chairs are free?",
        ),
    ),
    Template(
        ("h + i", "_ / p"),
        (
            "{N} has {h} red and {i} green {things}. {He} shares them equally among {p} friends. "
            "How many {things} does each friend get?",
            "{N} and {M} bring {h} and {i} {things}. They put them equally into {p} {boxes}. "
            "How many {things} are in each?",
        ),
    ),
    Template(
        ("a - h", "_ / p"),
        (
            "{N} has {a} {things}. {He} keeps {h} and shares the rest equally among {p} friends. "
            "How many {things} does each friend get?",
            "A cook has {a} eggs. {h} eggs break and the rest go equally into {p} {boxes}. "
            "How many eggs are in each?",
        ),
    ),
    Template(
        ("p * u", "_ + a"),
        (
            "{N} buys {p} {goods} for ${u} each and a {one} for ${a}. How much does {he} pay?",
            "A {one} costs ${a} and {goods} cost ${u} each. "
            "How much are {p} {goods} and one {one} together?",
        ),
    ),
    Template(
        ("p * u", "a - _"),
        (
            "{N} has ${a}. {He} buys {p} {goods} for ${u} each. How much money is left?",
            "{N} pays for {p} {goods} at ${u} each with ${a}. How much change does {he} get?",
        ),
    ),
    Template(
        ("p * u", "q * v", "_1 + _"),
        (
            "{N} has {p} {boxes} of {u} {things} and {M} has {q} {boxes} of {v} {things}. "
            "How many {things} do they have together?",
            "{N} buys {p} {goods} for ${u} each and {q} books for ${v} each. "
            "How much does {he} pay?",
        ),
    ),
    Template(
        ("p * u", "q * v", "_1 - _"),
        (
            "{N} has {p} {boxes} of {u} {things}. {M} has {q} {boxes} of {v} {things}. "
            "How many more {things} does {N} have than {M}?",
            "{N} earns ${u} an hour for {p} hours. {He} buys {q} {goods} for ${v} each. "
            "How much money is left?",
        ),
    ),
    Template(
        ("h + i", "_ - j"),
        (
            "{N} is {h} years old. {M} is {i} years older than {N}. "
            "{K} is {j} years younger than {M}. How old is {K}?",
        ),
    ),
    Template(
        ("p * u", "_ + u"),
        (
            "{N} is {u} years old. {M} is {p} times as old. How old are they together?",
            "{N} has {u} {things}. {M} has {p} times as many. How many do they have together?",
        ),
    ),
    Template(
        ("p * u", "_ - u"),
        (
            "{N} has {u} {things}. {M} has {p} times as many. "
            "How many more {things} does {M} have than {N}?",
            "{N} is {u} years old. {M} is {p} times as old. How many years older is {M}?",
        ),
    ),
    Template(
        ("p * u", "a - _"),
        (
            "A book has {a} pages. {N} reads {u} pages a day for {p} days. "
            "How many pages are left?",
            "{N} needs ${a} for a {one}. {He} saves ${u} a week for {p} weeks. "
            "How much more does {he} need?",
            "A road is {a} km long. {N} walks {u} km a day for {p} days. How many km are left?",
        ),
    ),
    Template(
        ("h + i", "h + _"),
        (
            "{N} reads {h} pages on Monday and {i} more pages on Tuesday than on Monday. "
            "How many pages does {he} read in total?",
            "{N} has {h} {things}. {M} has {i} more than {N}. How many do they have together?",
        ),
    ),
    Template(
        ("a - h", "a + _"),
        (
            "{N} has {a} {things}. {M} has {h} fewer than {N}. How many do they have together?",
            "{N} runs {a} km in May and {h} km less in June. How many km is that in total?",
        ),
    ),
    Template(
        ("p * u", "_ + h"),
        (
            "{N} rides {u} km an hour for {p} hours and then walks {h} km. "
            "How many km does {he} go in total?",
            "{N} plants {p} rows of {u} trees and then {h} more trees. "
            "How many trees does {he} plant?",
        ),
    ),
    Template(
        ("a - h", "_ + i", "_ - j"),
        (
            "A bus has {a} people. {h} get off and {i} get on. Then {j} get off. "
            "How many people are on the bus?",
            "{N} has ${a}. {He} spends ${h}, earns ${i} and then spends ${j}. "
            "How much money does {he} have?",
        ),
    ),
    Template(
        ("p * u", "_ / q"),
        (
            "{N} bakes {p} trays of {u} cookies and puts them equally into {q} {boxes}. "
            "How many cookies are in each?",
            "{N} has {p} {boxes} of {u} {things} and shares them equally among {q} friends. "
            "How many does each friend get?",
        ),
    ),
    Template(
        ("a / p", "_ * q"),
        (
            "{p} {goods} cost ${a}. How much do {q} {goods} cost?",
            "{N} puts {a} {things} equally into {p} {boxes}. "
            "How many {things} are in {q} of the {boxes}?",
            "{N} walks {a} km in {p} days, the same each day. How many km are that in {q} days?",
        ),
    ),
    Template(
        ("a / p", "_ - q"),
        (
            "{N} shares {a} {things} equally among {p} friends. {M} is one of them and loses {q}. "
            "How many does {M} have left?",
            "{p} children share {a} {things} equally. {N} is one of them and loses {q}. "
            "How many does {N} have now?",
        ),
    ),
    Template(
        ("a / p", "_ + h"),
        (
            "{N} and friends, {p} children in all, share {a} {things} equally. "
            "{N} had {h} {things} before. How many does {he} have now?",
        ),
    ),
    Template(
        ("q + r", "p * _"),
        (
            "{N} earns ${p} an hour. {He} works {q} hours on Monday and {r} hours on Tuesday. "
            "How much does {he} earn?",
            "{N} buys {q} {goods} and {r} books for ${p} each. How much does {he} pay?",
        ),
    ),
    Template(
        ("u - q", "p * _"),
        (
            "A {one} costs ${u}, but today it is ${q} cheaper. How much do {p} of them cost today?",
            "There are {p} {boxes} with {u} eggs each. {q} eggs in each of them are broken. "
            "How many eggs are good?",
        ),
    ),
    Template(
        ("p * 4", "u * 2", "_1 + _"),
        (
            "A farm has {p} cows and {u} ducks. How many legs do they have together?",
            "{N} sees {p} cars with 4 wheels and {u} bikes with 2 wheels. How many wheels is that?",
        ),
    ),
    Template(
        ("h + i", "_ - j", "_ / p"),
        (
            "{N} has {h} {things} and buys {i} more. {He} keeps {j} and shares the rest equally "
            "among {p} friends. How many does each friend get?",
        ),
    ),
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


def in_range(left: int, op: str, right: int, result: int) -> bool:
    """Whether a step stays within the ranges that the module docstring states."""
    if op in "+-":
        return 0 <= left <= 99 and 0 <= right <= 99 and result >= 0
    if op == "*":
        return 2 <= min(left, right) <= 9 and max(left, right) <= 12
    return 2 <= right <= 9 and 2 <= result <= 12 and result * right == left


_OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def _work(steps: tuple[str, ...], numbers: dict[str, int]) -> list[str] | None:
    """The worked lines "14 + 23 = 37", or None where a step leaves its range."""
    values = dict(numbers)
    lines = []
    for index, step in enumerate(steps, start=1):
        left_name, op, right_name = step.split()
        left, right = (
            int(name) if name.isdigit() else values[name] for name in (left_name, right_name)
        )
        result = _OPS[op](left, right)
        if not in_range(left, op, right, result):
            return None
        lines.append(f"{left} {op} {right} = {result}")
        values["_"] = values[f"_{index}"] = result
    return lines


def _make(rng: random.Random) -> Problem:
    template = rng.choice(TEMPLATES)
    # Redrawing the numbers under the same template keeps the templates equally frequent: those
    # that divide need many more tries than those that add.
    lines = None
    while lines is None:
        letters = sorted(set(re.findall("[a-z]", " ".join(template.steps))))
        numbers = {x: rng.randrange(_RANGES[x][0], _RANGES[x][1] + 1) for x in letters}
        lines = _work(template.steps, numbers)
    name, he = rng.choice([(n, "he") for n in _HE] + [(n, "she") for n in _SHE])
    friend = rng.choice([n for n in _HE + _SHE if n != name])
    third = rng.choice([n for n in _HE + _SHE if n not in (name, friend)])
    words = {"N": name, "M": friend, "K": third, "he": he, "He": he.capitalize()}
    words |= {"things": rng.choice(_THINGS), "goods": rng.choice(_GOODS)}
    words |= {"one": rng.choice(_ONE), "boxes": rng.choice(_BOXES)}
    question = rng.choice(template.texts).format(**words, **numbers)
    answer = int(lines[-1].split()[-1])
    return Problem(
        prompt=f"Q: {question}\nA:",
        solution=" " + "\n".join([*lines, f"#### {answer}"]) + "\n",
        answer=answer,
    )


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


@dataclass(frozen=True)
class _Drill:
    prompt: str
    content: str


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

    Facts are not held out: every one may occur in both splits (there are only about 200 products
    and quotients, and a problem needs them all). What is held out is problems; here `split` only
    keeps whole documents apart. A third of the lines each is + and -, a sixth * and /.

    Raises:
      ValueError: unknown split.
    """

    def make(rng: random.Random) -> _Drill:
        text = "".join(_fact(rng) for _ in range(_DRILL_LINES))
        return _Drill(prompt=text, content=text)

    return [drill.prompt for drill in draw(make, seed, count, split)]
