"""Where each tensor axis lies on the mesh: logical names to mesh axes, as data."""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

FSDP = "data"  # the mesh axis over which a weight in use is gathered


@dataclasses.dataclass(frozen=True)
class Axes:
    """Logical axis -> mesh axis. `data` splits the batch and, as FSDP, one axis of each weight; `model` is tensor."""

    batch: str | None = "data"
    fsdp: str | None = "data"
    heads: str | None = "model"
    ff: str | None = "model"
    vocab: str | None = "model"
    sequence: str | None = None
    """What splits the positions of the residual stream between layers, which see whole sequences: `model` for the
    sequence parallelism of Korthikanti et al., arXiv 2205.05198, or nothing."""
    gather: str = "values"
    """How FSDP gathers a weight, by its name in `fbi.model.gather`."""
    product: str = "values"
    """From what the blocks' products are formed, by its name in `fbi.model.codes`."""

    @property
    def stream(self) -> P:
        """Residual stream [b, t, d]."""
        return P(self.batch, self.sequence, None)

    def whole(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The stream as layers read it: all positions of a sequence on each of its devices."""
        return x if self.sequence is None else jax.sharding.reshard(x, P(self.batch, None, None))

    def hidden(self, axis: str | None) -> P:
        """An activation [b, t, x] whose last axis is split over `axis`."""
        return P(self.batch, None, axis)

    @property
    def per_head(self) -> P:
        """Queries, keys, values [b, t, h, k]."""
        return P(self.batch, None, self.heads, None)

    def stored(self, inner: str | None, outer: str | None) -> P:
        """A weight [in, out] at rest: the axis that is not split by tensor parallelism is split by FSDP."""
        return P(inner or self.fsdp, outer or (self.fsdp if inner else None))


def whole_input(spec: P) -> P:
    """A weight [in, out] at rest whose quantizer needs the input axis whole: all is split along the outputs."""
    inner, outer = spec
    axes = tuple(axis for axis in (outer, inner) if axis is not None)
    return P(None, axes or None)


def gathered(spec: P) -> P:
    """A weight in use: what FSDP split is whole, what tensor parallelism split stays split."""
    return P(*(None if axis == FSDP else axis for axis in spec))


def mesh_in_use() -> jax.sharding.Mesh:
    """The mesh that `jax.set_mesh` set; one device where none is."""
    mesh = jax.sharding.get_mesh()
    return mesh_1x1() if mesh.empty else mesh


def mesh_1x1() -> jax.sharding.Mesh:
    """The mesh of a laptop: one device, the same code."""
    return jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
