"""A run from its configuration: checks, data, teacher, mesh, loop, result."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbi import optim
from fbi.analysis.active import token_bits
from fbi.analysis.batch import activations, alignment, on_part
from fbi.analysis.diagnostics import Diagnostics
from fbi.analysis.names import parse as diagnostic_names
from fbi.analysis.routing import routing_rows
from fbi.data import Batches, Windows, prepare
from fbi.data import config as data_config
from fbi.errors import InputError
from fbi.evaluate.perplexity import evaluate
from fbi.files import read_json, write_json
from fbi.loss import Loss, check_chunks
from fbi.model import Model, Params
from fbi.model.config import check as check_model
from fbi.model.decoder import segments
from fbi.optim.groups import is_router, is_scale
from fbi.policy import NONE, Methods
from fbi.train import mesh as meshes
from fbi.train import pruning, routing, sinks
from fbi.train.checkpoint import Checkpoints
from fbi.train.load import build_model, check_teacher, load_teacher, starting_params
from fbi.train.loop import Loop
from fbi.train.program import program
from fbi.train.progress import Reporter
from fbi.train.run import Execution, Run
from fbi.train.rundir import Metrics, begin, environment, located, locked, take_back
from fbi.train.step import State, begun, documents_of, make_objective

STEPS = 1 << 31  # the optimizer counts them in 32 bits
SEEDS = 1 << 32  # jax takes a seed modulo this: beyond it two seeds would be one


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: where it is, and what it came to on the validation split."""

    directory: Path
    steps: int
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float


def check(run: Run, execution: Execution = Execution(), devices: int = 0) -> None:
    """Refuses a run that cannot be carried out on so many devices (0: those here), before anything is loaded."""
    check_model(run.model)
    data_config.check(run.data)
    optim.check(run.optimizer)
    model = build_model(run)
    if run.optimizer.latent == "bop":
        check_signs(model)
    loss = Loss.parse(run.loss)
    if loss.needs_teacher and not run.teacher:
        raise InputError(f"loss={run.loss!r} needs a teacher; set teacher to the directory of a finished run")
    if run.teacher and not loss.needs_teacher:
        raise InputError(f"loss={run.loss!r} does not look at teacher={run.teacher!r}; drop it, or use loss=ad")
    routing.check(run, loss)
    pruning.check(run, loss)
    if loss.whole_batch and execution.accumulate > 1:
        raise InputError(
            f"loss={run.loss!r}: {', '.join(loss.whole_batch)} looks at the whole batch, which accumulate="
            f"{execution.accumulate} computes in parts; use accumulate=1, or an option that fixes it, as cakld:beta=0.5"
        )
    check_chunks(loss, execution.loss_chunk)
    for name, value, least in (
        ("steps", run.steps, 1),
        ("guard.retries", run.guard.retries, 0),
        ("accumulate", execution.accumulate, 1),
        ("unroll", execution.unroll, 1),
        ("checkpoint_every", execution.checkpoint_every, 1),
        ("keep_last", execution.keep_last, 1),
        ("keep_every", execution.keep_every, 0),
        ("eval_every", execution.eval_every, 0),
        ("eval_windows", execution.eval_windows, 0),
        ("log_every", execution.log_every, 1),
        ("diagnose_every", execution.diagnose_every, 0),
    ):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    if run.steps >= STEPS:
        raise InputError(f"steps={run.steps} must be below {STEPS}")
    if not 0 <= run.seed < SEEDS:
        raise InputError(f"seed={run.seed} must be at least 0 and below {SEEDS}")
    if run.guard.spike <= 0:
        raise InputError(f"guard.spike={run.guard.spike} must be above 0")
    if run.data.window > run.model.context:
        raise InputError(f"data.window={run.data.window} exceeds model.context={run.model.context}; lower it")
    diagnostic_names(execution.diagnostics)
    sinks.names(execution.sinks)
    sizes = meshes.parse(execution.mesh, devices or jax.device_count())
    meshes.check(sizes, run.model, run.data.batch, execution.accumulate)


