"""Grids of least squared error for a normal distribution, derived by quadrature, and the constants that came out.

The constants stand here because every construction of a quantizer would otherwise solve for them again; a test derives
them anew. QuEST, arXiv 2502.05003, section 3.2, takes them in units of the root mean square.
"""

import itertools
import math
from collections.abc import Sequence

# bits -> half-range alpha* of the uniform mid-rise grid; 1.58 is the outer level of the ternary grid.
OPTIMAL = {
    1: 0.7978845608,
    1.58: 1.2240063619,
    2: 1.4935300289,
    3: 2.0510680451,
    4: 2.5140045915,
    5: 2.9161512493,
    6: 3.2779847974,
    7: 3.6110971963,
    8: 3.9222044167,
}
# The published code's, off the optimum by 3e-5 at 4 bits and 1 % at 8: its optimiser stopped early.
PUBLISHED = {
    1: 0.797884559,
    1.58: 1.224008952,
    2: 1.493534620,
    3: 2.051068354,
    4: 2.513930578,
    5: 2.916093883,
    6: 3.276597283,
    7: 3.601049719,
    8: 3.884938679,
}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, without the sign
FP4_UNIT = 0.4870791786  # root mean squares for a level of 1
FP4_PUBLISHED_RADIUS = 0.3186  # root mean squares; the paper's rule is the largest half gap, one FP4_UNIT

# Lloyd-Max levels above zero, in root mean squares: Lloyd, 1982; Max, 1960, table 1.
LLOYD: dict[int, tuple[float, ...]] = {
    1: (0.7978845608,),
    2: (0.4527800346, 1.5104176085),
    3: (0.2450941789, 0.7560052812, 1.3439092785, 2.1519457045),
    4: (
        0.1283950299, 0.3880482995, 0.6567591185, 0.9423404565,
        1.2562311973, 1.6180463860, 2.0690172265, 2.7325895710,
    ),
}  # fmt: skip


def _density(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _mass(a: float, b: float) -> float:
    """P(a < z < b); from the nearer tail, so that far cells keep their digits."""
    return _below(-a) - _below(-b) if a > 0 else _below(b) - _below(a)


def squared_error(levels: Sequence[float], thresholds: Sequence[float] | None = None) -> float:
    """E (z - q(z))² of a standard normal z on rising `levels`; cells meet halfway unless `thresholds` are given.

    In closed form: the moments of order 0, 1 and 2 of each cell.
    """
    inner = thresholds or [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    edges = [-math.inf, *inner, math.inf]
    total = 0.0
    for level, a, b in zip(levels, edges, edges[1:], strict=False):
        fa, fb = (0.0 if math.isinf(x) else _density(x) for x in (a, b))
        xfa, xfb = (0.0 if math.isinf(x) else x * _density(x) for x in (a, b))
        mass = _mass(a, b)
        total += (mass + xfa - xfb) - 2 * level * (fa - fb) + level * level * mass
    return total


def midrise(bits: int, alpha: float) -> list[float]:
    """The 2^bits levels of the symmetric mid-rise grid on [-alpha, alpha]."""
    n = 2**bits
    return [alpha * (2 * k - (n - 1)) / (n - 1) for k in range(n)]


def optimal_alpha(levels: Sequence[float]) -> float:
    """The factor a > 0 that gives `a * levels` the least squared error for a standard normal.

    At the optimum a = E[z l(z)] / E[l(z)²], l the unit level of the cell; iterated to a fixed point.
    """
    a = 1.5 / max(levels) if max(levels) > 1.5 else 1.0
    for _ in range(100_000):
        inner = [a * (x + y) / 2 for x, y in itertools.pairwise(levels)]
        edges = [-math.inf, *inner, math.inf]
        cross = square = 0.0
        for level, lo, hi in zip(levels, edges, edges[1:], strict=False):
            fa, fb = (0.0 if math.isinf(x) else _density(x) for x in (lo, hi))
            cross += level * (fa - fb)
            square += level * level * _mass(lo, hi)
        new = cross / square
        if abs(new - a) < 1e-15 * a:
            break
        a = new
    return a


def lloyd_max(bits: int) -> list[float]:
    """The 2^bits levels of least squared error: each the mean of its cell, cells meeting halfway; to a fixed point."""
    levels = midrise(bits, OPTIMAL[bits])
    for _ in range(100_000):
        edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
        new = []
        for a, b in itertools.pairwise(edges):
            fa, fb = (0.0 if math.isinf(x) else _density(x) for x in (a, b))
            new.append((fa - fb) / _mass(a, b))
        moved = max(abs(x - y) for x, y in zip(levels, new, strict=True))
        levels = new
        if moved < 1e-14:
            break
    return levels
