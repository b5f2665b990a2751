"""What compares public models with norms swapped tells equal from not."""

import sys
import types

import clients
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_without_a_folder_it_says_which_checkouts_there_may_be(capsys):
    assert clients.main([]) == 2
    said = capsys.readouterr().out
    for row in clients.ROWS:
        assert f"https://github.com/{row.repository}\n" in said


def test_rows_have_names_of_their_own():
    names = [row.name for row in clients.ROWS]
    assert len(set(names)) == len(names) >= 25


def test_a_checkout_that_is_missing_is_skipped(tmp_path, capsys):
    row = clients.ROWS[0]
    found = clients.run_row(row, tmp_path)
    assert found == {"skipped": f"no checkout of github.com/{row.repository}"}
    assert clients.say(row, found) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, off", [("float64", 1e-8), ("less", 1e-4)])
def test_what_is_off_beyond_rounding_is_a_fault(dtype, off, capsys):
    theirs = {"train['y']": np.array([4.0, 2.0]), "train['state']": np.ones(3)}
    ours = {**theirs, "train['y']": np.array([4.0, 2.0 + 4 * off])}
    worst = clients.compare(ours, theirs)
    assert worst["state"] == 0 and abs(worst["y"] / off - 1) < 1e-6
    tools = {"look": "FAULT TypeError: unhashable", "fold": "refused: fold: a rule"}
    found = {"worst": worst, "dtype": dtype, "norms": 3, "tools": tools}
    assert clients.say(clients.ROWS[0], found) == 2  # y and look
    said = capsys.readouterr().out
    assert (
        f"NOT EQUAL (3 norms, {dtype})" in said
        and "refused: fold" in said
        and "unhashable" in said
    )
    found["worst"] = clients.compare(theirs, theirs)
    assert clients.say(clients.ROWS[0], found) == 1


def test_a_model_whose_norms_are_its_own_is_told(capsys):
    found = {"worst": {"y": 0.0}, "dtype": "float64", "norms": 0, "tools": {}}
    assert clients.say(clients.ROWS[0], found) == 0
    assert "equal (no norm of Flax's, float64): y 0e+00" in capsys.readouterr().out


def test_a_checkout_is_imported_anew_and_what_lies_beside_it_is_not(tmp_path):
    folder = tmp_path / "clients"
    (folder / "name").mkdir(parents=True)
    (folder / "name" / "client_of_a_test.py").write_text("made = [1]")
    row = clients.Row("a", "owner/name", ".", "client_of_a_test", "made", "()")
    beside = types.ModuleType("beside_a_test")
    beside.__file__ = f"{tmp_path}/clients-venv/beside.py"
    before = list(sys.path)
    sys.modules["beside_a_test"] = beside
    try:
        first, second = (clients._made(row, folder)[0] for _ in range(2))
        assert first == second == [1] and first is not second
        assert sys.modules["beside_a_test"] is beside
    finally:
        sys.path[:] = before
        for name in ("beside_a_test", "client_of_a_test"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "program, narrows",
    [
        (lambda x: jnp.exp(x.astype(jnp.float32)), True),
        (lambda x: jax.jit(lambda x: x.astype(jnp.bfloat16))(x), True),
        (lambda x: x * (x > 0).astype(jnp.float32), False),
        (lambda x: x.sum().astype(jnp.float32), False),
    ],
)
def test_a_program_that_casts_arrays_of_float64_is_told_from_others(program, narrows):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        traced = jax.make_jaxpr(program)(jnp.ones(3))
        assert clients._narrows(traced.jaxpr) is narrows


def test_statistics_of_flax_are_exact_within():
    """Of a mean of 1000 deviations, of which float32 keeps little."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)) + 1000, jnp.float32)
    wide = np.asarray(x, np.float64)
    true = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    norm = nn.LayerNorm(epsilon=0.0, use_bias=False, use_scale=False)

    def off():
        return np.abs(norm.apply({}, x) - true).max()

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        with clients._exact():
            assert off() < 1e-6
        assert off() > 1e-3


def test_nan_and_other_arrays_are_not_equal():
    theirs = {"train['y']": np.ones(2)}
    assert clients.compare({"train['y']": np.array([1, np.nan])}, theirs)["y"] == np.inf
    with pytest.raises(AssertionError, match="other arrays"):
        clients.compare({}, theirs)
