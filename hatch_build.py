"""Builds the CPU kernels, with the package or by hand: ``python hatch_build.py``.

They are one shared library that Python loads, not an extension module, so that a wheel
with it serves every Python of its platform. Without a compiler, or with one that fails,
the package installs without them and works; `UNBUILT` then holds the reason.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

NATIVE = pathlib.Path("normjax/kernels/native")
LIBRARY = NATIVE / "libnormjax.so"
HASH = NATIVE / "libnormjax.sha256"
UNBUILT = NATIVE / "unbuilt.txt"

# Instruction sets, by the kernels' namespaces. On machines of other kinds there is one,
# the compiler's own.
X86_64 = {"base": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}

OPTIONS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # The kernels are written in vectors; what the compiler would add to that is code.
    "-fno-tree-vectorize",
    # A product that is added to something may be exact: the sums are better for it, and
    # nothing depends on a product's rounding. All machines of one kind do the same.
    "-ffp-contract=fast",
    # Comparisons here never ask for a signal, and errno is never read.
    "-fno-trapping-math",
    "-fno-math-errno",
]


class UnbuiltError(Exception):
    """Why there are no kernels."""


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, or the first there is."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise UnbuiltError(
        "no C++ compiler was found: c++, g++, clang++, or the one CXX names"
    )


def headers() -> str:
    """The folder of XLA's headers, which come with jaxlib."""
    try:
        import jaxlib
    except ImportError as e:
        raise UnbuiltError(
            f"jaxlib, whose headers are needed, does not import: {e}"
        ) from e
    folder = pathlib.Path(jaxlib.__file__).parent / "include"
    if not (folder / "xla/ffi/api/ffi.h").exists():
        raise UnbuiltError(f"jaxlib has no headers in {folder}")
    return str(folder)


def run(command: list[str]) -> None:
    """Runs the compiler."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise UnbuiltError(f"{command[0]} does not run: {e}") from e
    sys.stderr.write(done.stderr)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        lines = [line for line in said if "error" in line] or said[-1:]
        error = lines[0] if lines else f"exit status {done.returncode}"
        raise UnbuiltError(f"{shlex.join(command)} failed: {error}")


def compiled(root: pathlib.Path) -> None:
    """Compiles the library of the sources below ``root``."""
    if os.environ.get("NORMJAX_NATIVE") == "0":
        raise UnbuiltError("NORMJAX_NATIVE=0 was set")
    if os.name == "nt":
        raise UnbuiltError("Windows has no build of them yet")
    cxx, include, source = compiler(), headers(), root / NATIVE
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = X86_64 if is_x86 else {"base": []}
    with tempfile.TemporaryDirectory() as folder:
        units = {
            isa: ["kernels.cc", f"-DNORMJAX_ISA={isa}", *options]
            for isa, options in sets.items()
        }
        # As a system's headers: their warnings are not ours.
        units["handlers"] = ["handlers.cc", "-isystem", include]
        objects = [f"{folder}/{name}.o" for name in units]
        commands = [
            [*cxx, *OPTIONS, *options, "-c", str(source / file), "-o", output]
            for (file, *options), output in zip(units.values(), objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        link = [*cxx, "-shared", *objects, "-o", f"{folder}/{LIBRARY.name}"]
        # With its own C++ library, for machines that have an older one; hidden, so that
        # it is no other's.
        own = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s"]
        try:
            run([*link, *own])
        except UnbuiltError:
            run(link)
        # In one step: a process that has the old one loaded keeps it.
        new = root / f"{LIBRARY}.new"
        shutil.copy(f"{folder}/{LIBRARY.name}", new)
        # A library that was cut short would end the process that loads it.
        (root / HASH).write_text(hashlib.sha256(new.read_bytes()).hexdigest() + "\n")
        os.replace(new, root / LIBRARY)


def build(root: str | os.PathLike = ".") -> str | None:
    """Builds the library, or leaves the reason why not, which it returns."""
    root = pathlib.Path(root)
    try:
        for old in (LIBRARY, HASH, UNBUILT):
            (root / old).unlink(missing_ok=True)
        compiled(root)
    except (UnbuiltError, OSError) as e:
        # In a tree that is only to be read there is no place for the reason either.
        with contextlib.suppress(OSError):
            (root / UNBUILT).write_text(f"{e}\n")
        return str(e)
    return None


def wheel_tag() -> str:
    """Any Python 3, and this platform."""
    return "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    pass
else:

    class Hook(BuildHookInterface):
        """Builds the library before a wheel, or an editable install, is packed."""

        def initialize(self, version, build_data):
            """Compiles, and adds the library or the reason to the wheel."""
            if self.target_name != "wheel":
                return
            reason = build(self.root)
            if reason:
                self.app.display_warning(f"normjax without its CPU kernels: {reason}")
                build_data["artifacts"].append(f"/{UNBUILT}")
                return
            build_data["artifacts"] += [f"/{LIBRARY}", f"/{HASH}"]
            build_data["pure_python"] = False
            build_data["tag"] = wheel_tag()


if __name__ == "__main__":
    sys.exit(build(pathlib.Path(__file__).parent))
