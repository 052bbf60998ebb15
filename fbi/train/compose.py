"""A run from its configuration: checks, data, teacher, mesh, loop, result."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from fbi import optim
from fbi.analysis.active import token_bits
from fbi.analysis.batch import activations, alignment, of_tokens, on_part
from fbi.analysis.diagnostics import Diagnostics
from fbi.analysis.names import parse as diagnostic_names
from fbi.analysis.routing import routing_rows
from fbi.data import Batches, Windows, prepare
from fbi.data import config as data_config
from fbi.errors import InputError
from fbi.evaluate.perplexity import evaluate
from fbi.files import read_json, write_json
from fbi.loss import Loss, check_chunks
from fbi.model import Model
from fbi.model.config import check as check_model
from fbi.policy import NONE, Methods
from fbi.train import hosts, pruning, routing, sinks
from fbi.train import mesh as meshes
from fbi.train.checkpoint import Checkpoints
from fbi.train.goodput import Clock
from fbi.train.load import build_model, check_source, open_source, starting_params
from fbi.train.loop import Loop
from fbi.train.profile import Profile
from fbi.train.profile import parse as parse_profile
from fbi.train.program import program
from fbi.train.progress import Quiet, Reporter
from fbi.train.run import Execution, Run, to_json
from fbi.train.rundir import Metrics, NoMetrics, begin, environment, located, locked, take_back
from fbi.train.step import State, begun, documents_of, make_objective
from fbi.train.summary import scale_rows, summarize

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
        ("final_windows", run.final_windows, 0),
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
    if execution.grace < 0:
        raise InputError(f"grace={execution.grace} must be at least 0 seconds")
    parse_profile(execution.profile, run.steps)
    if run.guard.spike <= 0:
        raise InputError(f"guard.spike={run.guard.spike} must be above 0")
    if run.data.window > run.model.context:
        raise InputError(f"data.window={run.data.window} exceeds model.context={run.model.context}; lower it")
    diagnostic_names(execution.diagnostics)
    sinks.names(execution.sinks)
    sizes = meshes.parse(execution.mesh, devices or jax.device_count())
    meshes.check(sizes, run.model, run.data.batch, execution.accumulate)
    if execution.sequence and run.data.window % sizes["model"]:
        raise InputError(f"mesh: model={sizes['model']} does not divide data.window={run.data.window} (sequence)")


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
    hosts.same("command", {"run": to_json(run), "execution": to_json(execution)})
    with contextlib.ExitStack() as lock:  # of process 0, whose word the others take

        def start() -> dict[str, bool]:
            lock.enter_context(locked(directory))
            return {"begun": begin(directory, run), "done": (directory / "done.json").exists()}

        state = hosts.led(start)
        if state["done"]:
            return _result(directory)
        try:
            with Clock(directory / ".clock" if jax.process_index() == 0 else None) as clock:  # as the record
                return _train(run, directory, execution, clock)
        except InputError:
            if state["begun"] and hosts.leads():
                take_back(directory)
            raise


def _result(directory: Path) -> Result:
    done = hosts.led(lambda: read_json(directory / "done.json"))
    try:
        return Result(directory, done["steps"], done["loss"], done["perplexity"], done["bits_per_byte"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{directory / 'done.json'} is damaged: it lacks {error}; delete it, and the run ends anew"
        ) from error


def _reporter(*args: Any, **options: Any) -> Reporter:
    return (Reporter if hosts.leads() else Quiet)(*args, **options)


def prepared(run: Run, line_every: float) -> Windows:
    """The data, with progress; the tokenizer must fit the model."""
    with _reporter("data", 1, unit="document", line_every=line_every) as reporter:

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


def _train(run: Run, directory: Path, execution: Execution, clock: Clock) -> Result:
    sizes, given = meshes.parse(execution.mesh, jax.device_count()), located(run, directory)
    check_source(given, sizes, execution.accumulate)
    windows = hosts.first(lambda: prepared(run, execution.line_every))
    hosts.same("corpus", dict(windows.meta))
    schedule = optim.learning_rate(run.optimizer, run.steps)
    mesh = meshes.make(sizes)
    separator = windows.tokenizer.separator if run.data.mask_documents else None
    with jax.set_mesh(mesh):
        teacher, teacher_params, paired = open_source(given, windows, directory)
        checkpoints = Checkpoints(
            directory / "checkpoints", keep_last=execution.keep_last, keep_every=execution.keep_every
        )
        stream = windows.stream("validation")
        size = run.data.batch
        put = lambda step: meshes.put_batch(batches(()).batch_at(step), mesh, size)[:, :-1]  # noqa: E731
        held = functools.partial(routing.held, windows, run.data.batch, mesh)
        built = program(run, execution, teacher=teacher, separator=separator, held=held)
        model, routed = built.model, built.routed
        hosts.led(lambda: _describe(directory, model, windows, execution))
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
                rows=meshes.local_rows(run.data.batch, mesh),
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
                limit=run.final_windows if last else execution.eval_windows,
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
                "activations": of_tokens(
                    activations(model, functools.partial(documents_of, separator=separator)), teacher.split
                ),
                "alignment": alignment(model, objective),
            }
            by_batch = {name: on_part(measure, execution.accumulate) for name, measure in measures.items()}
            diagnostics = Diagnostics(model, execution.diagnostics, by_batch)
        try:
            with (
                _reporter(run.name, run.steps, line_every=execution.line_every) as reporter,
                sinks.opened(execution.sinks if hosts.leads() else "", run, directory) as opened,
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
                    batches=lambda skipped: paired(batches(skipped)),
                    evaluate=lambda *at: final.__setitem__(slice(None), rows(*at)) or final,
                    learning_rate=lambda step: float(schedule(step)),
                    checkpoints=checkpoints,
                    metrics=(Metrics if hosts.leads() else NoMetrics)(directory / "metrics.jsonl", opened),
                    reporter=reporter,
                    diagnostics=diagnostics,
                    clock=clock,
                    profile=Profile(parse_profile(execution.profile, run.steps), directory / "profile", reporter.say),
                    finish=routed.finish,
                ).train()
                final = final or rows(state, run.steps, True)  # a run stopped between its last checkpoint and here
        finally:
            checkpoints.close()
    kept = ("loss", "perplexity", "bits_per_byte", "sparsity", "active_bits_per_weight")
    best = {name: final[0][name] for name in kept if name in final[0]}
    hosts.led(lambda: write_json(directory / "done.json", {"steps": run.steps, **best, "hash": run.hash}))
    return _result(directory)


def _describe(directory: Path, model: Model, windows: Windows, execution: Execution) -> None:
    write_json(directory / "env.json", environment(execution))
    windows.tokenizer.save(directory / "tokenizer.json")
    write_json(directory / "summary.json", summarize(model, windows))
