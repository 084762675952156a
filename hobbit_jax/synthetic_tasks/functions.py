"""A miniature HumanEval: small Python functions from a compositional grammar, with test cases.

Owns the grammar (pieces, families, wordings), the inputs that the functions are tested on, and the
verdict on a completion.
A document reads

    def pick(nums):
        \"\"\"Return the sum of the even numbers in nums, each times 3.\"\"\"
        return sum(x * 3 for x in nums if x % 2 == 0)

What is held out is the combination of pieces and constants; every piece and wording also occurs in
training. The format follows HumanEval (Chen et al. 2021): prompt with docstring, body, tests.
"""

import ast
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

from hobbit_jax.code_runner import run_code
from hobbit_jax.synthetic_tasks.drawing import Split, draw, paragraphs

_MIN_TESTS = 5


@dataclass(frozen=True)
class Problem:
    """One function; `prompt + solution` is the training document.

    `tests` are pairs of arguments and expected value. `content` is the body with its arguments
    numbered, so without names and wording; it decides the split.
    """

    prompt: str
    solution: str
    name: str
    tests: tuple[tuple[tuple[Any, ...], Any], ...]
    content: str


class Step(NamedTuple):
    """Value to value: code over {v}, how a result is described, and the step as an order."""

    code: str
    text: str
    order: str


class Check(NamedTuple):
    """Value to bool: code over {v}, the verb phrase, and what many values that pass are called."""

    code: str
    text: str
    many: str


class End(NamedTuple):
    """What values are measured by: code over {v}, or over {0} and {1}, and the noun phrase."""

    code: str
    text: str


class Fold(NamedTuple):
    """What a list is folded into: code over a generator {g}, and two wordings over {many}."""

    code: str
    doc: str
    other_doc: str


PieceT = TypeVar("PieceT", Step, Check, End, Fold)


# Names of the tables in `function_pieces.txt`, whose further lines are a piece each. In all of them
# {k} is a constant 2..9, {n} a length 2..5, {c} a letter a..e, {d} a separator.
_TABLES = {name: lines for name, *lines in paragraphs("function_pieces.txt")}


def _table(kind: type[PieceT], name: str) -> list[PieceT]:
    return [kind(*line.split(" | ")) for line in _TABLES[name]]


INT_STEPS, INT_CHECKS = _table(Step, "int steps"), _table(Check, "int checks")
INT_PAIRS = _table(End, "int pairs")
STR_STEPS, STR_CHECKS = _table(Step, "str steps"), _table(Check, "str checks")
STR_COUNTS, STR_FACTS = _table(End, "str counts"), _table(End, "str facts")
LIST_STEPS, LIST_ENDS = _table(Step, "list steps"), _table(End, "list ends")
NUMBER_FOLDS, WORD_FOLDS = _table(Fold, "number folds"), _table(Fold, "word folds")

_NAMES = {
    "int": (("x",), ("n",), ("a",), ("num",), ("value",)),
    "int int": (("x", "y"), ("a", "b"), ("m", "n"), ("p", "q")),
    "str": (("s",), ("text",), ("word",), ("string",), ("t",)),
    "list": (("xs",), ("nums",), ("values",), ("numbers",), ("data",)),
    "words": (("words",), ("names",), ("strings",), ("texts",)),
}
_TITLES = {
    "int": ("f", "compute", "convert", "change_number", "solve", "apply_rule"),
    "int int": ("f", "combine", "merge", "solve", "pair_value", "compute"),
    "str": ("f", "edit", "change_text", "solve", "format_text", "convert"),
    "list": ("f", "process", "pick", "solve", "reduce_list", "collect"),
    "words": ("f", "process", "pick_words", "solve", "edit_words", "collect"),
}
# Of functions of one argument. Empty, one item, negatives, repeats, and enough length for every
# slice: measured by changing one piece of a reference, of which 0.3 % passes without being
# equivalent.
_VALUES = {
    "int": (*range(-20, 21), 24, 27, 35, 63, -49),
    "str": (
        *("", "a", "abcde", "Banana bread", "decade", "EBBED cab", "eagle", "cabbage-bead"),
        "cbadeeabdcb",
    ),
    "list": (
        *([], [0], [7], [-4], [12, 12], [3, -1, 4, 1, -5, 9, 2, 6], [2, 4, 6, 8, 10, 12, 14]),
        *([-9, -8, -3, -2, -6, -7], [5, 5, 5, 0, -5, 5, 3], [10, 3, 7, 12, 15, 20, 21, -14]),
        *([1, 9, 2, 8, 3, 7, 4, 6, 5], [63, 40, -35, 71, 16, 27, 6], list(range(9, -10, -1))),
        *([k] for k in range(1, 11)),
    ),
    "words": (
        *([], ["a"], ["Bob", "apple", "cab", "date", "eel"], ["", "dd", "ace"]),
        *(["bed", "decade", "Ace", "cc", "ebbed"], ["beads", "cabbage", "dad", "d", "banana"]),
        *(["eca", "deca", "cabdea", "ba"], ["dec", "cadebac", "ebc", "bc"], ["ceded", "cd"]),
        *(["ebdcab", "acdeb", "cb"], ["cbdae", "abcdee", "de"], ["db", "dcd", "ac", "ae", "bd"]),
    ),
}
INPUTS = {
    "int int": ((0, 0), (1, 2), (2, 1), (-3, 4), (5, -7), (-6, -2), (9, 9), (12, 5), (17, -40)),
    **{name: tuple((value,) for value in values) for name, values in _VALUES.items()},
}


