"""The training step: loss, gradient, update, compiled once, its state donated."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fbi.loss import NO_WATCH, Loss, Outputs, Readout, Watch, chunked
from fbi.loss.weighted import NO_WEIGHTS
from fbi.model import Model, Params
from fbi.quant import Ctx
from fbi.train.control import NO_CONTROL, Control
from fbi.train.teacher import Teacher, teaching

State = dict[str, Any]  # {"params": ..., "opt": ...}, and what a control keeps
Step = Callable[..., tuple[State, dict[str, Array]]]
Objective = Callable[..., tuple[Float[Array, ""], dict[str, Array]]]


def init_state(model: Model, tx: optax.GradientTransformation, key: Array, control: Control = NO_CONTROL) -> State:
    """Fresh parameters and optimizer state, each leaf made where the mesh in use keeps it."""
    return begun(model.init(key), tx, control)


def begun(params: Params, tx: optax.GradientTransformation, control: Control = NO_CONTROL) -> State:
    """The state in which training from these parameters begins."""
    return {"params": params, "opt": jax.jit(tx.init)(params), **jax.jit(control.init)()}


def abstract_state(model: Model, tx: optax.GradientTransformation, control: Control = NO_CONTROL) -> State:
    """Shapes, types and shardings of the state on the mesh in use."""
    params = model.abstract()
    return on_mesh({"params": params, "opt": jax.eval_shape(tx.init, params), **jax.eval_shape(control.init)})


def on_mesh(abstract: Any) -> Any:
    """Abstract arrays with their shardings on the concrete mesh in use, as a checkpoint is restored to."""
    mesh = jax.sharding.get_mesh()

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(concrete, abstract)


def documents_of(inputs: Int[Array, "b t"], separator: int | None) -> Int[Array, "b t"] | None:
    """The number of each token's document within its window; None where attention may cross documents."""
    return None if separator is None else jnp.cumsum(inputs == separator, axis=1)


def context(model: Model, progress: Float[Array, ""], tokens: Int[Array, "b t"]) -> Ctx:
    """What quantizers may know in a step: progress, and for stochastic rounding a key made of it and of the batch."""
    if not model.draws:
        return Ctx(progress)
    step = jax.lax.bitcast_convert_type(progress.astype(jnp.float32), jnp.uint32)
    return Ctx(progress, jax.random.fold_in(jax.random.key(step), jnp.sum(tokens)))


def make_objective(
    loss: Loss,
    *,
    teacher: Model | Teacher | None = None,
    parts: int = 1,
    separator: int | None = None,
    watch: Watch = NO_WATCH,
    chunk: int = 0,
) -> Objective:
    """What a step differentiates: (model, params, teacher_params, batch, progress) -> (mean loss, sums).

    The batch is tokens [b, t+1], or what the teacher splits into these and what it needs of them beside.
    The mean is over predictions, divided by `parts`: those of equal parts of a batch add up to that of the whole.
    `weights`, a last argument, take the place of those that the loss gives its terms. With `chunk` no more logits
    exist than those of so many tokens of each device.
    """
    head = ("head",) if chunk else ()
    wanted = tuple(dict.fromkeys((*loss.features, *watch.features)))
    who = teaching(teacher)

    def objective(
        model: Model,
        params: Params,
        teacher_params: Params | None,
        batch: Any,
        progress: Array,
        weights: Mapping[str, Array] = NO_WEIGHTS,
    ) -> tuple[Array, dict[str, Array]]:
        tokens, rows = who.split(batch)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        documents = documents_of(inputs, separator)
        ctx = context(model, progress, tokens)
        logits, features = model.features(params, inputs, documents, ctx, (*wanted, *head))
        lesson, known = who.lesson(teacher_params or {}, rows, inputs, documents, loss.teacher_features, bool(chunk))
        out = Outputs(None if chunk else logits, labels, None, features, known)
        if chunk:
            own = Readout(model.head_product(params, features["head"], ctx), model.head_logits)
            total, sums = chunked(loss, out, own, lesson, chunk, weights)
        else:
            out = out._replace(teacher_logits=None if lesson is None else lesson(logits))
            total, sums = loss(out, weights)
        return total / (labels.size * parts), sums | watch.sums(out)

    return objective


def make_step(
    model: Model,
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    teacher: Model | Teacher | None = None,
    accumulate: int = 1,
    separator: int | None = None,
    watch: Watch = NO_WATCH,
    control: Control = NO_CONTROL,
    chunk: int = 0,
) -> Step:
    """The compiled step (state, teacher_params, batch, progress) -> (state, sums); `batch` as in `make_objective`.

    Sums are over the batch: `loss`, `ce`, `floor` (with a teacher), each term of the loss by its kind, `count` of
    predictions; `grad_norm` before clipping; what `watch` and `control` tell. The batch is computed in `accumulate`
    parts whose gradients add up to that of the whole; `chunk` as in `make_objective`.
    """
    objective = make_objective(loss, teacher=teacher, parts=accumulate, separator=separator, watch=watch, chunk=chunk)
    gradient, who = jax.grad(functools.partial(objective, model), has_aux=True), teaching(teacher)

    def whole(params: Params, teacher_params: Params | None, batch: Any, *rest: Any) -> tuple[Params, dict[str, Array]]:
        if accumulate == 1:
            return gradient(params, teacher_params, batch, *rest)

        def dealt(x: Array) -> Array:
            # Rows are dealt out in turn, so that every part keeps its share of each device.
            return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

        parts = jax.tree.map(dealt, batch)
        first = gradient(params, teacher_params, jax.tree.map(lambda x: x[0], parts), *rest)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, teacher_params, part, *rest)), None

        return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], parts))[0]

    def step(
        state: State, teacher_params: Params | None, batch: Any, progress: Float[Array, ""]
    ) -> tuple[State, dict[str, Array]]:
        tokens = who.split(batch)[0]
        gradients, sums = whole(state["params"], teacher_params, batch, progress, control.weights(state))
        updates, opt = tx.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        count = jnp.asarray(tokens.shape[0] * (tokens.shape[1] - 1))
        kept, told = control.update({**state, "params": params}, sums, count)
        means = {"count": count, "grad_norm": optax.tree.norm(gradients)}
        return {"params": params, "opt": opt, **kept}, sums | told | means

    return jax.jit(step, donate_argnums=0)
