"""Low tiers on disk: what is in the file, when it is made again, and that it is whole or absent."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from conftest import TWO_BANKS
from tiny_models import write_model

from hobbit_jax import quantize, scale_search, tiers
from hobbit_jax.architecture import layer_tensors, read_config
from hobbit_jax.gguf_file import open_gguf
from hobbit_jax.quantize import encode
from hobbit_jax.store import ROLES


@pytest.fixture(scope="module")
def source(two_banks_path):
    return open_gguf(two_banks_path)


def test_contents(source, tmp_path):
    config = read_config(source)
    low = tiers.open_tier(source, config, "Q2_K", tmp_path)
    assert read_config(low) == config
    assert low.metadata[tiers.SOURCE_KEY] == source.sha256()
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
        assert tensor.data.tobytes() == encode(rows, "Q2_K").tobytes()


def test_reused_until_the_source_or_an_encoder_changes(source, tmp_path, monkeypatch):
    config = read_config(source)
    made = tiers.open_tier(source, config, "Q8_0", tmp_path).paths[0]
    stamp = made.stat().st_mtime_ns, made.stat().st_ino
    again = tiers.open_tier(source, config, "Q8_0", tmp_path).paths[0]
    assert again == made and (again.stat().st_mtime_ns, again.stat().st_ino) == stamp

    write_model(replace(TWO_BANKS, seed=6), tmp_path / "other.gguf")
    other = tiers.open_tier(open_gguf(tmp_path / "other.gguf"), config, "Q8_0", tmp_path).paths[0]
    assert other != made and made.exists()
    for module in (quantize, scale_search):
        text = Path(module.__file__).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(tmp_path / "better.py"))
            (tmp_path / "better.py").write_bytes(text + b"# better")
            better = tiers.open_tier(source, config, "Q8_0", tmp_path).paths[0]
            assert better not in (made, other)


def test_interrupted_writing_leaves_no_tier(source, tmp_path, monkeypatch):
    config, calls = read_config(source), []

    def failing(weights, format):
        calls.append(format)
        if len(calls) > 2 * TWO_BANKS.n_experts:
            raise KeyboardInterrupt
        return encode(weights, format)

    with monkeypatch.context() as patch:
        patch.setattr(tiers.quantize, "encode", failing)
        with pytest.raises(KeyboardInterrupt):
            tiers.open_tier(source, config, "Q8_0", tmp_path)
    assert len(calls) == 2 * TWO_BANKS.n_experts + 1 and not any(tmp_path.iterdir())
    assert tiers.open_tier(source, config, "Q8_0", tmp_path).tensors.keys() == source.tensors.keys()
