"""Tiny GGUF files and their mutations by seed, and what opening one has to come to.

`mutation(seed)` is the same files on every machine. `judge` opens them as the scripts do before
anything is compiled: file, hyperparameters, tokenizer, chat template, expert store, and a copy.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from hobbit_jax.experts.store import ExpertKey, HostExperts
from hobbit_jax.model_file.chat_template import ChatTemplate
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf, write_gguf
from hobbit_jax.model_file.gguf_header import SCALAR_CODES
from hobbit_jax.model_file.gguf_writer import metadata_of_new_weights
from hobbit_jax.model_file.metadata import text
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.models.registry import read_config

_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_ALPHABET = [chr(b) for b in _BYTES] + [chr(0x100 + i) for i in range(256 - len(_BYTES))]
_KINDS = list(GGUFValueType)
_INTEGERS = (
    *(0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 127, 128, 255, 256, 257, 260, 1000, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(-1, -2, -128, -(2**31), -(2**63)),
)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-6, 1e38, float("inf"), float("-inf"), float("nan"))
_STRINGS = (
    *(
        "",
        "a",
        " ",
        "\n",
        "a b",
        "a  b",
        "\x00",
        "<0x0A>",
        "<0x>",
        "<0xZZ>",
        "<|im_end|>",
        "é",
        "🦙",
    ),
    *(
        "gpt2",
        "llama",
        "qwen2",
        "default",
        "none",
        "yarn",
        "linear",
        "qwen3moe",
        "olmoe",
        "adapter",
    ),
    *("{{", "{% for", "{{ messages }}", "{{ 1/0 }}", "[EMPTY_3]", "x" * 5000, "\udcff\udcfe", "2"),
)
_KEYS = (
    *("general.architecture", "general.alignment", "general.type", "general.file_type"),
    *("general.tags", "general.name", "general.quantization_version", "adapter.type"),
    *("split.no", "split.count", "split.tensors.count", "tokenizer.chat_template"),
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges")),
    *(f"tokenizer.ggml.{key}" for key in ("scores", "add_bos_token", "add_space_prefix")),
    *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "eot", "eom", "unknown")),
    *(f"qwen3moe.{key}" for key in ("block_count", "expert_count", "expert_used_count")),
    *(f"qwen3moe.{key}" for key in ("vocab_size", "attention.sliding_window", "context_length")),
    *(f"qwen3moe.rope.{key}" for key in ("freq_base", "dimension_count", "scaling.type")),
    *(f"qwen3moe.rope.{key}" for key in ("scaling.factor", "scale_linear", "scaling.attn_factor")),
    *(f"qwen3moe.attention.{key}" for key in ("key_length", "value_length", "head_count_kv")),
)


@dataclass
class Draft:
    """A file before it is bytes: every field may be wrong."""

    keys: list[tuple[Any, int, int, Any]]  # key, type, element type, value
    tensors: list[list]  # name, axes as in the file, type number, offset
    data: bytes
    n_keys: int = 0  # added to the true number
    n_tensors: int = 0
    count: int = 0  # added to the length of the last array


def _model(arch: str, vocabulary: dict[str, Any]) -> Draft:
    """A model of two layers and two experts, float32, some kilobytes."""
    d, f, e, heads, width = 8, 4, 2, 2, 4
    q = heads * width
    n_tokens = len(vocabulary["tokenizer.ggml.tokens"])
    of_arch = {
        "block_count": 2, "context_length": 64, "embedding_length": d, "feed_forward_length": f,
        "expert_feed_forward_length": f, "attention.head_count": heads,
        "attention.head_count_kv": heads, "attention.key_length": width,
        "attention.value_length": width, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e4, "rope.dimension_count": width, "expert_count": e,
        "expert_used_count": 1, "rope.scaling.type": "none", "rope.scaling.factor": 1.0,
    }  # fmt: skip
    metadata = {
        "general.architecture": arch,
        **{f"{arch}.{key}": value for key, value in of_arch.items()},
        **vocabulary,
        "tokenizer.ggml.eos_token_id": n_tokens - 1,
        "tokenizer.ggml.bos_token_id": n_tokens - 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "general.tags": ["tiny"],
    }
    layer = {
        "attn_norm": (d,), "attn_q": (q, d), "attn_k": (q, d), "attn_v": (q, d),
        "attn_output": (d, q), "ffn_norm": (d,), "ffn_gate_inp": (e, d),
        "ffn_gate_exps": (e, f, d), "ffn_up_exps": (e, f, d), "ffn_down_exps": (e, d, f),
    }  # fmt: skip
    norms = {"qwen3moe": width, "olmoe": q}.get(arch)
    if norms:
        layer |= {"attn_q_norm": (norms,), "attn_k_norm": (norms,)}
    shapes = {"token_embd": (n_tokens, d), "output_norm": (d,), "output": (n_tokens, d)}
    shapes |= {f"blk.{i}.{role}": shape for i in range(2) for role, shape in layer.items()}
    rng = np.random.default_rng(0)
    tensors, data = [], b""
    for name, shape in shapes.items():
        tensors.append([f"{name}.weight", list(reversed(shape)), 0, len(data)])
        data += rng.standard_normal(shape, np.float32).tobytes()
        data += bytes(-len(data) % 32)
    return Draft([_typed(key, value) for key, value in metadata.items()], tensors, data)


def _typed(key: str, value: Any) -> tuple[str, int, int, Any]:
    def kind(value: Any) -> int:
        kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
        return kinds.get(type(value), GGUFValueType.FLOAT32)

    if isinstance(value, list):
        return key, GGUFValueType.ARRAY, kind(value[0]), value
    return key, kind(value), 0, value


def _originals() -> list[Draft]:
    bpe = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*_ALPHABET, "he", "ll", "<|im_end|>", "<|end|>"],
        "tokenizer.ggml.token_type": [1] * 258 + [3, 3],
        "tokenizer.ggml.merges": ["h e", "l l"],
    }
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "a",
        "\u2581a",
    ]
    spm = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
    }
    return [_model("qwen3moe", bpe), _model("llama", spm), _model("olmoe", bpe)]


ORIGINALS = _originals()


def _string(text: Any) -> bytes:
    raw = str(text).encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _payload(kind: int, value: Any) -> bytes:
    """`value` as `kind`, or the nearest that can be written."""
    if kind == GGUFValueType.STRING:
        return _string(value)
    code = SCALAR_CODES[GGUFValueType(kind)]
    try:
        return struct.pack(f"<{code}", value)
    except (struct.error, OverflowError):
        number = hash(value) if not isinstance(value, float) else 0
        size = struct.calcsize(f"<{code}")
        return (number % (1 << 8 * size)).to_bytes(size, "little")


def to_bytes(draft: Draft) -> bytes:
    """The file that a draft describes."""
    head = struct.pack(
        "<4sIQQ", b"GGUF", 3,
        (len(draft.tensors) + draft.n_tensors) % 2**64, (len(draft.keys) + draft.n_keys) % 2**64,
    )  # fmt: skip
    last_array = max((i for i, k in enumerate(draft.keys) if k[1] == 9), default=-1)
    for i, (key, kind, element, value) in enumerate(draft.keys):
        head += _string(key) + struct.pack("<I", kind)
        if kind == GGUFValueType.ARRAY:
            values = value if isinstance(value, list) else [value]
            count = len(values) + (draft.count if i == last_array else 0)
            head += struct.pack("<IQ", element, count % 2**64)
            if element == GGUFValueType.ARRAY:
                head += struct.pack("<IQ", GGUFValueType.ARRAY, 1) * min(len(values), 1000)
            else:
                head += b"".join(_payload(element, v) for v in values)
        else:
            head += _payload(kind, value[0] if isinstance(value, list) and value else value)
    for name, dims, kind, offset in draft.tensors:
        dims = [n % 2**64 for n in dims]
        head += _string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", kind % 2**32, offset % 2**64)
    return head + bytes(-len(head) % 32) + draft.data


def _random_value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((_INTEGERS, _FLOATS, _STRINGS, (True, False))))


def _random_field(rng: random.Random, key: Any) -> tuple[Any, int, int, Any]:
    kind = int(rng.choice(_KINDS))
    element = int(rng.choice(_KINDS))
    if kind != GGUFValueType.ARRAY:
        return key, kind, element, _random_value(rng)
    length = rng.choice((0, 1, 2, 2, 3, 260, 262, 5000))
    value = _random_value(rng)
    return key, kind, element, [value if rng.random() < 0.5 else _random_value(rng)] * length


def _change_key(rng: random.Random, draft: Draft) -> None:
    place = rng.randrange(len(draft.keys))
    key, kind, element, value = draft.keys[place]
    what = rng.randrange(9)
    if what == 0:
        del draft.keys[place]
    elif what == 1 and rng.random() < 0.1:
        draft.keys.insert(rng.randrange(len(draft.keys)), draft.keys[place])
    elif what == 2:
        draft.keys[place] = (rng.choice((*_KEYS, *_STRINGS)), kind, element, value)
    elif what == 3:
        field = _random_field(rng, rng.choice(_KEYS))
        draft.keys[:] = [other for other in draft.keys if other[0] != field[0]] + [field]
    elif what == 4 and isinstance(value, list) and value:
        values = list(value)
        for _ in range(rng.choice((1, 1, 2, 20))):
            values[rng.randrange(len(values))] = _random_value(rng)
        draft.keys[place] = (key, kind, element, values)
    elif what == 5 and isinstance(value, list):
        cut = rng.choice((0, 1, len(value) // 2, len(value)))
        draft.keys[place] = (key, kind, element, value[:cut] + value[: rng.choice((0, 1, 9))])
    elif what == 6:
        draft.keys[place] = (key, kind, element, _random_value(rng))
    elif what == 7 and rng.random() < 0.2:
        draft.count = rng.choice(_INTEGERS)
    else:
        draft.keys[place] = _random_field(rng, key)


def _change_tensor(rng: random.Random, draft: Draft) -> None:
    if not draft.tensors:
        return
    place = rng.randrange(len(draft.tensors))
    tensor = list(draft.tensors[place])
    what = rng.randrange(8)
    if what == 0:
        del draft.tensors[place]
        return
    if what == 1:
        draft.tensors.append(tensor)
        return
    if what == 2:
        names = [f"blk.{rng.choice(_INTEGERS)}.ffn_up_exps.weight", "rope_freqs.weight", "a.lora_a"]
        tensor[0] = rng.choice((*names, *_STRINGS, draft.tensors[0][0]))
    elif what == 3 and tensor[1]:
        tensor[1] = list(tensor[1])
        tensor[1][rng.randrange(len(tensor[1]))] = rng.choice(_INTEGERS)
    elif what == 4:
        tensor[1] = [rng.choice(_INTEGERS) for _ in range(rng.choice((0, 1, 2, 4, 5, 100)))]
    elif what == 5:
        tensor[2] = rng.choice((*range(42), 99, 2**32 - 1))
    elif what == 6:
        tensor[3] = rng.choice((*_INTEGERS, tensor[3] + 1, tensor[3] - 32, len(draft.data)))
    else:
        tensor[1] = list(reversed(tensor[1]))
    draft.tensors[place] = tensor


def _change_count(rng: random.Random, draft: Draft) -> None:
    setattr(draft, rng.choice(("n_keys", "n_tensors", "count")), rng.choice(_INTEGERS))


def _change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Damage that knows nothing of the format, mostly in the header."""
    place = rng.randrange(len(data) if rng.random() < 0.2 else min(len(data), 9000))
    what = rng.randrange(5)
    if what == 0:
        return data[:place]
    if what == 1:
        return data[:place] + rng.randbytes(rng.choice((1, 1, 4, 8))) + data[place + 1 :]
    if what == 2:
        width = rng.choice((1, 4, 8))
        number = (rng.choice(_INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")
        return data[:place] + number + data[place + width :]
    if what == 3:
        return data[:place] + data[place + rng.choice((1, 8, 100)) :]
    other = rng.randrange(len(data))
    return data[:place] + data[other : other + rng.choice((4, 8, 200))] + data[place:]


def mutation(seed: int) -> dict[str, bytes]:
    """Files by name; the first is the one to open."""
    rng = random.Random(seed)
    original = rng.choice(ORIGINALS)
    draft = Draft(list(original.keys), list(original.tensors), original.data)
    changes: list[Callable[[random.Random, Draft], None]] = [_change_key] * 5
    changes += [_change_tensor] * 2
    if rng.random() < 0.1:
        changes.append(_change_count)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if draft.keys:
            rng.choice(changes)(rng, draft)
    if rng.random() < 0.1:
        return _split(rng, draft)
    data = to_bytes(draft)
    for _ in range(rng.choice((0,) * 7 + (1, 1, 4))):
        data = _change_bytes(rng, data or b"?")
    name = (
        "model.gguf" if rng.random() < 0.97 else f"model-{rng.choice(_INTEGERS):05d}-of-00002.gguf"
    )
    return {name: data}


def _split(rng: random.Random, draft: Draft) -> dict[str, bytes]:
    """Two parts with the split keys right or wrong."""

    def keys(number: int) -> list[tuple[Any, int, int, Any]]:
        right = {"split.no": number, "split.count": 2, "split.tensors.count": len(draft.tensors)}
        fields = [_typed(key, value) for key, value in right.items()]
        if rng.random() < 0.5:
            place = rng.randrange(3)
            fields[place] = _random_field(rng, fields[place][0])
        return fields

    half = len(draft.tensors) // 2
    first = Draft(draft.keys + keys(0), draft.tensors[:half], draft.data)
    second = Draft(keys(1), draft.tensors[half:], draft.data)
    parts = {f"m-0000{i}-of-00002.gguf": to_bytes(d) for i, d in ((1, first), (2, second))}
    if rng.random() < 0.1:
        parts.popitem()
    return parts


def judge(seed: int, folder: Path) -> str | None:
    """Opens the mutation of `seed`, written into `folder`; returns what is wrong with the answer.

    Right answers are a model that can be used and copied, and one line that names the file.
    """
    files = mutation(seed)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    path = folder / next(iter(files))
    try:
        _use(path, folder)
    except (ValueError, NotImplementedError) as error:
        text = str(error)
        if type(error) not in (ValueError, NotImplementedError) or "\n" in text or len(text) > 2000:
            return f"{type(error).__name__}: {text[:300]!r}"
        # Those that know a tensor or a template only leave the file to their caller.
        if folder.name not in text and not text.startswith(("tensor ", "the file's chat template")):
            return f"names no file: {text[:300]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    finally:
        for name in files:
            (folder / name).unlink()
    return None


def _copy(file: GGUFFile, metadata: dict[str, Any], copy: Path) -> GGUFFile:
    tensors = [(t.name, t.format, t.shape, t.raw) for t in file.tensors.values()]
    write_gguf(copy, metadata, tensors, file.field_types)
    again = open_gguf(copy)
    copy.unlink()
    return again


def _use(path: Path, folder: Path) -> None:
    """As generate.py and quantize.py do before they compile."""
    file = open_gguf(path)
    copy = folder / "copy.gguf"
    arch = file.read("general.architecture", text())
    if arch:
        again = _copy(file, file.metadata, copy)
        # NaN equals nothing, so by their text.
        if repr(again.metadata) != repr({"general.architecture": arch} | file.metadata):
            raise AssertionError("the copy has other metadata")
        if again.field_types != file.field_types:
            raise AssertionError("the copy has other types")
        low = _copy(file, metadata_of_new_weights(file.metadata, "Q2_K"), copy)
        if low.metadata["general.file_type"] != 10:
            raise AssertionError("the copy has another file type")
    config = read_config(file)
    tokenizer = Tokenizer(file)
    ids = tokenizer.encode("hell a\n🦙<|im_end|>")
    if not all(0 <= i < len(tokenizer.byte_lengths()) for i in ids):
        raise AssertionError(f"ids {ids}")
    tokenizer.decode(ids)
    if "tokenizer.chat_template" in file.metadata:
        ChatTemplate.from_gguf(file, tokenizer).render([{"role": "user", "content": "hi"}])
    store = HostExperts(config, file)
    for layer in range(config.n_layers):
        store.raw(ExpertKey(0, layer, config.n_experts - 1))
