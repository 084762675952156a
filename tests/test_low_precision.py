"""Low precisions on disk: what is in the file, when it is made again, and that it is whole or
absent.
"""

import errno
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import TWO_BANKS
from tiny_models import write_model

from hobbit_jax import quantize
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.miss_modes import miss_mode
from hobbit_jax.cache.pool_sizing import least_bytes
from hobbit_jax.experts import low_precision
from hobbit_jax.experts.low_precision import LowPrecisionSpec
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import ROLES, ExpertKey, HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf, write_gguf
from hobbit_jax.models.config import layer_tensors
from hobbit_jax.models.loading import load_model
from hobbit_jax.models.registry import read_config
from hobbit_jax.quantize import ggml
from hobbit_jax.quantize.methods import encode_matrix
from hobbit_jax.quantize.quant_recipe import format_in_a_file


@pytest.fixture(scope="module")
def source(two_banks_path):
    return open_gguf(two_banks_path)


def test_contents(source, tmp_path):
    config = read_config(source)
    low = low_precision.open_low_precision(source, config, LowPrecisionSpec("Q2_K"), tmp_path)
    assert read_config(low) == config
    assert low.metadata[low_precision.SOURCE_KEY] == source.sha256()
    assert source.metadata.items() <= low.metadata.items()

    experts = {layer_tensors(config, i)[role] for i in range(config.n_layers) for role in ROLES}
    reader = gguf.GGUFReader(low.paths[0])
    assert [tensor.name for tensor in reader.tensors] == list(source.tensors)
    for tensor in reader.tensors:
        wanted = source.tensors[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == wanted.shape
        if tensor.name not in experts:
            assert tensor.tensor_type.name == wanted.format
            assert tensor.data.tobytes() == wanted.raw.tobytes()
            continue
        assert tensor.tensor_type.name == "Q2_K"
        kind = gguf.GGMLQuantizationType[wanted.format]
        rows = gguf.quants.dequantize(wanted.raw, kind).reshape(-1, wanted.shape[-1])
        assert tensor.data.tobytes() == ggml.encode(rows, "Q2_K").tobytes()


def test_reused_until_the_source_or_an_encoder_changes(source, tmp_path, monkeypatch):
    config = read_config(source)
    made = low_precision.open_low_precision(
        source, config, LowPrecisionSpec("Q8_0"), tmp_path
    ).paths[0]
    stamp = made.stat().st_mtime_ns, made.stat().st_ino
    again = low_precision.open_low_precision(
        source, config, LowPrecisionSpec("Q8_0"), tmp_path
    ).paths[0]
    assert again == made and (again.stat().st_mtime_ns, again.stat().st_ino) == stamp

    write_model(replace(TWO_BANKS, seed=6), tmp_path / "other.gguf")
    other = low_precision.open_low_precision(
        open_gguf(tmp_path / "other.gguf"), config, LowPrecisionSpec("Q8_0"), tmp_path
    ).paths[0]
    assert other != made and made.exists()
    package = Path(quantize.__file__).parents[1]
    for number, name in enumerate(
        ("quantize/ggml.py", "quantize/gptq.py", "importance/layer_inputs.py")
    ):
        copied = tmp_path / f"better_{number}"
        for room in ("quantize", "importance"):
            shutil.copytree(package / room, copied / room)
        with (copied / name).open("a") as module:
            module.write("# better\n")
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "__file__", str(copied / "quantize" / "__init__.py"))
            better = low_precision.open_low_precision(
                source, config, LowPrecisionSpec("Q8_0"), tmp_path
            ).paths[0]
            assert better not in (made, other)


