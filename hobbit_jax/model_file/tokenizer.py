"""Text to token ids and back, the same ids as llama.cpp for the same file.

Owns the vocabulary: pre-tokenisers, special tokens, the beginning-of-text rule, and decoding
without broken characters. Called by the engine, the evaluations and the scripts.

Source: llama.cpp, src/llama-vocab.cpp; merging is done by Hugging Face `tokenizers`. Two
differences to Hugging Face's own tokenizer of the same model are llama.cpp's: text is not
normalised (no NFC), and special tokens never swallow the spaces beside them. One difference to
llama.cpp: which tokens are special is what the file says. llama.cpp also makes any token special
whose name looks like an end of text, such as the ordinary token `</s>` of Qwen's vocabulary.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as _LibraryTokenizer

from hobbit_jax.model_file import metadata
from hobbit_jax.model_file.gguf_file import GGUFFile

T = TypeVar("T")

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_MODERN = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _MODERN % "{1,3}"
_QWEN2 = _MODERN % ""
# A word that is a token is that token, whatever the merges say; and text begins with BOS.
_WHOLE_WORDS_AND_BOS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "jina-v5-nano",
)
# Expressions, each splitting the pieces that the one before has left, and the values of
# tokenizer.ggml.pre that llama.cpp maps to them.
_EXPRESSIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), ("default", "")),
    (
        (_GPT2,),
        (
            *("gpt-2", "phi-2", "olmo", "mpt", "jais", "jina-es", "jina-de", "jina-v2-es"),
            *("jina-v2-de", "gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4", "trillion"),
            "granite-docling",
        ),
    ),
    (
        (r"\p{N}", _GPT2),
        (
            *("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"),
            "mellum2",
        ),
    ),
    (
        (_QWEN2,),
        (
            *("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo", "f2llmv2", "hunyuan"),
            "solar-open",
        ),
    ),
    ((_LLAMA3,), (*_WHOLE_WORDS_AND_BOS, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe")),
)
_PRE_TOKENIZERS = {name: expressions for expressions, names in _EXPRESSIONS for name in names}


class Tokenizer:
    """One file's tokenizer; immutable after `from_gguf`."""

    def __init__(
        self,
        library: _LibraryTokenizer,
        tokens: list[str],
        token_types: list[int],
        *,
        sentencepiece: bool,
        space_prefix: bool,
        add_bos: bool,
        bos_id: int | None,
        eos_id: int | None,
    ):
        self._library = library
        self._bytes = _token_bytes(tokens, token_types, sentencepiece)
        self._sentencepiece = sentencepiece
        self._space_prefix = space_prefix
        self._special_ids = {t: i for i, t in enumerate(tokens) if _is_special(token_types[i])}
        hidden = {i for i, kind in enumerate(token_types) if kind in (_CONTROL, _UNKNOWN)}
        self._hidden_ids = frozenset(hidden)
        self._all_specials = _alternation(self._special_ids)
        self._user_defined = _alternation(
            t for t, i in self._special_ids.items() if i not in hidden
        )
        self.add_bos = add_bos
        self.bos_id = bos_id
        self.eos_id = eos_id

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Builds the tokenizer from `tokenizer.ggml.*`.

        Raises:
          ValueError: a key is missing or of another type, a token stands twice, a list is short.
          NotImplementedError: another tokenizer model or pre-tokeniser.
        """
        model = file.read("tokenizer.ggml.model", metadata.text())
        if model not in ("gpt2", "llama"):
            raise NotImplementedError(
                f"{file.paths[0]}: tokenizer.ggml.model is {metadata.shown(model)}; supported are "
                "'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
            )
        tokens = _named_tokens(file.read("tokenizer.ggml.tokens", metadata.texts(least=1)))
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens):
            first = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
            raise ValueError(
                f"{file.paths[0]}: token {metadata.shown(first)} appears twice, expected once"
            )
        token_types = file.read(
            "tokenizer.ggml.token_type", metadata.integers(-(2**31)), [_NORMAL] * len(tokens)
        )
        token_types = _one_each(file, "tokenizer.ggml.token_type", token_types, len(tokens))
        if model == "llama":
            scores = file.read("tokenizer.ggml.scores", metadata.numbers(), [0.0] * len(tokens))
            scores = _one_each(file, "tokenizer.ggml.scores", scores, len(tokens))
            library = _sentencepiece_library(file, vocabulary, scores)
            pre, defaults = "default", {"bos": 1, "eos": 2, "add_bos": True}
        else:
            pre = file.read("tokenizer.ggml.pre", metadata.text(), "default")
            merges = file.read("tokenizer.ggml.merges", metadata.texts())
            library = _byte_level_library(file, vocabulary, merges, pre)
            defaults = {"add_bos": pre in _WHOLE_WORDS_AND_BOS}
        token_id = metadata.integer(0, len(tokens) - 1)
        ids = {
            role: file.read(f"tokenizer.ggml.{role}_token_id", token_id, defaults.get(role))
            for role in ("bos", "eos")
        }
        add_bos = file.read("tokenizer.ggml.add_bos_token", metadata.flag(), defaults["add_bos"])
        if add_bos and ids["bos"] is None:
            raise ValueError(
                f"{file.paths[0]}: the file wants text to begin with BOS but has no "
                "tokenizer.ggml.bos_token_id; convert the model again"
            )
        space_prefix = file.read("tokenizer.ggml.add_space_prefix", metadata.flag(), True)
        return cls(
            library,
            tokens,
            token_types,
            sentencepiece=model == "llama",
            space_prefix=model == "llama" and space_prefix,
            add_bos=add_bos,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special and unused ones included."""
        return len(self._bytes)

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
          add_bos: whether the ids begin with `bos_id`; None does what the file says.
          parse_special: whether the text of a control token (`<|im_start|>`) becomes that token.
            User-defined tokens are recognised either way, as in llama.cpp.

        Raises:
          ValueError: BOS is asked for and the file has none, or `text` holds half a surrogate
            pair, which has no UTF-8 (a UnicodeEncodeError, which is a ValueError).
        """
        text.encode()  # the library would answer with a TypeError about something else
        ids = []
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise ValueError("add_bos=True, but the file has no tokenizer.ggml.bos_token_id")
            ids.append(self.bos_id)
        pattern = self._all_specials if parse_special else self._user_defined
        position, after_special = 0, True
        for match in pattern.finditer(text) if pattern else ():
            if match.start() > position:
                ids += self._encode_plain(text[position : match.start()], after_special)
            ids.append(self._special_ids[match.group()])
            position, after_special = match.end(), True
        if position < len(text):
            ids += self._encode_plain(text[position:], after_special)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        The inverse of `encode`: the space that a SentencePiece model puts in front of a text
        (and after a special token) is taken away again.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        pieces = self._pieces(ids, skip_special, after_special=True)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int], skip_special: bool = True) -> Iterator[str]:
        """Yields the text of generated ids, one string per id, for printing as they come.

        Bytes of an unfinished character are held back until it is complete (the string is then
        empty); what is incomplete at the end becomes U+FFFD. The ids continue a text, so a
        leading space is kept.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for piece in self._pieces(ids, skip_special, after_special=False):
            yield decoder.decode(piece)
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _encode_plain(self, text: str, after_special: bool) -> list[int]:
        if self._sentencepiece:
            if after_special and self._space_prefix:
                text = " " + text
            text = text.replace(" ", _SPACE)
        return self._library.encode(text, add_special_tokens=False).ids

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


