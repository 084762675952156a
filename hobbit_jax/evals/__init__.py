"""The room that measures: quality against native logits, tasks, and the cost of decode.

`quality` compares distributions token by token, `tasks` scores what a model writes, `measure` times
decode and counts bytes, of any program. They know nothing of sweeps. `benchmarks`
runs lm-eval on an engine (`lm_eval_model`, `lm_eval_tasks`, `responses`) and alone needs the `eval`
extra.
"""
