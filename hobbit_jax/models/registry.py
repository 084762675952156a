"""Which families there are, and the decision whether we can run a file at all.

`read_config` takes every number from the metadata and holds every tensor against it, so the store
and the model may index without asking. A tensor that a family does not declare, and a key that
changes the arithmetic and that it does not read, are refused by name.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from hobbit_jax.model_file import metadata
from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo
from hobbit_jax.model_file.metadata import shown
from hobbit_jax.model_file.other_files import refuse_other_kinds
from hobbit_jax.models import families
from hobbit_jax.models.config import ROPE_DIVISORS, ModelConfig, block_shapes, tensor_shapes
from hobbit_jax.models.keys import Keys

# By `general.architecture`, what makes a model of a file's keys. It raises ValueError for a missing
# or impossible key, and NotImplementedError for a feature that we do not compute.
FAMILIES: dict[str, Callable[[Keys], ModelConfig]] = {
    "qwen3moe": families.qwen3moe,
    "llama": families.llama,
    "olmoe": families.olmoe,
    "deepseek2": families.deepseek2,
    "glm4moe": families.glm4moe,
    "bailingmoe2": families.bailingmoe2,
    "ernie4_5-moe": families.ernie4_5_moe,
    "qwen2": families.qwen2,
    "qwen2moe": families.qwen2moe,
    "qwen3": families.qwen3,
    "qwen3vlmoe": families.qwen3moe,  # on texts; `n_deepstack_layers` add features of images
    "qwen35moe": families.qwen35moe,
    "qwen3next": families.qwen35moe,
    "gpt-oss": families.gpt_oss,
    "gemma4": families.gemma4,
    "granitemoe": families.granitemoe,
    "lfm2moe": families.lfm2moe,
}


def read_config(file: GGUFFile) -> ModelConfig:
    """Reads the hyperparameters and checks that all tensors fit them.

    Raises:
      ValueError: a missing or impossible key, a missing tensor, or one of the wrong shape.
      NotImplementedError: another architecture, or a feature that we do not compute.
    """
    refuse_other_kinds(file)
    arch = file.read("general.architecture", metadata.text())
    if arch not in FAMILIES:
        raise NotImplementedError(
            f"{file.paths[0]}: architecture {shown(arch)}; supported are {', '.join(FAMILIES)}"
        )
    keys = Keys(file, arch)
    config = FAMILIES[arch](keys)
    keys.refuse_unread()
    others = file.tensors.keys() - tensor_shapes(config).keys()
    config = replace(config, scales=frozenset(name for name in others if _SCALE.fullmatch(name)))
    _check_tensors(file, config)
    return config


# Those that llama.cpp reads in every family (src/llama-model.cpp, in build 11549), and multiplies
# by in some (docs/log/2026-11-30-scales-of-matrices.md).
_SCALE = re.compile(
    r"(output|blk\.\d+\.(attn_(q|k|v|qkv|gate|output)|ffn_(gate|up|down)(_exps|_shexp)?|"
    r"ssm_(out|alpha|beta)))\.scale"
)


# Tensors that change the arithmetic, by the sentence that refuses them; first match counts.
_REFUSED_TENSORS = (
    (r"rope_(freqs|factors_\w+)\.weight|.*\.rope_(freqs|factors_\w+)\.weight",
     "scaled rotary frequencies; supported are plain ones"),
    (r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight",
     "one tensor per expert, as converters wrote before April 2024, and one is missing or of "
     "another type; supported are equal ones: convert the model again with a current llama.cpp"),
    (r".*_shexp\..*", "shared experts, which we do not compute for this architecture"),
    (r".*\.ssm_in\..*",
     "a delta net whose q, k, v and z are tangled, as converters wrote first; supported are "
     "attn_qkv and attn_gate: convert the model again with a current llama.cpp"),
    (r".*\.attn_qkv\..*", "fused q, k and v, which we do not compute for this architecture"),
    (r".*\.scale", "a scale of a matrix that is not there or that has none in llama.cpp"),
    (r".*\.bias", "biases, which we do not compute for this architecture"),
)  # fmt: skip


def _changes_nothing(tensor: TensorInfo, config: ModelConfig) -> bool:
    """Whether a tensor that the family does not declare leaves the arithmetic as it is."""
    if tensor.name == ROPE_DIVISORS and tensor.format == "F32" and tensor.nbytes > 0:
        return bool((tensor.raw.view("<f4") == 1).all())
    # In a block that predicts a further token, which does not run.
    block = re.match(r"blk\.(\d+)\.", tensor.name)
    if block and 0 <= int(block[1]) - config.n_blocks < config.skipped_blocks:
        return True
    # For backends that round activations to FP4, as llama.cpp does on some GPUs; none here does.
    return tensor.name.endswith(".input_scale")


def _check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    wanted = tensor_shapes(config)
    path = file.paths[0]
    unknown = {
        name
        for name in file.tensors.keys() - wanted.keys()
        if not _changes_nothing(file.tensors[name], config)
    }
    for name in unknown:
        for pattern, what in _REFUSED_TENSORS:
            if re.fullmatch(pattern, name):
                raise NotImplementedError(f"{path}: tensor {shown(name)} means {what}")
    # A foreign tensor is reported before a missing one: it says more about what the file is.
    foreign = sorted(unknown)
    if foreign:
        roles = dict.fromkeys(r for n in range(config.n_blocks) for r in block_shapes(config, n))
        raise NotImplementedError(
            f"{path}: tensor {shown(foreign[0])} is no part of {config.arch} with "
            f"{config.n_blocks} layers as we compute it; supported roles are {', '.join(roles)}"
        )
    for name, shape in wanted.items():
        if name not in file.tensors:
            raise ValueError(
                f"{path}: tensor {name!r} is missing, expected shape {shape}; download or convert "
                "the model again"
            )
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {file.tensors[name].shape}, expected {shape} "
                "from the metadata; convert the model again"
            )
