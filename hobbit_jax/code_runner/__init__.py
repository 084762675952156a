"""Runs Python that a language model wrote, in a child process that can harm nothing but itself.

`runner` is the parent's side, `child` the script on the other side. Standard library only.
"""

from hobbit_jax.code_runner.runner import PROTECTIONS, Outcome, missing_protections, run_code

__all__ = ["PROTECTIONS", "Outcome", "missing_protections", "run_code"]
