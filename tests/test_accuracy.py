"""The accuracy table of docs/accuracy.md: its bars, on the rows that are hardest."""

import accuracy
import family
import pytest

HARD = ["100", "1e5", "1e3, one value 0", "1, one value 1e4"]


@pytest.mark.parametrize(
    ("norm", "data", "who"), family.combined(family.FAMILY, HARD, accuracy.OURS)
)
def test_errors_stay_below_the_bar(norm, data, who):
    found, bars = accuracy.errors(norm, data, who), accuracy.bar(norm, data)
    missed = {m: (e, bars[m]) for m, e in found.items() if not e <= bars[m]}
    assert not missed


def test_the_bar_finds_what_flax_loses():
    found, bars = accuracy.errors("layer", "1e3", "flax"), accuracy.bar("layer", "1e3")
    assert found["y"] > 100 * bars["y"]
