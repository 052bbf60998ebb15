"""Routers: a logit for each expert of an MLP, of LTE and of what it is compared with.

Learn To be Efficient, arXiv 2402.06126, section 4.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fbi.model.axes import Axes
from fbi.model.config import ModelConfig, router_shapes
from fbi.model.norm import RMSNorm
from fbi.quant import Ctx

START = 0.8  # the scores of a fresh router, about
SPREAD = 1.0  # the standard deviation of the logits of a fresh router, for inputs of RMS 1
LEAST = 1e-30  # the least magnitude whose logarithm is taken


def _dot(x: Float[Array, "b t i"], weight: Float[Array, "i o"], out: jax.P) -> Float[Array, "b t o"]:
    """x @ weight in float32 at least, whatever the compute type."""
    wide = x.astype(jnp.promote_types(x.dtype, weight.dtype))
    return jnp.dot(wide, weight, precision=jax.lax.Precision.HIGHEST, out_sharding=out)


class Router(nnx.Module):
    """x W + b: [b, t, dim] -> [b, t, experts], in float32 at least whatever the compute type.

    No site of a policy: it decides what is computed, and costs about 1 % of it (LTE, section 5). The paper names
    neither a bias nor a start. Here b = log(START / (1 - START)) and W ~ N(0, SPREAD² / dim): nearly all experts are
    on, as in the dense model that training starts from, few scores are near the threshold, where separability is
    singular, and they are unlike enough to pass it one after the other.
    """

    weight: nnx.Param

    def __init__(self, config: ModelConfig, *, norm: RMSNorm | None, axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm, self.axes = norm, axes
        shapes = router_shapes(config)
        for name, shape in shapes.items():
            if len(shape) == 2:
                self._draw(name, shape, None if name == "thin" else axes.ff, dtype, rngs)
        spec = jax.P(axes.ff)
        self.bias = nnx.Param(jnp.full(shapes["bias"], math.log(START / (1 - START)), dtype, out_sharding=spec))

    def _draw(self, name: str, shape: tuple[int, ...], split: str | None, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """A map whose outputs have a standard deviation of SPREAD for inputs of RMS 1."""
        drawn = jax.random.normal(rngs.params(), shape, dtype, out_sharding=jax.P(None, split))
        setattr(self, name, nnx.Param(SPREAD / math.sqrt(shape[0]) * drawn))

    def __call__(
        self, x: Float[Array, "b t d"], hidden: Float[Array, "b t f"], out: jax.P, ctx: Ctx
    ) -> Float[Array, "b t n"]:
        """Logits, laid out as `out`, of the input of the MLP and its hidden units."""
        del hidden
        x = x if self.norm is None else self.norm(x)
        return self.logits(x, out, ctx) + self.bias[...][None, None, :]

    def logits(self, x: Float[Array, "b t d"], out: jax.P, ctx: Ctx) -> Float[Array, "b t n"]:
        """Before the bias."""
        del ctx
        return _dot(x, self.weight[...], out)


class LowRank(Router):
    """x A B + b: Deja Vu's predictor (arXiv 2310.17157, section 4; two linear maps in its code, without the bias)."""

    thin: nnx.Param

    def logits(self, x: Float[Array, "b t d"], out: jax.P, ctx: Ctx) -> Float[Array, "b t n"]:
        """Before the bias."""
        del ctx
        return _dot(_dot(x, self.thin[...], jax.P(self.axes.batch, None, None)), self.weight[...], out)


class Noisy(Router):
    """x W + N(0, 1) softplus(x W_noise), arXiv 1701.06538, eq. 4: noise where the step has a key, in training alone.

    The paper has no bias and starts both maps at zero; here they start as LTE's, or at step 0 no expert would be before
    another.
    """

    noise: nnx.Param

    def logits(self, x: Float[Array, "b t d"], out: jax.P, ctx: Ctx) -> Float[Array, "b t n"]:
        """Before the bias."""
        clean = _dot(x, self.weight[...], out)
        if ctx.key is None:
            return clean
        drawn = jax.random.normal(ctx.key, clean.shape, clean.dtype, out_sharding=out)
        return clean + drawn * jax.nn.softplus(_dot(x, self.noise[...], out))


class Oracle(Router):
    """log sum_j |h_j| over the neurons j of each expert: the selection by what experts really do, which skips no work.

    MoEfication, arXiv 2110.01786, section 3.3, "groundtruth selection"; its activations are those of ReLU.
    """

    def __init__(self, config: ModelConfig, *, norm: RMSNorm | None, axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs):
        del norm, dtype, rngs
        self.experts, self.axes = config.experts, axes

    def __call__(
        self, x: Float[Array, "b t d"], hidden: Float[Array, "b t f"], out: jax.P, ctx: Ctx
    ) -> Float[Array, "b t n"]:
        """Logits, laid out as `out`; no gradient passes."""
        del x, out, ctx
        return jnp.log(magnitude(hidden, self.experts) + LEAST)


ROUTERS: dict[str, type[Router]] = {
    "linear": Router,
    "low-rank": LowRank,
    "noisy": Noisy,
    "random": Router,  # routing=hard gives it no gradient, and no run before it is needed
    "oracle": Oracle,
}


def adds_noise(config: ModelConfig) -> bool:
    """Whether the routers of a model add noise in training."""
    return config.router == "noisy" and config.routing in ("soft", "softmax")


def magnitude(hidden: Float[Array, "*s f"], experts: int) -> Float[Array, "*s n"]:
    """sum_j |h_j| over the neurons of each expert, in float32 at least; a constant to the gradient."""
    wide = jnp.abs(jax.lax.stop_gradient(hidden)).astype(jnp.promote_types(hidden.dtype, jnp.float32))
    there = jax.typeof(hidden).sharding
    blocks = (*hidden.shape[:-1], experts, hidden.shape[-1] // experts)
    split = jax.NamedSharding(there.mesh, jax.P(*there.spec, None))
    return jnp.sum(jax.lax.reshape(wide, blocks, out_sharding=split), -1)
