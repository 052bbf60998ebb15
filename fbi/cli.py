"""The command line: `fbi COMMAND --help` shows each with an example."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fbi import cli_preflight, cli_report, cli_sweep, cli_tasks, cli_teach, console
from fbi.errors import InputError
from fbi.launch.hosts import Hosts
from fbi.launch.supervise import end, enter
from fbi.train.run import Execution

RunDirectory = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
Config = Annotated[str, tyro.conf.arg(metavar="FILE")]
Set = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="FIELD=VALUE")]
Flat = Annotated[Execution, tyro.conf.arg(name="")]
FlatHosts = Annotated[Hosts, tyro.conf.arg(name="")]
_arguments: list[str] = []  # of the command being run


def _configured(directory: Path | None, config: str, assignments: Sequence[str]):
    """The Run that a file, the directory or the defaults give, with single fields replaced."""
    import dataclasses

    from fbi.experiment import Run, overlay
    from fbi.files import read_json
    from fbi.train.rundir import parse_config, read_run

    if config:
        run = parse_config(read_json(Path(config)), config)
    elif directory is not None and (directory / "config.json").exists():
        run = read_run(directory)
    else:
        run = Run() if directory is None else dataclasses.replace(Run(), name=directory.resolve().name)
    return overlay(run, assignments)


def demo(
    directory: Path = Path("runs/demo"), steps: int = 500, execution: Flat = Execution(accumulate=4, eval_windows=256)
) -> None:
    """What one bit costs: teacher and two binarized students on real text, a table, a picture, samples.

    For example: fbi demo --directory runs/demo. Interrupted, it continues; finished, it shows its result at once.

    Args:
        directory: Where runs, table and picture go.
        steps: Optimizer steps of each of the three runs, 4,096 tokens each.
        execution: How the runs are executed.
    """
    from fbi.demo import demo

    demo(directory, steps, execution)


def data(config: Config = "", assignments: Set = ()) -> None:
    """Prepare a corpus: text, tokenizer, packed windows, all cached; print what came out.

    For example: fbi data --set data.corpus=text:books/ --set data.tokenizer=bpe:2048

    Args:
        config: A config.json whose data part is used.
        assignments: Replaces a field, such as data.window=256.
    """
    from fbi.data import prepare
    from fbi.report.table import Column, Table
    from fbi.train.progress import Reporter

    run = _configured(None, config, assignments)
    with Reporter("data", 1, unit="document") as reporter:

        def progress(done: int, total: int, unit: str) -> None:
            reporter.unit, reporter.total = unit, total
            reporter.update(done)

        windows = prepare(run.data, progress)
    names = ("documents", "bytes", "tokens", "windows")
    rows = [[split, *(part[n] for n in names)] for split, part in windows.meta["splits"].items()]
    notes = [
        f"vocabulary {windows.meta['vocab']}, window {windows.meta['window']}, "
        f"unigram entropy {windows.meta['unigram_entropy']:.4f} nats/token",
        f"in {windows.folder}",
    ]
    table = Table([Column("split"), *(Column(n, ",d") for n in names)], rows, title=run.data.corpus, notes=notes)
    print(table.terminal())


def train(
    directory: RunDirectory,
    config: Config = "",
    assignments: Set = (),
    execution: Flat = Execution(),
    hosts: FlatHosts = Hosts(),
) -> None:
    """Train, continue, or (when done) do nothing: what the directory's config says.

    For example: fbi train runs/first --set policy=bitnet-b158 --set steps=200 --mesh data=1

    Args:
        directory: The run directory; begun if it is not there yet.
        config: A file {"format": 1, "run": {...}}, as config.json of a run directory.
        assignments: Replaces a field of the run, such as data.batch=8 or model=micro; `fbi show` prints them all.
        execution: How the run is executed; may change when it continues.
        hosts: Of a run on several hosts, started by this command on each of them.
    """
    from fbi.train import train

    place = enter(hosts, _arguments)
    run = _configured(directory, config, assignments)
    result = train(run, directory, execution)
    if place and place.process:
        return
    print(
        f"{run.name}: done, {result.steps} steps, validation {result.loss:.4f} nats/token, "
        f"perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits/byte; {directory}"
    )


def generate(
    directory: RunDirectory,
    prompt: str = "The people of the United States",
    tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    seed: int = 0,
    sparse: bool = False,
) -> None:
    """Text from a trained run.

    For example: fbi generate runs/first --prompt "My fellow citizens" --temperature 0

    Args:
        directory: A run directory with a checkpoint.
        prompt: The text to continue.
        tokens: How many tokens to add at most.
        temperature: 0 takes the likeliest token each time.
        top_p: Draw from the fewest tokens that together have this probability.
        seed: Of the draws.
        sparse: Read the weights of active experts alone, of a model with model.routing=hard.
    """
    from fbi import serve
    from fbi.evaluate.generate import generate
    from fbi.train import load
    from fbi.train.compose import SEEDS

    if not 0 <= seed < SEEDS:
        raise InputError(f"seed is {seed}; it must be at least 0 and below {SEEDS}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not UTF-8 text: {error.reason} at character {error.start}") from error
    model, params, tokenizer = load(directory)
    if sparse:
        model, params = serve.sparse(model, params)
    options = {"tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    print(prompt + generate(model, params, tokenizer, prompt, **options))


def methods() -> None:
    """Every quantization method: roles, options, paper.

    For example: fbi methods
    """
    from fbi.quant import REGISTRY
    from fbi.quant.registry import allowed_text
    from fbi.report.table import Column, Table

    rows = [
        [
            name,
            ", ".join(entry.roles),
            ", ".join(f"{o}={str(p.default).lower()} ({allowed_text(p)})" for o, p in entry.options.items()) or None,
            entry.summary,
            entry.paper,
        ]
        for name, entry in sorted(REGISTRY.items())
    ]
    columns = [Column(name) for name in ("method", "roles", "options", "what it is", "source")]
    print(Table(columns, rows, title="methods").terminal(_width()))


def policy(
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")] = "fbi", model: str = "nano"
) -> None:
    """What a policy gives every site of a model, with bits and megabytes.

    For example: fbi policy "layers.{0,-1}.*: w=none | layers.*: w=fbi" --model fbi-130m

    Args:
        text: A preset (fp, fbi, bitnet-b158) or rules.
        model: The name of a model preset.
    """
    import fbi.model
    from fbi.policy import Policy

    print(Policy.parse(text).report(fbi.model.build(model)))


def cost(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    policy: str = "fbi",
    tokens: int = 512,
    expert: int = 0,
    sparsity: float = 0.0,
) -> None:
    """What a model costs: size, operations, energy of its arithmetic, memory of training; counted, not measured.

    For example: fbi cost bitnet-3b --policy bitnet-b158 --tokens 512

    Args:
        model: The name of a model preset.
        policy: A preset (fp, fbi, bitnet-b158) or rules.
        tokens: Length of the one sequence that the forward pass is over.
        expert: Neurons of an expert of the MLPs, 32 in LTE; 0: dense MLPs.
        sparsity: The share of the experts that a token skips.
    """
    import dataclasses

    from fbi.analysis import cost_rows
    from fbi.analysis.cost import cost
    from fbi.model.config import preset
    from fbi.policy import Policy
    from fbi.report.table import Column, Table

    config = dataclasses.replace(preset(model), expert=expert)
    found = cost(config, Policy.parse(policy), tokens, sparsity=sparsity)
    columns = [Column(*column) for column in cost_rows.COLUMNS]
    title = f"{model}, {policy}, a forward pass over {tokens} tokens"
    print(Table(columns, cost_rows.rows(found), title=title, notes=cost_rows.notes(found)).terminal(_width()))


def models() -> None:
    """Every model preset with its shape and exact parameter count.

    For example: fbi models
    """
    from fbi.model.config import PRESETS, count_parameters
    from fbi.report.table import Column, Table

    shape = ("dim", "layers", "heads", "kv_heads", "ff", "vocab")
    rows = [
        [name, *(getattr(c, f) for f in shape), c.norm, count_parameters(c).non_embedding, count_parameters(c).total]
        for name, c in PRESETS.items()
    ]
    columns = [Column("model"), *(Column(f, "d") for f in shape), Column("norm")]
    columns += [Column("non-embedding", ",d"), Column("parameters", ",d")]
    print(Table(columns, rows, title="model presets (learned scales of a policy come on top)").terminal())


COMMANDS = {
    "demo": demo, "data": data, "train": train, "eval": cli_tasks.evaluate, "tasks": cli_tasks.tasks,
    "generate": generate,
    "sweep": cli_sweep.sweep, "status": cli_sweep.status, "stop": cli_sweep.stop, "retry": cli_sweep.retry,
    "table": cli_report.table, "plot": cli_report.plot, "report": cli_report.report,
    "methods": methods, "policy": policy, "cost": cost, "models": models, "show": cli_report.show,
    "preflight": cli_preflight.preflight, "teach": cli_teach.teach,
}  # fmt: skip


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((160, 40)).columns if sys.stdout.isatty() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for bad input, 75 when stopped by a signal."""
    about = "Train, distil, tabulate low-bit language models. For example: fbi demo"
    _arguments[:] = sys.argv[1:] if arguments is None else arguments
    return console.run(COMMANDS, about, list(_arguments))


def entry() -> None:
    """The console script."""
    end(main)
