"""Several devices: which of them owns which expert, and what they share.

Owns the mesh of one axis over which the experts are divided, the rule of who owns whom, where
arrays lie on it, and the sum that makes one result of the devices' parts. Everything but the
experts is replicated: each device attends, routes and samples by itself, from the same numbers.
Where one device runs there is no mesh (None) and nothing here does anything.

Each selection is computed by the one device that owns its expert, and is all zero bits elsewhere.
The parts are added as integers, so the result is the owner's to the bit: a float sum would turn
-0.0 into 0.0 and may flush subnormals.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

AXIS = "devices"
REPLICATED, DIVIDED = PartitionSpec(), PartitionSpec(AXIS)  # by the leading axis


def expert_mesh(n_devices: int) -> Mesh | None:
    """The first devices of this process; None for one, which needs no mesh.

    Raises:
        ValueError: fewer than one, or more than there are, or they are not of one kind.
    """
    devices = jax.local_devices()
    if n_devices < 1:
        raise ValueError(f"devices is {n_devices}; want 1 or more")
    if n_devices > len(devices):
        raise ValueError(
            f"{n_devices} devices were asked for and this process has {len(devices)} "
            f"({devices[0].device_kind}); JAX_NUM_CPU_DEVICES={n_devices} makes virtual ones of a "
            "CPU, for tests"
        )
    if n_devices == 1:
        return None
    kinds = {device.device_kind for device in devices[:n_devices]}
    if len(kinds) > 1:
        # Each computes what is replicated by itself; rounded otherwise, they would route apart.
        raise ValueError(f"devices are {', '.join(sorted(kinds))}; want all of one kind")
    return Mesh(np.asarray(devices[:n_devices]), (AXIS,))


def owner(layer: Any, expert: Any, n_devices: int) -> Any:
    """The device of an expert, at every precision.

    In each layer no device has more than one expert above another, and as the rule moves on by one
    from layer to layer, all have the same number over `n_devices` layers in a row.
    """
    return (layer + expert) % n_devices


def owners_LE(n_layers: int, n_experts: int, n_devices: int) -> np.ndarray:
    """`owner` of every expert, int [L, E]."""
    layer_LE, expert_LE = np.indices((n_layers, n_experts))
    return owner(layer_LE, expert_LE, n_devices)


def replicated(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same arrays on every device."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def divided(tree: Any, mesh: Mesh) -> Any:
    """Arrays cut along their leading axis, a part to each device."""
    return jax.device_put(tree, NamedSharding(mesh, DIVIDED))


def assembled(parts: list[Tree], mesh: Mesh) -> Tree:
    """One tree whose leading axes run through the devices' own; not a byte is copied."""

    def join(*arrays: jax.Array) -> jax.Array:
        shape = (len(arrays) * arrays[0].shape[0], *arrays[0].shape[1:])
        sharding = NamedSharding(mesh, DIVIDED)
        return jax.make_array_from_single_device_arrays(shape, sharding, list(arrays))

    return jax.tree.map(join, *parts)


def on_each(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on each device's parts of its arguments; itself where there is one device.

    JAX's check that what is called replicated is so does not see into Pallas kernels, and is off.
    """
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def sum_of_parts(part_AD: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Within `on_each`: float32 rows that one device has and all others hold as zeros."""
    if mesh is None:
        return part_AD
    bits_AD = jax.lax.psum(jax.lax.bitcast_convert_type(part_AD, jnp.int32), AXIS)
    return jax.lax.bitcast_convert_type(bits_AD, jnp.float32)


def held_anywhere(table_UE: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Within `on_each`: a slot table that knows who is resident on any device.

    Its numbers are slots of different devices: only their signs mean something.
    """
    return table_UE if mesh is None else jax.lax.pmax(table_UE, AXIS)