@dataclass(frozen=True)
class _Program:
    """A function before it is named: {0}, {1} stand for its arguments."""

    signature: str
    body: str
    docs: tuple[str, ...]


def _fill(rng: random.Random, piece: PieceT) -> PieceT:
    """The piece with its constants drawn, the same ones in all its texts."""
    constants = {
        "{k}": str(rng.randrange(2, 10)),
        "{n}": str(rng.randrange(2, 6)),
        "{c}": rng.choice("abcde"),
        "{d}": rng.choice("-+/_."),
    }
    for hole, constant in constants.items():
        piece = type(piece)(*(text.replace(hole, constant) for text in piece))
    return piece


def _pick(rng: random.Random, pieces: Sequence[PieceT]) -> PieceT:
    return _fill(rng, rng.choice(pieces))


def _pick_two(rng: random.Random, pieces: Sequence[PieceT]) -> tuple[PieceT, PieceT]:
    """Two different pieces; the same one twice would mostly be one piece, oddly worded."""
    first = rng.randrange(len(pieces))
    second = (first + rng.randrange(1, len(pieces))) % len(pieces)
    return _fill(rng, pieces[first]), _fill(rng, pieces[second])


_ATOMS = (ast.Name, ast.Call, ast.Subscript, ast.List, ast.Set)


def _on(template: str, operand: str) -> str:
    """The template applied to an operand, in parentheses where precedence may need them."""
    # Arguments are still {0} here, which Python reads as a set display: an atom, like a name.
    is_atom = isinstance(ast.parse(operand, mode="eval").body, _ATOMS)
    bare = is_atom or "({v})" in template or "({v}, " in template
    return template.replace("{v}", operand if bare else f"({operand})")


def _orders(first: str, second: str) -> str:
    return f"{first[0].upper()}{first[1:]}, then {second}."


def _plain(signature: str, end: End, verb: str) -> _Program:
    """What the arguments are measured by, by itself."""
    code, text = (part.replace("{v}", "{0}") for part in end)
    verb = "Check" if text.startswith("whether") else verb
    return _Program(signature, f"return {code}", (f"Return {text}.", f"{verb} {text}."))


def _then_step(signature: str, end: End, step: Step) -> _Program:
    """What the arguments are measured by, then a step."""
    code, text = (part.replace("{v}", "{0}") for part in end)
    docs = (
        f"Return {text}, then {step.text}.",
        f"Compute {text}, then {step.order.replace('{v}', 'it')}.",
    )
    return _Program(signature, f"return {_on(step.code, code)}", docs)


def _then_end(signature: str, step: Step, end: End) -> _Program:
    """An argument after a step, measured."""
    code, text = end
    docs = (
        f"Return {text.replace('{v}', '{0} ' + step.text)}.",
        _orders(step.order.replace("{v}", "{0}"), "return " + text.replace("{v}", "it")),
    )
    return _Program(signature, f"return {_on(code, _on(step.code, '{0}'))}", docs)


