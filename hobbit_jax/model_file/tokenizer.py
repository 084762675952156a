"""Text to token ids and back, the same ids as llama.cpp for the same file.

Owns the vocabulary: where special tokens stand in a text, the rules of how a text
begins (BOS) and where a generation ends (EOG), and decoding without broken characters.

Source: llama.cpp, src/llama-vocab.cpp; byte-level merging is done by Hugging Face `tokenizers`.
Two differences to Hugging Face's own tokenizer of the same model are llama.cpp's: text is not
normalised (no NFC), and special tokens never swallow the spaces beside them. One difference to
llama.cpp: a text that begins with BOS gets no second one.
"""

import codecs
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from absl import logging
from gguf import TokenType
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as _LibraryTokenizer

from hobbit_jax.model_file import metadata
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.model_file.pre_tokenizers import EXPRESSIONS, WHOLE_WORDS, WHOLE_WORDS_AND_BOS
from hobbit_jax.model_file.sentencepiece import SPACE, SentencePieceBPE
from hobbit_jax.model_file.special_tokens import ROLES, find_special_tokens

T = TypeVar("T")

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = sorted({*range(256)} - _PRINTABLE)
# GPT-2's table: printable Latin-1 stands for itself, the other bytes for U+0100 upwards.
BYTE_CHARACTERS = [chr(b if b in _PRINTABLE else 0x100 + _OTHERS.index(b)) for b in range(256)]
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_GEMMA_LINES = re.compile(r"\n+|[^\n]+")


class Tokenizer:
    """One file's tokenizer, from its `tokenizer.ggml.*`.

    Warns, once for a file, of what makes its ids other than the model's.

    Attributes:
        add_bos: whether the file wants texts to begin with BOS.
        bos_id, eos_id: ids of beginning and end of text; None where the file names none.
        eog_ids: ids that end a generation, ascending (`special_tokens.py`).

    Raises:
        ValueError: a key is missing or of another type, a token stands twice, a list is short.
        NotImplementedError: another tokenizer model or pre-tokeniser.
    """

    def __init__(self, file: GGUFFile):
        model = file.read("tokenizer.ggml.model", metadata.text())
        if model not in _ENCODERS:
            raise NotImplementedError(
                f"{file.paths[0]}: tokenizer.ggml.model is {metadata.shown(model)}; supported are "
                "'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE) and 'gemma4' (BPE of "
                "characters)"
            )
        vocabulary = _vocabulary(file)
        tokens = list(vocabulary)
        any_integers = metadata.integers(-(2**31))
        types = _one_each(file, "tokenizer.ggml.token_type", any_integers, 1, len(tokens))
        self._encode_piece, defaults = _ENCODERS[model](file, vocabulary, types)
        token_id = metadata.integer(0, len(tokens) - 1)
        ids = {
            role: file.read(f"tokenizer.ggml.{role}_token_id", token_id, defaults.get(role))
            for role in ROLES
        }
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        add_bos = file.read("tokenizer.ggml.add_bos_token", metadata.flag(), defaults["add_bos"])
        self.add_bos = add_bos or model == "gemma4"  # whatever the file says, as llama.cpp has it
        if self.add_bos and self.bos_id is None:
            raise ValueError(
                f"{file.paths[0]}: the file wants text to begin with BOS but has no "
                "tokenizer.ggml.bos_token_id; convert the model again"
            )
        special = find_special_tokens(vocabulary, types, ids)
        if special.overridden:
            names = ", ".join(repr(tokens[token]) for token in special.overridden)
            _warn(
                f"{file.paths[0]}: {names} should be control tokens by name, but the file does not "
                "type them so; they are taken as control tokens, as in llama.cpp, and where their "
                "text stands in a prompt it becomes the token"
            )
        types, self.eog_ids = special.types, special.eog_ids
        space_prefix = file.read("tokenizer.ggml.add_space_prefix", metadata.flag(), True)
        self._space_prefix = space_prefix and model == "llama"
        self._sentencepiece = model in ("llama", "gemma4")
        self._bytes = _token_bytes(tokens, types, self._sentencepiece)
        # llama.cpp looks for the longest first, by their bytes; an empty one would be everywhere.
        named = [(t, i) for i, t in enumerate(tokens) if t and types[i] in _SPECIAL]
        self._special = sorted(named, key=lambda pair: -len(pair[0].encode()))
        hidden = (TokenType.CONTROL, TokenType.UNKNOWN)
        self._hidden_ids = frozenset(i for i, kind in enumerate(types) if kind in hidden)

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for in text, int64 [V]; 0 for control tokens."""
        return np.asarray(
            [0 if i in self._hidden_ids else len(piece) for i, (piece, _) in enumerate(self._bytes)]
        )

    def encode(
        self, text: str, add_bos: bool | None = None, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`; no end-of-text id is ever added.

        Args:
          text: any string; it is not normalised.
          add_bos: whether the ids begin with `bos_id`; None does what the file says. A text that
            itself begins with BOS, such as a chat template's, gets no second one.
          parse_special: whether the text of a control token (`<|im_start|>`) becomes that token.
            User-defined tokens are recognised either way, as in llama.cpp.

        Raises:
          ValueError: BOS is asked for and the file has none, or `text` holds half a surrogate
            pair, which has no UTF-8 (a UnicodeEncodeError, which is a ValueError).
        """
        text.encode()  # the library would answer with a TypeError about something else
        ids, after_special = [], True
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += self._encode_plain(fragment, after_special)
            after_special = isinstance(fragment, int)
        if not (self.add_bos if add_bos is None else add_bos):
            return ids
        if self.bos_id is None:
            raise ValueError("add_bos=True, but the file has no tokenizer.ggml.bos_token_id")
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        The inverse of `encode`: the space that a SentencePiece model puts in front of a text
        (and after a special token) is taken away again.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        pieces = self._pieces(ids, skip_special, after_special=True)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of generated ids, one string per id, for printing as they come.

        Control tokens have none. Bytes of an unfinished character are held back until it is
        complete (the string is then empty); what is incomplete at the end becomes U+FFFD. The ids
        continue a text, so a leading space is kept.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for piece in self._pieces(ids, skip_special=True, after_special=False):
            yield decoder.decode(piece)
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """`text` cut at its special tokens: their ids, and the texts between them."""
        fragments: list[str | int] = [text] if text else []
        for special, token in self._special:
            if special not in text or (token in self._hidden_ids and not parse_special):
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                for index, part in enumerate(fragment.split(special)):
                    cut += ([token] if index else []) + ([part] if part else [])
            fragments = cut
        return fragments

    def _encode_plain(self, text: str, after_special: bool) -> list[int]:
        if self._sentencepiece:
            if after_special and self._space_prefix:
                text = " " + text
            text = text.replace(" ", SPACE)
        return self._encode_piece(text)

    def _pieces(
        self, ids: Iterable[int], skip_special: bool, after_special: bool
    ) -> Iterator[bytes]:
        for token in ids:
            if not 0 <= token < len(self._bytes):
                raise ValueError(f"token id {token}, expected 0 to {len(self._bytes) - 1}")
            piece, kind_special = self._bytes[token]
            if kind_special:
                yield b"" if skip_special and token in self._hidden_ids else piece
            else:
                strip = after_special and self._space_prefix
                yield piece.removeprefix(b" ") if strip else piece
            after_special = kind_special


