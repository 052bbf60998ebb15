"""The scaling law of low-bit models, and its fit to finished runs. Imports numpy and scipy, no jax.

    L(N, D, P) = A / (N eff(P))^alpha + B / D^beta + E,        eff(reference) = 1

N: parameters without embeddings and head; D: training tokens; P: a precision; L: nats per token (QuEST, arXiv
2502.05003; in N and D the law of Hoffmann et al., arXiv 2203.15556). eff(P) says as how many parameters of the
reference precision a parameter of precision P counts. It is what such a fit tells reliably: A, alpha and E trade off
against each other (`fbi.analysis.scaling_report.profile` shows how much).
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize

from fbi.errors import InputError, unknown

Number = int | float
FLAT = 5  # parameters of the law before the efficiencies: a, alpha, b, beta, E
FARTHEST = 700.0  # of log eff, whose exponential is then neither 0 nor infinite
_UNIT = 1e-3  # log residuals are counted in thousandths, so that the tolerances of the optimizer mean something


@dataclass(frozen=True)
class Observation:
    """A finished run: parameters (non-embedding), training tokens, precision (any name), loss in nats per token."""

    parameters: Number
    tokens: Number
    precision: str
    loss: Number

    def __post_init__(self) -> None:
        """Raises InputError unless all three numbers are positive and finite."""
        for name in ("parameters", "tokens", "loss"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}={value} of a run at precision {self.precision!r} is not a positive finite "
                                 "number; leave out runs that diverged or did not finish")  # fmt: skip


class Start(NamedTuple):
    """Where a search begins: exponents, share of the model's term in what lies above E, E / least loss."""

    alpha: float
    beta: float
    share: float
    floor: float


# A grid of starts as in Hoffmann et al.; theirs is over log A, log B and log E, ours over shares of the loss at hand,
# so that every start has the right order of magnitude.
STARTS = tuple(Start(*v) for v in itertools.product((0.05, 0.2, 0.5), (0.1, 0.3), (0.3, 0.7), (0.05, 0.5)))


@dataclass(frozen=True)
class Law:
    """A law: its constants, `eff` by precision (1 at `reference`) and, where it was fitted, how.

    `delta` is the Huber threshold, `fixed_E` whether E was given, `objective` the sum of Huber losses and `rmse` the
    root mean square of the log residuals over the runs of the fit (nan for a law that was written down, not fitted).
    """

    A: float
    alpha: float
    B: float
    beta: float
    E: float
    eff: Mapping[str, float]
    reference: str = "16"
    delta: float = 1e-3
    fixed_E: bool = False
    objective: float = math.nan
    rmse: float = math.nan

    def predict(self, parameters: Any, tokens: Any, precision: str) -> Any:
        """Loss in nats per token; numbers or numpy arrays of one shape. Raises InputError for an unknown precision."""
        if precision not in self.eff:
            raise unknown("precision", precision, self.eff)
        return self.A / (parameters * self.eff[precision]) ** self.alpha + self.B / tokens**self.beta + self.E

    def residuals(self, observations: Sequence[Observation]) -> Float[np.ndarray, " runs"]:
        """log(predicted loss) - log(measured loss), in the order of the runs."""
        return np.array([math.log(self.predict(o.parameters, o.tokens, o.precision) / o.loss) for o in observations])


