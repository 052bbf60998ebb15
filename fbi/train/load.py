"""Trained weights back in: runs, teachers, starting points."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from fbi.data.table import Table, is_table
from fbi.data.tokenizer import Tokenizer
from fbi.data.windows import Windows
from fbi.errors import InputError
from fbi.lazy import make_callable
from fbi.loss import Loss
from fbi.model import Model, Params
from fbi.model.axes import Axes, mesh_in_use
from fbi.model.calibrate import calibrate, learned_sites
from fbi.model.convert import adapt, check_routers
from fbi.model.convert_gguf import smollm2
from fbi.model.convert_hf import load_safetensors
from fbi.model.pruning import Pruning, norms, prune
from fbi.policy import Methods, Policy
from fbi.train import mesh as meshes
from fbi.train.checkpoint import load_params
from fbi.train.run import Execution, Run
from fbi.train.rundir import read_run
from fbi.train.step import on_mesh
from fbi.train.teacher import Live, Source, check_table, open_table

PRETRAINED = "smollm2-135m"


class Loaded(NamedTuple):
    """A trained model: `model.apply(params, tokens)`, and the tokenizer it was trained with."""

    model: Model
    params: Params
    tokenizer: Tokenizer


def build_model(run: Run, execution: Execution = Execution()) -> Model:
    """The model of a run."""
    return Model(
        run.model,
        Policy.parse(run.policy),
        axes=Axes(sequence="model" if execution.sequence else None, gather=execution.gather, product=execution.product),
        remat=execution.remat,
        remat_keeps=execution.remat_keeps,
        unroll=execution.unroll,
    )


def load(directory: str | Path, step: int | None = None) -> Loaded:
    """The model, parameters and tokenizer of a run directory, from its newest (or named) checkpoint.

    Parameters land on the mesh in use, on one device where none is set. Raises `InputError` where the directory is no
    run, or has no readable checkpoint.
    """
    directory = Path(directory)
    run = read_run(directory)
    model = build_model(run)
    with jax.set_mesh(mesh_in_use()):
        params = load_params(directory / "checkpoints", on_mesh(model.abstract()), step)
    return Loaded(model, params, Tokenizer.load(directory / "tokenizer.json"))


def load_named(name: str) -> Loaded:
    """What `name` names: the pretrained `smollm2-135m`, in full precision, or a run directory as `load` reads it."""
    if name != PRETRAINED:
        return load(name)
    config, params, tokenizer = smollm2()
    model = Model(config)
    with jax.set_mesh(mesh_in_use()):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(model.abstract()))
        return Loaded(model, jax.device_put(params, shardings), tokenizer)


def check_teacher(run: Run) -> Run:
    """What the teacher of a run is; an `InputError` where it is unfinished or cannot teach this run."""
    directory = Path(run.teacher)
    taught = read_run(directory)
    if not (directory / "done.json").exists():
        raise InputError(f"teacher {directory} is not finished; finish it with `fbi train {directory}`")
    if taught.model.vocab != run.model.vocab:
        raise InputError(
            f"teacher {directory} has a vocabulary of {taught.model.vocab}, this run of {run.model.vocab}; "
            "distillation needs the same tokens in both: use the same data.tokenizer and model.vocab"
        )
    if run.data.window > taught.model.context:
        raise InputError(
            f"teacher {directory} has a context of {taught.model.context}, less than data.window={run.data.window}; "
            "use shorter windows"
        )
    return taught


def load_teacher(run: Run, tokenizer: Tokenizer) -> tuple[Model, Params]:
    """The teacher of a run, frozen; an `InputError` where it cannot teach this run, or has another tokenizer."""
    check_teacher(run)
    directory = Path(run.teacher)
    loaded = load(directory)
    if loaded.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"teacher {directory} was trained with another tokenizer ({loaded.tokenizer.fingerprint}, here "
            f"{tokenizer.fingerprint}); use its {directory / 'tokenizer.json'} as data.tokenizer"
        )
    return loaded.model, loaded.params


def check_source(run: Run, sizes: dict[str, int], accumulate: int) -> None:
    """Refuses a teacher, a run or a table, that cannot teach this run on a mesh of these sizes; loads nothing."""
    if is_table(run.teacher):
        check_table(run.teacher, Loss.parse(run.loss))
    elif run.teacher:
        meshes.check(sizes, check_teacher(run).model, run.data.batch, accumulate, "teacher")


def open_source(run: Run, windows: Windows, directory: Path) -> Source:
    """The teacher of a run in `directory`, whichever it is; an `InputError` where it is one of other data."""
    if is_table(run.teacher):
        return open_table(Table(run.teacher), windows, run.data.mask_documents, run.model.vocab, directory)
    if not run.teacher:
        return Source()
    model, params = load_teacher(run, windows.tokenizer)
    return Source(Live(model), params)


def starting_params(run: Run, target: Model, tokens: Callable[[], Int[Array, "b t"]]) -> Params:
    """Parameters to start from, under the run's policy: at random from the seed, or those that `run.start` names.

    What activation quantizers learn starts from the batch `tokens()` where `run.start` has not learned it. Where a
    routed model starts from a dense one, its neurons are grouped to experts first, as `run.grouping` says.
    """
    fresh = learned_sites(target)
    if not run.start:
        params = target.init(run.seed)
    else:
        source, given = _given(run)
        check_routers(source.config, target.config)
        if target.config.expert and not source.config.expert:
            given = _grouped(run, source, given, tokens, run.model.expert)
        if run.pruning:
            given = _pruned(run, source, given, tokens)
        params = adapt(given, source, target, run.seed)
        there = lambda site: source.bound.get(site, Methods()).activation  # noqa: E731
        fresh = [site for site in fresh if there(site) != target.bound[site].activation]
    return calibrate(target, params, tokens(), fresh) if fresh else params


def _grouped(run: Run, source: Model, params: Params, tokens: Callable[[], Int[Array, "b t"]], expert: int) -> Params:
    """The weights of a dense model with the neurons of each MLP in an order in which neighbours make experts."""
    if run.grouping == "contiguous":  # as they lie
        return params
    from fbi.model.experts import group

    seen = None
    if run.grouping == "coactivation":
        inputs = source.features(params, tokens(), wanted=("layers.*.mlp.down",))[1]["mlp.down"]
        seen = np.asarray(inputs, np.float32).reshape(source.config.layers, -1, source.config.ff)
    return group(source.config, params, expert, run.grouping, run.seed, activations=seen, policy=source.policy)


def _pruned(run: Run, source: Model, params: Params, tokens: Callable[[], Int[Array, "b t"]]) -> Params:
    """The weights of a dense model without those that `run.pruning` takes; a batch of the training data tells norms."""
    pruning = Pruning.parse(run.pruning)
    if pruning.block > 1:
        params = _grouped(run, source, params, tokens, pruning.block)
    seen = {}
    if wanted := {f"layers.*.{name}": norms for name in pruning.features}:
        seen = jax.device_get(source.features(params, tokens(), wanted=wanted)[1])
    return prune(pruning, params, seen)


def _given(run: Run) -> tuple[Model, Params]:
    """The model and parameters that `run.start` names."""
    if run.start == PRETRAINED:
        config, params, _ = smollm2()
        source = Model(config)
    elif (Path(run.start) / "checkpoints").is_dir():
        source, params, _ = load(run.start)
    elif Path(run.start).exists():
        config, params = load_safetensors(run.start)
        source = Model(config)
    else:
        raise InputError(f"start={run.start!r} is neither a run directory, a folder of safetensors, nor {PRETRAINED!r}")
    return source, params


make_callable(__name__, load)  # importing this module binds its name in fbi.train, where the function is wanted
