"""The same model with other weights: an original for one that exists only quantised.

Owns a rewriting of a model that changes no logit but takes its weights off the blocks that they
were encoded in: float32 weights that no K-quant has touched, where the trained ones are not kept.

Three symmetries of the architecture, drawn at random: the channels of the residual stream are
permuted throughout; each expert's hidden neurons are permuted; and each neuron's up row is
multiplied by a factor in [1/2, 2) and its down column divided by it. After that the weights of one
block come from many former blocks with grids of their own, and rounding them to a format costs
what it costs any weights of that distribution. That is a harder one: the factors differ inside a
block of down, so errors of plain rounding are some tenths above those of trained weights.
"""

from functools import partial
from pathlib import Path

import numpy as np

from hobbit_jax.experts.low_precision import dequantize
from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo, write_gguf
from hobbit_jax.model_file.gguf_writer import metadata_of_new_weights
from hobbit_jax.model_file.metadata import text
from hobbit_jax.models.config import ModelConfig, global_tensors, layer_tensors

# Where the residual stream's channels lie in each tensor: its first or its last axis.
_AXIS = {
    **dict.fromkeys(("output_norm", "attn_norm", "ffn_norm", "attn_output"), 0),
    **dict.fromkeys(("token_embedding", "output", "attn_q", "attn_k", "attn_v", "router"), -1),
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), -1),
    "ffn_down_exps": -2,
}


def _rewritten(
    tensor: TensorInfo,
    role: str,
    channels_D: np.ndarray,
    neurons_EF: np.ndarray,
    factor_EF: np.ndarray,
) -> np.ndarray:
    """Bytes of one tensor's float32 weights."""
    values = dequantize(tensor)
    if role in _AXIS:
        values = np.take(values, channels_D, axis=_AXIS[role])
    if role in ("ffn_gate_exps", "ffn_up_exps"):
        values = np.take_along_axis(values, neurons_EF[:, :, None], axis=1)
    if role == "ffn_up_exps":
        values = values * factor_EF[:, :, None]
    if role == "ffn_down_exps":
        values = np.take_along_axis(values, neurons_EF[:, None, :], axis=2)
        values = values / factor_EF[:, None, :]
    return np.ascontiguousarray(values, np.float32).view(np.uint8)


def write_off_grid(source: GGUFFile, config: ModelConfig, path: Path, seed: int = 0) -> None:
    """Writes the rewritten model in float32.

    Raises:
        NotImplementedError: the residual stream meets a tensor that is not known here.
    """
    layers = [layer_tensors(config, layer) for layer in range(config.n_layers)]
    roles = {role for tensors in layers for role in tensors}
    if unknown := {r for r in roles - _AXIS.keys() if not r.endswith(("q_norm", "k_norm"))}:
        raise NotImplementedError(
            f"no symmetry is known of {', '.join(sorted(unknown))}; known are {', '.join(_AXIS)}"
        )
    rng, weights = np.random.default_rng(seed), {}
    channels_D = rng.permutation(config.d_model)
    shape = (config.n_experts, config.d_expert)
    for layer in layers:
        neurons_EF = np.argsort(rng.random(shape), axis=1)
        factor_EF = (2.0 ** rng.uniform(-1, 1, shape)).astype(np.float32)
        for role, key in (global_tensors(config) | layer).items():
            if key in source.tensors:
                drawn = (channels_D, neurons_EF, factor_EF)  # by role only some of them matter
                weights[key] = partial(_rewritten, source.tensors[key], role, *drawn)
    name = f"{source.read('general.name', text(), config.arch)}, off its grid"
    tensors = [(key, "F32", t.shape, weights[key]) for key, t in source.tensors.items()]
    metadata = {**metadata_of_new_weights(source.metadata, "F32"), "general.name": name}
    write_gguf(path, metadata, tensors, source.field_types)
