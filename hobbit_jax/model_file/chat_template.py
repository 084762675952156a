"""Conversations to prompts, with the Jinja template that the model's own file carries.

Owns the rendering of `tokenizer.chat_template`. The environment (sandbox, whitespace rules, names
in scope) is that of Hugging Face's `apply_chat_template`, for which these templates are written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hobbit_jax.model_file import metadata
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.model_file.tokenizer import Tokenizer

_KEY = "tokenizer.chat_template"
Message = dict[str, str]


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value, **options) -> str:
    # Jinja's own filter escapes HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=False, **options)


class ChatTemplate:
    """One file's template; renders {"role", "content"} messages."""

    def __init__(self, source: str, bos_text: str, eos_text: str):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise NotImplementedError(
                f"the file's chat template has syntax that plain Jinja lacks: {error.message} "
                f"(line {error.lineno})"
            ) from error
        self._ends = {"bos_token": bos_text, "eos_token": eos_text}

    @classmethod
    def from_gguf(cls, file: GGUFFile, tokenizer: Tokenizer, name: str = "") -> ChatTemplate:
        """The file's default template, or the one it keeps under `name`.

        Raises:
            ValueError: the file has no such template; lists those it has.
            NotImplementedError: its syntax is not plain Jinja's.
        """
        key = f"{_KEY}.{name}" if name else _KEY
        source = file.read(key, metadata.text(), "")
        if not source:
            kept = [k for k in file.metadata if k.startswith(_KEY) and not k.endswith("templates")]
            raise ValueError(
                f"{file.paths[0]} has no {key}; it has {', '.join(kept) or 'no chat template'}"
            )
        texts = [
            "" if token is None else tokenizer.decode([token])
            for token in (tokenizer.bos_id, tokenizer.eos_id)
        ]
        return cls(source, *texts)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt; without a generation prompt, it ends with the last message's own text.

        A template that refuses a system message gets the conversation without it.

        Raises:
            ValueError: the template refuses the conversation, in its own words.
        """
        scope = {
            **self._ends,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(scope)
        except jinja2.TemplateError as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) < len(messages):
                return self.render(others, add_generation_prompt)
            raise ValueError(f"the file's chat template: {error.message}") from error
        return text if add_generation_prompt else _cut_after(text, messages[-1]["content"])


def _cut_after(text: str, content: str) -> str:
    """`text` up to the end of the last message, for a model that shall go on writing it."""
    at = text.rfind(content.strip())
    if at < 0:
        raise ValueError("the file's chat template changes the last message, which cannot go on")
    # A template may strip a message; what it kept is what the model goes on from.
    whole = content if text[at : at + len(content.lstrip())] == content.lstrip() else ""
    return text[: at + len(whole.lstrip() or content.strip())]
