"""The flags that say which text a script works on, and the token ids that it becomes.

Source: llama.cpp's `--prompt`, `--file` and chat mode.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import flags

from hobbit_jax.model_file.chat_template import ChatTemplate
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.model_file.tokenizer import Tokenizer


class PromptFlags:
    """`--prompt`, `--prompt_file` and `--chat`; made once, before flags are parsed."""

    def __init__(self):
        own: dict[str, Any] = {
            "module_name": sys.argv[0]
        }  # as absl calls the module that runs: --help lists them
        self._prompt = flags.DEFINE_string("prompt", None, "Text to work on.", **own)
        self._file = flags.DEFINE_string(
            "prompt_file",
            None,
            "File with the text, in UTF-8, in place of --prompt; - is standard input. One newline "
            "at its end is left out.",
            **own,
        )
        self._chat = flags.DEFINE_bool(
            "chat",
            False,
            "Whether the text is a user's message in the file's own chat template.",
            **own,
        )

    def text(self) -> str:
        """The text that is asked for.

        Raises:
            ValueError: none or two are, or it cannot be read as UTF-8; names the flag.
        """
        prompt, path = self._prompt.value, self._file.value
        if path is not None and prompt is None:
            text = _utf8(_read(path), f"--prompt_file: {path}")
            return text.removesuffix("\n").removesuffix("\r")
        if prompt is None or path is not None:
            raise ValueError("want one of --prompt and --prompt_file, which say what to work on")
        # What is no UTF-8 on a command line arrives as half surrogates.
        return _utf8(prompt.encode(errors="surrogateescape"), "--prompt")

    def encode(self, text: str, file: GGUFFile, tokenizer: Tokenizer) -> list[int]:
        """Token ids of `text`, as a user's message with --chat; at least one.

        Raises:
            ValueError: there is no text, or the file's chat template fails or is missing.
        """
        if self._chat.value:
            template = ChatTemplate.from_gguf(file, tokenizer)
            text = template.render([{"role": "user", "content": text}])
        ids = tokenizer.encode(text)
        if not ids:
            raise ValueError("the prompt is empty; this model needs at least one token to continue")
        return ids


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text (byte {error.start})") from None


def _read(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--prompt_file: {path} cannot be read ({reason})") from error
