"""What reading a file may take: regular files alone, and memory within a bound."""

import contextlib
import math
import operator
import os
import pathlib
import stat
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from normjax import _check

AGAIN = "Get the file again from where it came from"
# The most memory that reading takes, unless it is said: that, or twice the file.
DEFAULT = 200_000_000
# What an object of Python takes, about: a number, a word, an entry of a dictionary.
OBJECT = 100


class RefusedError(ValueError):
    """In the house form, unlike the ValueErrors of those who read."""


class Source:
    """A file that is read, or what is in it, and how much memory that may take.

    Attributes:
      path: of the file, for errors.
      file: opened, to read bytes from.
      size: of it, in bytes.
      most: bytes of memory that reading may take.

    Example:
      >>> import io
      >>> from normjax.tools.bounds import Source
      >>> Source("read", "a.npz", io.BytesIO(b""), 0).most
      200000000
    """

    def __init__(
        self,
        caller: str,
        path: Any,
        file: BinaryIO,
        size: int,
        max_bytes: int | None = None,
    ):
        self.caller, self.path, self.file, self.size = caller, path, file, size
        self.most = most(caller, max_bytes, size)

    def refused(self, rule: str, got: str, todo: str = AGAIN) -> Exception:
        """The error that a file breaks a rule; it names the path."""
        return refused(self.caller, self.path, rule, got, todo)

    def need(self, count: int, what: str) -> None:
        """Refuses what would take more memory than reading may."""
        need(self.caller, self.path, self.most, count, what)

    def at(self, begin: int, count: int) -> bytes:
        """The bytes at a place; fewer where the file ends."""
        self.file.seek(begin)
        return self.file.read(count)

    def array(self, begin: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The array at a place, once it is known that the file has all of it."""
        data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        self.file.seek(begin)
        count = self.file.readinto(data)  # type: ignore[attr-defined]
        if count != data.size:
            raise self.refused(
                "a file must stay as it is while it is read",
                f"{count} bytes of {data.size} from byte {begin} on",
            )
        return data.view(dtype).reshape(shape)

    def zip(self) -> zipfile.ZipFile:
        """Opens the file as a zip, if the list of its members is within the bound."""
        listed = _Listed(self)
        archive = zipfile.ZipFile(listed)  # type: ignore[arg-type]
        listed.measured = False
        return archive


class _Listed:
    """The file of a zip, whose list of members is measured before it is read.

    A member takes 46 bytes there and more, and some 700 as objects of Python.
    """

    def __init__(self, source: Source):
        self.source, self.measured = source, True
        self.seek, self.tell = source.file.seek, source.file.tell
        self.seekable = source.file.seekable

    def read(self, count: int = -1) -> bytes:
        if self.measured:
            self.source.need(16 * count, "the list of what is in a zip")
        return self.source.file.read(count)


def refused(caller: str, path: Any, rule: str, got: str, todo: str) -> Exception:
    """The error that a file breaks a rule, as ``caller`` says it."""
    return _check.error(RefusedError, caller, rule, f"{path}: {got}", todo)


def words(fault: Exception) -> str:
    """What an error of others says, in one line."""
    said = " ".join(f"{type(fault).__name__}: {fault}".split())
    return said[:200].rstrip(".: ")


def need(caller: str, path: Any, most: int, count: int, what: str) -> None:
    """Refuses what would take more memory than reading may."""
    if count > most:
        raise _check.error(
            RefusedError,
            caller,
            "reading must take no more memory than max_bytes, which is the larger of"
            f" {DEFAULT} and twice the file unless it is given",
            f"{path}: {what}, about {count} bytes, and max_bytes={most}",
            f"If you trust the file, pass max_bytes={count}, or more; on the command"
            " line --max-bytes",
        )


def most(caller: str, max_bytes: Any, size: int) -> int:
    """How much memory reading ``size`` bytes may take."""
    if max_bytes is None:
        return max(DEFAULT, 2 * size)
    if not _check.is_integer(max_bytes) or max_bytes < 0:
        raise _check.error(
            ValueError,
            caller,
            "max_bytes must be a number of bytes, or None",
            f"max_bytes={max_bytes!r}",
            f"Pass max_bytes={DEFAULT}, say",
        )
    return operator.index(max_bytes)


@contextlib.contextmanager
def opened(
    caller: str, path: str | os.PathLike, max_bytes: int | None = None
) -> Iterator[Source]:
    """Opens a regular file to read it; a pipe, a device or a folder is refused.

    It is looked at before, as opening a device can do something, and again once it is
    opened, without waiting for a pipe's writer: another may have come to its place.
    """
    _check_regular(caller, path, os.stat(path))
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        _check_regular(caller, path, status)
        yield Source(caller, path, file, status.st_size, max_bytes)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_regular(caller: str, path: Any, status: os.stat_result) -> None:
    kinds = ("FIFO", "CHR", "BLK", "SOCK", "DIR")
    words = ("a pipe", "a device", "a device", "a socket", "a folder")
    if not stat.S_ISREG(status.st_mode):
        found = [
            word
            for kind, word in zip(kinds, words, strict=True)
            if getattr(stat, f"S_IS{kind}")(status.st_mode)
        ]
        raise _check.error(
            RefusedError,
            caller,
            "only regular files are read",
            f"{path}: {' '.join(found) or 'another kind'}",
            "Copy what it gives to a file, and pass that",
        )


def files_of(caller: str, path: pathlib.Path) -> dict[pathlib.Path, int]:
    """The files in a folder and how large they are; refuses pipes and devices.

    Links are followed, each folder once.
    """
    found, seen = {}, set()
    for folder, folders, files in os.walk(path, followlinks=True):
        status = os.stat(folder)
        if (place := (status.st_dev, status.st_ino)) in seen:
            folders.clear()
            continue
        seen.add(place)
        for file in (pathlib.Path(folder, name) for name in files):
            try:
                status = os.stat(file)
            except FileNotFoundError:  # a link to nothing
                continue
            _check_regular(caller, file, status)
            found[file] = status.st_size
    return found
