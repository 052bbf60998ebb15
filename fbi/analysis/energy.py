"""The energy of the arithmetic of a matrix product, by BitNet's table and formulas. Imports no jax.

BitNet, arXiv 2310.11453, table 2 and equations 12 to 14 (after Horowitz 2014 and Zhang et al., arXiv 2112.00133).
Arithmetic alone: moving weights and activations between memories is left out, and often costs more.
"""

import math
from typing import Literal, NamedTuple

from fbi.errors import unknown

Number = Literal["fp32", "fp16", "int8"]
Operation = Literal["add", "mul"]

PICOJOULES: dict[int, dict[str, dict[str, float]]] = {  # process in nanometres -> type of number -> operation
    45: {
        "fp32": {"add": 0.9, "mul": 3.7},
        "fp16": {"add": 0.4, "mul": 1.1},
        "int8": {"add": 0.03, "mul": 0.2},
    },
    7: {
        "fp32": {"add": 0.38, "mul": 1.31},
        "fp16": {"add": 0.16, "mul": 0.34},
        "int8": {"add": 0.007, "mul": 0.07},
    },
}
TERNARY = math.log2(3) + 1e-9  # bits up to which a product with a weight is an addition, a subtraction or nothing


class Energy(NamedTuple):
    """Joules of additions and of multiplications."""

    add: float
    mul: float

    @property
    def total(self) -> float:
        """Both."""
        return self.add + self.mul

    def __add__(self, other: "Energy") -> "Energy":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Energy(self.add + other.add, self.mul + other.mul)


NOTHING = Energy(0.0, 0.0)


def product_energy(
    m: int,
    n: int,
    p: int,
    *,
    weight_bits: float = 16.0,
    activation_bits: float = 16.0,
    wide: Number = "fp16",
    nm: int = 7,
) -> Energy:
    """Joules of the arithmetic of (m x n) times (n x p), m tokens by an n x p weight, at `nm` (45 or 7).

    Full precision (`wide`, above 8 bits on either side of a multi-bit product): m (n - 1) p additions and m n p
    multiplications. Binary and ternary weights: as many additions, of int8 where activations have 8 bits or fewer, and
    m p + m n multiplications in `wide` for the scales of both operands (equation 14). Other weights of 8 bits or
    fewer with such activations: additions and multiplications of int8, and those of the scales.
    """
    if nm not in PICOJOULES:
        raise unknown("process (nm)", nm, PICOJOULES)
    joules = {kind: {o: 1e-12 * e for o, e in row.items()} for kind, row in PICOJOULES[nm].items()}
    additions, products, scalings = m * (n - 1) * p, m * n * p, m * p + m * n
    operand = "int8" if activation_bits <= 8 else wide
    scale = scalings * joules[wide]["mul"]
    if weight_bits <= TERNARY:
        return Energy(additions * joules[operand]["add"], scale)
    if weight_bits <= 8 and operand == "int8":
        return Energy(additions * joules["int8"]["add"], products * joules["int8"]["mul"] + scale)
    return Energy(additions * joules[wide]["add"], products * joules[wide]["mul"])
