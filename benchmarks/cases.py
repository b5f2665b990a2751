"""What the benchmarks and the tests of them share: shapes, and the form of a table."""

import importlib.metadata
import math
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
      model: where the shape is from.
    """

    norm: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    num_groups: int = 0
    model: str = ""

    @property
    def epsilon(self) -> float:
        """Flax's default."""
        return 1e-5 if self.norm == "batch" else 1e-6

    @property
    def features(self) -> int:
        """How many features x has."""
        return self.shape[-1]

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

    @property
    def small(self) -> bool:
        """Whether a call costs about as much as its work."""
        return math.prod(self.shape) < 2**15

    def passes(self, what: str, itemsize: int) -> int:
        """The least bytes that must move, in units of the bytes of x.

        Forward a norm reads x and writes y, backward it reads x and dy and writes dx.
        Where a set that shares its moments is spread over more than stays on chip, x is
        read once more for its moments, and x and dy once more for their sums.
        """
        slab = math.prod(self.shape if self.norm == "batch" else self.shape[1:])
        rows = self.norm in ("layer", "rms") or slab * itemsize <= ON_CHIP
        least = {"inference": 2, "forward": 2, "backward": 3}
        if not rows:
            least |= {"forward": 3, "backward": 5}
        return least["forward"] + least["backward"] if what == "both" else least[what]


ON_CHIP = 2**20  # bytes: about the second cache of a core, or shared memory of a GPU

# 200,704 values in a channel of batch norm, 768 to 8192 in a set of the others.
ACCURACY = {
    "batch": Case("batch", (64, 56, 56, 4), (0, 1, 2)),
    "layer": Case("layer", (64, 768), (1,)),
    "rms": Case("rms", (64, 1024), (1,)),
    "group": Case("group", (8, 32, 32, 64), (1, 2, 4), 8),
    "instance": Case("instance", (4, 64, 64, 16), (1, 2)),
}

SPEED = [
    Case("layer", (16, 512, 768), (2,), model="BERT-B"),
    Case("layer", (4, 2048, 1024), (2,), model="GPT-2 medium"),
    Case("layer", (16, 197, 768), (2,), model="ViT-B"),
    Case("layer", (1, 1024, 4096), (2,), model="7B decoder"),
    Case("rms", (16, 512, 768), (2,), model="T5-B"),
    Case("rms", (4, 2048, 1024), (2,), model="0.5B decoder"),
    Case("rms", (1, 1024, 4096), (2,), model="7B decoder"),
    Case("batch", (32, 28, 28, 128), (0, 1, 2), model="ResNet-50"),
    Case("batch", (64, 56, 56, 64), (0, 1, 2), model="ResNet-50"),
    Case("batch", (8, 56, 56, 256), (0, 1, 2), model="ResNet-50"),
    Case("batch", (16, 14, 14, 1024), (0, 1, 2), model="ResNet-50"),
    Case("batch", (16, 7, 7, 2048), (0, 1, 2), model="ResNet-50"),
    Case("group", (16, 32, 32, 256), (1, 2, 4), 32, model="diffusion U-Net"),
    Case("group", (2, 64, 64, 320), (1, 2, 4), 32, model="diffusion U-Net"),
    Case("group", (2, 32, 32, 640), (1, 2, 4), 32, model="diffusion U-Net"),
    Case("group", (2, 16, 16, 1280), (1, 2, 4), 32, model="diffusion U-Net"),
    Case("instance", (8, 64, 64, 64), (1, 2), model="style transfer"),
    Case("instance", (4, 128, 128, 64), (1, 2), model="style transfer"),
    Case("instance", (4, 64, 64, 128), (1, 2), model="style transfer"),
    Case("layer", (8, 64), (1,), model="small"),
    Case("rms", (1, 1, 4096), (2,), model="one token, 7B decoder"),
    Case("batch", (64, 32), (0,), model="small"),
    Case("batch", (4, 8, 8, 32), (0, 1, 2), model="small"),
    Case("group", (2, 4, 4, 128), (1, 2, 4), 32, model="small"),
    Case("instance", (2, 8, 8, 32), (1, 2), model="small"),
]


def _of_shapes(*shapes: tuple[int, ...]) -> list[Case]:
    """The cases of SPEED, of any norm, of these shapes."""
    return [case for case in SPEED if case.shape in shapes]


# What is measured in bfloat16 too: a shape of each norm, one of the small ones.
BFLOAT16 = _of_shapes(
    (16, 197, 768),
    (1, 1024, 4096),
    (32, 28, 28, 128),
    (2, 32, 32, 640),
    (4, 64, 64, 128),
    (8, 64),
)

# Where a compiler that takes seconds for each shape is run: the first of each norm.
COMPILED = [next(c for c in SPEED if c.norm == norm) for norm in ACCURACY]

# What --quick measures: the smaller of the models' shapes, and two of the small ones.
QUICK = _of_shapes(
    (16, 197, 768),
    (1, 1024, 4096),
    (32, 28, 28, 128),
    (2, 32, 32, 640),
    (8, 64, 64, 64),
    (8, 64),
    (4, 8, 8, 32),
)


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
