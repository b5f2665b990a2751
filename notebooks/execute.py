"""Runs the notebooks from top to bottom, each in a fresh kernel of this Python.

    python notebooks/execute.py [--out DIR] [notebook ...]

Without notebooks: all of this folder. Exits with 1 if a cell fails, and prints the
cell and its traceback. With --out, writes there the notebooks with their outputs, and
each picture as a PNG named after its notebook and cell. The stored notebooks are left
as they are.
"""

import argparse
import base64
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
TIMEOUT = 120  # seconds for one cell; the notebook as a whole takes a few
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # the colours of a traceback


def execute(notebook, timeout):
    """Runs the cells of ``notebook`` and puts their outputs into it.

    Raises:
      CellExecutionError, CellTimeoutError, DeadKernelError: for a cell that fails.
    """
    python_path = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),  # this checkout
            "IPYTHONDIR": folder,  # nobody's profile and startup files
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        # Sockets of the file system need no ports, but their paths have to be short.
        transport = "ipc" if os.name == "posix" and len(folder) < 80 else "tcp"
        client = NotebookClient(
            notebook,
            # A manager that looks for kernels in no folder knows just one, that of this
            # interpreter, whatever kernels are registered.
            km=AsyncKernelManager(
                kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
                connection_file=str(Path(folder) / "kernel.json"),
                transport=transport,
            ),
            timeout=timeout,
            startup_timeout=TIMEOUT,
            resources={"metadata": {"path": str(HERE)}},
        )
        client.execute(env=environment, cleanup_kc=True)


def write(notebook, stem, out):
    """Writes the executed notebook and its pictures to the folder ``out``."""
    nbformat.write(notebook, out / f"{stem}.ipynb")
    for cell in notebook.cells:
        pictures = [
            o.data["image/png"]
            for o in cell.get("outputs", [])
            if "image/png" in o.get("data", {})
        ]
        for i, picture in enumerate(pictures):
            name = f"{stem}.{cell.id}{f'-{i}' if i else ''}.png"
            (out / name).write_bytes(base64.b64decode(picture))


def main(argv=None):
    """Runs the notebooks and returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="notebook")
    parser.add_argument("--out", type=Path, help="folder for the executed notebooks")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="s, of a cell")
    args = parser.parse_args(argv)
    paths = args.notebooks or sorted(HERE.glob("*.ipynb"))
    if args.out is not None:
        if args.out.resolve() in {path.resolve().parent for path in paths}:
            parser.error("--out must not be the folder of the notebooks themselves")
        args.out.mkdir(parents=True, exist_ok=True)

    failures = 0
    for path in paths:
        started = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        try:
            execute(notebook, args.timeout)
            outcome = "ran"
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            failures += 1
            outcome = "FAILED"
            print(f"{path.name}: {ANSI.sub('', str(e))}", file=sys.stderr)
        if args.out is not None:
            write(notebook, path.stem, args.out)
        seconds = time.perf_counter() - started
        print(f"{path.name} {outcome} in {seconds:.1f} s", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main() > 0)
