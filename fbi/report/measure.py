"""One number of a run, several runs of one configuration, and what two configurations differ by, seed by seed."""

import dataclasses
import fnmatch
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from fbi.errors import InputError
from fbi.report.runs import RunRecord, number
from fbi.report.spec import Claim, Sweep

Verdict = Literal["reproduced", "not reproduced", "not resolved", "pending"]
PAIRS = 3  # seeds that a verdict needs
CONFIDENCE = 0.95
_SEED = re.compile(r"^(.*)-s(\d+)$")
_FINAL = ("loss", "perplexity", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class Found:
    """A run of a sweep that was read: its name in the experiment, and its record."""

    name: str
    record: RunRecord

    @property
    def group(self) -> str:
        """The name without its seed."""
        match = _SEED.match(self.name)
        return match[1] if match else self.name

    @property
    def seed(self) -> int:
        """The seed in the name; 0 where there is none."""
        match = _SEED.match(self.name)
        return int(match[2]) if match else 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Values of one measure over seeds."""

    values: Mapping[int, float]

    @property
    def mean(self) -> float | None:
        """None of no values."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def text(self, form: str = ".3f") -> str:
        """`3.512 ± 0.004 (3)`: mean, standard deviation, number of seeds."""
        if self.mean is None:
            return "-"
        spread = "" if self.spread is None else f" ± {self.spread:{form.removeprefix('+')}}"
        return f"{self.mean:{form}}{spread} ({len(self.values)})"


def measure(record: RunRecord, metric: str) -> float | None:
    """One number of a run; None where it has none (yet).

    `loss`, `perplexity`, `bits_per_byte`: at the end, on the whole validation split. `goodput`: useful step time / wall
    time of all attempts (`fbi.report.runs.goodput`). `summary.FIELD`, `config.A.B`:
    what was written at the start. `KIND.FIELD`: the mean of a field over the rows of that kind in `metrics.jsonl`,
    of sites those of all together; `KIND.FIELD@GLOB`: over the sites that match; `...:last`: of the last step alone.
    """
    if metric in _FINAL:
        return number((record.done or {}).get(metric))
    if metric == "goodput":
        return record.goodput
    kind, _, rest = metric.partition(".")
    if not rest:
        raise InputError(f"unknown metric {metric!r}; valid: {', '.join(_FINAL)}, goodput, "
                         "summary.FIELD, config.FIELD, KIND.FIELD, KIND.FIELD@SITES, "
                         "each of the last two also with :last")  # fmt: skip
    if kind in ("summary", "config"):
        value: object = record.summary if kind == "summary" else record.config
        for name in rest.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return number(value)
    field, _, last = rest.partition(":")
    field, _, sites = field.partition("@")
    rows = [r for r in record.rows.get(kind, ()) if "site" not in r or fnmatch.fnmatchcase(r["site"], sites or "all")]
    if last and rows:
        rows = [row for row in rows if row.get("step") == rows[-1].get("step")]
    values = [value for row in rows if (value := number(row.get(field))) is not None]
    return statistics.fmean(values) if values else None


def select(found: Sequence[Found], glob: str) -> list[Found]:
    """The runs whose names, without their seeds, match one of the globs, joined by `|`."""
    return [run for run in found if any(fnmatch.fnmatchcase(run.group, one) for one in glob.split("|"))]


def sample(found: Sequence[Found], metric: str) -> Sample:
    """A measure over the seeds of one configuration; an `InputError` where the runs are several configurations'."""
    if len(groups := {run.group for run in found}) > 1:
        raise InputError(f"one row takes the seeds of one configuration, not {', '.join(sorted(groups))}")
    values = {run.seed: measure(run.record, metric) for run in found}
    return Sample({seed: value for seed, value in values.items() if value is not None})


def paired(low: Sample, high: Sample) -> Sample:
    """`high - low` for every seed that both have."""
    return Sample({seed: high.values[seed] - low.values[seed] for seed in low.values if seed in high.values})


def interval(differences: Sample) -> tuple[float, float] | None:
    """The 95% interval of the mean by Student's t; None of fewer than two."""
    if differences.mean is None or differences.spread is None:
        return None
    from scipy.special import stdtrit

    count = len(differences.values)
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * differences.spread / math.sqrt(count)
    return differences.mean - reach, differences.mean + reach


def verdict(claim: Claim, differences: Sample) -> Verdict:
    """What the paired differences (high - low) say of a claim.

    less: the interval of the mean lies above 0 (reproduced), below 0 (not reproduced), or holds it (not resolved).
    equal: it lies within the margin, outside of it, or across its border. Fewer than three pairs resolve nothing;
    none are `pending`.
    """
    if not differences.values:
        return "pending"
    found = interval(differences)
    if found is None or len(differences.values) < PAIRS:
        return "not resolved"
    low, high = found
    if claim.kind == "less":
        return "reproduced" if low > 0 else "not reproduced" if high < 0 else "not resolved"
    if -claim.margin <= low and high <= claim.margin:
        return "reproduced"
    return "not reproduced" if low > claim.margin or high < -claim.margin else "not resolved"


def judged(claim: Claim, found: Sequence[Found]) -> tuple[Sample, Verdict]:
    """The differences that a claim is about, and the verdict."""
    low, high = (sample(select(found, glob), claim.metric) for glob in (claim.low, claim.high))
    differences = paired(low, high)
    return differences, verdict(claim, differences)


def unfinished(sweep: Sweep, found: Sequence[Found]) -> list[str]:
    """Names of the planned runs that are not done."""
    done = {run.name for run in found if run.record.done is not None}
    return [run.name for run in sweep.runs if run.name not in done]