def test_interrupted_writing_goes_on(source, tmp_path, monkeypatch):
    """No precision is seen before it is whole, and finished tensors are not encoded again."""
    config, calls = read_config(source), []

    def recording(*arguments):
        calls.append(arguments[0].tobytes())
        return encode_matrix(*arguments)

    def encoding(*arguments):
        if len(calls) == 2 * TWO_BANKS.n_experts + 1:
            raise KeyboardInterrupt
        return recording(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(low_precision, "encode_matrix", encoding)
        with pytest.raises(KeyboardInterrupt):
            low_precision.open_low_precision(source, config, LowPrecisionSpec("Q8_0"), tmp_path)
        assert not list(tmp_path.glob("*.gguf"))
        done = set(calls[: 2 * TWO_BANKS.n_experts])
        calls[:] = []
        patch.setattr(
            low_precision,
            "encode_matrix",
            lambda *a: calls.append(a[0].tobytes()) or encode_matrix(*a),
        )
        low = low_precision.open_low_precision(source, config, LowPrecisionSpec("Q8_0"), tmp_path)
    assert len(calls) == (3 * config.n_layers - 2) * config.n_experts
    assert done.isdisjoint(calls)
    straight = low_precision.open_low_precision(
        source, config, LowPrecisionSpec("Q8_0"), tmp_path / "straight"
    )
    assert low.paths[0].read_bytes() == straight.paths[0].read_bytes()
    assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".gguf"]
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_was_given_up_leaves_nothing_behind(source, tmp_path, monkeypatch):
    """Neither does the next one of that name, by another recipe."""
    config, path = read_config(source), tmp_path / "low.gguf"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(low_precision, "write_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            low_precision.write_low_precision(source, config, LowPrecisionSpec("Q2_K"), path)
    assert list(tmp_path.glob(".low.gguf.*.parts"))
    low_precision.write_low_precision(source, config, LowPrecisionSpec("Q8_0"), path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_and_a_format_without_encoder_are_refused_first(source, tmp_path, monkeypatch):
    config = read_config(source)
    encoded = []
    monkeypatch.setattr(low_precision, "encode_matrix", lambda *a: encoded.append(a))
    usage = shutil.disk_usage(tmp_path)
    with pytest.raises(NotImplementedError, match="weight type Q9_K is not supported"):
        low_precision.write_low_precision(
            source, config, LowPrecisionSpec("Q9_K"), tmp_path / "low.gguf"
        )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    wanted = low_precision.disk_bytes(source, config, "Q2_K")
    with pytest.raises(OSError, match=rf"low\.gguf wants {wanted} bytes, and 1000 are free"):
        low_precision.write_low_precision(
            source, config, LowPrecisionSpec("Q2_K"), tmp_path / "low.gguf"
        )
    assert not encoded


def test_several_who_want_a_tier_make_it_once(source, tmp_path, monkeypatch):
    config, made, write = read_config(source), [], low_precision.write_low_precision
    monkeypatch.setattr(
        low_precision,
        "write_low_precision",
        lambda *args, **named: (made.append(args), write(*args, **named)),
    )

    def make() -> None:
        file = low_precision.open_low_precision(source, config, LowPrecisionSpec("Q8_0"), tmp_path)
        assert file.tensors.keys() == source.tensors.keys()

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".gguf"]


def test_rows_that_are_no_whole_number_of_blocks(tmp_path):
    """ggml would end the process; a format on the way is filled up as the last one is."""
    weights_NK = np.random.default_rng(0).standard_normal((4, 320)).astype(np.float32)
    with pytest.raises(
        ValueError, match="rows of 320 weights are no whole number of Q4_K's blocks"
    ):
        ggml.encode(weights_NK, "Q4_K")
    spec = LowPrecisionSpec("Q2_K", through=("Q4_K",))
    blocks = low_precision._encode(weights_NK, "Q2_K", spec, None, "ffn_gate_exps", 0)
    filled_NK = np.pad(weights_NK, ((0, 0), (0, 192)))
    once_NK = np.array(low_precision.decode(ggml.encode(filled_NK, "Q4_K"), "Q4_K"))
    once_NK[:, 320:] = 0
    np.testing.assert_array_equal(blocks, ggml.encode(once_NK, "Q2_K"))


def test_through_another_format(source, tmp_path):
    """What passes through Q4_K first is what Q4_K's own decoding encodes to."""
    config = read_config(source)
    low = low_precision.open_low_precision(
        source, config, LowPrecisionSpec("Q2_K", through=("Q4_0",)), tmp_path
    )
    name = layer_tensors(config, 1)["ffn_down_exps"]
    weights = low_precision.dequantize(source.tensors[name], 3)
    middle = gguf.quants.dequantize(ggml.encode(weights, "Q4_0"), gguf.GGMLQuantizationType.Q4_0)
    assert low.tensors[name].raw[3].tobytes() == ggml.encode(middle, "Q2_K").tobytes()


def test_metadata_is_carried_over_but_for_what_is_no_longer_true(source, tmp_path):
    carried = {
        "general.tags": [],
        "general.license": "mit",
        "general.file_type": 15,
        "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.entries_count": 128,
        low_precision.CALIBRATION_KEY: "0" * 64,
    }
    types = {"general.tags": (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)}
    tensors = [(t.name, t.format, t.shape, t.raw) for t in source.tensors.values()]
    write_gguf(tmp_path / "m.gguf", source.metadata | carried, tensors, types)
    file = open_gguf(tmp_path / "m.gguf")
    low = low_precision.open_low_precision(
        file, read_config(file), LowPrecisionSpec("Q2_K"), tmp_path / "precisions"
    )
    kept = {k: v for k, v in file.metadata.items() if not k.startswith(("quantize.", "hobbit."))}
    assert kept["general.tags"] == []
    new = {"general.file_type": 10, "general.quantization_version": 2}  # MOSTLY_Q2_K in llama.h
    new |= {low_precision.SOURCE_KEY: file.sha256(), low_precision.METHOD_KEY: "ggml"}
    new |= {
        low_precision.ENCODER_KEY: low_precision.encoder_sha256(),
        "general.name": "qwen3moe experts Q2_K",
    }
    assert low.metadata == kept | new
    assert low.field_types["general.tags"] == types["general.tags"]


def test_a_write_that_fails_before_it_begins_leaves_nothing(source, tmp_path):
    spec = LowPrecisionSpec("Q2_K", "gptq")  # which needs a calibration
    with pytest.raises(ValueError, match="needs a calibration"):
        low_precision.write_low_precision(source, read_config(source), spec, tmp_path / "low.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_an_error(source, tmp_path, monkeypatch):
    """Parts are written through maps, and a map of a file with holes would end the process."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(low_precision.os, "posix_fallocate", full)
    path, spec = tmp_path / "low.gguf", LowPrecisionSpec("Q8_0")
    with pytest.raises(OSError, match="No space left"):
        low_precision.write_low_precision(source, read_config(source), spec, path)
    assert not path.exists()


# Rows of 224 weights, of which no K-quant has a whole number of blocks.
NARROW = replace(TWO_BANKS, d_expert=224, experts=(("Q4_K", "Q4_K", "Q8_0"),) * 2)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow") / "narrow.gguf"
    write_model(NARROW, path)
    return load_model(path, "xla")


@pytest.mark.parametrize("backend", ["ggml", pytest.param("xla", marks=pytest.mark.slow)])
def test_rows_are_filled_up_and_compute_what_they_say(narrow, tmp_path, backend):
    """Logits against a file of the decoded experts in float32, at the least budget and without."""
    source, config = narrow.file, narrow.config
    low = low_precision.open_low_precision(source, config, LowPrecisionSpec("Q3_K"), tmp_path)
    tensors = []
    for name, tensor in source.tensors.items():
        if tensor.raw.shape != low.tensors[name].raw.shape:  # an expert tensor
            weights = low_precision.dequantize(low.tensors[name])[..., : tensor.shape[-1]]
            tensors.append((name, "F32", tensor.shape, weights.copy().view(np.uint8)))
        else:
            tensors.append((name, tensor.format, tensor.shape, tensor.raw))
    write_gguf(tmp_path / "float.gguf", source.metadata, tensors, source.field_types)
    decoded = load_model(tmp_path / "float.gguf", "xla")
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 8))
    wanted = Engine(decoded, HostExperts(config, decoded.file), CacheConfig()).score(ids)

    store = HostExperts(config, source, [low])
    down_bytes = config.d_model * 110  # one block of 256 a row
    assert store.expert_bytes(ExpertKey(1, 0, 0)) == 2 * 224 * 110 + down_bytes
    plan, model = uniform_plan(store, 1), load_model(source.paths[0], backend)
    roomy = Engine(model, store, CacheConfig(plan=plan)).score(ids)
    layout = BankLayout.of_store(store)
    least = least_bytes(plan.shares_pLE(store.shape_pLE), miss_mode("fetch"), layout)
    np.testing.assert_array_equal(
        Engine(model, store, CacheConfig(least, plan=plan)).score(ids), roomy
    )
    error = np.abs(roomy - wanted).max() / wanted.std()
    assert error < (1e-4 if backend == "xla" else 0.3)  # ggml rounds activations to 8 bits


def test_a_padded_file_is_nobody_elses(narrow, tmp_path):
    low = low_precision.open_low_precision(
        narrow.file, narrow.config, LowPrecisionSpec("Q2_K"), tmp_path
    )
    name = layer_tensors(narrow.config, 1)["ffn_down_exps"]
    assert low.tensors[name].shape == (8, 256, 256)
    weights = low_precision.dequantize(narrow.file.tensors[name], 3)
    filled = np.pad(weights, ((0, 0), (0, 32)))
    assert low.tensors[name].raw[3].tobytes() == ggml.encode(filled, "Q2_K").tobytes()
    with pytest.raises(NotImplementedError, match="qwen3moe-padded"):
        read_config(low)


def test_a_file_for_llama_cpp_falls_back_as_it_does(narrow, tmp_path, capsys):
    path = tmp_path / "low.gguf"
    spec = LowPrecisionSpec("Q3_K")
    low_precision.write_low_precision(narrow.file, narrow.config, spec, path)
    assert "ffn_down_exps: rows of 224 weights are no multiple of 256; Q4_0" in (
        capsys.readouterr().err
    )
    low, names = open_gguf(path), layer_tensors(narrow.config, 0)
    assert read_config(low) == narrow.config
    assert [low.tensors[names[role]].format for role in ROLES] == ["Q3_K", "Q3_K", "Q4_0"]
    for format, columns, wanted in (
        ("Q4_K", 704, "Q5_0"),
        ("IQ2_XS", 2880, "IQ4_NL"),
        ("Q6_K", 40, "F16"),
        ("Q2_0", 1408, "Q2_0"),
    ):
        assert format_in_a_file(format, columns) == wanted
    with pytest.raises(NotImplementedError, match="rows of 96 weights in the place of Q1_0"):
        format_in_a_file("Q1_0", 96)


def test_some_matrices_only(two_banks_path, tmp_path):
    source = open_gguf(two_banks_path)
    config = read_config(source)
    spec = LowPrecisionSpec("Q2_K", roles=("down",))
    low = low_precision.open_low_precision(source, config, spec, tmp_path)
    for name, tensor in source.tensors.items():
        if "ffn_down_exps" in name:
            assert low.tensors[name].format == "Q2_K"
        else:
            np.testing.assert_array_equal(low.tensors[name].raw, tensor.raw)
    every = low_precision.open_low_precision(source, config, LowPrecisionSpec("Q2_K"), tmp_path)
    for name in (n for n in source.tensors if "ffn_down_exps" in n):
        np.testing.assert_array_equal(low.tensors[name].raw, every.tensors[name].raw)
    with pytest.raises(ValueError, match=r"roles .*'router'.*; want some of gate, up, down"):
        LowPrecisionSpec("Q2_K", roles=("router",))
