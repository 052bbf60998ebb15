"""A tensor that several layers read is quantized once for all that do it alike; the numbers stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fbi.model.linear import Linear, Read
from fbi.model.norm import RMSNorm
from fbi.policy import Methods
from fbi.quant import Ctx, Method

WIDTH = 32
QUEST = "quest:bits=4,block=16"
OUT = jax.P("data", None, "model")


def layers(activations, norm):
    """Linear layers with weights of their own, each with its method for activations."""
    for number, activation in enumerate(activations):
        yield Linear(
            (WIDTH, WIDTH),
            Methods(Method.parse(QUEST), Method.parse(activation)),
            std=0.1,
            spec=jax.P("data", "model"),
            dtype=jnp.dtype("float64"),
            norm=RMSNorm(WIDTH, 1e-5, jnp.dtype("float64")) if norm else None,
            rngs=nnx.Rngs(number),
            site=f"layer {number}",
        )


class Counted(Read):
    """Counts what it makes."""

    count = 0

    def made(self, how, make):
        def counted():
            self.count += 1
            return make()

        return super().made(how, counted)


def run(activations, norm, ctx, x, wrapped):
    """Loss and gradients of layers that read x as `wrapped` hands it to them."""
    graphs, params = zip(*(nnx.split(layer, nnx.Param) for layer in layers(activations, norm)), strict=True)

    def total(params, x):
        read = wrapped(x)
        outputs = [nnx.merge(graph, own)(read, OUT, ctx) for graph, own in zip(graphs, params, strict=True)]
        return sum(jnp.sum(jnp.sin(number * y)) for number, y in enumerate(outputs, 1))

    return jax.tree.leaves(jax.jit(jax.value_and_grad(total, (0, 1)))(params, x))


@pytest.mark.parametrize(
    ("activations", "norm", "made"),
    [
        pytest.param((QUEST, QUEST, QUEST), False, 1, id="alike"),
        pytest.param((QUEST, "quest:bits=2,block=16", QUEST), False, 2, id="two-alike"),
        pytest.param(("absmax:bits=4", "absmax:bits=4"), False, 1, id="absmax"),
        pytest.param((QUEST, QUEST), True, 0, id="norms-of-their-own"),
        pytest.param(("lsq:bits=4", "lsq:bits=4"), False, 0, id="learned"),
        pytest.param((*["absmax:bits=4,rounding=stochastic"] * 2,), False, 0, id="drawn"),
    ],
)
def test_loss_and_gradients_are_those_of_layers_that_quantize_for_themselves(activations, norm, made, x64):
    ctx, reads = Ctx(0.5, jax.random.key(0)), []
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])):
        x = jax.device_put(np.random.default_rng(0).standard_normal((2, 8, WIDTH)), jax.P("data", None, None))
        once = run(activations, norm, ctx, x, lambda x: reads.append(Counted(x)) or reads[-1])
        apart = run(activations, norm, ctx, x, lambda x: x)
    assert [read.count for read in reads] == [made]
    for a, b in zip(once, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
