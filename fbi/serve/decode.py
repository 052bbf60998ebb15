"""A trained model made ready to decode: arrays of its own for each layer, and MLPs that skip experts.

What comes back is a model and its parameters as everywhere else: `fbi.evaluate.generate` takes them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fbi.errors import InputError
from fbi.model.attention import Cache
from fbi.model.axes import mesh_in_use
from fbi.model.config import linear_shapes
from fbi.model.decoder import Blocks
from fbi.model.functional import Model, Params
from fbi.policy import NONE, Methods
from fbi.quant.around import NOTHING
from fbi.serve.ffn import METHODS, chosen
from fbi.serve.mlp import Sparse
from fbi.serve.packed import pack

Step = Callable[[Params, Array, dict[str, Cache], Any], tuple[Array, dict[str, Cache]]]


def unstacked(model: Model, params: Params) -> tuple[Model, Params]:
    """The same model with arrays of its own for each layer: a step of one token then copies no weight.

    A loop over stacked layers copies each layer's weights out of the stack, which a training step does not notice and
    a decoding step, whose time is that of reading weights, does. Compiling takes longer by the number of layers.
    """
    return _remade(model, Blocks(model.blocks.mlp, stacked=False)), _apart(params)


def sparse(model: Model, params: Params, method: str = "auto") -> tuple[Model, Params]:
    """A routed model (routing=hard) whose MLPs read the weights of active experts only, and its parameters.

    The output is that of `model` up to the order of sums. Weights of MLPs are quantized once, here, and packed in the
    compute type; `method` is one of `fbi.serve.ffn.METHODS` or `auto`. `InputError` for a model without hard routing,
    and for what comes between the products of an MLP: quantized activations, scales beside a product, a norm inside.
    """
    _check(model)
    method = chosen(method)
    layout, config = METHODS[method].layout, model.config
    mesh = mesh_in_use()

    def packed(layer: int, mlp: dict[str, Any]) -> dict[str, Any]:
        weights: dict[str, Any] = {"gate": None}
        for site in linear_shapes(config):
            part, _, name = site.partition(".")
            if part == "mlp":
                w = jax.tree.map(lambda a: jnp.asarray(jax.device_get(a[0])), mlp[name])
                weight, _ = model.bound.get(f"layers.{layer}.{site}", Methods()).build()
                weights[name] = jax.jit(weight.apply)(w["w"], w.get("q", {})).astype(config.dtype)
        blocks = pack(**weights, expert=config.expert, layout=layout)._asdict()
        whole = jax.NamedSharding(mesh, jax.P(None, None, None, None))
        kept = {name: jax.device_put(w[None], whole) for name, w in blocks.items() if w is not None}
        return {**kept, "router": mlp["router"]}

    out = _apart(params)
    for name, block in out.items():
        if name.startswith("layers_"):
            out[name] = {**block, "mlp": packed(int(name.split("_")[1]), block["mlp"])}
    return _remade(model, Blocks(Sparse(method), stacked=False)), out


def decode_step(model: Model) -> Step:
    """Compiled: (params, tokens [b, 1], caches, position) -> logits [b, v] and the caches with these positions written.

    The caches that go in are given up (donated), their memory is used again. One program for each number of rows and
    length of the caches.
    """

    @functools.partial(jax.jit, donate_argnums=2)
    def step(
        params: Params, tokens: Int[Array, "b 1"], caches: dict[str, Cache], position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "b v"], dict[str, Cache]]:
        logits, caches = model.extend(params, tokens, caches, position)
        return logits[:, 0], caches

    return step


def _remade(model: Model, blocks: Blocks) -> Model:
    return Model(model.config, model.policy, axes=model.axes, blocks=blocks)


def _apart(params: Params) -> Params:
    """The stacks of `params` cut into stacks of one layer."""
    out: Params = {}
    for name, part in params.items():
        if not name.startswith("layers_"):
            out[name] = part
            continue
        start, stop = (int(number) for number in name.split("_")[1:])
        for i in range(stop - start):
            out[f"layers_{start + i}_{start + i + 1}"] = jax.tree.map(lambda a, i=i: a[i : i + 1], part)
    return out


def _check(model: Model) -> None:
    """Refuses a model whose MLPs are more than products with routed experts between them."""
    c = model.config
    if not c.expert or c.routing != "hard":
        raise InputError(
            f"model.expert={c.expert}, routing={c.routing} skips no expert; use a model that was adapted with "
            "routing=hard (stage 2 of LTE)"
        )
    if c.router == "oracle":
        raise InputError("model.router=oracle looks at all neurons before it skips some; serve a model with a router")
    if c.norm != "pre":
        raise InputError(f"model.norm={c.norm} has a norm inside the MLP, which needs all neurons; use norm=pre")
    for layer in range(c.layers):
        for site in (f"layers.{layer}.{name}" for name in linear_shapes(c) if name.startswith("mlp.")):
            methods = model.bound.get(site, Methods())
            if methods.activation != NONE or methods.build()[0].around is not NOTHING:
                raise InputError(
                    f"{site}: w={methods.weight};a={methods.activation} does more than quantize a weight; the sparse "
                    "MLP takes methods of weights alone, such as w=fbi"
                )
