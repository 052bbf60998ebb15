"""One step: accumulation equals the large batch, gradients know no future, and a golden step that must not drift."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi import optim
from fbi.loss import Loss
from fbi.model import Model, ModelConfig
from fbi.model.axes import mesh_1x1
from fbi.policy import Policy
from fbi.train import mesh as meshes
from fbi.train.checkpoint import fingerprint
from fbi.train.step import init_state, make_step

SHAPE = ModelConfig(vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ff=64, context=32)
GOLDEN = Path(__file__).parent / "golden_step.json"


def one_step(policy, loss="ce", accumulate=1, dtype="float32", mesh_text="data=1", separator=None, **optimizer):
    config = dataclasses.replace(SHAPE, dtype=dtype)
    model, teacher = Model(config, Policy.parse(policy)), Model(config)
    tx = optim.build(optim.OptimizerConfig(warmup=0.0, **optimizer), 10)
    mesh = meshes.make(meshes.parse(mesh_text, jax.device_count()))
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
    distils = Loss.parse(loss).needs_teacher
    with jax.set_mesh(mesh):
        state, taught = init_state(model, tx, jax.random.key(0)), teacher.init(1)
        step = make_step(
            model,
            Loss.parse(loss),
            tx,
            teacher=teacher if distils else None,
            accumulate=accumulate,
            separator=separator,
        )
        batch = meshes.put_batch(tokens, mesh)
        state, sums = step(state, taught if distils else None, batch, jnp.float32(0))
        return jax.device_get(state["params"]), {name: float(value) for name, value in sums.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "mesh_text"), [("fp", "data=1"), ("fbi", "data=2,model=2"), ("bitnet-b158", "data=2,model=2")]
)
def test_accumulation_in_parts_equals_the_large_batch(policy, mesh_text, x64):
    whole, sums = one_step(policy, "0.5*ce + 0.5*ad", 1, "float64", mesh_text)
    parts, summed = one_step(policy, "0.5*ce + 0.5*ad", 4, "float64", mesh_text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), whole, parts)
    for name, value in sums.items():
        assert summed[name] == pytest.approx(value, rel=1e-10), name


@pytest.mark.slow
def test_losses_over_features_are_the_same_on_a_mesh_and_in_parts(x64):
    loss = "kl + cakld:beta=0.5 + 10*hidden + dmd"
    params, sums = one_step("fbi", loss, 1, "float64")
    assert {"loss", "ce", "floor", "kl", "cakld", "hidden", "dmd", "count", "grad_norm"} == set(sums)
    assert sums["loss"] == pytest.approx(sums["kl"] + sums["cakld"] + 10 * sums["hidden"] + sums["dmd"], rel=1e-12)
    others, found = one_step("fbi", loss, 2, "float64", "data=4,model=2")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), params, others)
    for name, value in sums.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name


def test_masking_documents_changes_the_loss():
    assert one_step("fp")[1]["loss"] != one_step("fp", separator=3)[1]["loss"]


def changed_leaves(a, b):
    flat = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (a, b))
    return {
        "/".join(entry.key for entry in path)
        for (path, x), (_, y) in zip(*flat, strict=True)
        if not np.array_equal(x, y)
    }


def test_decay_touches_the_latent_matrices_alone_unless_everything_is_asked_for():
    plain, _ = one_step("fbi", weight_decay=0.0)
    latent = {f"layers_0_2/attn/{n}/w" for n in "qkvo"} | {f"layers_0_2/mlp/{n}/w" for n in ("gate", "up", "down")}
    assert changed_leaves(plain, one_step("fbi", weight_decay=0.5, decay="latent")[0]) == latent
    everything = changed_leaves(plain, one_step("fbi", weight_decay=0.5, decay="everything")[0])
    assert everything > latent | {"embed", "head/w", "norm/scale", "layers_0_2/attn/q/q/alpha"}


def test_the_gradient_is_clipped_to_the_global_norm():
    tx = optim.build(optim.OptimizerConfig(clip=1.0, weight_decay=0.0), 10)
    params = {"layers_0_1": {"w": jnp.ones(4)}}
    mu = tx.update(jax.tree.map(lambda p: 1000.0 * p, params), tx.init(params), params)[1][1].mu
    assert float(jnp.linalg.norm(mu["layers_0_1"]["w"])) == pytest.approx(0.1, rel=1e-5)  # (1 - b1) times 1


def test_routers_may_have_a_learning_rate_of_their_own():
    params = {"layers_0_1": {"mlp": {"router": {"weight": jnp.ones(3)}, "up": {"w": jnp.ones(3)}}}}
    moves = []
    for factor in (1.0, 30.0):
        tx = optim.build(optim.OptimizerConfig(warmup=0.0, weight_decay=0.0, router_lr=factor), 10)
        moves.append(tx.update(params, tx.init(params), params)[0]["layers_0_1"]["mlp"])
    np.testing.assert_allclose(moves[1]["router"]["weight"], 30 * moves[0]["router"]["weight"], rtol=1e-6)
    np.testing.assert_array_equal(moves[1]["up"]["w"], moves[0]["up"]["w"])


@pytest.mark.parametrize("policy", ["fp", "fbi", "bitnet-b158"])
def test_golden_step(policy, optimized):
    """The numbers of one step. If this fails and you did not mean to change what a model computes, it found a bug.

    If you did, rewrite them with `FBI_REWRITE_GOLDEN=1 pytest tests/train/test_step.py -k golden`, and say in the
    commit why they moved.
    """
    params, sums = one_step(policy, "0.5*ce + 0.5*ad")
    found = sums | {"mean_abs_up": float(np.abs(params["layers_0_2"]["mlp"]["up"]["w"]).mean())}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("FBI_REWRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {policy: found}, indent=2, sort_keys=True) + "\n")
        return
    assert golden[policy].keys() == found.keys()
    for name, value in golden[policy].items():
        assert found[name] == pytest.approx(value, rel=2e-5), f"{policy} {name}: see the docstring of this test"


def test_a_fingerprint_sees_every_bit_and_no_sharding():
    tree = {"a": jnp.arange(64.0).reshape(8, 8), "b": jnp.ones(3, jnp.bfloat16), "n": jnp.int32(3)}
    known = fingerprint(tree)
    with jax.set_mesh(meshes.make({"data": 4, "model": 2})):
        assert fingerprint({**tree, "a": jax.device_put(np.asarray(tree["a"]), jax.P("data", "model"))}) == known
    flipped, turned = np.asarray(tree["a"]).copy(), np.asarray(tree["a"])[::-1].copy()
    flipped.view(np.uint32)[5, 5] ^= 1
    others = [fingerprint({**tree, "a": jnp.asarray(x)}) for x in (flipped, turned)]
    assert len({known, *others}) == 3


@pytest.mark.parametrize("policy", ["fp", "fbi", "bitnet-b158", "layers.*.attn.kv: a=absmax | layers.*.mlp.*: w=fbi"])
def test_no_gradient_flows_from_a_logit_to_a_later_token(policy):
    model = Model(SHAPE, Policy.parse(policy))
    tokens = jnp.arange(12)[None]  # every token is its own row of the embedding
    with jax.set_mesh(mesh_1x1()):
        params = model.init(0)

        def logits_at(embed, position):
            return jnp.sum(jnp.where(jnp.arange(12)[None, :, None] == position, model.apply({**params, "embed": embed}, tokens), 0))  # fmt: skip  # noqa: E501

        grad = jax.jit(jax.grad(logits_at))
        for position in (0, 5, 11):
            reached = np.flatnonzero(np.abs(np.asarray(grad(params["embed"], position))).sum(1))
            assert reached.max() == position
            assert position == 0 or reached.min() < position


def test_learning_rates_of_the_published_schedules():
    cosine = optim.learning_rate(optim.OptimizerConfig(lr=3e-4, warmup=2000.0, final=0.1), 10_000)
    assert [round(float(cosine(s)) / 3e-4, 4) for s in (0, 1000, 2000, 6000, 10_000)] == [0, 0.5, 1, 0.55, 0.1]
    stages = optim.OptimizerConfig(schedule="two-stage", lr=1.5e-3, second_lr=1e-3, warmup=375.0)
    two = optim.learning_rate(stages, 10_000)
    assert float(two(375)) == pytest.approx(1.5e-3 * (1 - 0.0375), rel=1e-5)
    assert float(two(4999)) == pytest.approx(1.5e-3 * 0.5001, rel=1e-5)
    assert float(two(5000)) == pytest.approx(1e-3 * 0.5, rel=1e-5)
    assert float(two(10_000)) == 0
    decay = optim.weight_decay(stages, 10_000)
    assert [float(decay(s)) for s in (0, 4999, 5000)] == pytest.approx([0.1, 0.1, 0.0])
    wsd = optim.learning_rate(optim.OptimizerConfig(schedule="wsd", lr=1.0, warmup=100.0, final=0.0), 1000)
    assert [round(float(wsd(s)), 3) for s in (0, 50, 100, 799, 900, 1000)] == [0, 0.5, 1, 1, 0.5, 0]
