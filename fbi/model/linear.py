"""A linear layer that is given its quantizers by the policy."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fbi.model import taps
from fbi.model.axes import gathered
from fbi.model.dense import dense
from fbi.model.norm import RMSNorm
from fbi.policy import Methods
from fbi.quant import Ctx


class Linear(nnx.Module):
    """y = quantize(norm(x)) @ quantize(w), without a bias. The latent w [in, out] keeps its own type.

    Each operand is quantized at least in float32 and cast once to the type of x. `spec` is the weight at rest; the
    quantized, cast weight is what FSDP gathers.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        methods: Methods,
        *,
        std: float,
        spec: jax.P,
        dtype: jnp.dtype,
        norm: RMSNorm | None,
        rngs: nnx.Rngs,
        site: str = "",
    ):
        self.site = site  # its name to whoever taps it
        self.methods, self.spec, self.norm = methods, spec, norm
        w = std * jax.random.normal(rngs.params(), shape, dtype, out_sharding=spec)
        self.w = nnx.Param(w)
        if learned := methods.weight.build("weight").init(w):
            self.q = nnx.data({name: nnx.Param(leaf) for name, leaf in learned.items()})

    def __call__(self, x: Float[Array, "b t i"], out: jax.P, ctx: Ctx) -> Float[Array, "b t o"]:
        if self.norm is not None:
            x = self.norm(x)
        taps.tap(self.site, x)
        qparams = {name: leaf[...] for name, leaf in self.q.items()} if hasattr(self, "q") else {}
        w_hat = self.methods.weight.build("weight").apply(self.w[...], qparams, ctx).astype(x.dtype)
        x_hat = self.methods.activation.build("activation").apply(x, {}, ctx).astype(x.dtype)
        return taps.tap(f"{self.site}.out", dense(x_hat, jax.sharding.reshard(w_hat, gathered(self.spec)), out))
