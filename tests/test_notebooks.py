"""The notebooks run from top to bottom, and are stored without what they print."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(*arguments, timeout=300):
    command = [sys.executable, FOLDER / "execute.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def write(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_stored_without_outputs(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id
    stored = json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
    assert text == stored


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs_without_errors_or_warnings(path, tmp_path):
    done = execute(path, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(tmp_path / path.name, as_version=4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "Warning" not in printed + done.stderr
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == len(list(tmp_path.glob(f"{path.stem}.*.png"))) > 0


def test_execute_reports_the_cell_that_fails(tmp_path):
    path = write(tmp_path / "fails.ipynb", "a = 0", "print('so far')\n1 / a")
    done = execute(path)
    assert done.returncode == 1
    assert "fails.ipynb FAILED" in done.stdout
    for part in ["fails.ipynb: ", "1 / a", "so far", "ZeroDivisionError", "Traceback"]:
        assert part in done.stderr
    assert "\x1b[" not in done.stderr


def test_execute_ends_a_cell_that_does_not(tmp_path):
    path = write(tmp_path / "endless.ipynb", "while True:\n    pass")
    done = execute(path, "--timeout", "2")
    assert done.returncode == 1
    assert "timed out" in done.stderr and "while True" in done.stderr


def test_execute_never_writes_over_the_notebooks(tmp_path):
    path = write(tmp_path / "stored.ipynb", "1 + 1")
    before = path.read_bytes()
    done = execute(path, "--out", tmp_path)
    assert done.returncode == 2
    assert "--out must not be the folder of the notebooks" in done.stderr
    assert path.read_bytes() == before
