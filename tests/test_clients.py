"""What compares public models with norms swapped tells equal from not."""

import clients
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
    found = {"worst": worst, "dtype": dtype, "tools": tools}
    assert clients.say(clients.ROWS[0], found) == 2  # y and look
    said = capsys.readouterr().out
    assert "NOT EQUAL" in said and "refused: fold" in said and "unhashable" in said
    found["worst"] = clients.compare(theirs, theirs)
    assert clients.say(clients.ROWS[0], found) == 1


def test_nan_and_other_arrays_are_not_equal():
    theirs = {"train['y']": np.ones(2)}
    assert clients.compare({"train['y']": np.array([1, np.nan])}, theirs)["y"] == np.inf
    with pytest.raises(AssertionError, match="other arrays"):
        clients.compare({}, theirs)
