"""CRC-32 of an array of which each host has shards: every host computes a share, and their XOR is the checksum.

CRC-32 is affine over bits: crc(m) = L(m) ^ crc(0...0), with as many zero bytes as m has. L is linear, so that L of a
whole is the XOR of L of its parts, each with zeros where the others are. Zeros before a part change nothing, and each
one after it multiplies L by the same matrix of 32 x 32 bits (zlib's crc32_combine uses that, too).
"""

import functools
import itertools
import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

POLYNOMIAL = 0xEDB88320


def of_zeros(count: int) -> int:
    """CRC-32 of so many zero bytes."""
    return _append(0xFFFFFFFF, count) ^ 0xFFFFFFFF


def of_shards(shape: tuple[int, ...], itemsize: int, shards: Iterable[tuple[tuple[slice, ...], Any]]) -> int:
    """The XOR of L of the shards [(index in the array, values)] of an array, each in its place; 0 of none."""
    found = 0
    for index, values in shards:
        found ^= _of_shard(shape, itemsize, index, np.ascontiguousarray(values))
    return found


def _of_shard(shape, itemsize, index, values):
    """L of the array with zeros outside of the shard: its runs of bytes in their order, and the zeros between them."""
    bounds = [part.indices(length)[:2] for part, length in zip(index, shape, strict=True)]
    whole = [start == 0 and stop == length for (start, stop), length in zip(bounds, shape, strict=True)]
    # A run goes over all last axes that the shard has all of, and over one more.
    axis = next((i for i in reversed(range(len(shape))) if not whole[i]), 0)
    strides = [itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    starts = [start * stride for (start, _), stride in zip(bounds, strides, strict=True)]
    outer = [
        range(start, stop * stride, stride) for start, (_, stop), stride in zip(starts, bounds, strides, strict=True)
    ]
    outer = outer[:axis]
    places = (sum(place) + sum(starts[axis : axis + 1]) for place in itertools.product(*outer))
    data = values.reshape(-1).view(np.uint8).data
    size = len(data) // max(math.prod(map(len, outer)), 1)
    total, at, zeros = 0, 0, of_zeros(size)
    for i, place in enumerate(places):
        total = _append(total, place + size - at) ^ zlib.crc32(data[i * size : (i + 1) * size]) ^ zeros
        at = place + size
    return _append(total, itemsize * math.prod(shape) - at)


def _append(register, zeros):
    """The register after so many zero bytes."""
    if not register or not zeros:
        return register
    a, b, c, d = _tables(zeros)
    return a[register & 255] ^ b[register >> 8 & 255] ^ c[register >> 16 & 255] ^ d[register >> 24]


@functools.lru_cache(maxsize=256)
def _tables(zeros):
    """What each byte of a register becomes after so many zero bytes: four tables of 256."""
    columns = _power(zeros)
    tables = []
    for byte in range(4):
        table = [0] * 256
        for bit in range(8):
            for value in range(1 << bit):
                table[value | 1 << bit] = table[value] ^ columns[8 * byte + bit]
        tables.append(table)
    return tables


def _power(zeros):
    """The columns of the matrix of one zero byte to this power."""
    square, power = [_byte(1 << bit) for bit in range(32)], [1 << bit for bit in range(32)]
    while zeros:
        if zeros & 1:
            power = [_times(square, column) for column in power]
        square, zeros = [_times(square, column) for column in square], zeros >> 1
    return power


def _times(columns, vector):
    found = 0
    for column in columns:
        if vector & 1:
            found ^= column
        vector >>= 1
    return found


def _byte(register):
    for _ in range(8):
        register = register >> 1 ^ POLYNOMIAL * (register & 1)
    return register