def _vocabulary(file: GGUFFile) -> dict[str, int]:
    """The id of each token, in the order of ids."""
    vocabulary: dict[str, int] = {}
    for i, named in enumerate(file.read("tokenizer.ggml.tokens", metadata.texts(least=1))):
        # Empty ones get llama.cpp's names for them, so that several can be told apart.
        if vocabulary.setdefault(token := named or f"[EMPTY_{i}]", i) != i:
            raise ValueError(
                f"{file.paths[0]}: token {metadata.shown(token)} appears twice, expected once"
            )
    return vocabulary


def _one_each(
    file: GGUFFile, key: str, kind: metadata.Kind[list[T]], default: T, wanted: int
) -> list[T]:
    """One value for each of the `wanted` tokens; more are left out, as llama.cpp does."""
    values = file.read(key, kind, [default] * wanted)
    if len(values) < wanted:
        raise ValueError(
            f"{file.paths[0]}: {key} has {len(values)} entries, expected one for each of the "
            f"{wanted} tokens"
        )
    return values[:wanted]


@functools.cache
def _warn(text: str) -> None:
    """Says `text` on stderr, once however often a file's tokenizer is made."""
    logging.warning("%s", text)


def _byte_level(
    file: GGUFFile, vocabulary: dict[str, int], _types: list[int]
) -> tuple[Callable[[str], list[int]], dict[str, Any]]:
    """Byte-level BPE behind the pre-tokeniser of the file, and what such files default to."""
    pre = file.read("tokenizer.ggml.pre", metadata.text(), "")
    if not pre:
        _warn(
            f"{file.paths[0]}: tokenizer.ggml.pre is missing, so text is split by llama.cpp's "
            "'default' rule; where the model was trained with another, numbers and punctuation get "
            "other token ids than in training and answers are worse; convert the model again"
        )
        pre = "default"
    if pre not in EXPRESSIONS:
        raise NotImplementedError(
            f"{file.paths[0]}: tokenizer.ggml.pre is {metadata.shown(pre)}; supported are "
            f"{', '.join(EXPRESSIONS)}"
        )
    pairs = _merges(file, vocabulary)
    begins = pre in WHOLE_WORDS_AND_BOS
    whole_words = begins or pre in WHOLE_WORDS
    library = _LibraryTokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in EXPRESSIONS[pre]]
    to_byte_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_byte_characters])
    return lambda text: library.encode(text, add_special_tokens=False).ids, {"add_bos": begins}


