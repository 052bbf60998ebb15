"""The commands `fbi eval`, held-out loss of a run, and `fbi tasks`, zero-shot accuracy, also of a pretrained model."""

from pathlib import Path
from typing import Annotated

import tyro

from fbi.errors import InputError

_STANDARD = "lambada,boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"


def evaluate(
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
    split: str = "validation",
    window: int = 0,
    stride: int = 0,
    batch: int = 32,
) -> None:
    """Held-out loss, perplexity and bits per byte of a run; of a model with experts the share that is skipped.

    For example: fbi eval runs/first --split test --window 128 --stride 64

    Args:
        directory: A run directory with a checkpoint.
        split: Which part of its corpus: train, validation or test.
        window: Tokens in a window; 0 takes the training window and one.
        stride: Tokens between windows; 0 scores every token once; the window itself is FBI-LLM's protocol.
        batch: Windows computed at once.
    """
    from fbi.analysis.routing import routing_rows
    from fbi.data import prepare
    from fbi.errors import unknown
    from fbi.evaluate.perplexity import evaluate
    from fbi.report.table import Column, Table
    from fbi.train import load
    from fbi.train.routing import tally_of
    from fbi.train.rundir import read_run

    run = read_run(directory)
    model, params, tokenizer = load(directory)
    windows = prepare(run.data)
    if windows.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f"the data of {directory} now gives another tokenizer; its corpus has changed since training")
    if split not in windows.meta["splits"]:
        raise unknown("split", split, windows.meta["splits"])
    window = window or run.data.window + 1
    score = evaluate(
        model,
        params,
        windows.stream(split),
        token_bytes=windows.token_bytes,
        window=window,
        stride=stride or window - 1,
        batch=batch,
        separator=tokenizer.separator if run.data.mask_documents else None,
        tally=tally_of(run.model),
    )
    names = (("nats/token", ".4f"), ("perplexity", ".2f"), ("bits/byte", ".4f"), ("tokens", ",d"), ("windows", ",d"))
    row = [split, score.loss, score.perplexity, score.bits_per_byte, score.tokens, score.windows]
    if routed := routing_rows(score.tallied, 0):
        names, row = (*names, ("FFN sparsity", ".4f")), [*row, routed[-1]["sparsity"]]  # the last row is of all layers
    print(Table([Column("split"), *(Column(*name) for name in names)], [row], title=str(directory)).terminal())


def tasks(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|smollm2-135m")],
    tasks: Annotated[str, tyro.conf.arg(metavar="NAME,NAME")] = _STANDARD,
    limit: int = 0,
    seed: int = 0,
    batch: int = 16,
) -> None:
    """Zero-shot accuracy on the usual tasks, by log-likelihood of the answers.

    For example: fbi tasks runs/first --tasks lambada,piqa --limit 200

    Args:
        model: A run directory with a checkpoint, or the name of the pretrained model.
        tasks: Names of tasks with commas between them; besides the standard ones arc_easy_test, arc_challenge_test and
            openbookqa_test.
        limit: At most so many documents of each task; 0 for all.
        seed: Draws the documents of LAMBADA where they are limited.
        batch: Answers computed at once.
    """
    from fbi.evaluate.tasks import evaluate_task
    from fbi.evaluate.tasks.tasks import find
    from fbi.report.table import Column, Table
    from fbi.train.load import load_named
    from fbi.train.progress import Reporter

    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        find(name)
    if limit < 0:
        raise InputError(f"limit is {limit}; it must be at least 0, which means all documents")
    loaded = load_named(model)
    scores = []
    for name in names:
        with Reporter(name, 1, unit="answer") as reporter:

            def progress(done: int, total: int, reporter: Reporter = reporter) -> None:
                reporter.total = total
                reporter.update(done)

            scores.append(evaluate_task(*loaded, name, limit=limit or None, seed=seed, batch=batch, progress=progress))
    columns = [
        Column("task"), Column("documents", ",d"), Column("acc", ".4f"), Column("stderr", ".4f"),
        Column("acc_norm", ".4f"), Column("stderr", ".4f"), Column("chance", ".4f"), Column("perplexity", ".2f"),
        Column("bits/byte", ".4f"),
    ]  # fmt: skip
    rows = [
        [s.name, s.documents, s.accuracy, s.stderr, s.accuracy_norm, s.stderr_norm, s.chance, s.perplexity,
         s.bits_per_byte]
        for s in scores
    ]  # fmt: skip
    notes = ["acc_norm: by log-likelihood per character; perplexity: of LAMBADA's last words; bits/byte: of the right "
             "answers"]  # fmt: skip
    print(Table(columns, rows, title=f"{model}, zero-shot", notes=notes).terminal())
