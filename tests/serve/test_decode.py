"""Decoding with MLPs that skip experts: the tokens and logits of the dense masked model, and no weight copied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.errors import InputError
from fbi.evaluate.generate import complete
from fbi.model import Model, ModelConfig
from fbi.model.axes import mesh_1x1
from fbi.policy import Policy
from fbi.serve import native
from fbi.serve.decode import decode_step, sparse, unstacked

CONFIG = ModelConfig(
    vocab=48, dim=32, layers=2, heads=2, kv_heads=1, head_dim=8, ff=128, context=64, init_std=0.2, expert=16,
    routing="hard",
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7]]
RUNS = ["loop", *(["native"] if native.compiler() else [])]


@functools.cache
def routed(policy="fp", **fields):
    """A model whose routers leave out about half of the experts."""
    model = Model(dataclasses.replace(CONFIG, **fields), Policy.parse(policy))
    params = model.init(0)
    for name in [name for name in params if name.startswith("layers_")]:
        params[name]["mlp"]["router"]["bias"] *= 0.0
    return model, params


@pytest.mark.parametrize("method", RUNS)
def test_the_same_tokens_are_decoded_and_the_same_logits_computed(method):
    model, params = routed("layers.1.*: w=fbi")
    served, packed = sparse(model, params, method)
    assert complete(served, packed, PROMPTS, tokens=12) == (added := complete(model, params, PROMPTS, tokens=12))
    assert len(set(added[0])) > 2  # not one token again and again, which anything would pass
    tokens = jnp.asarray([PROMPTS[1]])
    (want, scores), (y, own) = (
        m.features(p, tokens, wanted=["mlp.router"]) for m, p in ((model, params), (served, packed))
    )
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    np.testing.assert_allclose(own["mlp.router"], scores["mlp.router"], atol=1e-5)
    assert 0.2 < float(jnp.mean(scores["mlp.router"] > 0.5)) < 0.8


def test_an_mlp_without_a_gate_and_a_mesh_of_several_devices():
    model = Model(dataclasses.replace(CONFIG, activation="relu", gated=False, kv_heads=2))
    tokens = jnp.asarray(PROMPTS[1:])
    want = np.asarray(model.apply(model.init(0), tokens))
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))):
        served, packed = sparse(model, model.init(0), "loop")
        y = jax.jit(served.apply)(packed, jax.sharding.reshard(jnp.repeat(tokens, 4, 0), jax.P("data", None)))
    np.testing.assert_allclose(np.asarray(y)[3:], want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("ready", [unstacked, functools.partial(sparse, method="loop")], ids=["dense", "sparse"])
@pytest.mark.usefixtures("optimized")
def test_a_step_copies_no_weights_and_writes_the_cache_in_place(ready):
    # Weights of 2.8 MB a layer, which a loop over stacked layers copies; a cache of 0.1 MB, which attention transposes.
    model, params = routed(dim=256, ff=768, head_dim=64, context=128)
    served, weights = ready(model, params)
    with jax.set_mesh(mesh_1x1()):
        caches = served.empty_cache(1, 128)
        token, position = jnp.zeros((1, 1), jnp.int32), jnp.int32(3)
        step = decode_step(served)
        memory = step.lower(weights, token, caches, position).compile().memory_analysis()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
        logits, after = step(weights, token, caches, position)
        want, _ = model.extend(params, token, model.empty_cache(1, 128), position)
    assert memory.temp_size_in_bytes < 0.3e6
    assert memory.alias_size_in_bytes == held
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(caches))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, caches)
    np.testing.assert_allclose(logits, want[:, 0], rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("policy", "fields", "says"),
    [
        ("fp", {"routing": "soft"}, "model.expert=16, routing=soft skips no expert; use a model that was adapted with"),
        ("fp", {"expert": 0, "routing": "soft"}, "model.expert=0, routing=soft skips no expert"),
        ("fp", {"router": "oracle", "top_k": 2}, "model.router=oracle looks at all neurons before it skips some"),
        ("fp", {"norm": "sub"}, "model.norm=sub has a norm inside the MLP"),
        ("bitnet-b158", {}, r"layers.0.mlp.gate: w=bitnet-b158;a=absmax:bits=8 does more than quantize a weight"),
        ("onebit", {}, "layers.0.mlp.gate: w=onebit;a=none does more than quantize a weight"),
    ],
)
def test_what_cannot_skip_experts_is_refused(policy, fields, says):
    with pytest.raises(InputError, match=says):
        sparse(Model(dataclasses.replace(CONFIG, **fields), Policy.parse(policy)), {})
