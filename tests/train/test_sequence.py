"""The residual stream split by position: the same numbers as on whole sequences, in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_alike_in_float64, drawn

from fbi.errors import InputError
from fbi.loss import Loss
from fbi.model import Model, ModelConfig
from fbi.model.axes import Axes
from fbi.policy import Policy
from fbi.train import mesh as meshes
from fbi.train.compose import check
from fbi.train.run import Execution, Run
from fbi.train.step import abstract_state, make_objective, make_step, on_mesh

SHAPE = ModelConfig(
    vocab=64, dim=32, layers=2, heads=4, kv_heads=4, head_dim=8, ff=64, context=32, dtype="float64", norm="sub"
)
QUANTIZED = "layers.*: w=bitnet-b158;a=absmax:bits=8"
SPLIT, WHOLE = Axes(sequence="model"), Axes()


@pytest.mark.parametrize(
    ("changes", "policy", "loss"),
    [
        pytest.param({}, QUANTIZED, "ce", id="bitnet"),
        pytest.param({"norm": "pre", "tied": True}, "fbi", "ce", id="fbi-tied"),
        pytest.param(
            {"norm": "inner", "activation": "relu2"}, "layers.*: w=quest:bits=4,block=8", "ce", id="quest-inner"
        ),
        pytest.param(
            {"expert": 16, "router": "low-rank"}, "fp", "ce + 0.5*efficiency + 0.02*separability", id="routed"
        ),
        pytest.param({}, QUANTIZED, "0.5*ce + 0.5*hidden", id="features"),
    ],
)
def test_loss_and_gradients_are_those_of_whole_sequences_in_float64(changes, policy, loss, x64):
    config = dataclasses.replace(SHAPE, **changes)
    parsed = Loss.parse(loss)
    teacher = Model(config, Policy.parse("fp")) if parsed.needs_teacher else None
    objective = make_objective(parsed, teacher=teacher)
    with jax.set_mesh(mesh := meshes.make({"data": 2, "model": 4})):
        rng = np.random.default_rng(0)
        params, taught = (drawn(on_mesh(Model(config, Policy.parse(p)).abstract()), rng) for p in (policy, "fp"))
        tokens = meshes.put_batch(rng.integers(0, 64, (4, 17)).astype(np.int32), mesh)
        found = []
        for axes in (WHOLE, SPLIT):
            model = Model(config, Policy.parse(policy), axes=axes, remat=True)
            total = lambda params, model=model: objective(
                model, params, taught if teacher else None, tokens, jnp.asarray(0.5)
            )[0]
            found.append(jax.jit(jax.value_and_grad(total))(params))
    assert_alike_in_float64(*found)


def temporaries(axes: Axes) -> tuple[int, str]:
    """Bytes that a device needs beside its arguments for a step over long windows, and the program."""
    config = dataclasses.replace(SHAPE, layers=16, context=1024, dtype="float32")
    model, tx = Model(config, Policy.parse("fbi"), axes=axes, remat=True, unroll=1), optax.sgd(0.1)
    with jax.set_mesh(mesh := meshes.make({"data": 1, "model": 4})):
        tokens = jax.ShapeDtypeStruct((2, 1025), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("data", None)))
        step = make_step(model, Loss.parse("ce"), tx, chunk=64)
        compiled = step.lower(abstract_state(model, tx), None, tokens, jax.ShapeDtypeStruct((), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


def test_what_remat_keeps_of_a_layer_is_split_over_the_devices():
    (whole, _), (split, text) = temporaries(WHOLE), temporaries(SPLIT)
    kept = 16 * 2 * 1024 * 32 * 4  # the inputs of all layers, of two sequences
    assert whole - split > 0.5 * kept * 3 / 4, (whole, split, kept)
    assert "f32[16,2,256,32]" in text
    assert "f32[16,2,1024,32]" not in text


def test_a_window_that_does_not_divide_is_refused():
    run = Run(data=dataclasses.replace(Run().data, window=126))
    with pytest.raises(InputError, match=r"model=4 does not divide data.window=126"):
        check(run, Execution(mesh="data=2,model=4", sequence=True), 8)
