"""Types: a file of a user's calls every public function, and type checkers pass it."""

import ast
import pathlib
import re

import client
import pytest
from test_house import PUBLIC

CLIENT = pathlib.Path(client.__file__)


def test_the_client_uses_every_public_name():
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(CLIENT.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    public = {f"{module.__name__.split('.')[-1]}.{name}" for module, name in PUBLIC}
    assert not public - used


def test_the_client_runs(tmp_path):
    client.run(tmp_path)


WRONG = """
import jax.numpy as jnp
import normjax
from flax import nnx as flax_nnx
from normjax import linen, nnx

x = jnp.ones((2, 4))
normjax.layer_norm(x, axis="features")  # arg-type
normjax.layer_norm("x")  # arg-type
normjax.layer_norm(x, features=2)  # call-arg
normjax.rms_norm(x, epsilon=None)  # arg-type
normjax.batch_norm(x, axis_name=0)  # arg-type
normjax.batch_norm(x, axis_index_groups=[0])  # list-item
normjax.batch_norm(x, moments=normjax.RunningMoments.init(4))  # arg-type
normjax.group_norm(x)  # call-arg
normjax.moments(x, 0, where={1.0})  # arg-type
normjax.RunningMoments.init((4,)).update(x)  # arg-type
linen.BatchNorm(axis="features")  # arg-type
linen.BatchNorm(running_variance="neither")  # arg-type
linen.LayerNorm()(x, mask="all")  # arg-type
linen.RMSNorm(axis_name=0)  # arg-type
nnx.BatchNorm(4, axis=0.5, rngs=flax_nnx.Rngs(0))  # arg-type
nnx.GroupNorm(4, num_groups=2)  # call-arg
"""


def test_types_pass_the_client_and_refuse_what_is_wrong(tmp_path):
    mypy = pytest.importorskip("mypy.api")  # of the extra "dev"
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    config = CLIENT.parents[1] / "pyproject.toml"
    report, _, _ = mypy.run(["--config-file", *map(str, (config, CLIENT, wrong))])
    found = re.findall(r"wrong.py:(\d+): error: .*\[(.+)\]", report)
    lines = enumerate(WRONG.splitlines(), 1)
    assert found == [(str(i), line.split("# ")[1]) for i, line in lines if "# " in line]
    assert "client.py" not in report, report
