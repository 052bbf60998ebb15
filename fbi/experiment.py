"""Runs as values: single fields replaced, a shrunken copy that ends in seconds, a chain of runs that teach the next."""

import dataclasses
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fbi.errors import InputError, unknown
from fbi.model.config import ModelConfig, preset
from fbi.train.run import Execution as Execution
from fbi.train.run import Run, convert


def overlay(run: Run, assignments: Iterable[str]) -> Run:
    """The run with fields replaced, given as `data.batch=8`; `model=micro` takes a preset.

    Raises `InputError` for a field that does not exist (listing those that do) or a value of the wrong type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment!r} is not FIELD=VALUE, as in --set data.batch=8")
        run = _replace(run, path.strip().split("."), text.strip(), path.strip())
    return run


def _replace(config: Any, names: list[str], text: str, path: str) -> Any:
    hints = typing.get_type_hints(type(config))
    name, rest = names[0], names[1:]
    if name not in hints:
        prefix = path.rsplit(".", len(names) - 1)[0].rpartition(".")[0] if len(path.split(".")) > len(names) else ""
        raise unknown("field", path, [f"{prefix}.{h}" if prefix else h for h in hints])
    hint, value = hints[name], getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(value):
            raise InputError(f"--set {path}: {name} is a single value, it has no field {'.'.join(rest)}")
        return dataclasses.replace(config, **{name: _replace(value, rest, text, path)})
    return dataclasses.replace(config, **{name: _value(hint, text, path)})


def _value(hint: Any, text: str, path: str) -> Any:
    if hint is ModelConfig:
        return preset(text)
    if dataclasses.is_dataclass(hint):
        fields = ", ".join(f"{path}.{field.name}" for field in dataclasses.fields(hint))
        raise InputError(f"--set {path}: give one of its fields: {fields}")
    kind = type(get_args(hint)[0]) if get_origin(hint) is Literal else hint
    if kind is bool:
        return convert(hint, {"true": True, "false": False}.get(text.lower(), text), path)
    for parse in {int: (int,), float: (float,)}.get(kind, ()):
        try:
            return convert(hint, parse(text), path)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
    return convert(hint, text, path)


def smoke(run: Run) -> Run:
    """The same run made small enough to end in seconds: two layers of width 128, 64 tokens, 2 steps.

    What the run is about stays: policy, loss, norm placement, schedule, corpus.
    """
    model = dataclasses.replace(
        run.model, vocab=512, dim=128, layers=2, heads=2, kv_heads=2, head_dim=64, ff=128, context=128
    )
    data = dataclasses.replace(run.data, tokenizer="bpe:512", window=64, batch=8)
    return dataclasses.replace(run, name=f"{run.name}-smoke", model=model, data=data, steps=2)


def chain(run: Run, policies: Sequence[str], root: str | Path) -> list[tuple[Path, Run]]:
    """(directory, run) under one policy after the other, to be trained in this order; each continues the one before.

    A link starts from the weights of the one before and, where the loss has a teacher, is taught by it: the
    distillation in steps of BiT, arXiv 2205.13016, whose policies fall from 32 bits to 1. The first link starts and is
    taught as `run` says; where that names no teacher, it learns from the text alone (`ce`). Directories are `root`/0,
    `root`/1, ...; links differ from `run` in name, policy, start, teacher and loss. `InputError` for no policy.
    """
    from fbi.loss import Loss  # it needs jax, which naming runs does not

    if not policies:
        raise InputError("a chain of runs needs at least one policy, as in chain(run, ['fp', 'fbi'], 'runs/chain')")
    distils = Loss.parse(run.loss).needs_teacher
    links: list[tuple[Path, Run]] = []
    for index, policy in enumerate(policies):
        link = dataclasses.replace(run, name=f"{run.name}-{index}", policy=policy)
        if links:
            before = str(links[-1][0])
            link = dataclasses.replace(link, start=before, teacher=before if distils else "")
        elif distils and not run.teacher:
            link = dataclasses.replace(link, loss="ce")
        links.append((Path(root) / str(index), link))
    return links