def _named_tokens(tokens: list[str]) -> list[str]:
    """Empty tokens get the names that llama.cpp gives them, so that several can be told apart."""
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]


def _one_each(file: GGUFFile, key: str, values: list[T], wanted: int) -> list[T]:
    """One value for each token; more are left out, as llama.cpp does."""
    if len(values) < wanted:
        raise ValueError(
            f"{file.paths[0]}: {key} has {len(values)} entries, expected one for each of the "
            f"{wanted} tokens"
        )
    return values[:wanted]


def _is_special(token_type: int) -> bool:
    return token_type in (_CONTROL, _UNKNOWN, _USER_DEFINED)


def _alternation(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the longest of `texts` at the first place where any of them stands."""
    # llama.cpp orders by length in bytes; an empty text would match everywhere.
    longest_first = sorted(filter(None, texts), key=lambda t: -len(t.encode()))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _byte_level_library(
    file: GGUFFile, vocabulary: dict[str, int], merges: list[str], pre: str
) -> _LibraryTokenizer:
    """Byte-level BPE behind the pre-tokeniser that the file names."""
    if pre not in _PRE_TOKENIZERS:
        raise NotImplementedError(
            f"{file.paths[0]}: tokenizer.ggml.pre is {metadata.shown(pre)}; supported are "
            f"{', '.join(filter(None, _PRE_TOKENIZERS))}"
        )
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
    whole_words = pre in _WHOLE_WORDS_AND_BOS
    library = _LibraryTokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in _PRE_TOKENIZERS[pre]]
    to_byte_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_byte_characters])
    return library


def _sentencepiece_library(
    file: GGUFFile, vocabulary: dict[str, int], scores: list[float]
) -> _LibraryTokenizer:
    """SentencePiece BPE: of all neighbours that form a piece, the best scored merge first.

    The library wants ranked merges, so each way to cut a piece into two pieces becomes a merge,
    ranked by the score of the piece and then by the position of the cut.
    """
    for byte in range(256):
        if f"<0x{byte:02X}>" not in vocabulary:
            # The library would drop characters that it cannot spell, without a word.
            raise ValueError(
                f"{file.paths[0]}: token '<0x{byte:02X}>' is missing, expected one for each byte; "
                "convert the model again"
            )
    merges = []
    for piece, token in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[token], token, cut, left, right))
    merges.sort()
    pairs = [(left, right) for *_, left, right in merges]
    return _LibraryTokenizer(models.BPE(vocabulary, pairs, byte_fallback=True))


def _token_bytes(
    tokens: list[str], token_types: list[int], sentencepiece: bool
) -> list[tuple[bytes, bool]]:
    """For each id its bytes, and whether it is a special token (whose text stands as it is)."""
    of_character = _byte_of_character()

    def plain(token: str) -> bytes:
        if sentencepiece:
            return token.replace(_SPACE, " ").encode()
        return b"".join(of_character.get(c) or c.encode() for c in token)

    def convert(token: str, kind: int) -> bytes:
        if _is_special(kind):
            return token.encode()
        if kind == _BYTE and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return b"" if kind == _UNUSED else plain(token)

    pairs = zip(tokens, token_types, strict=True)
    return [(convert(token, kind), _is_special(kind)) for token, kind in pairs]


def _byte_of_character() -> dict[str, bytes]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
