"""A linear layer that is given its quantizers by the policy."""

import zlib
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fbi.model import taps
from fbi.model.axes import whole_input
from fbi.model.codes import Form, Seen, of_values
from fbi.model.dense import Product, multiplied
from fbi.model.gather import Gather, by_value
from fbi.model.learned import held, leaves_of
from fbi.model.norm import RMSNorm
from fbi.policy import Methods
from fbi.quant import Ctx, paired


def for_site(ctx: Ctx, site: str) -> Ctx:
    """The context with a key of the site's own, where there is a key."""
    return ctx if ctx.key is None else ctx._replace(key=jax.random.fold_in(ctx.key, zlib.crc32(site.encode())))


def finished(methods: Methods, y: Float[Array, "b t o"], product: Product) -> Float[Array, "b t o"]:
    """What the weight's method does to the product y of a layer."""
    return methods.build()[0].around.post(y, product.after or {}, product.memo)


class Read:
    """A tensor that several layers read. What two of them make of it alike is made once.

    So it is kept once for the backward pass, and their gradients are summed before they go back through it.
    """

    def __init__(self, x: Float[Array, "b t i"]):
        self.x = x
        self._made: dict[Hashable, Array] = {}

    def made(self, how: Hashable, make: Callable[[], Array]) -> Array:
        """What `make` gives, or gave before to whoever asked in the same way."""
        if how not in self._made:
            self._made[how] = make()
        return self._made[how]


class Linear(nnx.Module):
    """y = post(quantize(pre(norm(x))) @ quantize(w)), without a bias. The latent w [in, out] keeps its own type.

    Each operand is quantized at least in float32 and cast once to the type of x; the quantized, cast weight is what
    FSDP gathers, in the way of `gather`, to be laid out as `spec`. `form` says from what the product is formed. `pre`
    and `post` are what the weight's method adds around the product. What is learned beside w lies in `q` (the weight's
    quantizer), `a` (the activation's) and `r` (around the product).
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
        gather: Gather = by_value,
        form: Form = of_values,
    ):
        self.site, self.methods, self.norm, self.spec = site, methods, norm, spec
        self.gather, self.form = gather, form
        weight, activation = methods.build()
        key, rest = rngs.params(), whole_input(spec) if weight.whole else spec
        w = std * jax.random.normal(key, shape, dtype, out_sharding=rest)
        self.w = nnx.Param(w)
        # A token stands for the batch until `Model.calibrate` has seen one.
        x = jnp.ones((1, 1, shape[0]), dtype)
        held(self, "q", weight.init(w))
        held(self, "a", activation.init(x))
        held(self, "r", weight.around.init(w, jax.random.fold_in(key, 1)), replicated=True)

    def __call__(
        self, x: Float[Array, "b t i"] | Read, out: jax.P, ctx: Ctx, after: Callable[[Array], Array] = taps.identity
    ) -> Float[Array, "b t o"]:
        """The product, laid out as `out`; `after` is applied to the quantized input."""
        product = self.operands(x, ctx, after)
        return taps.tap(f"{self.site}.out", finished(self.methods, multiplied(product, out), product))

    def operands(
        self, x: Float[Array, "b t i"] | Read, ctx: Ctx, after: Callable[[Array], Array] = taps.identity
    ) -> Product:
        """What is multiplied."""
        read = x if isinstance(x, Read) else Read(x)
        x = read.x if self.norm is None else self.norm(read.x)
        taps.tap(self.site, x)
        ctx, around = for_site(ctx, self.site), leaves_of(self, "r")
        weight, activation = paired(*self.methods.build())
        latent = self.w[...], leaves_of(self, "q"), for_site(ctx, "w")
        w_hat = weight.apply(*latent).astype(x.dtype)
        full = self.gather(weight, *latent, w_hat, self.spec)
        spec = jax.typeof(x).sharding.spec
        whole = jax.P(*spec[:-1], None) if activation.whole else spec
        x, memo = weight.around.pre(x, around)
        seen = jax.sharding.reshard(x, whole), leaves_of(self, "a"), for_site(ctx, "a")
        own = x is not read.x or seen[1] or (activation.draws and ctx.key is not None)
        quantized = lambda: jax.sharding.reshard(activation.apply(*seen).astype(x.dtype), spec)  # noqa: E731
        x_hat = after(quantized() if own else read.made(activation, quantized))
        form = self.form if after is taps.identity else of_values  # what is left of the levels, only `after` knows
        product = Product(x_hat, w_hat, full, around, memo)
        return form(product, Seen(activation, *seen), Seen(weight, *latent), self.spec)
