"""The build of the native kernels: what it leaves where it can't be done."""

import importlib.util
import pathlib
import re
import shutil

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def hook():
    spec = importlib.util.spec_from_file_location(
        "hatch_build", ROOT / "hatch_build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path, hook):
    """The sources alone, beside a library of another build."""
    shutil.copytree(
        ROOT / hook.NATIVE,
        tmp_path / hook.NATIVE,
        ignore=shutil.ignore_patterns("libnormjax*", "unbuilt.txt"),
    )
    (tmp_path / hook.LIBRARY).write_bytes(b"of before")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("NORMJAX_NATIVE", "0", "NORMJAX_NATIVE=0 was set"),
        ("CXX", "/no/such/compiler", "/no/such/compiler does not run"),
        ("CXX", "false", "false .* failed"),
    ],
)
def test_without_a_compiler_the_reason_is_left(
    hook, tree, monkeypatch, name, value, why
):
    monkeypatch.setenv(name, value)
    reason = hook.build(tree)
    assert reason == (tree / hook.UNBUILT).read_text().strip()
    assert re.search(why, reason)
    assert not (tree / hook.LIBRARY).exists()
    assert not (tree / hook.HASH).exists()


def test_no_compiler_is_found(hook, tree, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tree))
    assert "no C++ compiler was found" in hook.build(tree)


def test_a_tree_that_is_only_to_be_read(hook, tree, monkeypatch):
    """Not by its mode, which root passes: every write is refused."""

    def refused(self, *args, **kwargs):
        raise PermissionError(f"read-only: {self}")

    monkeypatch.setattr(pathlib.Path, "unlink", refused)
    monkeypatch.setattr(pathlib.Path, "write_text", refused)
    assert "read-only" in hook.build(tree)