def huber(residuals: Float[np.ndarray, " runs"], delta: float) -> Float[np.ndarray, " runs"]:
    """r^2 / 2 up to |r| = delta, delta (|r| - delta / 2) beyond (Huber 1964), elementwise."""
    size = np.abs(residuals)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def fit(
    observations: Sequence[Observation],
    *,
    delta: float = 1e-3,
    starts: Sequence[Start] = STARTS,
    fixed_E: float | None = None,
    reference: str = "16",
) -> Law:
    """The law with the least sum of Huber losses of the log residuals: the best over all starts.

    One fit of all precisions together; every eff but that of `reference` is free, E too unless `fixed_E` gives it.
    Delta 1e-3 is Hoffmann et al.'s and QuEST's; 1 or more is least squares. Deterministic. Raises InputError for fewer
    runs than free parameters, a missing reference, fewer than two sizes or token counts, or an E not below all losses.
    """
    if not delta > 0 or not starts:
        raise InputError(f"delta={delta} with {len(starts)} starts; delta must be positive, and one start is the least")
    data = _Data.of(observations, reference, fixed_E)
    weights = np.ones(len(observations))
    found = [_search(start, data, weights, delta, fixed_E) for start in data.vectors(starts, fixed_E)]
    return data.law(min(found, key=lambda each: each[1])[0], delta, fixed_E is not None)


def refit(observations: Sequence[Observation], law: Law, weights: Float[np.ndarray, " runs"]) -> Law:
    """`law` fitted anew, as it was fitted and from where it stands, with run i counted `weights[i]` times.

    Its `objective` and `rmse` are those over the runs as they are, each counted once. Raises InputError as `fit`
    does, and for a precision that the law does not have.
    """
    fixed_E = law.E if law.fixed_E else None
    data = _Data.of(observations, law.reference, fixed_E)
    for precision in data.precisions:
        if precision not in law.eff:
            raise unknown("precision", precision, law.eff)
    return data.law(_search(data.vector(law), data, weights, law.delta, fixed_E)[0], law.delta, law.fixed_E)


class _Data(NamedTuple):
    """Runs as arrays. The vector of parameters is (a, alpha, b, beta, E, theta_1, theta_2, ...), where

        L = exp(a - alpha n + theta_P) + exp(b - beta d) + E,    theta_P = -alpha log eff(P),

    n and d are log N and log D less their means. Exponents are then linear in the parameters and hardly correlated,
    which makes the search an order of magnitude faster than one over (log A, alpha, log B, beta, log E, log eff).
    """

    runs: Sequence[Observation]
    precisions: tuple[str, ...]  # the reference first
    n: Float[np.ndarray, " runs"]
    d: Float[np.ndarray, " runs"]
    log_loss: Float[np.ndarray, " runs"]
    group: Int[np.ndarray, " runs"]
    means: tuple[float, float]  # of log N and of log D

    @staticmethod
    def of(runs: Sequence[Observation], reference: str, fixed_E: float | None) -> "_Data":
        """Checks and converts."""
        counts = Counter(run.precision for run in runs)
        if reference not in counts:
            raise InputError(f"no run at the reference precision {reference!r}, to which eff is relative; there are "
                             f"{', '.join(map(repr, counts)) or 'no runs'}: name one of them as reference")  # fmt: skip
        free = FLAT - (fixed_E is not None) + len(counts) - 1
        sizes, tokens = {run.parameters for run in runs}, {run.tokens for run in runs}
        if len(runs) < free or len(sizes) < 2 or len(tokens) < 2:
            raise InputError(f"{len(runs)} runs of {len(sizes)} sizes and {len(tokens)} token counts at {len(counts)} "
                             f"precisions cannot fix the law's {free} free parameters; it needs at least as many runs, "
                             "two sizes and two token counts")  # fmt: skip
        least = min(run.loss for run in runs)
        if fixed_E is not None and not 0 <= fixed_E < least:
            raise InputError(f"fixed_E={fixed_E} is not from 0 to below the least loss, {least:.4f}; choose one there")
        precisions = (reference, *sorted(counts.keys() - {reference}))
        n, d = np.log([float(run.parameters) for run in runs]), np.log([float(run.tokens) for run in runs])
        group = np.array([precisions.index(run.precision) for run in runs])
        means = (float(n.mean()), float(d.mean()))
        log_loss = np.log([float(run.loss) for run in runs])
        return _Data(runs, precisions, n - means[0], d - means[1], log_loss, group, means)

    def vectors(self, starts: Sequence[Start], fixed_E: float | None) -> list[Float[np.ndarray, " parameters"]]:
        """The parameters that the starts stand for, each once, with eff = 1 throughout."""
        low, middle = math.exp(self.log_loss.min()), math.exp(self.log_loss.mean())
        found = {}
        for alpha, beta, share, floor in starts:
            E = floor * low if fixed_E is None else fixed_E
            above = middle - E
            found[math.log(share * above), alpha, math.log((1 - share) * above), beta, E] = None
        return [np.array([*start, *[0.0] * (len(self.precisions) - 1)]) for start in found]

    def vector(self, law: Law) -> Float[np.ndarray, " parameters"]:
        """The parameters of a law."""
        theta = [-law.alpha * math.log(law.eff[p]) for p in self.precisions[1:]]
        a, b = (
            math.log(c) - e * m for c, e, m in ((law.A, law.alpha, self.means[0]), (law.B, law.beta, self.means[1]))
        )
        return np.array([a, law.alpha, b, law.beta, law.E, *theta])

    def law(self, x: Float[np.ndarray, " parameters"], delta: float, fixed_E: bool) -> Law:
        """The law of parameters."""
        a, alpha, b, beta, E = map(float, x[:FLAT])
        eff = {self.precisions[0]: 1.0} | dict(
            zip(self.precisions[1:], map(float, np.exp(np.clip(-x[FLAT:] / alpha, -FARTHEST, FARTHEST))), strict=True)
        )
        A, B = math.exp(a + alpha * self.means[0]), math.exp(b + beta * self.means[1])
        r = _terms(x, self)[2]
        return Law(A, alpha, B, beta, E, eff, self.precisions[0], delta, fixed_E, float(huber(r, delta).sum()),
                   float(np.sqrt(np.mean(r**2))))  # fmt: skip


