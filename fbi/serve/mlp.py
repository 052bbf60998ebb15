"""The routed MLP as it is served: the weights packed by expert, those that are skipped not read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fbi.model import taps
from fbi.model.axes import Axes
from fbi.model.config import ModelConfig
from fbi.model.linear import Linear
from fbi.model.norm import RMSNorm
from fbi.model.router import ROUTERS, Router
from fbi.model.routing import THRESHOLD, choice
from fbi.quant import Ctx
from fbi.serve.ffn import METHODS, packed_ffn
from fbi.serve.packed import Packed


class SparseMLP(nnx.Module):
    """sum_i 1[G_i(x) > 1/2] E_i(x), as `RoutedMLP` with routing=hard computes it; LTE, arXiv 2402.06126, eq. 7.

    `gate`, `up` and `down` are those of `fbi.serve.packed.Packed`, in the compute type, whole on every device.
    """

    def __init__(self, config: ModelConfig, router: Router, axes: Axes, method: str):
        n, e, d = config.experts, config.expert, config.dim
        self.activation, self.axes, self.method = config.activation, axes, method
        block = (n, d, e) if METHODS[method].layout == "columns" else (n, e, d)

        def zeros(shape: tuple[int, int, int]) -> Any:
            return nnx.Param(jnp.zeros(shape, config.dtype, out_sharding=jax.P(None, None, None)))

        self.gate: Any = zeros(block) if config.gated else None
        self.up, self.down = zeros(block), zeros((n, e, d))
        self.router, self.choice = router, choice(config.top_k)

    def __call__(self, x: Float[Array, "b t d"], ctx: Ctx) -> Float[Array, "b t d"]:
        """The layer's output for x; which experts are read follows from x."""
        spec = jax.typeof(x).sharding.spec
        logits = self.choice(self.router(x, x, self.axes.hidden(self.axes.ff), ctx))  # of the input: no oracle here
        scores = taps.tap(taps.ROUTER, jax.nn.sigmoid(logits))
        active = jax.sharding.reshard(scores > THRESHOLD, spec)  # every device has all experts
        gate = None if self.gate is None else self.gate[...]

        def local(x: Array, active: Array, packed: Packed) -> Array:
            rows, chosen = (a.reshape(-1, a.shape[-1]) for a in (x, active))
            return packed_ffn(rows, packed, chosen, self.activation, self.method).reshape(x.shape)

        # Of one device each: a custom call has no rule for arrays that are split.
        call: Any = jax.shard_map(local, out_specs=spec, check_vma=False)
        return call(x, active, Packed(gate, self.up[...], self.down[...]))


class Sparse(NamedTuple):
    """Makes `SparseMLP` where a model asks for an MLP; compares by value, as compiled functions need it."""

    method: str

    def __call__(
        self,
        config: ModelConfig,
        linear: Callable[[str], Linear],
        sub_norm: RMSNorm | None,
        router_norm: RMSNorm | None,
        axes: Axes,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> SparseMLP:
        """The MLP of one block, as `fbi.model.mlp.mlp` makes a dense one."""
        del linear, sub_norm  # `fbi.serve.decode.sparse` refuses models that have more than plain products here
        router = ROUTERS[config.router](config, norm=router_norm, axes=axes, dtype=dtype, rngs=rngs)
        return SparseMLP(config, router, axes, self.method)
