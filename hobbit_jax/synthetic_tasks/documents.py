"""Training documents of both miniature tasks, in given shares."""

from dataclasses import dataclass

from hobbit_jax.synthetic_tasks import arithmetic, functions


@dataclass(frozen=True)
class TaskMix:
    """Shares of worked problems, drills of plain facts and functions among task documents."""

    problems: float
    drills: float
    functions: float


EVEN_MIX = TaskMix(problems=0.4, drills=0.2, functions=0.4)


def task_documents(seed: int, count: int, mix: TaskMix = EVEN_MIX) -> list[str]:
    """About `count` training documents in the shares of `mix`."""
    problems = arithmetic.generate(seed, round(count * mix.problems), "train")
    programs = functions.generate(seed, round(count * mix.functions), "train")
    drills = arithmetic.drills(seed, round(count * mix.drills), "train")
    return [problem.prompt + problem.solution for problem in [*problems, *programs]] + drills
