"""Dense bits: integer codes as a file holds them."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8

from fbi.errors import InputError

MOST_LEVELS = 256  # of a code that fits a byte
TRITS = 5  # 3^5 = 243 codes in a byte: 1.6 bits for a ternary code
# x // 3^k of a byte is (x * factor) >> shift, exactly: a vector unit divides no integers.
_FACTORS = np.array([[1, 171, 57, 19, 203]], np.uint16)
_SHIFTS = np.array([[0, 9, 9, 9, 14]], np.uint16)


def _width(levels: int) -> int:
    if not 2 <= levels <= MOST_LEVELS:
        raise InputError(f"cannot pack {levels} levels; codes of 2 to {MOST_LEVELS} levels fit a byte")
    return math.ceil(math.log2(levels))


def packed_size(count: int, levels: int) -> int:
    """Bytes that `count` codes of `levels` levels take: five ternary codes a byte, else ceil(log2 levels) bits each."""
    return -(-count // TRITS) if levels == 3 else -(-count * _width(levels) // 8)


def pack(codes: Integer[Array, "..."], levels: int, *, trits: bool = True) -> UInt8[Array, "bytes"]:
    """Codes 0..levels-1, in row-major order, as bytes; the unused end is zero.

    Without `trits` a ternary code takes two bits, which are read five times as fast as five codes in a byte.
    """
    flat = codes.astype(jnp.uint8).reshape(-1)
    if levels == 3 and trits:
        flat = jnp.pad(flat, (0, -flat.size % TRITS)).reshape(-1, TRITS)
        return flat @ jnp.array([1, 3, 9, 27, 81], jnp.uint8)
    width = _width(levels)
    planes = (flat[:, None] >> jnp.arange(width, dtype=jnp.uint8)[None, :]) & 1
    return jnp.packbits(planes.reshape(-1), bitorder="little")


def unpack(
    packed: UInt8[Array, "bytes"], shape: tuple[int, ...], levels: int, *, trits: bool = True
) -> UInt8[Array, "..."]:
    """The inverse of `pack` for codes of that shape."""
    count = math.prod(shape)
    if levels == 3 and trits:
        quotients = (packed.astype(jnp.uint16)[:, None] * _FACTORS) >> _SHIFTS
        digits = quotients - 3 * ((quotients * 171) >> 9)
        return digits.astype(jnp.uint8).reshape(-1)[:count].reshape(shape)
    width = _width(levels)
    if width == 1:
        bits = (packed[:, None] >> jnp.arange(8, dtype=jnp.uint8)[None, :]) & 1
        return bits.reshape(-1)[:count].reshape(shape)
    planes = jnp.unpackbits(packed, count=count * width, bitorder="little").reshape(count, width)
    return jnp.sum(planes << jnp.arange(width, dtype=jnp.uint8)[None, :], -1, dtype=jnp.uint8).reshape(shape)
