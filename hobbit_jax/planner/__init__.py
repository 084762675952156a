"""What to run on a GPU, before anything runs there.

Read in this order: `hardware` (GPUs), `cost_model` (seconds of a token, and every constant's
origin), `shapes` (what a model weighs), `routing` (what a text asks for), `traffic`
(what a setting moves, by replay), `candidates` (settings and the rule of choice), `plan` (the
record); `published_benchmarks` holds the model against what others report.
"""