def _terms(x: Float[np.ndarray, " parameters"], data: _Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The model's term, the tokens' term and the log residuals."""
    theta = np.concatenate(([0.0], x[FLAT:]))
    by_model = np.exp(x[0] - x[1] * data.n + theta[data.group])
    by_tokens = np.exp(x[2] - x[3] * data.d)
    return by_model, by_tokens, np.log(by_model + by_tokens + x[4]) - data.log_loss


def _objective(
    x: Float[np.ndarray, " parameters"], data: _Data, weights: Float[np.ndarray, " runs"], delta: float
) -> tuple[float, Float[np.ndarray, " parameters"]]:
    """The weighted sum of Huber losses, in units of _UNIT^2, and its gradient."""
    by_model, by_tokens, r = _terms(x, data)
    slope = weights * np.clip(r, -delta, delta) / (by_model + by_tokens + x[4]) / _UNIT**2  # d loss / d prediction
    by_model, by_tokens = by_model * slope, by_tokens * slope
    flat = [by_model.sum(), -by_model @ data.n, by_tokens.sum(), -by_tokens @ data.d, slope.sum()]
    theta = np.bincount(data.group, by_model, len(data.precisions))[1:]
    return float(weights @ huber(r, delta)) / _UNIT**2, np.concatenate((flat, theta))


def _search(
    start: Float[np.ndarray, " parameters"],
    data: _Data,
    weights: Float[np.ndarray, " runs"],
    delta: float,
    fixed_E: float | None,
) -> tuple[Float[np.ndarray, " parameters"], float]:
    """The nearest optimum and its objective; the bounds only keep exponentials finite, but for E >= 0."""
    floor = (0.0, math.exp(data.log_loss.min())) if fixed_E is None else (fixed_E, fixed_E)
    bounds = [(-30, 10), (1e-3, 5), (-30, 10), (1e-3, 5), floor, *[(-15, 15)] * (len(data.precisions) - 1)]
    found = minimize(_objective, start, (data, weights, delta), "L-BFGS-B", jac=True, bounds=bounds,
                     options=dict(maxcor=20, maxiter=5000, maxfun=10_000, ftol=1e-13, gtol=1e-6))  # fmt: skip
    return found.x, float(found.fun)
