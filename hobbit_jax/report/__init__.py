"""The room that answers: from a sweep's rows to its decision document.

Read in this order: `results` (the types) and `read_results` (the files), `comparisons` (what
"better" means), `verdict` (the rule), `threats`, `figures`, `markdown` and `document` (the
text), `writer` (the files it leaves). No module here touches a model or imports JAX.
"""

from hobbit_jax.report.writer import write_report

__all__ = ["write_report"]
