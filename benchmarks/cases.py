"""What the benchmarks and the tests of them share: shapes, and the form of a table."""

import importlib.metadata
import platform
from typing import Any, NamedTuple

import normjax


class Case(NamedTuple):
    """A norm and the shape of its input, whose last axis is the features.

    Attributes:
      norm: batch, layer, rms, group or instance.
      shape: of x.
      axes: the axes reduced; of group norm in the view [..., groups, members] of x.
      num_groups: of group norm, else 0.
    """

    norm: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    num_groups: int = 0

    @property
    def epsilon(self) -> float:
        """Flax's default."""
        return 1e-5 if self.norm == "batch" else 1e-6

    @property
    def module(self) -> str:
        """The name of the Flax module."""
        return "RMSNorm" if self.norm == "rms" else f"{self.norm.capitalize()}Norm"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the Flax module that have no default that fits."""
        if self.norm == "batch":
            return {"use_running_average": False}
        return {"num_groups": self.num_groups} if self.num_groups else {}


# 200,704 values in a channel of batch norm, 768 to 8192 in a set of the others.
ACCURACY = {
    "batch": Case("batch", (64, 56, 56, 4), (0, 1, 2)),
    "layer": Case("layer", (64, 768), (1,)),
    "rms": Case("rms", (64, 1024), (1,)),
    "group": Case("group", (8, 32, 32, 64), (1, 2, 4), 8),
    "instance": Case("instance", (4, 64, 64, 16), (1, 2)),
}

SPEED = [
    Case("layer", (16, 512, 768), (2,)),
    Case("layer", (4, 2048, 1024), (2,)),
    Case("rms", (16, 512, 768), (2,)),
    Case("rms", (4, 2048, 1024), (2,)),
    Case("batch", (32, 28, 28, 128), (0, 1, 2)),
    Case("batch", (64, 56, 56, 64), (0, 1, 2)),
    Case("instance", (8, 64, 64, 64), (1, 2)),
    Case("group", (16, 32, 32, 256), (1, 2, 4), 32),
]


def versions(*packages: str) -> str:
    """Names the kind of machine, Python, normjax and what is installed of packages."""
    found = [f"Python {platform.python_version()}", f"normjax {normjax.__version__}"]
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{platform.system()} {platform.machine()}, " + ", ".join(found)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
