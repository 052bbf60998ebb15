"""Runs as values: fields replaced, grids and ladders of runs, a shrunken copy, a chain of runs that teach the next.

A sweep is a list of runs made by these functions, each of which takes runs and returns runs:

    runs = grid(Run(name="w1"), {"policy": ["fbi", "bitnet-b158"], "optimizer.lr": [1e-3, 3e-3]})
    runs = seeds(runs, 3)     # w1-fbi-0.001-s0, w1-fbi-0.001-s1, ...
"""

import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fbi.errors import InputError, unknown
from fbi.model.config import ModelConfig, count_parameters, preset
from fbi.train.run import Config, Run, convert
from fbi.train.run import Execution as Execution

ORDERS = 1000  # seeds of one order of the data
Values = Sequence[Any] | Mapping[str, Any]  # of one field; a mapping gives each its label


def overlay(config: Config, assignments: Iterable[str]) -> Config:
    """The config (of a run, a launcher, ...) with fields replaced, given as `data.batch=8`; `model=micro`: a preset.

    Raises `InputError` for a field that does not exist (listing those that do) or a value of the wrong type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment!r} is not FIELD=VALUE, as in --set data.batch=8")
        path, text = path.strip(), text.strip()
        config = _replace(config, path.split("."), path, lambda hint, path, text=text: _parse(hint, text, path))
    return config


def replace(run: Run, fields: Mapping[str, Any]) -> Run:
    """The run with fields replaced by values, given as `{"data.batch": 8, "model": "micro"}`; errors as `overlay`."""
    for path, value in fields.items():
        run = _replace(run, path.split("."), path, lambda hint, path, value=value: _typed(hint, value, path))
    return run


def grid(runs: Run | Sequence[Run], axes: Mapping[str, Values]) -> list[Run]:
    """Every run with every combination of the fields' values; names gain a label for each field with several values.

    `grid(base, {"policy": ["fp", "fbi"], "optimizer.lr": {"low": 1e-3, "high": 3e-3}})` gives four runs, `fp-low` and
    on. A label is the value as text, or the key where the values are a mapping.
    """
    chosen = [[(path, label, value) for label, value in _labelled(values)] for path, values in axes.items()]
    return [
        _named(replace(run, {path: value for path, _, value in point}),
               [label for (_, label, _), options in zip(point, chosen, strict=True) if len(options) > 1])
        for run in _several(runs)
        for point in itertools.product(*chosen)
    ]  # fmt: skip


def zipped(runs: Run | Sequence[Run], axes: Mapping[str, Values]) -> list[Run]:
    """Every run with the first value of every field, then with the second, ...; labels are those of the first field.

    `InputError` where the fields have unlike numbers of values.
    """
    if len(lengths := {path: len(values) for path, values in axes.items()}) and len(set(lengths.values())) > 1:
        raise InputError(f"zipped fields need equally many values each, not {lengths}; use grid for all combinations")
    points = zip(*([(path, label, value) for label, value in _labelled(v)] for path, v in axes.items()), strict=True)
    steps = list(points)
    return [
        _named(replace(run, {path: value for path, _, value in step}), [step[0][1]])
        for run in _several(runs)
        for step in steps
    ]


def seeds(runs: Run | Sequence[Run], count: int | Sequence[int]) -> list[Run]:
    """Every run with each seed, of its start and of its data order alike; names gain `-s0`, `-s1`, ...

    The order of a run whose `data.seed` is n is that of n * 1000 + seed: runs of one n and one seed read the same text.
    Runs of one seed are pairs: they see the same batches, so that their difference has less spread than their losses.
    A teacher or start named in the sweep (`@NAME`) is the one of the same seed where its name holds `{seed}`.
    """
    chosen = range(count) if isinstance(count, int) else count
    return [
        dataclasses.replace(
            run,
            name=f"{run.name}-s{seed}",
            seed=seed,
            data=dataclasses.replace(run.data, seed=ORDERS * run.data.seed + seed),
            teacher=run.teacher.replace("{seed}", str(seed)),
            start=run.start.replace("{seed}", str(seed)),
        )
        for run in _several(runs)
        for seed in chosen
    ]


def variants(runs: Run | Sequence[Run], named: Mapping[str, Mapping[str, Any]]) -> list[Run]:
    """Every run in each variant: `{"ad": {"loss": "ad", "teacher": "@fp"}, ...}`; names gain the variant's."""
    return [_named(replace(run, fields), [slug(name)]) for run in _several(runs) for name, fields in named.items()]


def ladder(runs: Run | Sequence[Run], models: Mapping[str, ModelConfig], tokens_per_parameter: float) -> list[Run]:
    """Every run at every size, each trained on as many tokens per non-embedding parameter; names gain the size's.

    Steps are rounded up. `InputError` for a ratio that is not above 0.
    """
    if not tokens_per_parameter > 0:
        raise InputError(f"tokens_per_parameter is {tokens_per_parameter}; it must be above 0, such as 20")
    return [
        _named(
            dataclasses.replace(run, model=model, steps=math.ceil(tokens / (run.data.batch * run.data.window))), [size]
        )
        for run in _several(runs)
        for size, model in models.items()
        for tokens in [tokens_per_parameter * count_parameters(model).non_embedding]
    ]


def _several(runs: Run | Sequence[Run]) -> Sequence[Run]:
    return [runs] if isinstance(runs, Run) else runs


def _labelled(values: Values) -> list[tuple[str, Any]]:
    pairs = values.items() if isinstance(values, Mapping) else [(str(value), value) for value in values]
    return [(slug(label), value) for label, value in pairs]


def _named(run: Run, labels: Sequence[str]) -> Run:
    """The run with labels added to its name; the placeholder name of `Run()` gives way to them."""
    first = [run.name] if run.name and run.name != Run().name else []
    return dataclasses.replace(run, name="-".join([*first, *labels]) or run.name)


def slug(text: str) -> str:
    """`text` as part of a file name: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^\w.]+", "-", text, flags=re.ASCII).strip("-.")


def _replace(config: Any, names: list[str], path: str, value: Callable[[Any, str], Any]) -> Any:
    """`config` with the field that `names` lead to replaced by `value(type of the field, path)`."""
    hints = typing.get_type_hints(type(config))
    name, rest = names[0], names[1:]
    if name not in hints:
        prefix = path.rsplit(".", len(names) - 1)[0].rpartition(".")[0] if len(path.split(".")) > len(names) else ""
        raise unknown("field", path, [f"{prefix}.{h}" if prefix else h for h in hints])
    hint, held = hints[name], getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(held):
            raise InputError(f"{path}: {name} is a single value, it has no field {'.'.join(rest)}")
        return dataclasses.replace(config, **{name: _replace(held, rest, path, value)})
    return dataclasses.replace(config, **{name: value(hint, path)})


def _typed(hint: Any, value: Any, path: str) -> Any:
    """A value as the field's type: dataclasses stay as they are, presets may be named."""
    if isinstance(value, str) and hint is ModelConfig:
        return preset(value)
    return value if dataclasses.is_dataclass(value) and type(value) is hint else convert(hint, value, path)


def _parse(hint: Any, text: str, path: str) -> Any:
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
    few = run.model.top_k and max(1, 128 * run.model.top_k // run.model.ff)
    model = dataclasses.replace(
        run.model, vocab=512, dim=128, layers=2, heads=2, kv_heads=2, head_dim=64, ff=128, context=128, top_k=few
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
