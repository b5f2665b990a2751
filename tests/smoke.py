"""What an installed normjax must do, without its source tree and without pytest.

python tests/smoke.py             # in a fresh environment, from an empty folder
python tests/smoke.py --oldest    # prints the oldest packages that it may need
"""

import importlib.metadata
import importlib.resources
import pathlib
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
from flax import nnx

import normjax
import normjax.linen
import normjax.nnx
from normjax import tools

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    home = pathlib.Path(normjax.__file__).resolve()
    assert ROOT not in home.parents or ".venv" in str(home), f"{home}: not installed"
    assert importlib.metadata.version("normjax") == normjax.__version__
    assert (importlib.resources.files("normjax") / "py.typed").is_file()
    files = importlib.metadata.files("normjax") or ()
    others = {f.parts[0] for f in files} - {"normjax", ".."}
    assert all(name.endswith(".dist-info") for name in others), others

    x = 3 * jax.random.normal(jax.random.key(0), (16, 4)) + 2
    y, m = normjax.batch_norm(x)
    assert jnp.allclose(y.mean(0), 0, atol=1e-5) and jnp.allclose(m.mean, x.mean(0))
    norm = normjax.linen.BatchNorm(use_running_average=False, momentum=0.0)
    variables = norm.init(jax.random.key(1), x)
    _, after = norm.apply(variables, x, mutable=["batch_stats"])
    assert jnp.allclose(after["batch_stats"]["mean"], x.mean(0), atol=1e-5)
    model = normjax.nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    assert jnp.allclose(model(x), normjax.layer_norm(x), atol=1e-5)
    assert [n.kind for n in tools.find_norms(model)] == ["LayerNorm"]
    command = [sys.executable, "-m", "normjax", "--help"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "inspect" in said and "doctor" in said, said
    jaxes = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax"))
    print(f"normjax {normjax.__version__} works, installed beside {jaxes}")


def oldest() -> None:
    """Prints what pyproject.toml declares, each at its oldest version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(">=" in d and "," not in d for d in project["dependencies"])
    print(*(d.replace(">=", "==") for d in project["dependencies"]))


if __name__ == "__main__":
    oldest() if sys.argv[1:] == ["--oldest"] else main()
