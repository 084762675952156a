"""Model files of true shape and size without a trained model: for measuring scale, not quality.

Owns how such a file is filled. Tensors, types, metadata and vocabulary size are those of the real
model's Q4_K_M file; weights are random blocks, cut from a pool of a few megabytes per type, so that
18 GB are written as fast as the disk takes them.

Random weights would route every token to experts of its own. Real routing has hot experts, and
neighbouring tokens share experts, so a little structure is put in:

- Every embedding has a direction in common. Routers are random, so an expert whose row lies along
  it is a favourite of every token.
- Queries and keys read that direction only. They are the same for all tokens, and what is left of
  attention is the rotary embedding: a few tokens back count, more than that fade.
- The first layer's attention is strong, the others' weaker, and experts add little, so a token's
  state is its own embedding, its neighbours' and the common direction, in proportions that were
  set by comparing with real traces.

How close that comes, as means over layers: the share of selections that go to the most used quarter
of a layer's experts, and the share of a token's experts that the token 1, 2, 5 and 20 places before
chose too. "Chance" is the overlap of two random choices.

                                        quarter  overlap 1     2     5    20   chance
    DeepSeek-V2-Lite, intent               .530       .262  .196  .179  .150     .094
    DeepSeek-V2-Lite, law                  .447       .290  .216  .184  .153     .094
    the tiny preset, 1,000 tokens          .487       .310  .211  .191  .179     .125
"""

import math
import string
import zlib
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, TokenType
from tqdm import tqdm

from hobbit_jax.atomic import check_space
from hobbit_jax.model_file.gguf_file import GGUFFile, write_gguf
from hobbit_jax.model_file.gguf_header import raw_shape
from hobbit_jax.model_file.metadata import integers, numbers, texts
from hobbit_jax.model_file.tokenizer import BYTE_CHARACTERS
from hobbit_jax.models.attention import GroupedQuery
from hobbit_jax.models.config import TOKEN_EMBEDDING, ModelConfig, tensor_shapes
from hobbit_jax.models.written_keys import config_metadata
from hobbit_jax.quantize import ggml
from hobbit_jax.quantize.quant_recipe import FILE_TYPE_Q4_K_M, q4_k_m_format
from pallas_kernels.formats import get_format

_COMMON = 0.05  # of an embedding's square, what all tokens share
_LOCALITY = 25.0  # attention's logit at distance 0; over 64 frequencies of base 1e6 it loses
#   .5 at distance 1, 1.5 at 2 and 2.9 at 5
_FIRST_ATTENTION = 2.0  # gain of the first layer's attention, in embeddings
_ATTENTION, _EXPERTS = 1.3, 0.5  # gains of all further layers together, added as squares
_ROUTER = 1.15  # standard deviation of router logits

_POOL_BLOCKS = 30011  # a prime, so that a wrapped row does not meet itself
_EMBEDDING_ROWS = 4099  # distinct pieces of an embedding per super-block
# Of a block with random codes: its weights' standard deviation when d is 1, and, where there is a
# second scale, the multiple of d that makes the mean 0.
_SCALES: dict[str, tuple[float, float | None]] = {
    "Q8_0": (73.9, None),
    "Q5_0": (9.25, None),
    "Q4_K": (232.0, 7.5),
    "Q5_K": (480.0, 15.5),
    "Q6_K": (1369.0, None),
}


def synthesize(
    config: ModelConfig, name: str, path: Path, vocabulary: GGUFFile | None = None, seed: int = 0
) -> None:
    """Writes a synthetic Q4_K_M file of `config`'s shapes; atomic, below 1 GiB of memory.

    Args:
        config: the shapes, with an untied head.
        name: goes into the metadata.
        path: the file; replaced when it exists.
        vocabulary: a file whose tokenizer is taken; a made-up byte-level one if None.
        seed: of all weights; the same seed gives the same bytes.

    Raises:
        ValueError: the vocabulary has more tokens than the model, or none.
        NotImplementedError: a type that no random blocks are known for.
        OSError: the disk is too small, or cannot be written.
    """
    metadata = {
        **config_metadata(config),
        "general.name": f"{name} (synthetic)",
        "general.file_type": FILE_TYPE_Q4_K_M,
        "general.quantization_version": GGML_QUANT_VERSION,
    }
    if vocabulary is None:
        metadata |= made_up_vocabulary(config.vocab_size)
    else:
        metadata |= borrowed_vocabulary(vocabulary, config.vocab_size)
    shapes = tensor_shapes(config)
    formats = {name: q4_k_m_format(name, shape, config) for name, shape in shapes.items()}
    total = sum(math.prod(raw_shape(n, formats[n], shape)) for n, shape in shapes.items())
    check_space(path, total)
    weights = _Weights(config, seed)
    with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:

        def fill(name: str) -> np.ndarray:
            raw = weights.tensor(name, formats[name], shapes[name])
            bar.update(raw.nbytes)
            return raw

        tensors = [(n, formats[n], shape, partial(fill, n)) for n, shape in shapes.items()]
        write_gguf(path, metadata, tensors, vocabulary and vocabulary.field_types)


