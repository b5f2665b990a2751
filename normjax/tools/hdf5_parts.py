"""The small parts of HDF5: fields, shapes, datatypes, checksums."""

import struct
from typing import Any, NoReturn

import numpy as np

CLASSES = dict(
    enumerate(
        "integer float time string bitfield opaque compound reference enum"
        " variable-length array complex".split()
    )
)


class DamagedError(Exception):
    """What the file says cannot be."""


def damaged(what: str) -> NoReturn:
    raise DamagedError(what)


def number_of(data: bytes) -> int:
    return int.from_bytes(data, "little")


def width_of(most: int) -> int:
    """How many bytes a number up to the most takes."""
    return (most.bit_length() + 7) // 8


class Fields:
    """The fields of a structure, one after another."""

    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def bytes(self, count: int) -> bytes:
        part = self.data[self.place : self.place + count]
        if len(part) != count or count < 0:
            damaged("a part of it is shorter than it says")
        self.place += count
        return part

    def number(self, count: int = 8) -> int:
        return number_of(self.bytes(count))

    def left(self) -> int:
        return len(self.data) - self.place


def shape_of(data: bytes) -> tuple[int, ...] | None:
    """The shape of an array; None where it is of nothing."""
    fields = Fields(data)
    version, rank, flags, kind = fields.bytes(4)
    if version not in (1, 2):
        damaged(f"version {version} of a shape")
    if version == 1:
        fields.bytes(4)
    elif kind == 2:
        return None
    shape = tuple(fields.number() for _ in range(rank))
    if flags & 1 and any(n > fields.number() for n in shape):
        damaged(f"the shape {list(shape)} is larger than it may become")
    return shape


# By bytes: where a float's sign, exponent and mantissa lie, and the exponent's bias.
_FLOATS = {
    2: (15, 10, 5, 0, 10, 15),
    4: (31, 23, 8, 0, 23, 127),
    8: (63, 52, 11, 0, 52, 1023),
}


def dtype_of(data: bytes) -> tuple[np.dtype | None, str]:
    """The dtype of an array, None where numpy has none such; what it is in words."""
    dtype, _ = _datatype(Fields(data), 0)
    return dtype, f"of HDF5's class {CLASSES.get(data[0] & 15, 'unknown')}"


def _datatype(fields: Fields, depth: int) -> tuple[np.dtype | None, int]:
    """The dtype that the fields describe, and of how many bytes it is."""
    first, *bits = fields.bytes(4)
    version, kind, size = first >> 4, first & 15, fields.number(4)
    order = ">" if bits[0] & 1 else "<"
    if not 1 <= version <= 5 or depth > 2:
        damaged(f"version {version} of a datatype")
    if kind == 0:
        begin, precision = fields.number(2), fields.number(2)
        sign = "i" if bits[0] & 8 else "u"
        if size in (1, 2, 4, 8) and (begin, precision) == (0, 8 * size):
            return np.dtype(f"{order}{sign}{size}"), size
    elif kind == 1:
        begin, precision = fields.number(2), fields.number(2)
        places = bits[1], *fields.bytes(4), fields.number(4)
        plain = (begin, precision) == (0, 8 * size) and bits[0] & 0x70 == 0x20
        if plain and _FLOATS.get(size) == places:
            return np.dtype(f"{order}f{size}"), size
    elif kind == 5:
        return np.dtype("V2") if size == 2 else None, size
    elif kind == 6 and bits[0] | bits[1] << 8 == 2:
        return _complex(fields, version, size, depth), size
    elif kind == 8:
        return _enumeration(fields, version, bits[0] | bits[1] << 8, depth), size
    return None, size


def _text(fields: Fields, version: int) -> bytes:
    """A name that ends in a zero; up to version 2 it is filled up to eight bytes."""
    end = fields.data.find(b"\0", fields.place)
    count = end - fields.place + 1
    if end < 0:
        damaged("a name in a datatype has no end")
    return fields.bytes(count if version >= 3 else -(-count // 8) * 8).rstrip(b"\0")


def _complex(fields: Fields, version: int, size: int, depth: int) -> np.dtype | None:
    """Two floats, r and i, one after the other."""
    found = []
    for _ in range(2):
        name = _text(fields, version)
        place = fields.number(width_of(size) if version >= 3 else 4)
        fields.bytes(28 if version == 1 else 0)
        inner, wide = _datatype(fields, depth + 1)
        if inner is None:  # whose fields were perhaps not all read
            return None
        found.append((name, place, inner, wide))
    (_, _, part, wide), _ = found
    want = [(b"r", 0, part, wide), (b"i", wide, part, wide)]
    if found != want or part.kind != "f" or size != 2 * wide or wide < 4:
        return None
    return np.dtype(f"{part.str[0]}c{size}")


def _enumeration(fields: Fields, version: int, count: int, depth: int) -> Any:
    """The numbers that stand for names; FALSE and TRUE are numpy's booleans."""
    inner, wide = _datatype(fields, depth + 1)
    if inner is None:
        return None
    names = [_text(fields, version) for _ in range(count)]
    values = [fields.number(wide) for _ in range(count)]
    boolean = dict(zip(names, values, strict=True)) == {b"FALSE": 0, b"TRUE": 1}
    return np.dtype(bool) if boolean and wide == 1 else inner


def checksum(data: bytes) -> int:
    """Bob Jenkins's lookup3, of 2006, with which HDF5 sums its structures."""
    a = b = c = 0xDEADBEEF + len(data) & 0xFFFFFFFF
    whole = max(0, len(data) - 1) // 12 * 12
    for x, y, z in struct.iter_unpack("<III", data[:whole]):
        a, b, c = _mixed(a + x, b + y, c + z)
    rest = data[whole:]
    if not rest:
        return c
    x, y, z = struct.unpack("<III", rest.ljust(12, b"\0"))
    a, b, c = a + x & 0xFFFFFFFF, b + y & 0xFFFFFFFF, c + z & 0xFFFFFFFF
    for turn in (14, 11, 25, 16, 4, 14, 24):
        c = (c ^ b) - _turned(b, turn) & 0xFFFFFFFF
        a, b, c = b, c, a
    return b


def _mixed(a: int, b: int, c: int) -> tuple[int, int, int]:
    m = 0xFFFFFFFF
    for turn in (4, 6, 8, 16, 19, 4):
        c &= m
        a = (a - c & m) ^ _turned(c, turn)
        c += b
        a, b, c = b, c, a
    return a & m, b & m, c & m


def _turned(n: int, by: int) -> int:
    return (n << by | n >> 32 - by) & 0xFFFFFFFF
