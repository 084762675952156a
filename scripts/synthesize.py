"""Writes a model file of true shape and size with made-up weights, for measuring scale.

    python scripts/synthesize.py --preset qwen3-30b-a3b --out F.gguf [--vocab V.gguf]

Shapes, types (llama.cpp's Q4_K_M mix) and metadata are the real model's, and routing has
hot experts and repeats itself from token to token as real routing does. The text such a model
writes means nothing. 21.2 GB for qwen3.6-35b-a3b, 18.6 GB for qwen3-30b-a3b, 28.4 GB for
mixtral-8x7b, 4.2 GB for olmoe-1b-7b.
"""

from absl import flags

from hobbit_jax import cli
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.presets import PRESETS
from hobbit_jax.synthetic.synthesize import synthesize

_PRESET = flags.DEFINE_enum(
    "preset", None, list(PRESETS), "Model whose shapes are taken.", required=True
)
_OUT = flags.DEFINE_string("out", None, "GGUF file to write.", required=True)
_VOCAB = flags.DEFINE_string(
    "vocab", None, "GGUF file to take the tokenizer from; made up by default."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the weights.", 0, cli.MAX_COUNT)


def main(_):
    path = cli.output_file("out", str(_OUT.value))
    vocabulary = None
    if _VOCAB.value is not None:
        vocabulary = open_gguf(cli.input_file("vocab", _VOCAB.value))
    preset = str(_PRESET.value)
    synthesize(PRESETS[preset], preset, path, vocabulary, _SEED.value)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    cli.run(main)
