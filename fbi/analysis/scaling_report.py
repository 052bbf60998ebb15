"""What one reads out of a fitted scaling law: intervals, what is not identified, which precision pays. No jax.

The law is L(N, D, P) = A / (N eff(P))^alpha + B / D^beta + E (`fbi.analysis.scaling`; QuEST, arXiv 2502.05003).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fbi.analysis.scaling import STARTS, Law, Number, Observation, Start, fit, refit
from fbi.errors import InputError, unknown

FLOORS = (0.0, 1.0, 1.5, 1.69, 1.9)  # nats per token; 1.69 is Hoffmann et al.'s E (arXiv 2203.15556)


class Interval(NamedTuple):
    """From the lower to the upper quantile."""

    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """The laws of resampled runs."""

    laws: tuple[Law, ...]

    def interval(self, read: Callable[[Law], float], level: float = 0.95) -> Interval:
        """The central `level` of `read(law)` over the laws: `lambda law: law.predict(1e9, 1e11, "4")`.

        Percentiles that are values themselves, so that `read` may return infinity.
        """
        if not 0 < level < 1:
            raise InputError(f"level={level} is not between 0 and 1; 0.95 is usual")
        values = [read(law) for law in self.laws]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        return Interval(float(low), float(high))

    def eff(self, precision: str, level: float = 0.95) -> Interval:
        """The interval of one efficiency. Raises InputError for an unknown precision."""
        if precision not in self.laws[0].eff:
            raise unknown("precision", precision, self.laws[0].eff)
        return self.interval(lambda law: law.eff[precision], level)


def bootstrap(observations: Sequence[Observation], law: Law, *, resamples: int = 200, seed: int = 0) -> Resampled:
    """Refits `law` to runs drawn with replacement, each search beginning at `law` itself.

    Runs are drawn within each precision, as many as it has, so that none loses all. The intervals show the scatter of
    runs around the law, not the law's own error, and are too narrow for a precision of few runs: n of them have a
    spread that is too small by sqrt((n - 1) / n), 0.82 for three. Raises InputError for a precision with one run.
    """
    groups = {p: [i for i, run in enumerate(observations) if run.precision == p] for p in law.eff}
    if lonely := [precision for precision, members in groups.items() if len(members) < 2]:
        raise InputError(f"fewer than two runs at {', '.join(map(repr, lonely))}, which have no scatter to resample; "
                         "leave them out, or run them at another size")  # fmt: skip
    if resamples < 1:
        raise InputError(f"resamples={resamples} must be positive; 200 or more give 95 % intervals")
    random = np.random.default_rng(seed)
    laws = []
    for _ in range(resamples):
        drawn = np.concatenate([random.choice(members, len(members)) for members in groups.values()])
        laws.append(refit(observations, law, np.bincount(drawn, minlength=len(observations)).astype(float)))
    return Resampled(tuple(laws))


def profile(
    observations: Sequence[Observation],
    law: Law,
    floors: Sequence[float] = FLOORS,
    *,
    starts: Sequence[Start] = STARTS,
) -> list[Law]:
    """`law` fitted anew with E held at each of `floors` (nats per token, below the least loss).

    Read beside the `rmse` of `law`: where floors far apart fit nearly as well, E and with it A, alpha and every
    extrapolation are not identified by these runs, and what moves little (eff, mostly) is. Raises InputError as `fit`.
    """
    return [fit(observations, delta=law.delta, starts=starts, fixed_E=E, reference=law.reference) for E in floors]


def precision_bits(precision: str, bits: Mapping[str, Number] | None = None) -> float:
    """Bits per weight of a precision: `bits[precision]`, a name that is a number, or the `bits=` of a method's text.

    Raises InputError where none of these tells it, or a policy names several.
    """
    if bits and precision in bits:
        return float(bits[precision])
    found = set(re.findall(r"\bbits=(\d+(?:\.\d+)?)", precision)) or set(re.findall(r"^\d+(?:\.\d+)?$", precision))
    if len(found) != 1:
        raise InputError(f"the bits of precision {precision!r} are not in its name; give bits={{{precision!r}: ...}}")
    return float(found.pop())


class Density(NamedTuple):
    """How much model a precision puts into a bit of memory: eff(P) / P.

    `interval` is that of eff(P) / P, `wins` the share of resampled laws in which it is the greatest; None without them.
    """

    precision: str
    bits: float
    per_bit: float
    interval: Interval | None
    wins: float | None


def optimum(
    law: Law,
    resampled: Resampled | None = None,
    *,
    among: Sequence[str] | None = None,
    bits: Mapping[str, Number] | None = None,
) -> list[Density]:
    """Precisions (all, or those `among`) by eff(P) / P, best first: the first has the least loss at fixed N P.

    At a memory of M bits and any one number of tokens, N = M / P and L = A (M eff(P) / P)^-alpha + const, so the order
    holds at every M, and alone decides as D goes to infinity. Needs 0 < bits; raises InputError for unknown names.
    """
    chosen = list(among) if among is not None else list(law.eff)
    width = {precision: precision_bits(precision, bits) for precision in chosen}
    if not chosen or any(value <= 0 for value in width.values()):
        raise InputError(f"no order among {width}; name precisions with a positive number of bits")
    for precision in chosen:
        if precision not in law.eff:
            raise unknown("precision", precision, law.eff)
    best = [max(chosen, key=lambda p: each.eff[p] / width[p]) for each in resampled.laws] if resampled else []
    rows = []
    for precision in chosen:
        P = width[precision]
        interval = Interval(*(end / P for end in resampled.eff(precision))) if resampled else None
        wins = best.count(precision) / len(best) if best else None
        rows.append(Density(precision, P, law.eff[precision] / P, interval, wins))
    return sorted(rows, key=lambda row: -row.per_bit)


def threshold(law: Law, fewer: str, more: str, memory: Number, *, bits: Mapping[str, Number] | None = None) -> float:
    """Tokens per parameter of the model with `more` bits, above which one with `fewer` bits has the lower loss.

    Both models have `memory` bits of weights and cost the same to train; QuEST's argument (arXiv 2502.05003), whose
    figure of about 30 between 4 and 8 bits at 14 Gb this is. Assumed: a model of M bits has N_P = M / P parameters;
    training costs N D operations, at every precision alike (fake quantization: all products in 16 bits). With p < P,
    m = M / P and x = D / N of the P-bit model, the p-bit model has P/p times its parameters and p/P times its tokens:

        L_p - L_P = B (m x)^-beta [(P/p)^beta - 1] - A M^-alpha [(P / eff(P))^alpha - (p / eff(p))^alpha],

    without E. The first bracket is positive, what fewer tokens cost; the second is positive where p bits hold more
    model per bit, eff(p) / p > eff(P) / P. Then the loss difference falls in x and is zero at

        x = (1/m) { B [(P/p)^beta - 1] / (A M^-alpha [(P / eff(P))^alpha - (p / eff(p))^alpha]) }^(1/beta),

    proportional to M^(alpha/beta - 1): it falls with size while alpha < beta. The p-bit model's own D / N there is
    (p/P)^2 x. At equal *tokens* instead, p bits win at any x, or never. Raises InputError where there is no crossing.
    """
    for precision in (fewer, more):
        if precision not in law.eff:
            raise unknown("precision", precision, law.eff)
    p, P = precision_bits(fewer, bits), precision_bits(more, bits)
    if not 0 < p < P or not memory > 0:
        raise InputError(f"{fewer!r} has {p:g} bits, {more!r} {P:g}, of a memory of {memory:g}; the first must have "
                         "fewer, and all be positive")  # fmt: skip
    gain = law.A * memory**-law.alpha * ((P / law.eff[more]) ** law.alpha - (p / law.eff[fewer]) ** law.alpha)
    if gain <= 0:
        raise InputError(f"{fewer!r} does not overtake {more!r} at any number of tokens: eff/P is "
                         f"{law.eff[fewer] / p:.4f} against {law.eff[more] / P:.4f}; compare precisions where the "
                         "first is the greater")  # fmt: skip
    loss = law.B * ((P / p) ** law.beta - 1)
    return math.exp(math.log(loss / gain) / law.beta - math.log(memory / P))
