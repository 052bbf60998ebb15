"""The sparse feed-forward layer as a Pallas kernel for TPU: the list of experts steers what is fetched."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from fbi.serve.compiled import listed
from fbi.serve.packed import ACTIVATIONS, Packed

SUBLANES = 8  # rows of a tile


def _kernel(activation: str, gated: bool):
    act = ACTIVATIONS[activation]

    def across(a: Array, b: Array, dims: tuple[int, int]) -> Array:
        exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        contract = (((dims[0],), (dims[1],)), ((), ()))
        return jax.lax.dot_general(a, b, contract, precision=exact, preferred_element_type=jnp.float32)

    def kernel(order, count, first, x, chosen, *rest):
        del order, first  # the index maps read them
        *gate, up, down, y = rest
        step = pl.program_id(0)

        @pl.when(step == 0)
        def _():
            y[...] = jnp.zeros_like(y)

        @pl.when(step < count[0])
        def _():
            h = across(x[...], up[0].astype(x.dtype), (1, 1))
            h = act(across(x[...], gate[0][0].astype(x.dtype), (1, 1))) * h if gated else act(h)
            h = jnp.where(chosen[0] != 0, h, 0.0).astype(x.dtype)
            y[...] += across(h, down[0].astype(x.dtype), (1, 0))

    return kernel


def tiled(
    x: Float[Array, "t d"],
    packed: Packed,
    active: Bool[Array, "t n"],
    activation: str,
    first: Int[Array, ""],
    cap: int | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "t d"]:
    """One grid step an expert in use, at most `cap` (all); weights in the layout `rows`; unused steps fetch nothing.

    Past the end of the list the block of the last expert is asked for again, which the pipeline already holds. With a
    `cap`, more experts than that are left to a second call of all steps.
    """
    (t, d), n, e = x.shape, active.shape[1], packed.down.shape[1]
    order, count = listed(active)
    # Beyond the list: its last expert.
    order = order[jnp.minimum(jnp.arange(n), jnp.maximum(count - 1, 0))]
    rows = -(-t // SUBLANES) * SUBLANES
    weights = [w for w in packed if w is not None]
    padded = jnp.pad(x, ((0, rows - t), (0, 0)))
    chosen = jnp.pad(active.T, ((0, 0), (0, rows - t))).astype(jnp.float32)[:, :, None]

    whole = lambda step, order, count, first: (0, 0)  # noqa: E731
    block = lambda step, order, count, first: (first[0] + order[step], 0, 0)  # noqa: E731
    mask = lambda step, order, count, first: (order[step], 0, 0)  # noqa: E731

    def run(steps: int) -> Array:
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec((rows, d), whole),
                pl.BlockSpec((1, rows, 1), mask),
                *[pl.BlockSpec((1, e, d), block) for _ in weights],
            ],
            out_specs=pl.BlockSpec((rows, d), whole),
        )
        call = pl.pallas_call(
            _kernel(activation, packed.gate is not None),
            grid_spec=grid,
            out_shape=jax.ShapeDtypeStruct((rows, d), jnp.float32),
            interpret=interpret,
        )
        return call(order, count.reshape(1), first.reshape(1), padded, chosen, *weights)

    if cap is None or cap >= n:
        return run(n)[:t]
    return jax.lax.cond(count <= cap, lambda: run(max(cap, 1)), lambda: run(n))[:t]
