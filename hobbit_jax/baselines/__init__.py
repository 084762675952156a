"""The same model elsewhere: PyTorch and llama.cpp beside our engine, on the same tokens.

Read in this order: `side` (what every program compared must do, and the child process that does
it), one file a program (`ours`; `pytorch` with `hugging_face`; `llama`), `agreement` (what two
programs' logits have in common), `comparison` (both, in turns: `evals/measure.py`).
Only the file of a program imports its library, inside the child that runs it.
"""
