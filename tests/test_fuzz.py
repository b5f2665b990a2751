"""A short run of the fuzzer of norms; `make fuzz` runs it for an hour."""

import dataclasses

import fuzz_norms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz_norms import DATA

import normjax

OVERFLOW = ("huge", "largest", "mixed")
SANE = tuple(kind for kind in DATA if kind not in OVERFLOW)


def found(numbers, kinds):
    said = []
    count, faults = fuzz_norms.fuzz(2, numbers, kinds, say=said.append)
    assert count == len(numbers)
    return faults, "\n".join(said)


def test_calls_agree_with_the_formula_in_extended_precision():
    faults, said = found(range(16, 22), SANE)
    assert not faults, said


def test_calls_on_data_whose_squares_overflow_agree_with_the_formula():
    faults, said = found(range(40, 44), OVERFLOW)
    assert not faults, said


def test_a_stream_agrees_with_the_formula():
    assert fuzz_norms.stream(2, 65) == []


def test_a_call_is_drawn_from_its_seed_and_number_alone():
    assert fuzz_norms.draw(7, 3) == fuzz_norms.draw(7, 3)
    one, two = (fuzz_norms.data(fuzz_norms.draw(7, 3), "normal", 7, 3) for _ in "ab")
    jax.tree.map(np.testing.assert_array_equal, one, two)


# A reference that lets a fault through is none: each of these must be found.
def _mean_without_rest(m):
    return dataclasses.replace(m, rest=jnp.zeros_like(m.rest))


def _var_off(m):
    return dataclasses.replace(m, var=m.var * (1 + 1e-5))


@pytest.mark.parametrize("fault", [_mean_without_rest, _var_off])
def test_the_fuzzer_finds_a_fault(fault, monkeypatch):
    take = normjax._measure.take
    monkeypatch.setattr(normjax._measure, "take", lambda *a: fault(take(*a)))
    jax.clear_caches()
    faults, _ = found([154], ("far",))
    jax.clear_caches()
    assert faults


def test_main_prints_a_line_that_repeats_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(
        fuzz_norms, "run", lambda *a: [("normal", "y is 1, not 2", 9.0)]
    )
    assert fuzz_norms.main(["--seed", "5", "--only", "3"]) == 1
    text = capsys.readouterr().out
    assert "python tests/fuzz_norms.py --seed 5 --only 3" in text
    assert "1 calls of seed 5, 1 faults" in text
    monkeypatch.setattr(fuzz_norms, "run", lambda *a: [])
    assert fuzz_norms.main(["--seed", "5", "--only", "3"]) == 0
