"""Prints the token ids of a text, or writes them for scripts/logits.py.

    python scripts/text_to_ids.py --model M.gguf --prompt "def fib(n):" [--chat]
    python scripts/text_to_ids.py --model M.gguf --prompt_file T.txt --out ids.npy

BOS stands in front where the file wants it, and control tokens such as <|im_start|> are recognised
in the text, as in scripts/generate.py. --out is int32 [T].
"""

from pathlib import Path

import numpy as np
from absl import flags

from hobbit_jax import cli, prompt_flags, reference
from hobbit_jax.atomic import replacing
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer

flags.adopt_module_key_flags(prompt_flags)
_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default.")
_OUT = flags.DEFINE_string("out", None, "File for the ids (.npy); printed by default.")


def main(_):
    text = prompt_flags.prompt_text()
    file = open_gguf(_MODEL.value or reference.model_path())
    ids = prompt_flags.prompt_ids(text, file, Tokenizer(file))
    if _OUT.value is None:
        print(",".join(map(str, ids)))
        return
    with replacing(Path(_OUT.value)) as partial, partial.open("wb") as out:
        np.save(out, np.asarray(ids, np.int32))


if __name__ == "__main__":
    cli.run(main)
