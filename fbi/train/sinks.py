"""Dashboards beside metrics.jsonl, which stays the record: the same numbers, sent on as they are written."""

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fbi.errors import InputError, unknown
from fbi.train.run import Run, to_json

Row = Mapping[str, Any]


@runtime_checkable
class Sink(Protocol):
    """Where numbers go."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one step, by names such as `train/loss`."""
        ...

    def close(self) -> None:
        """Writes what is still held back."""
        ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard; `tensorboard --logdir` shows them. A continued run adds a file to them."""

    def __init__(self, run: Run, directory: Path):
        del run
        self._writer = _package("tensorboardX").SummaryWriter(str(directory / "tensorboard"))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class Trackio:
    """A run of the trackio project named after the folder of the run directory; kept on this machine."""

    def __init__(self, run: Run, directory: Path):
        place = directory.absolute()
        self._run = _package("trackio").init(
            project=place.parent.name or "fbi", name=place.name, config=to_json(run), resume="allow", embed=False
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


SINKS = {"tensorboard": TensorBoard, "trackio": Trackio}


def names(text: str) -> list[str]:
    """The sinks that `tensorboard,trackio` names; an `InputError` for another."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    for name in found:
        if name not in SINKS:
            raise unknown("sink", name, SINKS)
    return found


@contextlib.contextmanager
def opened(text: str, run: Run, directory: Path) -> Iterator[Sequence[Sink]]:
    """The sinks that an execution asks for, closed at the end; an `InputError` where their package is missing."""
    with contextlib.ExitStack() as stack:
        sinks: list[Sink] = []
        for name in names(text):
            sinks.append(SINKS[name](run, directory))
            stack.callback(sinks[-1].close)
        yield sinks


def numbers(row: Row) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by name: `train/loss`, `scales/layers.0.attn.q/alpha/mean`."""
    prefix = "/".join(str(row[name]) for name in ("kind", "site", "split") if name in row)
    return dict(_numbers(prefix, {k: v for k, v in row.items() if k not in ("kind", "site", "split", "step")}))


def _numbers(prefix: str, values: Row) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", float(value)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{name} is not installed, which sinks asks for: pip install 'fbi[dashboards]'") from error
