"""Routed MLPs: what they compute, expert by expert, on every mesh; what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.errors import InputError
from fbi.model import Model
from fbi.model.config import check, count_parameters
from fbi.model.convert import adapt
from fbi.model.convert_hf import save_safetensors
from fbi.policy import Policy

EXPERT = 8


def routed(config, routing, policy="fp", expert=EXPERT, **options):
    return Model(dataclasses.replace(config, expert=expert, routing=routing), Policy.parse(policy), **options)


def with_bias(params, bias):
    """The parameters with every router's score decided by its bias: one for all, or one for each expert."""
    stack = params["layers_0_3"]
    router = stack["mlp"]["router"]
    router = router | {"weight": 0 * router["weight"], "bias": 0 * router["bias"] + bias}
    return params | {"layers_0_3": stack | {"mlp": stack["mlp"] | {"router": router}}}


def dense_part(params):
    """Without the routers."""
    stack = params["layers_0_3"]
    mlp = {name: part for name, part in stack["mlp"].items() if name != "router"}
    return params | {"layers_0_3": stack | {"mlp": mlp}}


@pytest.mark.parametrize("changes", [{}, {"gated": False, "activation": "relu"}, {"norm": "inner"}], ids=str)
def test_with_every_expert_on_it_is_the_dense_model(changes, tiny, tokens, drawn):
    config = tiny(**changes)
    params = with_bias(drawn(routed(config, "soft")), 40.0)  # sigmoid(40) is 1 in float32
    expected = np.asarray(Model(config).apply(dense_part(params), tokens))
    for routing in ("soft", "hard", "dense"):
        np.testing.assert_allclose(routed(config, routing).apply(params, tokens), expected, rtol=0, atol=2e-6)
    uneven = with_bias(params, jnp.linspace(-2.0, 2.0, 6)[None])
    scaled = routed(config, "soft").apply(uneven, tokens)
    assert np.abs(scaled - expected).max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"gated": False, "activation": "relu"}], ids=str)
def test_hard_and_soft_are_the_sum_over_experts(changes, tiny, tokens, drawn, x64):
    config = tiny(layers=1, dtype="float64", **changes)
    wanted = ["mlp.router", "mlp.down", "mlp.down.out", "mlp.up", "mlp.up.out", *(["mlp.gate.out"] * config.gated)]
    for routing in ("soft", "hard"):
        model = routed(config, routing)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), drawn(model))
        _, found = model.features(params, tokens, wanted=wanted)
        at = jax.tree.map(lambda x: np.asarray(x[0]), params["layers_0_1"]["mlp"])
        x = np.asarray(found["mlp.up"][0])
        scores = 1 / (1 + np.exp(-(x @ at["router"]["weight"] + at["router"]["bias"])))
        np.testing.assert_allclose(found["mlp.router"][0], scores, rtol=0, atol=1e-12)
        factors = scores if routing == "soft" else (scores > 0.5).astype(float)
        assert 0.2 < np.mean(scores > 0.5) < 0.8
        total = 0.0
        for i in range(config.ff // EXPERT):
            own = slice(i * EXPERT, (i + 1) * EXPERT)
            up = x @ at["up"]["w"][:, own]
            gate = x @ at["gate"]["w"][:, own] if config.gated else None
            h = gate / (1 + np.exp(-gate)) * up if gate is not None else np.maximum(up, 0)
            total = total + factors[..., i : i + 1] * (h @ at["down"]["w"][own])
        np.testing.assert_allclose(found["mlp.down.out"][0], total, rtol=0, atol=1e-11)


def test_a_skipped_expert_adds_nothing_under_a_grid_without_a_zero(tiny, tokens, drawn):
    # QuEST's 4-bit levels are half-integers: a zero would come back as half a step. 8 of 48 neurons are on.
    model = routed(tiny(layers=3), "hard", "layers.*.mlp.down: a=quest:bits=4,block=8")
    first = jnp.where(jnp.arange(6) == 2, 5.0, -5.0)[None, :]
    params = with_bias(drawn(model), first)
    stack = params["layers_0_3"]
    down = stack["mlp"]["down"]["w"]
    others = jnp.arange(48)[None, :, None] // EXPERT != 2
    moved = stack["mlp"] | {"down": {"w": jnp.where(others, down + 1.0, down)}}
    np.testing.assert_array_equal(
        model.apply(params, tokens), model.apply(params | {"layers_0_3": stack | {"mlp": moved}}, tokens)
    )


def test_hard_routing_gives_routers_no_gradient_and_soft_does(tiny, tokens, drawn):
    for routing in ("hard", "soft"):
        model = routed(tiny(), routing)
        gradient = jax.jit(jax.grad(lambda p, m=model: jnp.sum(jnp.sin(m.apply(p, tokens)))))(drawn(model))
        router = gradient["layers_0_3"]["mlp"]["router"]
        assert all(np.any(leaf) == (routing == "soft") for leaf in jax.tree.leaves(router))
        assert np.any(gradient["layers_0_3"]["mlp"]["up"]["w"])


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_loss_and_gradient_are_the_same_on_a_mesh_unrolled_and_recomputed(routing, tiny, tokens, drawn, x64):
    config = tiny(dtype="float64", norm="sub", layers=2)
    batch, found = np.tile(np.asarray(tokens), (2, 1)), []
    for shape, options in (((1, 1), {}), ((2, 2), {"unroll": 2, "remat": True})):
        mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])
        model = routed(config, routing, **options)
        with jax.set_mesh(mesh):
            rows = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data", None)))

            def loss(p, rows, model=model):
                logits, features = model.features(p, rows, wanted=["mlp.router"])
                return jnp.mean(jnp.sin(logits)) + jnp.mean(jnp.square(features["mlp.router"]))

            params = drawn(model)
            value, gradient = jax.jit(jax.value_and_grad(loss))(params, rows)
            found.append(jax.device_get((value, gradient)))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-9)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), gradient, found[0][1])


