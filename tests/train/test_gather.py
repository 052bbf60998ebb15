"""FSDP that gathers codes: the same numbers as values give, in a fraction of the bytes, read off the compiled step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_alike_in_float64, drawn

from fbi.analysis.program import Gathered, all_gathers
from fbi.loss import Loss
from fbi.model import Model, ModelConfig
from fbi.model.axes import Axes, whole_input
from fbi.model.config import linear_shapes
from fbi.model.gather import by_code, by_value
from fbi.policy import Policy
from fbi.quant import Ctx, quantizer
from fbi.quant.pack import packed_size
from fbi.train import mesh as meshes
from fbi.train.step import abstract_state, make_objective, make_step, on_mesh

SHAPE = ModelConfig(vocab=64, dim=32, layers=1, heads=4, kv_heads=4, head_dim=8, ff=64, context=32)
METHODS = (
    "fbi", "fbi:granularity=output,shift=false", "bitnet-b1", "bitnet-b158", "onebit", "binarymos", "adabin",
    "dbllm:group=8", "absmax:bits=8", "quest:bits=4,block=16", "quest:bits=4,block=16,sparsity=4:8", "paretoq:bits=2",
    "lsq:bits=3", "bitnet-b158:warmup=0.5", "none",
)  # fmt: skip


def test_all_gathers_are_found_in_the_text_of_a_program():
    text = """
  %a = u8[8,96]{1,0} all-gather(%p), channel_id=1
  ROOT %b = (bf16[4,2]{1,0}, f32[]) all-gather(%p, %q), channel_id=2
  %c = (s8[2]{0}, s8[16]{0}) all-gather-start(%p), channel_id=3
  %d = f32[9]{0} all-reduce(%all-gather), channel_id=4
"""
    found = list(all_gathers(text))
    assert found == [Gathered("u8", (8, 96)), Gathered("bf16", (4, 2)), Gathered("f32", ()), Gathered("s8", (16,))]
    assert [one.bytes for one in found] == [768, 16, 4, 16]


@pytest.mark.parametrize("mesh_text", ["data=4,model=2"])
@pytest.mark.parametrize("spec", [jax.P("data", "model"), jax.P("model", "data")])
def test_codes_give_the_values_of_every_method_bit_for_bit(mesh_text, spec):
    built = {text: quantizer(text) for text in METHODS}
    w = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    ctx = Ctx(0.25)
    with jax.set_mesh(meshes.make(meshes.parse(mesh_text, 8))):

        def both(w):
            found = {}
            for text, q in built.items():
                at_rest = jax.sharding.reshard(w, whole_input(spec) if q.whole else spec)
                own = q.init(at_rest)
                w_hat = q.apply(at_rest, own, ctx)
                found[text] = [gather(q, at_rest, own, ctx, w_hat, spec) for gather in (by_value, by_code)]
            return found

        for text, (value, decoded) in jax.jit(both)(w).items():
            assert jax.typeof(value) == jax.typeof(decoded), text
            np.testing.assert_array_equal(value, decoded, err_msg=text)


def test_a_stochastic_rounding_travels_as_it_was_drawn():
    q = quantizer("absmax:bits=2,rounding=stochastic")
    ctx = Ctx(0.5, jax.random.key(3))
    with jax.set_mesh(meshes.make({"data": 8, "model": 1})):
        w = jax.device_put(np.random.default_rng(0).standard_normal((32, 16)), jax.P("data", None))

        def both(w):
            w_hat = q.apply(w, {}, ctx)
            return [g(q, w, {}, ctx, w_hat, jax.P("data", None)) for g in (by_value, by_code)] + [q.apply(w, {})]

        value, decoded, nearest = jax.jit(both)(w)
    np.testing.assert_array_equal(value, decoded)
    assert (np.asarray(value) != np.asarray(nearest)).any()


def test_loss_and_gradient_are_those_of_the_plain_step_in_float64(x64):
    policy = "layers.*.attn.*: w=fbi | layers.*.mlp.up: w=quest:bits=4,block=16 | *: w=bitnet-b158;a=absmax:bits=8"
    policy = f"embed: w=none | {policy}"
    config = dataclasses.replace(SHAPE, dtype="float64")
    objective = make_objective(Loss.parse("ce"))
    with jax.set_mesh(mesh := meshes.make(meshes.parse("data=4,model=2", 8))):
        rng = np.random.default_rng(0)
        params = drawn(on_mesh(Model(config, Policy.parse(policy)).abstract()), rng)
        tokens = meshes.put_batch(rng.integers(0, 64, (8, 17)).astype(np.int32), mesh)
        found = []
        for gather in ("values", "codes"):
            model = Model(config, Policy.parse(policy), axes=Axes(gather=gather))
            total = lambda params, model=model: objective(model, params, None, tokens, jnp.asarray(0.5))[0]
            found.append(jax.jit(jax.value_and_grad(total))(params))
    assert_alike_in_float64(*found)


WIDE = dataclasses.replace(SHAPE, vocab=96, dim=128, layers=2, head_dim=32, ff=256, dtype="bfloat16")


def gathers(policy, gather):
    """All-gathers of the compiled training step on eight devices."""
    model, tx = Model(WIDE, Policy.parse(policy), axes=Axes(gather=gather)), optax.sgd(0.1)
    with jax.set_mesh(mesh := meshes.make({"data": 8, "model": 1})):
        tokens = jax.ShapeDtypeStruct((8, 17), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("data", None)))
        progress = jax.ShapeDtypeStruct((), jnp.float32)
        step = make_step(model, Loss.parse("ce"), tx)
        return list(all_gathers(step.lower(abstract_state(model, tx), None, tokens, progress).compile().as_text()))


def test_binary_codes_travel_in_a_sixteenth_and_ternary_ones_in_an_eighth_of_the_bytes_of_bfloat16():
    shapes = linear_shapes(WIDE)
    plain = [g for g in gathers("fp", "values") if g.shape in shapes.values()]
    assert sorted(g.shape for g in plain) == sorted(shapes.values())  # each matrix once, the layers being scanned
    found = gathers("layers.*.attn.*: w=fbi | layers.*.mlp.*: w=bitnet-b158", "codes")
    assert not [g for g in found if g.dtype != "u8" and g.shape in shapes.values()]
    codes = sorted(g.bytes for g in found if g.dtype == "u8")
    expected = 0
    for kind, levels, most in (("attn", 2, 0.07), ("mlp", 4, 0.13)):  # a ternary code takes two bits
        counts = [math.prod(shape) for site, shape in shapes.items() if site.startswith(kind)]
        travelled = [8 * packed_size(count // 8, levels) for count in counts]  # each device packs its own part
        for size in travelled:
            codes.remove(size)
        assert sum(travelled) / sum(2 * count for count in counts) <= most
        expected += len(travelled)
    assert (codes, expected) == ([], 7)
