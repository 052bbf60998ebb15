"""Training: mesh, step, loop, checkpoints, run directories. `fbi.train(run, directory)` carries out a run."""

import sys

from fbi.callable_module import make_callable
from fbi.train.compose import Result as Result
from fbi.train.compose import train as train
from fbi.train.load import load as load
from fbi.train.loop import Stopped as Stopped
from fbi.train.run import Execution as Execution
from fbi.train.run import Run as Run

make_callable(sys.modules[__name__], train)
