"""The training step of a run and the shapes it takes, from the configuration alone: nothing is loaded or allocated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fbi import optim
from fbi.data.table import Layout, Taught
from fbi.loss import Loss
from fbi.model import Model
from fbi.train import routing
from fbi.train.load import build_model
from fbi.train.run import Execution, Run
from fbi.train.step import State, Step, abstract_state, make_step, on_mesh
from fbi.train.teacher import Teacher, rows_like


class Program(NamedTuple):
    """What a run trains with, on the mesh in use."""

    model: Model
    loss: Loss
    tx: optax.GradientTransformation
    routed: routing.Parts
    step: Step
    state: State
    """Shapes, types and shardings."""


def program(
    run: Run,
    execution: Execution = Execution(),
    *,
    teacher: Model | Teacher | None = None,
    separator: int | None = None,
    held: routing.Held | None = None,
) -> Program:
    """The program of a run; `held` gives text it does not train on to what a routed model does after the last step."""
    model, loss = build_model(run, execution), Loss.parse(run.loss)
    tx = optim.build(run.optimizer, run.steps)
    routed = routing.parts(run, loss, model, held or _no_data, separator)
    step = make_step(
        model,
        loss,
        tx,
        teacher=teacher,
        accumulate=execution.accumulate,
        separator=separator,
        watch=routed.watch,
        control=routed.control,
        chunk=execution.loss_chunk,
    )
    return Program(model, loss, tx, routed, step, abstract_state(model, tx, routed.control))


def _no_data(tokens: int) -> list[jax.Array]:
    raise RuntimeError(f"{tokens} tokens of a program without data")


def step_arguments(run: Run, built: Program, teacher: Model | None = None, table: Layout | None = None) -> tuple:
    """Shapes, types and shardings of the arguments of `built.step` on the mesh in use, as the loop passes them."""
    mesh = jax.sharding.get_mesh()
    rows = lambda axes: jax.NamedSharding(mesh, jax.P("data", *[None] * (axes - 1)))  # noqa: E731
    tokens = jax.ShapeDtypeStruct((run.data.batch, run.data.window + 1), jnp.int32, sharding=rows(2))
    batch = Taught(tokens, rows_like(table, run.data.batch, rows)) if table else tokens
    progress = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
    return built.state, None if teacher is None else on_mesh(teacher.abstract()), batch, progress