class _Weights:
    """The bytes of every tensor, from a seed."""

    def __init__(self, config: ModelConfig, seed: int):
        self.config, self.seed = config, seed
        self.common_D = self._rng("common").choice(np.array([-1, 1], np.float32), config.d_model)
        attentions = (block.attention for block in config.blocks)
        self._attention = next(a for a in attentions if isinstance(a, GroupedQuery))
        self._pool = cache(self._random_blocks)

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def tensor(self, name: str, format: str, shape: tuple[int, ...]) -> np.ndarray:
        """Raw uint8 [*shape[:-1], row_bytes]."""
        if name == TOKEN_EMBEDDING:
            return self._embedding(format, shape[0])
        role = name.removesuffix(".weight").split(".")[-1]
        if role.endswith("_norm"):
            scale = self._query_size if role in ("attn_q_norm", "attn_k_norm") else 1.0
            return np.full(shape, scale, np.float32).view(np.uint8)
        if role == "ssm_a":  # the rate at which a state of a delta net decays
            return self._rng(name).uniform(-1, 0, shape).astype(np.float32).view(np.uint8)
        if format == "F32":
            gain = _ROUTER if role == "ffn_gate_inp" else 1.0
            values = self._rng(name).standard_normal(shape, np.float32)
            return (values * np.float32(gain / math.sqrt(shape[-1]))).view(np.uint8)
        if role in ("attn_q", "attn_k"):
            row_1D = self.common_D[None] * np.float32(self._query_gain())
            raw = ggml.encode(row_1D, format)
            return np.ascontiguousarray(np.broadcast_to(raw, (shape[0], raw.shape[1])))
        return self._random(name, format, shape, self._std(name, role, shape[-1]))

    @property
    def _query_size(self) -> float:
        """Value of every entry of a query and a key for attention's logit to be `_LOCALITY`."""
        return math.sqrt(_LOCALITY / math.sqrt(self._attention.head_dim))

    def _query_gain(self) -> float:
        """A norm takes care of the size where there is one; otherwise it must be right here."""
        width = self.config.d_model * math.sqrt(_COMMON)  # of the common direction in a state
        return (1.0 if self._attention.qk_norm != "none" else self._query_size) / width

    def _std(self, name: str, role: str, fan_in: int) -> float:
        """Standard deviation of a matrix's weights, by what it shall add to the state."""
        n_later = max(1, self.config.n_layers - 1)
        if role in ("attn_output", "ssm_out"):
            first = name.startswith("blk.0.")
            gain = _FIRST_ATTENTION if first else _ATTENTION / math.sqrt(n_later)
        elif role == "ffn_down_exps":
            # silu(a) b of unit normals has .6, and K experts are averaged with their weights.
            averaged = 0.6 / math.sqrt(self.config.experts_per_token)
            gain = _EXPERTS / math.sqrt(n_later) / averaged
        else:
            gain = 1.0
        return gain / math.sqrt(fan_in)

    def _random(self, name: str, format: str, shape: tuple[int, ...], std: float) -> np.ndarray:
        """Every matrix is the pool from a place of its own on, block after block."""
        pool, rng = self._pool(format, std), self._rng(name)
        raw = np.empty(raw_shape(name, format, shape), np.uint8)
        matrices = raw.reshape(math.prod(shape[:-2]), -1, pool.shape[1])
        for blocks in matrices:
            done, start = 0, int(rng.integers(len(pool)))
            while done < len(blocks):
                part = pool[start : start + len(blocks) - done]
                blocks[done : done + len(part)] = part
                done, start = done + len(part), 0
        return raw

    def _random_blocks(self, format: str, std: float) -> np.ndarray:
        """Blocks of random codes, uint8 [blocks, block_bytes], of weights with mean 0."""
        rng = self._rng(f"{format} {std}")
        block_bytes = get_format(format).block_bytes
        if format == "F16":
            values = rng.standard_normal(_POOL_BLOCKS, np.float32) * np.float32(std)
            return values.astype(np.float16).view(np.uint8).reshape(-1, 2)
        if format not in _SCALES:
            raise NotImplementedError(
                f"no random blocks of {format}; there are some of F16, {', '.join(_SCALES)}"
            )
        raw = rng.integers(0, 256, (_POOL_BLOCKS, block_bytes), np.uint8)
        unit, multiple = _SCALES[format]
        d = (rng.uniform(0.5, 1.5, _POOL_BLOCKS) * std / unit).astype(np.float16)
        values = [d] if multiple is None else [d, d * np.float16(multiple)]
        for (at, *_), value in zip(get_format(format).float_fields, values, strict=True):
            raw[:, at : at + 2] = value[:, None].view(np.uint8)
        return raw

    def _embedding(self, format: str, n_rows: int) -> np.ndarray:
        """Rows of the common direction and a part of their own, put together from pieces.

        There is a pool of pieces per super-block, and a row takes another piece of each.
        """
        width = min(256, self.config.d_model)
        n_pieces = self.config.d_model // width
        rng, pieces = self._rng(TOKEN_EMBEDDING), []
        for i in range(n_pieces):
            own = rng.standard_normal((_EMBEDDING_ROWS, width), np.float32)
            common = self.common_D[i * width : (i + 1) * width]
            values = math.sqrt(_COMMON) * common + math.sqrt(1 - _COMMON) * own
            blocks = ggml.encode(values.astype(np.float32), format)
            # Strides up to n_pieces differ, so two rows share pieces in one place at most.
            pieces.append(blocks[np.arange(n_rows) * (i + 1) % _EMBEDDING_ROWS])
        return np.concatenate(pieces, axis=1)


