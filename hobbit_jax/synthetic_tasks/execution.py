"""Runs completions of `functions` and decides which are right.

Owns the cut of a completion and the verdict. The programs run in `hobbit_jax.code_runner`. The
manner follows HumanEval's `check_correctness` (Chen et al. 2021), with one difference: the child is
told the arguments but not the expected values, and the comparison happens here. Each candidate has
a process of its own, so it cannot affect the verdict on another.
"""

from itertools import takewhile

from hobbit_jax.code_runner import run_code
from hobbit_jax.synthetic_tasks.functions import Problem


def score(problem: Problem, completion: str, timeout_s: float = 2.0) -> bool:
    """Whether the completed function gives the expected value, by value and type, on every test.

    Endless loops (after `timeout_s` seconds), exceptions, exits, too much memory and whatever
    else the code runner refuses are all False.
    """
    # Cut at the first line that starts at column 0.
    body = takewhile(lambda line: not line or line[0].isspace(), completion.split("\n"))
    source = problem.prompt + "\n".join(body) + "\n"
    calls = [(problem.name, arguments) for arguments, _ in problem.tests]
    expected = repr([value for _, value in problem.tests])
    outcome = run_code(source, calls, timeout_s=timeout_s, most_bytes=len(expected.encode()))
    return outcome.status == "finished" and outcome.detail == expected
