"""Grids of least squared error for a normal distribution, derived by quadrature, and the constants that came out.

The constants stand here because every construction of a quantizer would otherwise solve for them again; a test derives
them anew. QuEST, arXiv 2502.05003, section 3.2, takes them in units of the root mean square.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

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


def _erfc(x: np.ndarray) -> np.ndarray:
    return np.array([math.erfc(value) for value in x])


def _moments(borders: Sequence[float | int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, E[z; cell] and E[z²; cell] of the cells that rising borders cut, for a standard normal."""
    edges = np.array([-math.inf, *borders, math.inf])
    density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    # Each probability from the nearer tail, so that far cells keep their digits.
    upper, lower = 0.5 * _erfc(edges / math.sqrt(2)), 0.5 * _erfc(-edges / math.sqrt(2))
    mass = np.where(edges[:-1] > 0, upper[:-1] - upper[1:], lower[1:] - lower[:-1])
    weighted = np.where(np.isinf(edges), 0.0, np.nan_to_num(edges, posinf=0, neginf=0) * density)
    return mass, density[:-1] - density[1:], mass + weighted[:-1] - weighted[1:]


def _halfway(levels: Sequence[float | int]) -> list[float]:
    return [(a + b) / 2 for a, b in itertools.pairwise(levels)]


def squared_error(levels: Sequence[float | int]) -> float:
    """E (z - q(z))² of a standard normal z, rounded to the nearest of rising `levels`."""
    mass, first, second = _moments(_halfway(levels))
    values = np.array(levels)
    return float(np.sum(second - 2 * values * first + values**2 * mass))


def midrise(bits: int, alpha: float) -> list[float]:
    """The 2^bits levels of the symmetric mid-rise grid on [-alpha, alpha]."""
    n = 2**bits
    return [alpha * (2 * k - (n - 1)) / (n - 1) for k in range(n)]


def optimal_alpha(levels: Sequence[float | int]) -> float:
    """The factor a > 0 that gives `a * levels` the least squared error for a standard normal.

    By bisection of its condition, a E[l(z)²] = E[z l(z)] with l(z) the unit level of the cell of z.
    """
    values, borders = np.array(levels, float), np.array(_halfway(levels))
    low, high = 0.1 / values.max(), 8.0 / values.max()
    for _ in range(100):
        a = (low + high) / 2
        mass, first, _ = _moments(list(a * borders))
        if a * np.sum(values**2 * mass) < np.sum(values * first):
            low = a
        else:
            high = a
    return (low + high) / 2


def lloyd_max(bits: int) -> list[float]:
    """The 2^bits levels of least squared error: each the mean of its cell, cells meeting halfway; to a fixed point."""
    levels = midrise(bits, OPTIMAL[bits])
    for _ in range(20_000):
        mass, first, _ = _moments(_halfway(levels))
        new = list(first / mass)
        moved = max(abs(x - y) for x, y in zip(levels, new, strict=True))
        levels = new
        if moved < 1e-14:
            break
    return [float(x) for x in levels]