def _of_characters(
    file: GGUFFile, vocabulary: dict[str, int], _types: list[int]
) -> tuple[Callable[[str], list[int]], dict[str, Any]]:
    """Gemma 4's BPE, which merges characters and not bytes, line by line; a run of newlines that is
    a token is that token, and what has no token is spelt in bytes."""
    _byte_ids(file, vocabulary)  # refuses a file in which a byte cannot be spelt
    pairs = _merges(file, vocabulary)
    library = _LibraryTokenizer(models.BPE(vocabulary, pairs, byte_fallback=True))

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for line in _GEMMA_LINES.findall(text):
            if line[0] == "\n" and line in vocabulary:
                ids.append(vocabulary[line])
            else:
                ids += library.encode(line, add_special_tokens=False).ids
        return ids

    return encode, {"add_bos": True}


def _byte_ids(file: GGUFFile, vocabulary: dict[str, int]) -> list[int]:
    """Ids of `<0x00>` to `<0xFF>`."""
    for name in (names := [f"<0x{byte:02X}>" for byte in range(256)]):
        if name not in vocabulary:
            raise ValueError(
                f"{file.paths[0]}: token {name!r} is missing, expected one for each byte; convert "
                "the model again"
            )
    return [vocabulary[name] for name in names]


def _merges(file: GGUFFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that are merged, the first first."""
    merges = file.read("tokenizer.ggml.merges", metadata.texts())
    # From the second character on: the left part may itself be a space. Of equal merges the first
    # rank counts, as in llama.cpp; the library would take the last.
    pairs = list(
        dict.fromkeys((m[:cut], m[cut + 1 :]) for m in merges if (cut := m.find(" ", 1)) > 0)
    )
    for left, right in pairs:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(
                f"{file.paths[0]}: merge {metadata.shown(left + ' ' + right)} uses a token outside "
                "the vocabulary, expected all three inside; convert the model again"
            )
    return pairs


def _sentencepiece(
    file: GGUFFile, vocabulary: dict[str, int], types: list[int]
) -> tuple[Callable[[str], list[int]], dict[str, Any]]:
    """SentencePiece BPE by the file's scores, and what such files default to."""
    scores = _one_each(file, "tokenizer.ggml.scores", metadata.numbers(), 0.0, len(vocabulary))
    of_text = Counter(s for s, kind in zip(scores, types, strict=True) if kind == TokenType.NORMAL)
    if len(of_text) == 1 and of_text.total() > 1:
        _warn(
            f"{file.paths[0]}: all tokenizer.ggml.scores are equal, so pieces of a word are merged "
            "from left to right and not the most probable first; token ids are other than in "
            "training and answers are worse; convert the model again"
        )
    encoder = SentencePieceBPE(vocabulary, scores, _byte_ids(file, vocabulary))
    default_ids = {role: i for role, i in (("bos", 1), ("eos", 2)) if i < len(vocabulary)}
    return encoder.encode, {**default_ids, "add_bos": True}


# By tokenizer.ggml.model: how a text without special tokens is encoded, and what such files default
# to.
_ENCODERS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _of_characters}


def _token_bytes(
    tokens: list[str], token_types: list[int], sentencepiece: bool
) -> list[tuple[bytes, bool]]:
    """For each id its bytes, and whether it is a special token (whose text stands as it is)."""
    of_character = {character: bytes([byte]) for byte, character in enumerate(BYTE_CHARACTERS)}

    def plain(token: str) -> bytes:
        if sentencepiece:
            return token.replace(SPACE, " ").encode()
        return b"".join(of_character.get(c) or c.encode() for c in token)

    def convert(token: str, kind: int) -> bytes:
        if kind in _SPECIAL:
            return token.encode()
        if kind == TokenType.BYTE and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return b"" if kind == TokenType.UNUSED else plain(token)

    pairs = zip(tokens, token_types, strict=True)
    return [(convert(token, kind), kind in _SPECIAL) for token, kind in pairs]
