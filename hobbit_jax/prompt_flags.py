"""The flags that say which text a script works on, and the token ids that it becomes.

A script that imports this module has them. Source: llama.cpp's `--prompt`, `--file` and chat mode.
"""

import sys

from absl import flags

from hobbit_jax import cli
from hobbit_jax.model_file.chat_template import ChatTemplate
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.model_file.tokenizer import Tokenizer

_PROMPT = flags.DEFINE_string("prompt", None, "Text to work on.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file",
    None,
    "File with the text, in UTF-8, in place of --prompt; - is standard input. One newline at its "
    "end is left out.",
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Whether the text is a user's message in the file's own chat template."
)


def prompt_text() -> str:
    """The text that is asked for.

    Raises:
        ValueError: none or two are, or it cannot be read as UTF-8; names the flag.
    """
    prompt, path = _PROMPT.value, _PROMPT_FILE.value
    if (prompt is None) == (path is None):
        raise ValueError("want one of --prompt and --prompt_file, which say what to work on")
    if prompt is not None:
        # What is no UTF-8 on a command line arrives as half surrogates.
        return cli.utf8(prompt.encode(errors="surrogateescape"), "--prompt")
    if path == "-":
        text = cli.utf8(sys.stdin.buffer.read(), "--prompt_file: -")
    else:
        text = cli.input_text("prompt_file", str(path))
    return text.removesuffix("\n").removesuffix("\r")


def prompt_ids(text: str, file: GGUFFile, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text, as a user's message with --chat; at least one.

    Raises:
        ValueError: there is no text, or the file's chat template fails or is missing.
    """
    if _CHAT.value:
        template = ChatTemplate.from_gguf(file, tokenizer)
        text = template.render([{"role": "user", "content": text}])
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty; this model needs at least one token to continue")
    return ids