def check_signs(model: Model) -> None:
    """Refuses Bop, which only flips signs, where a matrix of a block is used as it is."""
    for site in model.sites:
        if site.name.startswith("layers.") and site.weight and model.bound.get(site.name, Methods()).weight == NONE:
            raise InputError(
                f"optimizer.latent=bop only flips signs, and {site.name} has no quantized weight; "
                "give every matrix of the blocks a method (policy=fbi), or use optimizer.latent=adamw"
            )


def train(run: Run, directory: str | Path, execution: Execution = Execution()) -> Result:
    """`fbi.train.train`, which this implements."""
    directory = Path(directory)
    check(run, execution)
    with locked(directory):
        begun = begin(directory, run)
        if (directory / "done.json").exists():
            return _result(directory)
        try:
            return _train(run, directory, execution)
        except InputError:
            if begun:
                take_back(directory)
            raise


def _result(directory: Path) -> Result:
    done = read_json(directory / "done.json")
    try:
        return Result(directory, done["steps"], done["loss"], done["perplexity"], done["bits_per_byte"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{directory / 'done.json'} is damaged: it lacks {error}; delete it, and the run ends anew"
        ) from error


def _prepare(run: Run, execution: Execution) -> Windows:
    """The data, with progress; the tokenizer must fit the model."""
    with Reporter("data", 1, unit="document", line_every=execution.line_every) as reporter:

        def progress(done: int, total: int, unit: str) -> None:
            reporter.unit, reporter.total = unit, total
            reporter.update(done)

        windows = prepare(run.data, progress)
    if windows.tokenizer.vocab > run.model.vocab:
        raise InputError(
            f"the tokenizer has {windows.tokenizer.vocab} tokens, model.vocab is {run.model.vocab}; "
            f"set model.vocab={windows.tokenizer.vocab} or use a smaller tokenizer"
        )
    return windows


def _train(run: Run, directory: Path, execution: Execution) -> Result:
    sizes, given = meshes.parse(execution.mesh, jax.device_count()), located(run, directory)
    if run.teacher:
        meshes.check(sizes, check_teacher(given).model, run.data.batch, execution.accumulate, "teacher")
    windows = _prepare(run, execution)
    schedule = optim.learning_rate(run.optimizer, run.steps)
    mesh = meshes.make(sizes)
    separator = windows.tokenizer.separator if run.data.mask_documents else None
    with jax.set_mesh(mesh):
        teacher, teacher_params = load_teacher(given, windows.tokenizer) if run.teacher else (None, None)
        write_json(directory / "env.json", environment(execution))
        windows.tokenizer.save(directory / "tokenizer.json")
        checkpoints = Checkpoints(
            directory / "checkpoints", keep_last=execution.keep_last, keep_every=execution.keep_every
        )
        stream = windows.stream("validation")
        put = lambda step: meshes.put_batch(batches(()).batch_at(step), mesh)[:, :-1]  # noqa: E731
        held = functools.partial(routing.held, windows, run.data.batch, mesh)
        built = program(run, execution, teacher=teacher, separator=separator, held=held)
        model, routed = built.model, built.routed
        write_json(directory / "summary.json", summarize(model, windows))
        pruned = pruning.told(run)

        def fresh() -> State:
            params = starting_params(given, model, lambda: put(0))
            return begun(params, built.tx, routed.control)

        def batches(skipped: tuple[tuple[int, int], ...]) -> Batches:
            return Batches(
                windows,
                batch=run.data.batch,
                seed=run.data.seed,
                skipped=skipped,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )

        def rows(state: State, step: int, last: bool) -> list[dict[str, Any]]:
            score = evaluate(
                model,
                state["params"],
                stream,
                token_bytes=windows.token_bytes,
                window=run.data.window + 1,
                stride=run.data.window,
                batch=run.data.batch,
                separator=separator,
                limit=0 if last else execution.eval_windows,
                tally=routed.tally,
            )
            found = {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
            found |= pruned(state["params"])
            routers = routing_rows(score.tallied, step)
            if routers:
                found["sparsity"] = routers[-1]["sparsity"]  # of all layers
                active = token_bits(run.model, model.policy, found["sparsity"])
                found["active_bits_per_weight"] = active.per_weight[0]
            row = {"kind": "eval", "step": step, "split": "validation", **found, "tokens": score.tokens}
            return [row, *scale_rows(model, state["params"], step), *routers]

        diagnostics = None
        if execution.diagnose_every:
            objective = make_objective(built.loss, teacher=teacher, separator=separator, chunk=execution.loss_chunk)
            measures = {
                "activations": activations(model, functools.partial(documents_of, separator=separator)),
                "alignment": alignment(model, objective),
            }
            by_batch = {name: on_part(measure, execution.accumulate) for name, measure in measures.items()}
            diagnostics = Diagnostics(model, execution.diagnostics, by_batch)
        try:
            with (
                Reporter(run.name, run.steps, line_every=execution.line_every) as reporter,
                sinks.opened(execution.sinks, run, directory) as opened,
            ):
                final: list[dict[str, Any]] = []
                state = Loop(
                    run=run,
                    execution=execution,
                    mesh=mesh,
                    step=built.step,
                    fresh=fresh,
                    abstract=built.state,
                    teacher_params=teacher_params,
                    batches=batches,
                    evaluate=lambda *at: final.__setitem__(slice(None), rows(*at)) or final,
                    learning_rate=lambda step: float(schedule(step)),
                    checkpoints=checkpoints,
                    metrics=Metrics(directory / "metrics.jsonl", opened),
                    reporter=reporter,
                    diagnostics=diagnostics,
                    finish=routed.finish,
                ).train()
                final = final or rows(state, run.steps, True)  # a run stopped between its last checkpoint and here
        finally:
            checkpoints.close()
    kept = ("loss", "perplexity", "bits_per_byte", "sparsity", "active_bits_per_weight")
    best = {name: final[0][name] for name in kept if name in final[0]}
    write_json(directory / "done.json", {"steps": run.steps, **best, "hash": run.hash})
    return _result(directory)


def summarize(model: Model, windows: Windows) -> dict[str, Any]:
    """What a model costs and what its text is like: parameters, bits of the block matrices, bytes of a file."""
    report = model.policy.report(model)
    blocks = [row.bits for row in report.rows if row.bits and row.site.startswith("layers.")]
    weights = sum(bits.weights for bits in blocks)
    flat = jax.tree_util.tree_flatten_with_path(model.abstract())[0]
    wide = sum(leaf.size for path, leaf in flat if path[-1].key == "scale" or is_router(path))
    return {
        "parameters": model.parameter_count(),
        "paper_bits_per_weight": sum(bits.paper for bits in blocks) / weights,
        "stored_bits_per_weight": 8 * sum(bits.stored for bits in blocks) / weights,
        "stored_megabytes": (report.stored_bytes + 4 * wide) / 1e6,
        "unigram_entropy": windows.meta["unigram_entropy"],
        "vocab": model.config.vocab,
        "train_tokens": windows.meta["splits"]["train"]["tokens"],
    }


@jax.jit
def _statistics(leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(leaf.shape[0], -1)
    return jnp.stack([flat.mean(1), flat.std(1), flat.min(1), flat.max(1)], 1)


def scale_rows(model: Model, params: Params, step: int) -> list[dict[str, Any]]:
    """A row for each site with learned scales: mean, std, min and max of each of its leaves."""
    rows: dict[str, dict[str, Any]] = {}
    for start, stop in segments(model.bound, model.config.layers):
        flat, _ = jax.tree_util.tree_flatten_with_path(params[f"layers_{start}_{stop}"])
        for path, leaf in flat:
            names = [entry.key for entry in path]
            if not is_scale(path):
                continue
            operand = {"q": "", "a": "activation.", "r": "around."}[names[-2]]
            whole = jax.sharding.reshard(leaf, jax.P(*[None] * leaf.ndim))
            for layer, numbers in enumerate(np.asarray(_statistics(whole)).tolist(), start):
                site = f"layers.{layer}.{'.'.join(names[:-2])}"
                row = rows.setdefault(site, {"kind": "scales", "step": step, "site": site})
                row[operand + names[-1]] = dict(zip(("mean", "std", "min", "max"), numbers, strict=True))
    return [rows[site] for site in sorted(rows, key=_by_layer)]


def _by_layer(site: str) -> tuple[int, str]:
    found = re.match(r"layers\.(\d+)\.(.*)", site)
    return (int(found[1]), found[2]) if found else (-1, site)
