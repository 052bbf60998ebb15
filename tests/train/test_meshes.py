"""The same run on every mesh: exact in float64, reported in float32, laid out as declared, donated without a copy."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi import optim
from fbi.loss import Loss
from fbi.model import Model, ModelConfig
from fbi.policy import Policy
from fbi.train import mesh as meshes
from fbi.train.step import abstract_state, init_state, make_step

pytestmark = pytest.mark.slow

MESHES = ["data=1", "data=8", "data=4,model=2", "data=2,model=4"]
SHAPE = ModelConfig(vocab=64, dim=32, layers=2, heads=4, kv_heads=4, head_dim=8, ff=64, context=32)
STEPS = 20


def train(mesh_text, policy, dtype, steps=STEPS):
    """Losses of `steps` steps of distillation with a teacher, and the state after the first."""
    config = dataclasses.replace(SHAPE, dtype=dtype)
    model, teacher = Model(config, Policy.parse(policy)), Model(config)
    tx = optim.build(optim.OptimizerConfig(lr=1e-2), steps)
    mesh = meshes.make(meshes.parse(mesh_text, jax.device_count()))
    rng = np.random.default_rng(0)
    losses, first = [], None
    with jax.set_mesh(mesh):
        state, teacher_params = init_state(model, tx, jax.random.key(0)), teacher.init(1)
        step = make_step(model, Loss.parse("mix"), tx, teacher=teacher)
        tokens = meshes.put_batch(rng.integers(0, 64, (8, 17)).astype(np.int32), mesh)
        for i in range(steps):
            state, sums = step(state, teacher_params, tokens, jnp.float32(i / steps))
            losses.append(float(sums["loss"]) / float(sums["count"]))
            first = jax.device_get(state) if first is None else first
    return np.array(losses), first


@pytest.mark.parametrize("policy", ["fp", "fbi", "bitnet-b158"])
def test_in_float64_every_mesh_gives_the_same_loss_to_1e_9(policy, x64):
    one, _ = train(MESHES[0], policy, "float64")
    assert one[-1] < one[0] - 0.05  # it does learn
    for mesh in MESHES[1:]:
        np.testing.assert_allclose(train(mesh, policy, "float64")[0], one, rtol=0, atol=1e-9)


def test_in_float32_full_precision_agrees_to_1e_5_on_every_mesh():
    one, _ = train(MESHES[0], "fp", "float32")
    for mesh in MESHES[1:]:
        np.testing.assert_allclose(train(mesh, "fp", "float32")[0], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["fbi", "bitnet-b158"])
def test_in_float32_low_bit_runs_differ_by_counted_rounding_flips(policy, record_property):
    one, first = train(MESHES[0], policy, "float32")
    weight = Policy.parse(policy).at("layers.0.mlp.up", 2).weight.build("weight")
    codes = jax.jit(jax.vmap(lambda w, q: weight.encode(w, q).codes))
    for mesh in MESHES[1:]:
        losses, other = train(mesh, policy, "float32")
        gap = float(np.abs(losses - one).max())
        record_property(f"{policy} {mesh} largest loss difference", gap)
        print(f"{policy} {mesh}: largest loss difference {gap:.1e} in {STEPS} steps")
        flips = entries = 0
        for site in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            kind, name = site.split(".")
            stacks = [s["params"]["layers_0_2"][kind][name] for s in (first, other)]
            a, b = (codes(x["w"], x.get("q", {})) for x in stacks)
            flips, entries = flips + int((a != b).sum()), entries + a.size
        print(f"{policy} {mesh}: {flips} of {entries} codes differ after one step")
        assert flips < entries / 10_000


@pytest.mark.parametrize("mesh_text", MESHES[1:])
def test_the_compiled_step_keeps_the_declared_shardings_and_copies_no_donated_buffer(mesh_text):
    model = Model(SHAPE, Policy.parse("fbi"))
    tx = optim.build(optim.OptimizerConfig(), STEPS)
    mesh = meshes.make(meshes.parse(mesh_text, jax.device_count()))
    sizes = dict(mesh.shape)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of donated buffers that it could not use
        declared = abstract_state(model, tx)
        tokens = jax.ShapeDtypeStruct((8, 17), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("data", None)))
        progress = jax.ShapeDtypeStruct((), jnp.float32)
        compiled = make_step(model, Loss.parse("ce"), tx).lower(declared, None, tokens, progress).compile()
        state = init_state(model, tx, jax.random.key(0))
    given = compiled.output_shardings[0]
    for wanted, got in zip(jax.tree.leaves(declared), jax.tree.leaves(given), strict=True):
        assert wanted.sharding.is_equivalent_to(got, len(wanted.shape))
    up = declared["params"]["layers_0_2"]["mlp"]["up"]["w"]
    assert up.sharding.spec == jax.P(None, "data", "model")
    assert declared["opt"][1].mu["layers_0_2"]["mlp"]["up"]["w"].sharding.spec == up.sharding.spec
    # At rest a device holds its share of a matrix and no more: there is no full copy anywhere.
    shard = state["params"]["layers_0_2"]["mlp"]["up"]["w"].addressable_shards[0].data
    assert shard.shape == (2, 32 // sizes["data"], 64 // sizes["model"])
    # Every leaf of the state is aliased to an output: the program's table of aliases names them all.
    aliases = compiled.as_text().split("input_output_alias={", 1)[1].split("entry_computation_layout", 1)[0]
    assert aliases.count("may-alias") + aliases.count("must-alias") == len(jax.tree.leaves(declared))


def test_a_mesh_is_read_from_text():
    assert meshes.parse("", 8) == {"data": 8, "model": 1}
    assert meshes.parse("model=2, data=4", 8) == {"data": 4, "model": 2}
    assert meshes.parse("model=4", 8) == {"data": 1, "model": 4}
