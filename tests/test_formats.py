"""Weight formats against gguf-py, bit for bit: values, round trips, sizes, errors."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_oracle import dequantize

from hobbit_jax.quantize import ggml
from pallas_kernels.formats import FORMATS, get_format
from pallas_kernels.ggml.library import type_functions

ALL_F16 = np.arange(2**16, dtype=np.uint16)
FINITE_F16 = ALL_F16[np.isfinite(ALL_F16.view(np.float16))]
NAN_F16 = ALL_F16[np.isnan(ALL_F16.view(np.float16))]
# Zeros, smallest and largest subnormal, smallest normal, largest; each with both signs.
EDGE_F16 = np.array([0, 1, 0x3FF, 0x400, 0x7BFF], np.uint16)
EDGE_F16 = np.concatenate([EDGE_F16, EDGE_F16 | 0x8000])
# E8M0 exponents whose products are subnormal (0, 1), smallest normal, and those that overflow.
EDGE_E8M0 = np.array([0, 1, 2, 126, 127, 253, 254, 255], np.uint8)

ROWS, BLOCKS = 6, 9
every_format = pytest.mark.parametrize("name", FORMATS)


def _random_raw(name, lead=()):
    """Random bytes, uint8 [*lead, ROWS, row_bytes]; the first two rows all clear and all set."""
    fmt = get_format(name)
    rng = np.random.default_rng(sum(name.encode()) + len(lead))
    raw_RGb = rng.integers(0, 256, (*lead, ROWS, BLOCKS, fmt.block_bytes), dtype=np.uint8)
    raw_RGb[..., 0, :, :] = 0x00
    raw_RGb[..., 1, :, :] = 0xFF
    return raw_RGb, rng


def _set_f16(raw_RGb, name, rng, choices):
    """Puts `choices` into every float16 of the blocks. A wrong offset meets random bits elsewhere,
    and the oracle reads them from the right one."""
    fmt, start = get_format(name), 0
    for plane in fmt.planes:
        if plane.dtype == np.float16:
            d_RG = rng.choice(choices, raw_RGb.shape[:-1])
            raw_RGb[..., start : start + 2] = d_RG.astype("<u2")[..., None].view(np.uint8)
        start += plane.block_bytes
    if name == "IQ1_M":  # the tops of four 16-bit words
        nibbles_RG4 = rng.choice(choices, raw_RGb.shape[:-1])[..., None] >> np.arange(0, 16, 4)
        raw_RGb[..., 49::2] = raw_RGb[..., 49::2] & 15 | (nibbles_RG4 & 15).astype(np.uint8) << 4


def _finite_raw(name, lead):
    raw_RGb, rng = _random_raw(name, lead)
    # As many edge values as ordinary ones.
    choices = np.concatenate([rng.choice(FINITE_F16, EDGE_F16.size), EDGE_F16])
    _set_f16(raw_RGb, name, rng, choices)
    if name == "MXFP4":
        edges = rng.random(raw_RGb.shape[:-1]) < 0.5
        raw_RGb[..., 0] = np.where(edges, rng.choice(EDGE_E8M0, edges.shape), raw_RGb[..., 0])
    return raw_RGb.reshape(*raw_RGb.shape[:-2], -1)


def _assert_same_bits(weights, wanted):
    np.testing.assert_array_equal(np.asarray(weights).view(np.uint32), wanted.view(np.uint32))


@every_format
@pytest.mark.parametrize(
    ("lead", "jit"), [((2, 2), jax.jit), ((), lambda function: function)], ids=["jit-2", "eager-0"]
)
def test_unpack_equals_gguf_bit_for_bit(name, lead, jit):
    fmt = get_format(name)
    raw = _finite_raw(name, lead)
    weights = jit(lambda raw: fmt.unpack(fmt.split(raw)))(raw)  # fusion must change no bit either
    assert weights.dtype == jnp.float32
    assert weights.shape == (*lead, ROWS, BLOCKS * fmt.block_weights)
    _assert_same_bits(weights, dequantize(raw, name))


@pytest.mark.slow
@every_format
def test_encoded_weights_decode_to_what_was_encoded(name):
    """Blocks as ggml's encoder writes them, which random bytes never are."""
    fmt = get_format(name)
    weights_RW = np.random.default_rng(3).standard_normal((2, 256)).astype(np.float32)
    raw = ggml.encode(weights_RW, name, np.ones(256, np.float32))
    decoded = np.asarray(jax.jit(lambda raw: fmt.unpack(fmt.split(raw)))(raw))
    _assert_same_bits(decoded, dequantize(raw, name))
    assert np.mean((decoded - weights_RW) ** 2) < np.mean(weights_RW**2)  # better than zeros


@every_format
@pytest.mark.parametrize(
    ("scales", "jit"),
    [("nan", jax.jit), ("any", lambda function: function)],
    ids=["nan", "any-eager"],
)
def test_join_inverts_split_on_any_bytes(name, scales, jit):
    fmt = get_format(name)
    raw_RGb, rng = _random_raw(name, (2,))
    if scales == "nan":
        _set_f16(raw_RGb, name, rng, NAN_F16)
    raw = raw_RGb.reshape(*raw_RGb.shape[:-2], -1)
    planes = jit(fmt.split)(raw)
    assert sum(plane.nbytes for plane in planes.values()) == raw.nbytes
    np.testing.assert_array_equal(jit(fmt.join)(planes), raw)