def test_a_fresh_router_starts_above_the_threshold_in_full_precision(tiny, tokens):
    config = tiny(layers=1, dtype="bfloat16")
    model = routed(config, "soft")
    params = model.init(0)
    scores = model.features(params, tokens, wanted=["mlp.router"])[1]["mlp.router"]
    assert scores.dtype == jnp.float32
    assert scores.shape == (1, *tokens.shape, 6)
    assert 0.7 < float(jnp.mean(scores)) < 0.85
    assert 0.03 < float(jnp.mean(scores <= 0.5)) < 0.2
    # What is not a router starts as in the dense model.
    router = params["layers_0_1"]["mlp"].pop("router")
    assert {name: leaf.dtype for name, leaf in router.items()} == {"weight": jnp.float32, "bias": jnp.float32}
    jax.tree.map(np.testing.assert_array_equal, params, Model(config).init(0))


@pytest.mark.parametrize(
    "changes", [{"gated": False}, {"expert": 8}, {"expert": 16, "norm": "inner", "gated": False}], ids=str
)
def test_counts_and_sites_follow_the_mlp(changes, tiny):
    model = Model(tiny(**changes), Policy.parse("fbi"))
    assert Model(model.config).parameter_count() == count_parameters(model.config).total
    gates = [site.name for site in model.sites if site.name.endswith("gate")]
    assert len(gates) == (3 if model.config.gated else 0)
    assert not any("router" in site.name for site in model.sites)


def test_routers_are_carried_over_made_or_dropped(tiny, drawn, equal):
    dense, soft, hard = Model(tiny()), routed(tiny(), "soft"), routed(tiny(), "hard", "layers.1.*: w=fbi")
    params = drawn(soft)
    kept = adapt(params, soft, hard)
    for layer in range(3):
        router = jax.tree.map(lambda x: x[0], kept[f"layers_{layer}_{layer + 1}"]["mlp"]["router"])
        equal(router, jax.tree.map(lambda x, i=layer: x[i], params["layers_0_3"]["mlp"]["router"]))
    equal(adapt(params, soft, dense), dense_part(params))
    made = adapt(dense_part(params), dense, soft, seed=3)
    equal(made["layers_0_3"]["mlp"]["router"], soft.init(3)["layers_0_3"]["mlp"]["router"])
    equal(dense_part(made), dense_part(params))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expert": 7}, r"model.expert=7 does not divide ff=48; use one of \[1, 2, 3, 4, 6, 8, 12, 16, 24, 48\]"),
        ({"expert": -1}, "model.expert=-1 must be at least 0"),
        ({"routing": "hard"}, "model.routing=hard needs experts, and model.expert=0 has none; set model.expert"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes, says, tiny):
    with pytest.raises(InputError, match=says):
        check(tiny(**changes))


@pytest.mark.parametrize(
    ("policy", "expert", "says"),
    [
        ("layers.*.mlp.down: a=quest:block=16", 8, "a=quest:block=16 mixes blocks of 16 neurons, model.expert=8: "
         "skipped experts would leak into the others; use block=8, or experts of a multiple of 16"),
        ("layers.1.mlp.down: a=quest:block=16,rotate=back", 24, "layers.1.mlp.down: .*; use block=8"),
        ("layers.*.mlp.down: a=bitnet-v2", 16, "mixes blocks of 64 neurons, model.expert=16: .*; use block=16"),
    ],
)  # fmt: skip
def test_a_quantizer_that_mixes_experts_is_refused(policy, expert, says, tiny):
    config = tiny(ff=64 if "v2" in policy else 48)
    Model(config, Policy.parse(policy))
    with pytest.raises(InputError, match=says):
        routed(config, "soft", policy, expert)


def test_what_has_no_routers_or_no_place_for_them_is_refused(tiny, drawn, tmp_path):
    dense, soft = Model(tiny()), routed(tiny(), "soft")
    with pytest.raises(InputError, match=r"to start from have none; train them first in a run with model.routing=soft"):
        adapt(drawn(dense), dense, routed(tiny(), "hard"))
    with pytest.raises(InputError, match=r"routers of experts of 8 neurons to experts of 16; use model.expert=8"):
        adapt(drawn(soft), soft, routed(tiny(), "soft", expert=16))
    with pytest.raises(InputError, match="a model with expert=8, gated=true has none in transformers"):
        save_safetensors(drawn(soft), soft, tmp_path / "out")
    with pytest.raises(InputError, match=r"unknown feature 'layers.\*.mlp.router'"):
        dense.features({}, jnp.zeros((1, 2), int), wanted=["layers.*.mlp.router"])