def _one_value(rng: random.Random, signature: str, steps: Sequence[Step]) -> _Program:
    """One step, or two one after the other, on one argument."""
    first, second = _pick_two(rng, steps)
    done = _on(first.code, "{0}")
    order = first.order.replace("{v}", "{0}")
    if rng.randrange(4) == 0:
        docs = (f"Return {{0}} {first.text}.", f"{order[0].upper()}{order[1:]}.")
        return _Program(signature, f"return {done}", docs)
    then = second.order.replace("{v}", "it")
    docs = (
        f"Return {{0}} {first.text}, then {second.text}.",
        _orders(order, then),
        f"Take {{0}}, {first.order.replace('{v}', 'it')}, then {then}.",
    )
    return _Program(signature, f"return {_on(second.code, done)}", docs)


def _int_pair(rng: random.Random) -> _Program:
    """Two arguments combined, then perhaps a step; or a linear form."""
    pair = rng.choice(INT_PAIRS)
    case = rng.randrange(4)
    if case == 0:
        left, right = rng.randrange(2, 10), rng.randrange(2, 10)
        sign, word = rng.choice((("+", "plus"), ("-", "minus")))
        docs = (
            f"Return {left} times {{0}} {word} {right} times {{1}}.",
            f"Compute {left} times {{0}}, {word} {right} times {{1}}.",
        )
        return _Program("int int", f"return {left} * {{0}} {sign} {right} * {{1}}", docs)
    if case == 1:
        return _plain("int int", pair, "Compute")
    return _then_step("int int", pair, _pick(rng, INT_STEPS))


def _int_branch(rng: random.Random) -> _Program:
    """One step if a check holds, otherwise another step or nothing."""
    check = _pick(rng, INT_CHECKS)
    yes, no = _pick_two(rng, (*INT_STEPS, Step("{v}", "unchanged", "keep {v}")))
    body = (
        f"if {_on(check.code, '{0}')}:\n        return {_on(yes.code, '{0}')}\n"
        f"    return {_on(no.code, '{0}')}"
    )
    orders = [step.order.replace("{v}", "{0}") for step in (yes, no)]
    docs = (
        f"Return {{0}} {yes.text} if {{0}} {check.text}, otherwise {{0}} {no.text}.",
        f"If {{0}} {check.text}, {orders[0]}, otherwise {orders[1]}.",
    )
    return _Program("int", body, docs)


def _int_checks(rng: random.Random) -> _Program:
    """One check, or two joined by and / or."""
    first, second = _pick_two(rng, INT_CHECKS)
    body, text = _on(first.code, "{0}"), first.text
    if rng.randrange(4):
        joint = rng.choice(("and", "or"))
        body += f" {joint} {_on(second.code, '{0}')}"
        text += f" {joint} {second.text}"
    docs = (f"Return whether {{0}} {text}.", f"Check if {{0}} {text}.")
    return _Program("int", f"return {body}", docs)


def _str_measure(rng: random.Random) -> _Program:
    """A count or a fact of a string: plain, after a step, or a count with arithmetic on it."""
    case = rng.randrange(4)
    if case == 0:
        return _plain("str", _pick(rng, STR_COUNTS + STR_FACTS), "Compute")
    if case == 1:
        return _then_step("str", _pick(rng, STR_COUNTS), _pick(rng, INT_STEPS[:5]))
    return _then_end("str", _pick(rng, STR_STEPS), _pick(rng, STR_COUNTS + STR_FACTS))


def _list_measure(rng: random.Random) -> _Program:
    """One value out of a list, after a slice or a sort, or plain."""
    end = _pick(rng, LIST_ENDS)
    if rng.randrange(4) == 0:
        return _plain("list", end, "Find")
    return _then_end("list", _pick(rng, LIST_STEPS), end)


class Items(NamedTuple):
    """What a list has, and what can be done to it."""

    signature: str
    item: str  # its name in a comprehension
    noun: str
    checks: Sequence[Check]
    steps: Sequence[Step]
    folds: Sequence[Fold]


_NUMBERS = Items("list", "x", "number", INT_CHECKS, INT_STEPS, NUMBER_FOLDS)
_WORDS = Items("words", "w", "word", STR_CHECKS, STR_STEPS, WORD_FOLDS)