@every_format
def test_planes_are_slices_of_each_block(name):
    """Each plane holds its field's bytes, in block order, with the promised shape and dtype."""
    fmt = get_format(name)
    raw_RGb, _ = _random_raw(name)
    planes = jax.jit(fmt.split)(raw_RGb.reshape(ROWS, -1))
    shapes = fmt.plane_shapes(ROWS, BLOCKS * fmt.block_weights)
    assert list(shapes) == [plane.name for plane in fmt.planes]
    assert {key: (p.shape, p.dtype) for key, p in planes.items()} == {
        key: (s.shape, s.dtype) for key, s in shapes.items()
    }
    start = 0
    for key in shapes:  # in block order; a jit returns its dict sorted by name
        field_RGb = np.asarray(planes[key]).view(np.uint8).reshape(ROWS, BLOCKS, -1)
        stop = start + field_RGb.shape[-1]
        np.testing.assert_array_equal(field_RGb, raw_RGb[..., start:stop], err_msg=key)
        start = stop


@every_format
def test_numbers_and_sizes_equal_ggml_and_gguf(name):
    fmt = get_format(name)
    functions = type_functions(name, "ggml_f32")  # by ggml's number of the type
    assert (fmt.block_weights, fmt.block_bytes) == (
        functions.block_weights,
        functions.block_bytes,
    )
    if name in gguf.GGMLQuantizationType.__members__:
        kind = gguf.GGMLQuantizationType[name]
        assert (fmt.number, fmt.block_weights, fmt.block_bytes) == (
            kind,
            *gguf.GGML_QUANT_SIZES[kind],
        )
    assert fmt.row_bytes(3 * fmt.block_weights) == 3 * fmt.block_bytes


def test_every_mxfp4_weight():
    """All 256 exponents with all 16 codes: both nibbles of byte i hold code i."""
    codes = np.arange(16, dtype=np.uint8) * 17
    raw = np.concatenate(
        [np.arange(256, dtype=np.uint8)[:, None], np.tile(codes, (256, 1))], axis=-1
    )
    fmt = get_format("MXFP4")
    weights = jax.jit(fmt.unpack)(fmt.split(raw))
    _assert_same_bits(weights, dequantize(raw, "MXFP4"))


def test_every_nvfp4_scale():
    """All 256 scale bytes with all 16 codes, among them the two zeros and the ignored sign."""
    scales = np.arange(256, dtype=np.uint8).reshape(64, 4)
    codes = np.arange(16, dtype=np.uint8).reshape(2, 8)
    quants = np.tile(codes[0] | codes[1] << 4, (64, 4))
    raw = np.concatenate([scales, quants], axis=-1)
    fmt = get_format("NVFP4")
    weights = jax.jit(fmt.unpack)(fmt.split(raw))
    _assert_same_bits(weights, dequantize(raw, "NVFP4"))


@pytest.mark.parametrize("name", [fmt.name for fmt in FORMATS.values() if fmt.integers])
def test_pack_inverts_integers(name):
    fmt = get_format(name)
    raw_GP, _ = _random_raw(name)
    raw_GP = raw_GP.reshape(-1, fmt.block_bytes)
    blocks = fmt._elements(fmt.split(raw_GP))
    integers = [np.asarray(part).reshape(len(raw_GP), -1) for part in fmt.integers(blocks)]
    planes = fmt.split(raw_GP)
    floats = [np.asarray(planes[p.name])[:, 0] for p in fmt.planes if p.dtype == np.float16]
    np.testing.assert_array_equal(fmt.pack(integers, floats), raw_GP)


def test_f32_unpack_is_a_differentiable_identity():
    fmt = get_format("F32")
    weights_RW = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    loss = lambda weights_RW: jnp.sum(fmt.unpack({"weights": weights_RW}) ** 2)  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(weights_RW), 2 * weights_RW)


def test_format_is_a_static_jit_argument():
    unpack = functools.partial(jax.jit, static_argnums=0)(lambda fmt, planes: fmt.unpack(planes))
    fmt = get_format("Q8_0")
    planes = fmt.split(_finite_raw("Q8_0", ()))
    np.testing.assert_array_equal(unpack(fmt, planes), fmt.unpack(planes))


def test_unknown_format_names_itself_and_the_supported():
    with pytest.raises(NotImplementedError, match=r"Q8_K.*F32, .*Q4_K, .*MXFP4"):
        get_format("Q8_K")


def test_a_row_is_filled_up_to_whole_blocks():
    fmt = get_format("Q4_K")
    assert (fmt.padded(512), fmt.padded(513), fmt.row_bytes(513)) == (512, 768, 3 * 144)
    assert fmt.plane_shapes(2, 513)["d"].shape == (2, 3)


def test_a_part_of_a_block_is_an_error():
    with pytest.raises(ValueError, match="Q4_K: a row has 300 bytes, want a multiple of 144"):
        get_format("Q4_K").split(np.zeros((2, 300), np.uint8))


def test_wrong_dtypes_are_errors():
    fmt = get_format("Q4_K")
    with pytest.raises(ValueError, match="int8, want uint8"):
        fmt.split(np.zeros((2, 144), np.int8))
    planes = fmt.split(np.zeros((2, 144), np.uint8))
    for call in (fmt.unpack, fmt.join):
        with pytest.raises(ValueError, match=r"plane d: got float32 .*want float16"):
            call({**planes, "d": planes["d"].astype(jnp.float32)})
