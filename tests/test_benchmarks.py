"""The benchmarks: peers agree in value, and reports have their parts."""

import json
import warnings

import cases
import jax.numpy as jnp
import pytest

with warnings.catch_warnings():  # what other libraries warn about is theirs
    warnings.simplefilter("ignore")
    import passes
    import peers
    import run
    import steps
    import sync
    import timing

SMALL = [case for case in cases.SPEED if case.small]

pytestmark = pytest.mark.filterwarnings("ignore")


def both(peer, case):
    """What a peer computes, forward and backward."""
    f = peer.build(case, jnp.dtype("float32"))
    params, running, x, dy = run.arguments_of(case, jnp.float32)
    own = (params, running, *(peers.laid_out(peer, case, a) for a in (x, dy)))
    if peer.kind == "torch":
        program = run.of_torch(f, own, ["both"])[0]["both"]
    else:
        program = run.of_jax(f, own, ["both"])["both"]
    return run.values(peer, case, program), program.call()[2]


@pytest.mark.parametrize("norm", sorted(cases.ACCURACY))
def test_every_peer_agrees_with_normjax(norm):
    case = [case for case in SMALL if case.norm == norm][-1]
    want, running = both(peers.NORMJAX, case)
    same = [n for n in peers.PEERS if n != "torch compiled"]  # takes seconds a norm
    for name in same:
        if peers.PEERS[name].build(case, jnp.dtype("float32")) is None:
            continue
        got, theirs = both(peers.PEERS[name], case)
        assert not run.disagreement(got, want, case, jnp.float32), name
        if norm == "batch" and name in ("flax", "nnx", "keras"):  # the same average
            for key in ("mean", "var"):
                assert jnp.allclose(theirs[key], running[key], rtol=1e-5), (name, key)


def test_a_peer_that_is_wrong_is_named():
    case = SMALL[0]
    want, _ = both(peers.NORMJAX, case)
    got = want | {"dx": want["dx"] * 1.001}
    found = run.disagreement(got, want, case, jnp.float32)
    assert found.startswith("dx is off by ")


def test_what_is_missing_has_a_reason():
    assert set(peers.NAMES) == set(peers.PEERS) | set(peers.ABSENT)
    assert all(peers.ABSENT.values())


def report(ratio=1.0):
    ratios = {"flax": {"median": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio}}
    row = {"case": "layer [8, 64]", "dtype": "float32", "pass": "both"}
    return {"rows": [row | {"ratios": ratios}, row | {"pass": "forward", "ratios": {}}]}


def test_compare_names_what_got_slower(tmp_path):
    for name, ratio in {"old": 0.5, "same": 0.54, "slow": 0.8}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report(ratio)))
    old, same, slow = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("old", "same", "slow")
    )
    assert run.slower(old, same) == []
    assert run.slower(slow, old) == []
    assert run.slower(old, slow) == [
        "layer [8, 64], float32, both: 0.50 to 0.80 of flax's time"
    ]


def test_report_has_its_fields(monkeypatch, tmp_path):
    only = {n: p for n, p in peers.PEERS.items() if n == "flax"}
    monkeypatch.setattr(peers, "PEERS", only)
    rows, left_out = run.measure(SMALL[0], jnp.dtype("float32"), 5)
    assert left_out == {}
    assert [row["pass"] for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert set(row["ratios"]) == {"flax"}
        assert set(row["of"]) == {"normjax", "flax", "copy"}
        for figures in row["of"].values():
            assert figures["low"] <= figures["ms"] <= figures["high"]
            assert figures["gb_s"] > 0 and figures["of_copy"] > 0
            assert figures["temporary"] >= 0 and figures["compile_ms"] > 0
        x = row["x_bytes"]
        assert x < row["of"]["normjax"]["kept"] < 1.5 * x < row["of"]["flax"]["kept"]
    about = {"about": "here", "absent": {"haiku": "why"}, "left_out": ["keras: why"]}
    whole = about | {"rows": rows, "networks": {}, "memory": [], "import_seconds": 0.2}
    words = run.text(json.loads(json.dumps(whole)))
    for part in ("absent: haiku: why", "not timed: keras: why", "| layer [8, 64] |"):
        assert part in words
    assert "| import normjax after jax, s | 0.20 | 0.1 | MISSED |" in words
    pytest.importorskip("matplotlib")
    import plot

    plot.draw(whole, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_a_norm_of_any_peer_is_a_module():
    x = jnp.arange(24.0).reshape(2, 3, 4) ** 2
    norm = steps.Norm(peers.NORMJAX, "batch")
    variables = norm.init(steps.jax.random.key(0), x)
    y, new = norm.apply(variables, x, mutable=["batch_stats"])
    assert jnp.allclose(y.mean((0, 1)), 0, atol=1e-5)
    want = (1 - peers.MOMENTUM) * x.mean((0, 1))
    assert jnp.allclose(new["batch_stats"]["mean"], want)


def test_least_traffic_is_that_of_the_pass():
    layer, batch = cases.SPEED[0], cases.Case("batch", (64, 56, 56, 64), (0, 1, 2))
    assert [layer.passes(what, 4) for what in run.PASSES] == [2, 2, 3, 5]
    assert [batch.passes(what, 4) for what in run.PASSES] == [2, 3, 5, 8]
    assert timing.ratios({"normjax": [1, 2], "flax": [2, 4]})["flax"]["median"] == 0.5


@pytest.mark.parametrize("axis", [0, 1])
def test_forms_of_forward_are_one_norm(axis):
    """On data near zero, where none of them loses digits."""
    x = jnp.sin(jnp.arange(16 * 16.0)).reshape(16, 16) + 0.1
    want = (x - x.mean(axis, keepdims=True)) / (x.std(axis, keepdims=True) + 5e-7)
    for name, form in passes.forms((axis,)).items():
        assert jnp.allclose(form(x, None), want, atol=1e-5), name


def test_a_constant_far_from_zero_needs_the_rest_of_the_mean():
    """Two passes alone leave the mean's rounding over a standard deviation of 0."""
    x = jnp.full((1000, 1), 1e5 / 3)
    forms = passes.forms((0,))
    assert jnp.abs(forms["two passes"](x, None)).max() > 0.1
    assert not forms["safe, three sums"](x, None).any()


@pytest.mark.parametrize("one", [True, False])
def test_the_model_of_sync_has_the_bytes_of_the_compiled_program(one, monkeypatch):
    if not one:
        monkeypatch.setattr(sync._devices, "ONE_ALL_REDUCE_BYTES", 0)
        sync.jax.clear_caches()
    program, _ = sync.programs(64, sync.normjax.linen, "forward")
    sync.jax.clear_caches()
    assert sync.collectives(program) == sync.buffers(64, sync.DEVICES, one)


def test_what_is_taken_to_sync_is_never_twice_the_faster():
    ratio, channels, devices = sync.worst()
    assert ratio < 2
    assert all(float(row[-1]) <= ratio + 0.005 for row in sync.modelled())
    assert 16 <= channels <= 4096 and 2 <= devices <= 4096
