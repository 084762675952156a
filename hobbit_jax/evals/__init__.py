"""The room that measures: quality against native logits, tasks, and the cost of decode.

`quality` compares distributions token by token, `tasks` scores what a model writes, `measure` times
decode and counts bytes. `benchmarks` runs lm-eval on an engine and alone needs the `eval` extra.
"""
