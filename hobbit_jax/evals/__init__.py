"""The room that measures: quality against native logits, tasks, and the cost of decode.

`quality` compares distributions token by token, `tasks` scores what a model writes, `cost` times
decode and counts bytes. All of them drive an `Engine` and know nothing of sweeps. `benchmarks`
runs lm-eval on an engine (`lm_eval_model`, `lm_eval_tasks`, `responses`) and alone needs the `eval`
extra.
"""
