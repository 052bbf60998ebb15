"""Training: mesh, step, loop, checkpoints, run directories. Calling the module trains: `fbi.train(run, directory)`."""

from pathlib import Path
from typing import TYPE_CHECKING

from fbi.lazy import lazy_names, make_callable
from fbi.train.run import Execution as Execution
from fbi.train.run import Run as Run

if TYPE_CHECKING:
    from fbi.train.compose import Result as Result
    from fbi.train.load import load as load
    from fbi.train.loop import Stopped as Stopped


def train(run: Run, directory: str | Path, execution: Execution = Execution()) -> "Result":
    """Carries out a run in a directory, or goes on with it, or returns its result where it is done.

    Raises `InputError` for anything wrong with the input, `Stopped` after a signal with a checkpoint on disk: SIGTERM,
    SIGINT, SIGUSR1 or SIGUSR2.
    """
    from fbi.train import compose

    return compose.train(run, directory, execution)


__getattr__ = lazy_names(
    "fbi.train", {"Result": "fbi.train.compose", "load": "fbi.train.load", "Stopped": "fbi.train.loop"}
)
make_callable(__name__, train)
