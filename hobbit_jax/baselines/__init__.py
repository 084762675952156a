"""The same model elsewhere: PyTorch and llama.cpp beside our engine, on the same tokens.

Read in this order: `child` (what every program compared must do, and the process that does it), one
file a program (`ours`; `pytorch` with `hugging_face`; `llama`), `comparison`.
"""
