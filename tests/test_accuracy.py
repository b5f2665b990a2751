"""The accuracy table of docs/accuracy.md: its bars, on the rows that are hardest."""

import accuracy
import family
import jax
import jax.numpy as jnp
import pytest

import normjax
from normjax import _measure

HARD = ["100", "1e5", "1e3, one value 0", "1, one value 1e4"]


@pytest.mark.parametrize(
    ("norm", "data", "who"), family.combined(family.FAMILY, HARD, accuracy.OURS)
)
def test_errors_stay_below_the_bar(norm, data, who):
    found, bars = accuracy.errors(norm, data, who), accuracy.bar(norm, data)
    missed = {m: (e, bars[m]) for m, e in found.items() if not e <= bars[m]}
    assert not missed


of_cpu = _measure._in_double
# What a GPU and what a TPU computes.
FORMS = {
    "one pass": lambda x, where, r: of_cpu(x, where, r, passes=1),
    "in float32": lambda x, where, r: _measure._in_dtype(x, where, r, jnp.float32),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def another_form(request, monkeypatch):
    """Has a CPU compute moments as another platform does."""
    asked = []

    def form(x, where, r, passes):
        asked.append(passes)
        return request.param(x, where, r)

    monkeypatch.setattr(_measure, "_in_double", form)
    normjax.set_implementation("xla")
    jax.clear_caches()
    yield
    assert asked
    normjax.set_implementation(None)
    jax.clear_caches()


@pytest.mark.usefixtures("another_form")
@pytest.mark.parametrize(("norm", "data"), family.combined(["batch", "layer"], HARD))
def test_errors_stay_below_the_bar_as_other_platforms_compute(norm, data):
    found, bars = accuracy.errors(norm, data), accuracy.bar(norm, data)
    missed = {m: (e, bars[m]) for m, e in found.items() if not e <= bars[m]}
    assert not missed


def test_the_bar_finds_what_flax_loses():
    found, bars = accuracy.errors("layer", "1e3", "flax"), accuracy.bar("layer", "1e3")
    assert found["y"] > 100 * bars["y"]