def _merges(alphabet: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of bytes, those of the first bytes first; then pairs with a third byte."""
    for last, newest in enumerate(alphabet):
        yield newest, newest
        for older in alphabet[:last]:
            yield older, newest
            yield newest, older
    for left, middle, right in product(alphabet, repeat=3):
        yield left + middle, right


def made_up_vocabulary(n_tokens: int) -> dict[str, Any]:
    """Metadata of a byte-level BPE of `n_tokens`, the last of them the end of text.

    Raises:
        ValueError: fewer tokens than 256 bytes and the end of text.
    """
    if n_tokens < 257:
        raise ValueError(f"n_tokens is {n_tokens}; a byte-level vocabulary has at least 257")
    # GPT-2's printable stand-ins of the 256 bytes, letters and the space first.
    first = [BYTE_CHARACTERS[ord(c)] for c in f" {string.ascii_lowercase}{string.ascii_uppercase}"]
    alphabet = list(dict.fromkeys([*first, *BYTE_CHARACTERS]))
    merges = list(islice(_merges(alphabet), n_tokens - 257))
    tokens = [*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[TokenType.NORMAL] * (n_tokens - 1), TokenType.CONTROL],
        "tokenizer.ggml.eos_token_id": n_tokens - 1,
        "tokenizer.ggml.padding_token_id": n_tokens - 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    if merges:
        metadata["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    return metadata


def borrowed_vocabulary(file: GGUFFile, n_tokens: int) -> dict[str, Any]:
    """The tokenizer of another file, filled up with unused tokens.

    Raises:
        ValueError: it has none, or more tokens than `n_tokens`.
    """
    keys = {k: v for k, v in file.metadata.items() if k.startswith("tokenizer.")}
    tokens = file.read("tokenizer.ggml.tokens", texts(), [])
    if not 0 < len(tokens) <= n_tokens:
        raise ValueError(
            f"{file.paths[0]} has {len(tokens)} tokens; want 1 to the model's {n_tokens}"
        )
    missing = n_tokens - len(tokens)
    keys["tokenizer.ggml.tokens"] = [*tokens, *(f"[PAD{i}]" for i in range(missing))]
    types, scores = "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
    if types in keys:
        keys[types] = [*file.read(types, integers(-(2**31))), *[TokenType.UNUSED] * missing]
    if scores in keys:
        keys[scores] = [*file.read(scores, numbers()), *[0.0] * missing]
    return keys
