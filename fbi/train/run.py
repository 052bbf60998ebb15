"""What is trained (`Run`, hashed) and how that is executed (`Execution`, free to change); both as strict JSON."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar, get_args, get_origin

from fbi.data.config import DataConfig
from fbi.errors import InputError, unknown
from fbi.fields import hashed, later
from fbi.files import content_hash
from fbi.model.config import PRESETS, ModelConfig, preset
from fbi.optim.config import OptimizerConfig

FORMAT = 1  # of config.json
Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When training returns to its last checkpoint and skips the data since (FBI-LLM, arXiv 2407.07093, section 4)."""

    spike: float = 2.0
    """Nats by which a step's loss, without its regularizers, may exceed its running mean.

    A non-finite loss or gradient always counts.
    """
    retries: int = 3
    """How often in one run, before it is given up."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that decides the numbers of a training run; its hash names them."""

    name: str = "run"
    """For tables and pictures."""
    model: ModelConfig = PRESETS["nano"]
    """The architecture; in JSON and in --set also the name of a preset."""
    policy: str = "fbi"
    """Which quantizer each site gets: a preset or rules."""
    loss: str = "ce"
    """ce, ad, kl, rkl, cakld, hidden, dmd, or a weighted sum such as '0.3*ce + 0.7*ad:temperature=2'; mix."""
    teacher: str = ""
    """Run directory of the teacher, or a table of it (`fbi teach`); ../NAME is beside the run's own directory."""
    start: str = ""
    """Where the weights start: '' at random, a run directory (as for teacher), 'smollm2-135m', or safetensors."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    steps: int = 500
    """Optimizer steps."""
    seed: int = 0
    """Of the initialisation."""
    sparsity: float = later(0.0)
    """Share of experts that the routers shall leave out at the threshold, met by moving the weight of `efficiency` and
    the biases of the routers; 0: that weight stays as the loss gives it, and frozen routers as they are."""
    grouping: Literal["kmeans", "random", "contiguous", "coactivation"] = later("kmeans")
    """How neurons become experts where a routed model starts from a dense one; contiguous: they stay in their order."""
    pruning: str = later("")
    """How the weights of the MLPs are pruned at the start, such as 'wanda:sparsity=0.5,pattern=expert'; '': not."""
    final_windows: int = later(0)
    """Windows of the validation split, from its beginning, that the last evaluation reads; 0: all of them."""

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this configuration."""
        return content_hash(hashed(self))


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a run is carried out. None of it may change the numbers beyond rounding, so it may change on resume."""

    mesh: str = ""
    """Axes and sizes, such as data=4,model=2; empty: every device on the data axis."""
    accumulate: int = 1
    """Parts in which a batch is computed, one after the other."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    remat_keeps: Literal["nothing", "products"] = "nothing"
    """What remat keeps of a layer beside its input: the results of its matrix products are then not computed again."""
    loss_chunk: int = 0
    """Tokens of each device whose logits exist at a time, as 1024; 0: all. Costs no computation."""
    gather: Literal["values", "codes"] = "values"
    """What travels where a weight split over the data axis is brought together: its quantized values, or its codes
    packed into bytes (1 bit for fbi, 1.6 for bitnet-b158) and its scales. The same numbers."""
    sequence: bool = False
    """Split the residual stream between layers over the model axis by position: less memory for long windows, and the
    links carry as much."""
    product: Literal["values", "integers", "float8"] = "values"
    """From what products in the blocks are formed whose operands both are on a grid: their values, or their levels as
    int8 or float8, where these hold them (float8: up to 5 bits). Up to rounding the same numbers."""
    unroll: int = 4
    """Layers unrolled in one turn of the scan."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept, the newest ones."""
    keep_every: int = 0
    """Steps of which every multiple's checkpoint is kept for good; 0: none."""
    eval_every: int = 100
    """Steps between evaluations on the validation split; 0: only at the end."""
    eval_windows: int = 0
    """Windows of the validation split that are evaluated during the run; 0: all. At the end `final_windows` counts."""
    log_every: int = 10
    """Steps summed up in one row of metrics.jsonl."""
    grace: float = 30.0
    """Seconds from the notice of a preemption (SIGTERM, SIGUSR1, SIGUSR2) to the kill: a run says where a checkpoint
    would take longer; 0: it does not look."""
    profile: str = ""
    """Steps of which a profiler trace goes to RUN_DIR/profile, such as 10:15."""
    diagnose_every: int = 0
    """Steps of which every multiple gets rows of diagnostics in metrics.jsonl, by site and of all; 0: none."""
    diagnostics: str = "flips,entropy,margin,error"
    """Which, joined by commas; also masked, activations, alignment (these three cost more)."""
    sinks: str = ""
    """Dashboards that get the numbers as well: tensorboard, trackio, joined by commas."""
    line_every: float = 10.0
    """Seconds between progress lines where standard output is not a terminal."""


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain data."""
    return dataclasses.asdict(config)


def from_json(kind: type[Config], data: Any, where: str = "") -> Config:
    """A config from plain data; an unknown field or a value of another type is an `InputError` that names it."""
    if kind is ModelConfig and isinstance(data, str):
        return typing.cast(Config, preset(data))
    if not isinstance(data, dict):
        raise InputError(f"{where or 'the config'} must be an object with fields, not {data!r}")
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for name, value in data.items():
        path = f"{where}.{name}" if where else name
        if name not in hints:
            raise unknown("field", path, [f"{where}.{h}" if where else h for h in hints])
        fields[name] = convert(hints[name], value, path)
    return kind(**fields)


def convert(hint: Any, value: Any, path: str) -> Any:
    """`value` checked against the type of the field at `path`."""
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, path)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown(path, value, get_args(hint))
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = hint if isinstance(hint, type) else types.NoneType
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{path}={value!r} is not {_name(expected)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path}={value!r} is not a finite number")
    return value


def _name(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, kind.__name__)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The fields in which two pieces of plain data differ, as 'data.batch: 8 -> 16'."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [d for n in names for d in differences(old.get(n), new.get(n), f"{where}.{n}" if where else n)]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]
