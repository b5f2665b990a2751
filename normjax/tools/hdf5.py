"""HDF5 files of plain arrays, as Keras and h5py write them, read in Python alone.

The C library of HDF5 hangs, dies or takes gigabytes over a file that is damaged. Plain
arrays in groups need little of the format, and here every address, size and count is
compared with the file before it is followed, and nothing is read twice.
https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
"""

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from normjax.tools.bounds import Source
from normjax.tools.hdf5_parts import (
    DamagedError,
    Fields,
    checksum,
    damaged,
    dtype_of,
    number_of,
    shape_of,
    width_of,
)

_NOWHERE = 2**64 - 1  # the address of what is not there
_SAVE = "Save it with Keras 3: model.save_weights('model.weights.h5')"
# Messages of an object's header, by type.
_SPACE, _LINKS, _TYPE, _LINK, _EXTERNAL, _LAYOUT = 1, 2, 3, 6, 7, 8
_ATTRIBUTE, _MORE, _TABLE = 12, 16, 17
_GROUP = {_LINKS, _LINK, 10, _TABLE}


class Stored(NamedTuple):
    """An array as it lies in the file: its bytes are at a place, or are here."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    inline: bytes | None


def read(source: Source) -> dict[str, np.ndarray]:
    """The datasets of a file by their paths, where all are plain arrays.

    Args:
      source: the file.

    Returns:
      Arrays by name; bfloat16 where Keras says so in the attribute ``dtype``.

    Raises:
      ValueError: if the file is damaged, or holds anything else.

    Example:
      >>> import io
      >>> from normjax.tools import bounds, hdf5
      >>> hdf5.read(bounds.Source("read", "a.h5", io.BytesIO(b"words"), 5))
      Traceback (most recent call last):
      ...
      normjax.tools.bounds.RefusedError: read: a file of Keras must be HDF5, whole. Got
      a.h5: 'the file': there is no HDF5 in it. Get the file again from where it came
      from.
    """
    reader, total, name = _Reader(source), 0, "the file"
    found: dict[str, Stored] = {}
    try:
        for name, header in reader.datasets():
            found[name] = stored = reader.stored(name, header)
            total += math.prod(stored.shape) * stored.dtype.itemsize
            if total > source.size:
                raise source.refused(
                    "datasets must not declare more than the file holds",
                    f"{total} bytes with {name!r}, {source.size} there",
                )
    except DamagedError as fault:
        raise source.refused(
            "a file of Keras must be HDF5, whole", f"{name!r}: {fault}"
        ) from None
    source.need(total, f"{len(found)} arrays")
    return {name: _array(source, stored) for name, stored in found.items()}


def _array(source: Source, stored: Stored) -> np.ndarray:
    if stored.inline is None:
        return source.array(stored.begin, stored.dtype, stored.shape)
    data = np.frombuffer(bytearray(stored.inline), np.uint8)
    return data.view(stored.dtype).reshape(stored.shape)


class _Reader:
    """Follows the structures of a file."""

    def __init__(self, source: Source):
        self.source, self.base, self.spent, self.named = source, 0, 0, 0
        self.collections: dict[int, dict[int, tuple[int, int]]] = {}  # by address

    # Bytes of the file. All that is read is counted, so that parts that lie on one
    # another are not read without end.

    def at(self, address: int, count: int) -> bytes:
        if not 0 <= address <= self.source.size - self.base - count or count < 0:
            damaged(f"{count} bytes at {address} are not in it")
        self.spend(count)
        return self.source.at(self.base + address, count)

    def spend(self, count: int, named: int = 0) -> None:
        """Counts bytes that are read, and those of names, which are longer as paths."""
        self.spent, self.named = self.spent + count, self.named + named
        if self.spent > 3 * self.source.size + 4096:
            damaged("its parts lie on one another")
        # A message of four bytes and more becomes some objects of Python.
        needed = 3 * self.spent + self.named
        self.source.need(needed, "the structure of groups and datasets")

    def signed(self, address: int, count: int, signature: bytes) -> Fields:
        """A structure that begins with its signature, without it."""
        data = self.at(address, count)
        if data[: len(signature)] != signature:
            damaged(f"no {signature.decode('latin1')} at {address}")
        return Fields(data[len(signature) :])

    def summed(self, address: int, count: int, signature: bytes) -> Fields:
        """The same with a checksum at its end, which is slow to take."""
        fields = self.signed(address, count, signature)
        data = signature + fields.data
        if checksum(data[:-4]) != number_of(data[-4:]):
            damaged(f"the checksum of {signature.decode('latin1')} at {address}")
        self.spend(count)
        return Fields(fields.data[:-4])

    # Groups.

    def datasets(self) -> Iterator[tuple[str, "_Header"]]:
        """Every dataset by its path; through hard links alone, through each once."""
        root = self.root()
        seen, groups = {root}, [("", self.header(root))]
        while groups:
            prefix, group = groups.pop()
            keys: set[str] = set()
            for key, kind, address in self.links(group):
                name = prefix + key
                self.spend(0, 4 * len(name))
                if key in keys or not key or "/" in key:
                    damaged(f"the name {key[:100]!r} in a group")
                keys.add(key)
                if kind != "HardLink":
                    raise self.source.refused(
                        "a file must hold its arrays itself, without links",
                        f"{name!r}, of {kind}",
                        _SAVE,
                    )
                header = self.header(address)
                what = header.kind()
                if address in seen or what not in ("Group", "Dataset"):
                    raise self.source.refused(
                        "a file must hold groups and datasets, each in one place",
                        f"{name!r}, of {what}"
                        + ", which is in two" * (address in seen),
                        _SAVE,
                    )
                seen.add(address)
                if what == "Group":
                    groups.append((f"{name}/", header))
                else:
                    yield name, header

    def root(self) -> int:
        """Finds the superblock; returns the address of the root's header."""
        signature = b"\x89HDF\r\n\x1a\n"
        while self.source.at(self.base, 8) != signature:
            self.base = max(512, 2 * self.base)  # after a block of the user's own
            if self.base >= self.source.size:
                self.base = 0
                damaged("there is no HDF5 in it")
        version = self.at(8, 1)[0]
        if version in (2, 3):
            fields = self.summed(0, 48, signature)
            _, offsets, lengths, flags = fields.bytes(4)
            base, _, end, root = (fields.number() for _ in range(4))
            if version == 3 and flags & 5:
                damaged("who wrote it did not close it")
        elif version in (0, 1):
            fields = self.signed(0, 96 + 4 * version, signature)
            _, _, _, _, _, offsets, lengths, _ = fields.bytes(8)
            fields.bytes(8 + 4 * version)
            base, _, end, _, _, root = (fields.number() for _ in range(6))
        else:
            damaged(f"version {version} of HDF5 is not known")
        if (offsets, lengths, base) != (8, 8, self.base):
            damaged("its addresses are not of 8 bytes, from where it begins")
        if end > self.source.size:
            damaged(f"it ends before the {end} bytes that it says it has")
        return root

    def links(self, group: "_Header") -> Iterator[tuple[str, str, int]]:
        """The names in a group, the kind of each, and the address of its object."""
        for data in group.all(_TABLE):
            yield from self.table(Fields(data))
        for data in group.all(_LINK):
            yield _link(data)
        for data in group.all(_LINKS):
            fields = Fields(data)
            version, flags = fields.bytes(2)
            if version != 0:
                damaged(f"version {version} of a group's links")
            fields.bytes(8 * (flags & 1))
            heap, names = fields.number(), fields.number()
            if heap != _NOWHERE:
                found = _Heap(self, heap)
                records = self.records(names)
                yield from sorted(_link(found.item(r[4:])) for r in records)

    def table(self, fields: Fields) -> Iterator[tuple[str, str, int]]:
        """Links of old: a tree of nodes of entries, whose names are in a heap."""
        tree, heap = fields.number(), fields.number()
        part = self.signed(heap, 32, b"HEAP\0\0\0\0")
        size, _, place = part.number(), part.number(), part.number()
        names = self.at(place, size)
        nodes: list[tuple[int, int | None]] = [(tree, None)]
        last = ""
        seen = set()
        while nodes:
            address, level = nodes.pop()
            if address in seen:
                damaged("a node of a group is in two places")
            seen.add(address)
            if level == -1:
                for link in self.entries(address, names):
                    if link[0].encode() <= last.encode():
                        damaged("the names of a group are out of order")
                    last = link[0]
                    yield link
                continue
            part = self.signed(address, 24, b"TREE\0")
            found, count = part.number(1), part.number(2)
            if level not in (None, found):
                damaged("a node of a group is at another level than it says")
            part = Fields(self.at(address + 24, 16 * count + 8))
            children = [(part.bytes(8), part.number())[1] for _ in range(count)]
            nodes += [(child, found - 1) for child in reversed(children)]

    def entries(self, address: int, names: bytes) -> Iterator[tuple[str, str, int]]:
        part = self.signed(address, 8, b"SNOD\1\0")
        count = part.number(2)
        part = Fields(self.at(address + 8, 40 * count))
        for _ in range(count):
            place, header, kind = part.number(), part.number(), part.number(4)
            part.bytes(20)
            end = names.find(b"\0", place)
            if end < 0 or kind > 2:
                damaged("a name of a group has no end")
            self.spend(0, 4 * (end - place))
            name = _name(names[place:end])
            yield name, "SoftLink" if kind == 2 else "HardLink", header

    def records(self, address: int) -> Iterator[bytes]:
        """The records of a tree of version 2 that are names of links."""
        part = self.summed(address, 38, b"BTHD\0\5")
        node, size, depth = part.number(4), part.number(2), part.number(2)
        part.bytes(2)
        root, count = part.number(), part.number(2)
        if size < 5 or node < 10 + size:
            damaged("a tree has nodes of no size")
        most = (node - 10) // size
        wide, below, pointers = width_of(most), most, [0]
        for d in range(1, depth + 1):
            pointers.append(8 + wide + (width_of(below) if d > 1 else 0))
            most = (node - 10 - pointers[d]) // (size + pointers[d])
            below = (most + 1) * below + most
            if most < 1 or d > 16:
                damaged("a tree is deeper than its nodes let it be")
        nodes = [(root, count, depth)] if root != _NOWHERE else []
        while nodes:
            address, count, d = nodes.pop()
            length = 6 + count * size + (count + 1) * pointers[d] + 4
            if length > node:
                damaged("a node of a tree holds more than it can")
            part = self.summed(address, length, b"BTIN\0\5" if d else b"BTLF\0\5")
            for _ in range(count):
                yield part.bytes(size)
            for _ in range(count + 1 if d else 0):
                child, inside = part.number(), part.number(wide)
                part.bytes(pointers[d] - 8 - wide)
                nodes.append((child, inside, d - 1))

    # Objects.

    def header(self, address: int) -> "_Header":
        """The messages of an object."""
        if self.at(address, 4) == b"OHDR":
            return _Header(self.messages(address))
        version, _, count, _, size = struct.unpack("<BBHII", self.at(address, 12))
        if version != 1:
            damaged(f"no object at {address}")
        found = _Header(self.messages_of_old(address + 16, size))
        if len(found.messages) != count:
            damaged(f"{count} messages at {address}, of which there are others")
        return found

    def messages_of_old(self, address: int, size: int) -> Iterator[tuple]:
        chunks, seen = [(address, size)], set()
        while chunks:
            address, size = chunks.pop()
            if address in seen:
                damaged("a part of an object is in two places")
            seen.add(address)
            part = Fields(self.at(address, size))
            while part.left() >= 8:
                kind, length, flags = part.number(2), part.number(2), part.number(1)
                part.bytes(3)
                data = part.bytes(length)
                yield kind, flags, data
                if kind == _MORE:
                    more = Fields(data)
                    chunks.append((more.number(), more.number()))

    def messages(self, address: int) -> Iterator[tuple]:
        version, flags = self.at(address + 4, 2)
        if version != 2:
            damaged(f"version {version} of an object at {address}")
        before = 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        wide = 1 << (flags & 3)
        size = number_of(self.at(address + before, wide))
        chunks, seen = [(address, before + wide, size, b"OHDR")], set()
        while chunks:
            address, before, size, signature = chunks.pop()
            if address in seen:
                damaged("a part of an object is in two places")
            seen.add(address)
            part = self.summed(address, before + size + 4, signature)
            part.bytes(before - 4)
            least = 4 + 2 * bool(flags & 4)
            while part.left() >= least:
                kind, length, own = part.number(1), part.number(2), part.number(1)
                part.bytes(least - 4)
                data = part.bytes(length)
                yield kind, own, data
                if kind == _MORE:
                    more = Fields(data)
                    chunks.append((more.number(), 4, more.number() - 8, b"OCHK"))

    # Datasets.

    def stored(self, name: str, header: "_Header") -> Stored:
        """Where an array lies, once it is known to be there, and all of it."""
        layout = Fields(header.one(_LAYOUT))
        version, kind = layout.bytes(2)
        if not 3 <= version <= 5:
            damaged(f"version {version} of the layout of a dataset")
        shape = shape_of(header.one(_SPACE))
        external = bool(header.all(_EXTERNAL))
        if kind > 1 or external or shape is None:
            what = {2: "chunked", 3: "virtual"}.get(kind, "empty")
            raise self.source.refused(
                "datasets must be plain arrays that lie in the file as they are,"
                " neither chunked, compressed, virtual nor external",
                f"{name!r}, {'external' if external else what}",
                "Save it with Keras 3, or type: h5repack -f NONE -l CONTI in.h5 out.h5",
            )
        dtype, words = dtype_of(header.one(_TYPE))
        if dtype == np.dtype("V2") and self.text(header, b"dtype") == b"bfloat16":
            dtype = np.dtype(ml_dtypes.bfloat16)
        if dtype is None or dtype == np.dtype("V2"):
            raise self.source.refused(
                "datasets must hold numbers, of a dtype that numpy has",
                f"{name!r}, {words}",
                "Leave it out of the file",
            )
        begin, inline = 0, None
        if kind == 0:
            inline = layout.bytes(layout.number(2))
            there = len(inline)
        else:
            begin, there = layout.number(), layout.number()
            there = 0 if begin == _NOWHERE else there
            begin = self.base + begin if there else 0
        declared = math.prod(shape) * dtype.itemsize
        if declared != there or begin + (there if inline is None else 0) > (
            self.source.size
        ):
            raise self.source.refused(
                "a dataset must declare just what is stored of it, within the file",
                f"{name!r} of {dtype} {list(shape)}, {declared} bytes; {there} stored"
                f" from byte {begin} on, in a file of {self.source.size}",
            )
        if math.prod(n or 1 for n in shape) >= 2**59 or len(shape) > 32:
            damaged(f"an array of shape {list(shape)}")
        return Stored(dtype, shape, begin, inline)

    def text(self, header: "_Header", name: bytes) -> bytes | None:
        """The value of an attribute that is one string; None where it is not there."""
        for data in header.all(_ATTRIBUTE):
            fields = Fields(data)
            version, shared = fields.bytes(2)
            sizes = [fields.number(2) for _ in range(3)]
            if version == 3:
                fields.bytes(1)
            padded = [-(-n // 8) * 8 if version == 1 else n for n in sizes]
            found, kind, _ = [
                fields.bytes(n)[:size] for n, size in zip(padded, sizes, strict=True)
            ]
            if found.rstrip(b"\0") != name or not 1 <= version <= 3:
                continue
            if len(kind) < 8 or (version > 1 and shared):
                return None
            if kind[0] & 15 == 9 and kind[1] & 15 == 1:  # a string of any length
                length, address, index = (fields.number(n) for n in (4, 8, 4))
                return self.of_collection(address, index)[:length]
        return None

    def of_collection(self, address: int, index: int) -> bytes:
        """An object of a collection, as which values of variable length are kept."""
        if address not in self.collections:
            self.collections[address] = dict(self.collection(address))
        if index not in self.collections[address]:
            damaged("the value of an attribute is not where it says")
        return self.at(*self.collections[address][index])

    def collection(self, address: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """The place and size of each object of a collection, by its number."""
        part = self.signed(address, 16, b"GCOL\1\0\0\0")
        end = address + part.number()
        address += 16
        while address + 16 <= end:
            number, _, _, size = struct.unpack("<HHIQ", self.at(address, 16))
            if number == 0:  # the rest is free
                return
            yield number, (address + 16, size)
            address += 16 + -(-size // 8) * 8


class _Header:
    """The messages of an object."""

    def __init__(self, messages: Iterator[tuple]):
        self.messages = list(messages)

    def all(self, kind: int) -> list[bytes]:
        found = [(flags, data) for k, flags, data in self.messages if k == kind]
        if any(flags & 2 for flags, _ in found):
            damaged("a part of an object is kept elsewhere, shared with others")
        return [data for _, data in found]

    def one(self, kind: int) -> bytes:
        found = self.all(kind)
        if len(found) != 1:
            damaged(f"an array with {len(found)} messages of kind {kind}")
        return found[0]

    def kind(self) -> str:
        kinds = {kind for kind, _, _ in self.messages}
        if kinds & _GROUP and _LAYOUT not in kinds:
            return "Group"
        if _LAYOUT in kinds:
            return "Dataset"
        return "Datatype" if _TYPE in kinds else "nothing known"


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        damaged(f"the name {data[:100]!r} is not UTF-8")


def _link(data: bytes) -> tuple[str, str, int]:
    fields = Fields(data)
    version, flags = fields.bytes(2)
    kind = fields.number(1) if flags & 8 else 0
    fields.bytes(8 * bool(flags & 4) + bool(flags & 16))
    name = _name(fields.bytes(fields.number(1 << (flags & 3))))
    if version != 1:
        damaged(f"version {version} of the link {name!r}")
    if kind:
        return name, {1: "SoftLink", 64: "ExternalLink"}.get(kind, "another link"), 0
    return name, "HardLink", fields.number()


class _Heap:
    """A heap of links: blocks in rows of which each is twice as large as the last."""

    def __init__(self, reader: _Reader, address: int):
        self.reader = reader
        self._known: dict[int, list[int]] = {}  # children by address
        self._blocks: dict[int, bytes] = {}
        part = reader.summed(address, 146, b"FRHP\0")
        identity, filters, flags = part.number(2), part.number(2), part.number(1)
        largest = part.number(4)
        part.bytes(96)
        self.width = part.number(2)
        self.start, self.most = part.number(), part.number()
        bits = part.number(2)
        part.bytes(2)
        self.root, self.rows = part.number(), part.number(2)
        powers = all(
            n and n & (n - 1) == 0 for n in (self.width, self.start, self.most)
        )
        if filters or not powers or self.start > self.most or bits > 64:
            damaged("the heap of a group has filters, or blocks of no size")
        self.wide = width_of(2**bits - 1) if bits else 0
        self.length = min(width_of(self.most - 1), width_of(largest))
        self.summed = bool(flags & 2)
        self.before = 13 + self.wide + 4 * self.summed
        if identity < 1 + self.wide + self.length:
            damaged("the heap of a group has names of no size")

    def item(self, identity: bytes) -> bytes:
        """A link, by its place and length in the heap."""
        fields = Fields(identity)
        if fields.number(1) & 0xF0:
            damaged("the heap of a group keeps a name outside of its blocks")
        place, length = fields.number(self.wide), fields.number(self.length)
        address, inside, size = self.block(place)
        if not self.before <= inside <= size - length:
            damaged("a name of a group is not in its heap")
        return self.of_block(address, size)[inside : inside + length]

    def of_block(self, address: int, size: int) -> bytes:
        """The bytes of a block, which have a checksum in their midst."""
        if address not in self._blocks:
            data = self.reader.signed(address, size, b"FHDB\0").data
            if self.summed:
                end = self.before - 5
                known, whole = data[end - 4 : end], b"FHDB\0" + data[: end - 4]
                whole += bytes(4) + data[end:]
                self.reader.spend(size)
                if checksum(whole) != number_of(known):
                    damaged(f"the checksum of FHDB at {address}")
            self._blocks[address] = b"FHDB\0" + data
        if len(self._blocks[address]) != size:
            damaged("a block of a heap is in two places")
        return self._blocks[address]

    def block(self, place: int) -> tuple[int, int, int]:
        """The address of a block, the place in it, and how many bytes it has."""
        address, rows = self.root, self.rows
        if rows == 0:
            return address, place, self.start
        while True:
            row, column, inside, size = self.cell(place)
            if row >= rows:
                damaged("a name of a group is beyond its heap")
            children = self.children(address, rows)
            address = children[row * self.width + column]
            if size <= self.most:
                return address, inside, size
            place, rows = inside, self.rows_of(size)

    def cell(self, place: int) -> tuple[int, int, int, int]:
        """The row and column of a block, the place in it, and its size."""
        row = max(0, (place // (self.width * self.start)).bit_length())
        size = self.start << max(0, row - 1)
        begin = self.width * self.start << row - 1 if row else 0
        return row, (place - begin) // size, (place - begin) % size, size

    def rows_of(self, size: int) -> int:
        return (size // (self.start * self.width)).bit_length()

    def children(self, address: int, rows: int) -> list[int]:
        """The addresses of the blocks of a block of blocks."""
        if address not in self._known:
            count = rows * self.width
            length = 13 + self.wide + 8 * count + 4
            part = self.reader.summed(address, length, b"FHIB\0")
            part.bytes(8 + self.wide)
            self._known[address] = [part.number() for _ in range(count)]
        found = self._known[address]
        if len(found) != rows * self.width:
            damaged("a block of a heap is in two places")
        return found