def _folded(rng: random.Random, items: Items) -> _Program:
    """Filter x map x fold over a list, as a comprehension."""
    case = rng.randrange(3)  # filter, map, or both
    check = _pick(rng, items.checks) if case != 1 else None
    step = _pick(rng, items.steps) if case != 0 else None
    item = items.item
    generator = f"{_on(step.code, item) if step else item} for {item} in {{0}}"
    many = f"{check.many if check else f'{items.noun}s'} in {{0}}"
    if check:
        generator += f" if {_on(check.code, item)}"
    if step:
        many += f", each {step.text}"
    code, *docs = _pick(rng, items.folds)
    docs = tuple(doc.replace("{many}", many) for doc in docs)
    return _Program(items.signature, f"return {code.replace('{g}', generator)}", docs)


def _quantified(rng: random.Random) -> _Program:
    """Count, any and all over a list of numbers or words."""
    signature, item, noun, checks, *_ = rng.choice((_NUMBERS, _WORDS))
    check = _pick(rng, checks)
    code = _on(check.code, item)
    case = rng.randrange(3)
    if case == 0:
        body = f"len([{item} for {item} in {{0}} if {code}])"
        docs = (f"Return how many {check.many} are in {{0}}.", f"Count the {check.many} in {{0}}.")
    else:
        name, word = (("any", "any"), ("all", "every"))[case - 1]
        body = f"{name}({code} for {item} in {{0}})"
        asked = f"{word} {noun} in {{0}} {check.text}."
        docs = (f"Return whether {asked}", f"Check if {asked}")
    return _Program(signature, f"return {body}", docs)


_INT_STEPS = partial(_one_value, signature="int", steps=INT_STEPS)
_STR_STEPS = partial(_one_value, signature="str", steps=STR_STEPS)
_LIST_STEPS = partial(_one_value, signature="list", steps=LIST_STEPS)
_NUMBER_FOLD, _WORD_FOLD = partial(_folded, items=_NUMBERS), partial(_folded, items=_WORDS)
# A family occurs as often as it stands here.
FAMILIES = (
    *(_INT_STEPS, _int_pair, _int_branch, _int_branch, _int_checks),
    *(_STR_STEPS, _STR_STEPS, _str_measure, _LIST_STEPS, _list_measure),
    *(_NUMBER_FOLD, _NUMBER_FOLD, _NUMBER_FOLD, _WORD_FOLD, _WORD_FOLD, _quantified),
)


def _tests(source: str, name: str, signature: str) -> tuple[tuple[tuple[Any, ...], Any], ...]:
    """Arguments and expected values of our own reference; inputs on which it raises are left out"""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    tests = []
    for args in INPUTS[signature]:
        try:
            tests.append((args, namespace[name](*args)))
        except IndexError:  # an index into a list too short for it
            continue
    return tuple(tests)


def _make(rng: random.Random) -> Problem | None:
    program = rng.choice(FAMILIES)(rng)
    names = rng.choice(_NAMES[program.signature])
    title = rng.choice(_TITLES[program.signature])
    doc = rng.choice(program.docs).format(*names)
    prompt = f'def {title}({", ".join(names)}):\n    """{doc}"""\n'
    solution = f"    {program.body.format(*names)}\n"
    tests = _tests(prompt + solution, title, program.signature)
    expected = [value for _, value in tests]
    # A function that is constant on its tests would be solved by that constant.
    if len(tests) < _MIN_TESTS or all(value == expected[0] for value in expected):
        return None
    return Problem(prompt, solution, title, tests, program.body)


def generate(seed: int, count: int, split: Split) -> list[Problem]:
    """`count` problems of one split, the same for a seed on every platform and Python.

    Raises:
      ValueError: unknown split, or more held-out problems wanted than the grammar has.
    """
    return draw(_make, seed, count, split)


def score(problem: Problem, completion: str, timeout_s: float = 2.0) -> bool:
    """Whether the completed function gives the expected value, by value and type, on every test.

    Endless loops (after `timeout_s` seconds), exceptions, exits, too much memory and whatever else
    the code runner refuses are all False. As in HumanEval's `check_correctness` (Chen et al. 2021),
    each candidate has a process of its own, so it cannot affect the verdict on another; but it is
    not told the expected values, and the comparison happens here.
    """
    # Cut at the first line that starts at column 0.
    body = takewhile(lambda line: not line or line[0].isspace(), completion.split("\n"))
    source = problem.prompt + "\n".join(body) + "\n"
    calls = [(problem.name, arguments) for arguments, _ in problem.tests]
    expected = repr([value for _, value in problem.tests])
    outcome = run_code(source, calls, timeout_s=timeout_s, most_bytes=len(expected.encode()))
    return outcome.status == "finished" and outcome.detail == expected
