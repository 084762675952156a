"""Conversations to prompts, with the Jinja template that the model's own file carries.

Owns the rendering of `tokenizer.chat_template`. These templates are written for Hugging Face's
`apply_chat_template`, so that its environment is built here: the sandbox, the whitespace rules, the
functions and filters, the `{% generation %}` tag, and the names in scope.

Source: transformers 5.24, utils/chat_template_utils.py.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from absl import logging
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hobbit_jax.model_file import metadata
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.model_file.tokenizer import Tokenizer

_KEY = "tokenizer.chat_template"
# Stands behind the text of a message that shall go on; its space tells whether the template trims.
_GOES_ON = "CONTINUE_FINAL_MESSAGE_TAG "
Message = dict[str, Any]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what a model has written, which matters in training only."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call, as Hugging Face's: what is set inside stays inside.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dictionaries:
    """`dict` in a template, without the ways from a type to Python's internals."""

    def __call__(self, *args, **items) -> dict:
        return dict(*args, **items)

    def fromkeys(self, *args) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in a template, which keeps no names that begin with an underscore."""

    def __init__(self, *args, **items):
        super().__init__()
        for name, value in dict(*args, **items).items():
            self[name] = value

    def __setitem__(self, name, value):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not keep {name!r}")
        super().__setitem__(name, value)


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which a prompt is not.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    extensions = [_GenerationTag, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["dict"] = _Dictionaries()
    environment.globals["namespace"] = _Namespace
    return environment


class ChatTemplate:
    """One file's template; renders {"role", "content"} messages.

    Args:
        source: the template.
        bos_text, eos_text: `bos_token` and `eos_token` in the template; None leaves them undefined.

    Raises:
        ValueError: `source` is no template.
    """

    def __init__(self, source: str, bos_text: str | None, eos_text: str | None):
        self.source = source
        ends = {"bos_token": bos_text, "eos_token": eos_text}
        self._scope = {name: text for name, text in ends.items() if text is not None}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{_reason(error)} (line {error.lineno} of it)") from error
        except Exception as error:  # of Jinja's compiler: anything, for it compiles anything
            raise ValueError(_reason(error)) from error

    @classmethod
    def from_gguf(cls, file: GGUFFile, tokenizer: Tokenizer, name: str = "") -> "ChatTemplate":
        """The file's default template, or the one it keeps under `name`.

        Raises:
            ValueError: the file has no such template; lists those it has. Or it is none.
        """
        key = f"{_KEY}.{name}" if name else _KEY
        source = file.read(key, metadata.text(), "")
        if not source:
            kept = [k for k in file.metadata if k.startswith(_KEY) and not k.endswith("templates")]
            raise ValueError(
                f"{file.paths[0]} has no {key}; it has {', '.join(kept) or 'no chat template'}"
            )
        ends = (tokenizer.bos_id, tokenizer.eos_id)
        return cls(source, *(None if end is None else tokenizer.decode([end]) for end in ends))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt; without a generation prompt, it ends with the last message's own text.

        A template that refuses a system message gets the conversation without it.

        Raises:
            ValueError: the template refuses the conversation, in its own words, or fails.
        """
        shown = [dict(message) for message in messages]
        if not add_generation_prompt:
            shown[-1]["content"] += _GOES_ON
        scope = {"messages": shown, "add_generation_prompt": add_generation_prompt, **self._scope}
        try:
            text = self._template.render(tools=None, documents=None, **scope)
        except Exception as error:  # of the file's own program: anything
            others = [message for message in messages if message["role"] != "system"]
            refused = type(error) is jinja2.TemplateError  # by raise_exception
            if refused and len(others) < len(messages):
                logging.log_first_n(
                    logging.WARNING, "%s; system messages are left out", 1, _reason(error)
                )
                return self.render(others, add_generation_prompt)
            raise ValueError(_reason(error)) from error
        return text if add_generation_prompt else _cut(text, messages[-1]["content"])


def _reason(error: Exception) -> str:
    """What failed in a template, in one line; its own words where it has refused."""
    words = " ".join(str(error).split())
    if not isinstance(error, jinja2.TemplateError) or not words:
        words = f"{type(error).__name__}: {words}"
    return f"the file's chat template: {words}"


def _cut(text: str, content: str) -> str:
    """`text` up to the mark of the message `content` that goes on."""
    at = text.rfind(_GOES_ON.strip())
    if at < 0 or content.strip() not in text:
        raise ValueError("the file's chat template changes the last message, which cannot go on")
    # A template that trims messages has also trimmed the text before the mark, as it stands now.
    return text[:at] if text.startswith(_GOES_ON, at) else text[:at].rstrip()
