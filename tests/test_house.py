"""The house: imports go one way, every public name is documented, examples run."""

import ast
import doctest
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import normjax
from normjax import linen, nnx, tools

PACKAGE = pathlib.Path(normjax.__file__).parent
# A file imports only from files of lower numbers, never its own.
ORDER = {
    "_check": 0,
    "_types": 0,
    "kernels": 0,
    "kernels.canonical": 0,
    "kernels.choice": 1,
    "kernels.library": 1,
    "kernels.operation": 2,
    "_axes": 1,
    "_trees": 1,
    "_numbers": 2,
    "_moments": 3,
    "_devices": 4,
    "_running": 4,
    "_measure": 5,
    "_formula": 6,
    "_operations": 7,
    "_normalize": 8,
    "_norms": 9,
    "_remat": 9,
    "_fused": 10,
    "_module": 10,
    "linen": 11,
    "nnx": 11,
    "tools.bounds": 8,
    "tools.hdf5": 9,
    "tools.hdf5_parts": 8,
    "tools.safetensors": 9,
    "tools.batches": 10,
    "tools.checkpoints": 10,
    "tools.files": 10,
    "tools.merging": 10,
    "tools.kinds": 9,
    "tools.models": 10,
    "tools.presets": 10,
    "tools.replicas": 10,
    "tools.average": 11,
    "tools.calls": 14,
    "tools.checks": 14,
    "tools.convert": 11,
    "tools.feeds": 11,
    "tools.keras_names": 11,
    "tools.looks": 11,
    "tools.nnx_folded": 11,
    "tools.optimize": 11,
    "tools.replace": 14,
    "tools.replace_linen": 13,
    "tools.replace_nnx": 12,
    "tools.replace_rules": 11,
    "tools.sweep_linen": 14,
    "tools.sweep_nnx": 14,
    "tools.tables": 11,
    "tools.tent": 11,
    "tools.doctor": 15,
    "tools.fold_plan": 12,
    "tools.freeze": 15,
    "tools.plots": 12,
    "tools.recalibrate": 15,
    "tools.fold": 15,
    "tools": 16,
    "__init__": 17,
    "__main__": 18,
}
PUBLIC = [
    (module, name)
    for module in (normjax, linen, nnx, tools)
    for name, value in vars(module).items()
    if not name.startswith("_")
    and getattr(value, "__module__", "").startswith("normjax")
]


def file_of(name):
    path = PACKAGE / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(path):
    """The files of normjax that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "normjax":
                one = ".".join(parts[1:])
                inside = [f"{one}.{a.name}".lstrip(".") for a in node.names]
                files = [name for name in inside if name in ORDER]
                yield from files or [one]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("normjax."):
                    yield alias.name.split(".", 1)[1]


def test_every_file_has_its_floor():
    assert set(PACKAGE.rglob("*.py")) == set(map(file_of, ORDER))


@pytest.mark.parametrize("file", ORDER)
def test_imports_go_one_way(file):
    above = [n for n in imported(file_of(file)) if ORDER[n] >= ORDER[file]]
    assert not above, f"{file} imports {above}"


def test_one_file_talks_to_named_device_axes():
    words = ("psum", "pmean", "axis_index(", "all_gather", "ppermute")
    for path in PACKAGE.rglob("*.py"):
        code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
        found = [w for w in words if w in code]
        assert not found or path.stem == "_devices", f"{path.stem} uses {found}"


def _without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            node.body = [*body[1:], ast.Pass()]
    return tree


def test_public_names_are_those_of_the_design():
    assert {n for m, n in PUBLIC if m is normjax} == {
        "Moments",
        "RunningMoments",
        "add_layer_norm",
        "add_rms_norm",
        "batch_norm",
        "group_norm",
        "instance_norm",
        "layer_norm",
        "merge",
        "moments",
        "normalize",
        "remat_policy",
        "rms_norm",
        "set_implementation",
    }
    modules = {"BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"}
    modules |= {"AddLayerNorm", "AddRMSNorm"}
    for library in (linen, nnx):
        assert {n for m, n in PUBLIC if m is library} == modules
    assert {n for m, n in PUBLIC if m is tools} == {
        "Drift",
        "Finding",
        "FoldReport",
        "Folded",
        "Look",
        "Moved",
        "Norm",
        "Rate",
        "Recalibrated",
        "Replaced",
        "Report",
        "Row",
        "RunningVariables",
        "checksum",
        "decay_mask",
        "doctor",
        "effective_rates",
        "entropy",
        "find_drift",
        "find_dropped",
        "find_norms",
        "fold",
        "freeze",
        "from_equinox",
        "from_haiku",
        "from_keras",
        "from_torch",
        "global_batch",
        "keras_names",
        "labels",
        "look",
        "merge_replicas",
        "norm_table",
        "pad_batch",
        "plot",
        "plot_table",
        "preset",
        "read_weights",
        "recalibrate",
        "replace",
        "scalars",
        "tent",
        "to_equinox",
        "to_haiku",
        "to_keras",
        "to_torch",
        "unfreeze",
        "write_weights",
    }


def documented():
    """Every public name and every public method, with its value."""
    for module, name in PUBLIC:
        value = getattr(module, name)
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value):
            for attribute, method in vars(value).items():
                method = getattr(method, "__func__", method)
                own = getattr(method, "__module__", "").startswith("normjax")
                if inspect.isfunction(method) and own and attribute[0] != "_":
                    yield f"{module.__name__}.{name}.{attribute}", method


DOCUMENTED = dict(documented())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_docstring_has_its_parts(name):
    doc = inspect.getdoc(DOCUMENTED[name])
    assert doc and doc.splitlines()[0].endswith(".")
    assert "Example:" in doc and ">>>" in doc
    value = DOCUMENTED[name]
    if inspect.isfunction(value):
        arguments = [p for p in inspect.signature(value).parameters if p != "self"]
        for argument in arguments:
            assert f"{argument}:" in doc or argument == "cls", argument
    elif inspect.isclass(value):
        fields = {n for n in value.__annotations__ if not n.startswith("_")}
        own = fields - {"parent", "name"}
        if issubclass(value, nnx.nnx.Module):
            own = set(inspect.signature(value.__init__).parameters) - {"self"}
            if "__init__" not in vars(value):  # those of the class it builds on
                own = set()
        for field in own:
            assert f"{field}:" in doc, field


@pytest.mark.parametrize(
    "module", [f"normjax.{n}" for n in ORDER if n != "__init__"] + ["normjax"]
)
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert found.failed == 0


def test_examples_in_docstrings_are_found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(f"normjax.{n}") for n in ORDER if n[:2] != "__"]
    examples = {t.name for m in modules for t in finder.find(m) if t.examples}
    assert len(examples) >= len(DOCUMENTED)


def test_import_brings_jax_alone():
    code = (
        "import sys, normjax\n"
        "heavy = {'flax', 'optax', 'chex', 'orbax', 'matplotlib', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
