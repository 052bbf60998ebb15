"""How FSDP brings a weight to the devices that multiply by it: its values, or its codes packed into bytes.

Both give the same numbers. A weight is quantized where it lies, each device its own part, before it travels;
statistics over the whole matrix are sums of sums. As codes a binary weight costs 1 bit, a ternary one 2 (five to a
byte would be 1.6, and five times slower to read), where its values cost 16 or 32; every device then decodes all of what
it uses. Scales travel as they are.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.model.axes import FSDP, gathered
from fbi.quant import Ctx, Encoded, QParams, Quantizer, decode

# (quantizer, w at rest, what is learned beside it, ctx, the quantized w at rest, layout at rest) -> it, gathered
Gather = Callable[[Quantizer, Array, QParams, Ctx, Array, jax.P], Array]


def by_value(
    quantizer: Quantizer, w: Array, qparams: QParams, ctx: Ctx, w_hat: Float[Array, "i o"], spec: jax.P
) -> Float[Array, "i o"]:
    """The quantized weight as it is in use, in its own type; no gradient."""
    del quantizer, w, qparams, ctx
    return jax.sharding.reshard(jax.lax.stop_gradient(w_hat), gathered(spec))


def by_code(
    quantizer: Quantizer, w: Float[Array, "i o"], qparams: QParams, ctx: Ctx, w_hat: Float[Array, "i o"], spec: jax.P
) -> Float[Array, "i o"]:
    """The same, from codes; as `by_value` where the method has none, or no other device has a part."""
    dim, names = travelling(jax.typeof(w).sharding.spec)
    mesh = jax.sharding.get_abstract_mesh()
    if not quantizer.coded or math.prod(mesh.shape[name] for name in names) == 1:
        return by_value(quantizer, w, qparams, ctx, w_hat, spec)
    encoded = quantizer.encode(*jax.lax.stop_gradient((w, qparams)), ctx)
    used = decode(carried(encoded, dim, names)).astype(w_hat.dtype)
    return jax.sharding.reshard(used, gathered(spec))


GATHERS: dict[str, Gather] = {"values": by_value, "codes": by_code}


def travelling(rest: jax.P) -> tuple[int, tuple[str, ...]]:
    """The axis of a weight at rest that FSDP splits, and the mesh axes over which its parts are gathered.

    They are FSDP's own and those within it: parts are put together in the order in which they lie.
    """
    for dim, entry in enumerate(rest):
        names = entry if isinstance(entry, tuple) else (entry,)
        if FSDP in names:
            return dim, names[names.index(FSDP) :]
    return 0, ()


def _without(spec: jax.P, names: tuple[str, ...]) -> jax.P:
    """A layout that is not split over these mesh axes."""

    def kept(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(entry, tuple):
            return tuple(name for name in entry if name not in names) or None
        return None if entry in names else entry

    return jax.P(*map(kept, spec))


def carried(encoded: Encoded, dim: int, names: tuple[str, ...]) -> Encoded:
    """Codes and scales split along `dim` over the mesh axes `names` as every device along these axes has them."""
    grid = encoded.grid
    assert grid is not None  # only methods with codes come here
    into = _without(jax.typeof(encoded.codes).sharding.spec, names)

    def local(part: Array) -> Array:
        packed = jax.tree.map(lambda data: jax.lax.all_gather(data, names), grid.pack(part, trits=False))
        parts = jax.vmap(lambda arrays: grid.unpack(arrays, part.shape, trits=False).astype(part.dtype))(packed)
        whole = [size * parts.shape[0] if axis == dim else size for axis, size in enumerate(part.shape)]
        return jnp.moveaxis(parts, 0, dim).reshape(whole)

    # What all devices gathered is alike on all of them, which the check cannot know.
    codes = jax.shard_map(local, out_specs=into, check_vma=False)(encoded.codes)
    numbers = lambda leaf: jax.sharding.reshard(leaf, _without(jax.typeof(leaf).sharding.spec, names))  # noqa: E731
    return dataclasses.replace(encoded, codes=codes, field=jax.tree.map(numbers, encoded.field))
