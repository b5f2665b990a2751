"""The reader of compiled programs, the table of cases, and what compare says."""

import copy
import json
import math
import pathlib

import compiled
import compiled_report
import hlo
import jax
import jax.numpy as jnp
import networks
import peers
import programs
import pytest
import targets
from contexts import mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

DOCS = pathlib.Path(__file__).parent.parent / "docs"
X = jax.ShapeDtypeStruct((64, 1000), jnp.float32)
SMALL = programs.Case("layer", (8, 64))


def read(f, *arguments):
    return hlo.figures(jax.jit(f).lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
    "type_, size",
    [
        ("f32[16,512]{1,0}", 4 * 16 * 512),
        ("bf16[16,512,768]{2,1,0:T(8,128)(2,1)S(1)}", 2 * 16 * 512 * 768),
        ("f32[]", 4),
        ("pred[3]", 3),
        ("s4[10]", 5),
        ("f8e4m3fn[7]", 7),
        ("c64[2]", 16),
        ("token[]", 0),
        ("f32[0,5]", 0),
        ("(f64[2]{0}, /*index=1*/u8[5], (bf16[3]))", 16 + 5 + 6),
    ],
)
def test_size_of_a_type(type_, size):
    assert hlo.size(type_) == size


def test_a_sum_reads_x_and_writes_it():
    two = 2 * 64 * 4000
    want = hlo.Figures(bytes=two, off_chip=two, kernels=1)
    assert read(lambda x: x + 1, X) == want
    assert read(lambda x, y: x + y, X, X).bytes == 3 * 64 * 4000
    half = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)
    assert read(lambda x: x.astype(jnp.bfloat16), X).bytes == 64 * 6000
    assert read(lambda x: -x, half).bytes == 64 * 4000


def test_what_waits_for_another_is_a_kernel_of_its_own():
    found = read(lambda x: jnp.sin(jnp.sort(x, axis=0)), X)
    assert (found.kernels, found.bytes) == (2, 4 * 64 * 4000)


def test_an_all_reduce_is_a_collective():
    def f(x):
        return jax.lax.psum(x, "d")

    devices = mesh((8,), ("d",))
    over = NamedSharding(devices, P("d"))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=over)
    program = jax.shard_map(f, mesh=devices, in_specs=P("d"), out_specs=P())
    found = read(program, x)
    assert found.collectives == 1
    assert found.bytes == 2 * 8 * 4000  # of the eight rows that each device has


def test_json_takes_the_place_of_the_same_cases_alone():
    old, new = report(), report(kernels=9)
    other = copy.deepcopy(old["rows"][0]) | {"case": "rms [8, 64]"}
    old["rows"].append(other)
    found = compiled_report.merged(old, new)
    assert found == {"about": "here", "rows": [new["rows"][0], other]}
    with pytest.raises(ValueError) as error:
        compiled_report.merged(old | {"about": "there"}, new)
    assert str(error.value) == (
        "compiled.py: --json adds to a report of the same versions. Got there; here "
        "are here. Remove the file first."
    )


PROGRAM = """HloModule jit_f, is_scheduled=true

%body (s: (s32[], f32[100])) -> (s32[], f32[100]) {
  %s = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %a = f32[100]{0} get-tuple-element(%s), index=1
  %b = f32[100]{0} fusion(%a), kind=kLoop, calls=%inside
  ROOT %t = (s32[], f32[100]{0}) tuple(%i, %b)
}

%condition (s.1: (s32[], f32[100])) -> pred[] {
  %s.1 = (s32[], f32[100]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

%more (m: f32[100]) -> f32[100] {
  %m = f32[100]{0} parameter(0)
  %m.1 = f32[100]{0} sort(%m), dimensions={0}
  ROOT %m.2 = f32[100]{0} negate(%m.1)
}

%less (l: f32[100]) -> f32[100] {
  %l = f32[100]{0} parameter(0)
  ROOT %l.1 = f32[100]{0} negate(%l)
}

%together (q: f32[100]) -> f32[100] {
  %q = f32[100]{0} parameter(0)
  ROOT %q.1 = f32[100]{0} all-reduce(%q), replica_groups={{0,1}}, to_apply=%add
}

%part (t: f32[100], u: f32[100]) -> f32[10] {
  %u = f32[100]{0} parameter(1)
  %t = f32[100]{0} parameter(0)
  %u.1 = f32[10]{0} slice(%u), slice={[0:100:10]}
  %t.1 = f32[10]{0} slice(%t), slice={[0:10]}
  %t.2 = f32[10]{0} slice(%t), slice={[5:15]}
  %t.3 = f32[10]{0} add(%t.1, %t.2)
  ROOT %t.4 = f32[10]{0} add(%t.3, %u.1)
}

%mixed (v: f32[100], w: f32[100]) -> f32[100] {
  %v = f32[100]{0} parameter(0)
  %w = f32[100]{0} parameter(1)
  %v.1 = f32[10]{0} slice(%v), slice={[0:10]}
  %v.2 = f32[100]{0} pad(%v.1, %c), padding=0_90
  ROOT %v.3 = f32[100]{0} add(%v.2, %w)
}

%itself (k: f32[100]) -> f32[100] {
  ROOT %k = f32[100]{0} parameter(0)
}

ENTRY %main (x: f32[100], y: bf16[200], z: f32[]) -> (f32[100], bf16[200], f32[100]) {
  %x = f32[100]{0} parameter(0), metadata={op_name="x (the input)"}
  %y = bf16[200]{0:T(8,128)(2,1)} parameter(1)
  %z = s32[] parameter(2)
  %start = (bf16[200]{0:S(1)}, bf16[200]{0}, u32[]{:S(2)}) copy-start(%y)
  BODY
}
"""
EMPTY = hlo.Figures()


def of(*lines):
    return hlo.figures(PROGRAM.replace("BODY", "\n  ".join(lines)))


@pytest.mark.parametrize(
    "lines, want",
    [
        (["ROOT %r = f32[100]{0} bitcast(%x)"], EMPTY),
        (["ROOT %r = f32[100]{0} multiply(%x, %x)"], EMPTY._replace(bytes=800)),
        (["ROOT %r = f32[100]{0} call(%x), to_apply=%more"], (1600, 2)),
        (
            [
                "ROOT %r = f32[100]{0} fusion(%x), kind=kLoop, calls=%f, "
                'backend_config={"estimated_cycles":"123","other":"9"}'
            ],
            EMPTY._replace(bytes=800, cycles=123),
        ),
        (
            [
                "%t = (s32[], f32[100]{0}) tuple(%z, %x)",
                "ROOT %w = (s32[], f32[100]{0}) while(%t), condition=%condition, "
                'body=%body, backend_config={"known_trip_count":{"n":"7"}}',
            ],
            (7 * (800 + 9), 14),
        ),
        (
            [
                "ROOT %r = f32[100]{0} conditional(%z, %x, %x), "
                "branch_computations={%less, %more}"
            ],
            (1600, 2),
        ),
        (
            [
                "ROOT %r = f32[100]{0} conditional(%z, %x, %x), "
                "true_computation=%less, false_computation=%less"
            ],
            (800, 1),
        ),
        (
            [
                "%s.2 = f32[100]{0} all-reduce-start(%x), to_apply=%add",
                "ROOT %d = f32[100]{0} all-reduce-done(%s.2)",
            ],
            EMPTY._replace(bytes=800, collectives=1),
        ),
        (
            ["ROOT %r = f32[100]{0} fusion(%x), kind=kCustom, calls=%together"],
            EMPTY._replace(bytes=800, collectives=1),
        ),
        # Of what a fusion takes slices of alone, those are read.
        (
            [
                "%a = f32[100]{0} negate(%x)",
                "ROOT %r = f32[10]{0} fusion(%x, %a), kind=kLoop, calls=%part",
            ],
            (800 + 4 * 40, 2),
        ),
        # All of an array is read, once, where another use takes all of it.
        (
            ["ROOT %r = f32[100]{0} fusion(%x, %x), kind=kLoop, calls=%mixed"],
            (800, 1),
        ),
        (
            ["ROOT %r = f32[100]{0} fusion(%x), kind=kLoop, calls=%itself"],
            (800, 1),
        ),
        (
            [
                "%s.2 = ((f32[100]), f32[100]) async-start(%x), calls=%together",
                "ROOT %d = f32[100]{0} async-done(%s.2)",
            ],
            EMPTY._replace(bytes=800, collectives=1),
        ),
    ],
)
def test_figures_of_a_line(lines, want):
    if not isinstance(want, hlo.Figures):
        want = EMPTY._replace(bytes=want[0], kernels=want[1])
    elif want != EMPTY:
        want = want._replace(kernels=1)
    assert of(*lines) == want._replace(off_chip=want.bytes)


def test_what_is_on_the_chip_is_no_traffic_off_it():
    """Of y, fetched once, two results of two bytes a value go out, and one stays."""
    found = of(
        "%done = bf16[200]{0:T(8,128)(2,1)S(1)} copy-done(%start)",
        "%a = bf16[200]{0:T(256)S(1)} negate(%done)",
        "%b = (bf16[200]{0:T(256)}, bf16[200]{0:T(256)}) fusion(%a), calls=%f",
        "%c = bf16[200]{0} get-tuple-element(%b), index=1",
        "ROOT %r = bf16[200]{0} bitcast(%c)",
    )
    assert found == EMPTY._replace(bytes=5 * 400, off_chip=3 * 400, kernels=2)


def test_slices_that_overlap_are_no_more_than_the_array():
    found = of(
        "%a = f32[12]{0} slice(%x), slice={[0:12]}",
        "ROOT %r = f32[10]{0} fusion(%a, %x), kind=kLoop, calls=%part",
    )
    assert found.bytes == (400 + 48) + (48 + 40 + 40)


def test_slices_of_what_is_on_the_chip_are_no_traffic_off_it():
    found = of(
        "%a = f32[100]{0:T(256)S(1)} negate(%x)",
        "ROOT %r = f32[10]{0} fusion(%a, %x), kind=kLoop, calls=%part",
    )
    assert found.off_chip == 400 + 40 + 40  # x, its slice, and the result


def test_a_copy_of_an_argument_to_a_result_is_told_apart():
    lines = [
        "%done = bf16[200]{0:S(1)} copy-done(%start)",
        '%c = bf16[200]{0} copy(%done), backend_config={"estimated_cycles":"5"}',
        "%inner = f32[100]{0} copy(%x)",
        "%n = f32[100]{0} negate(%inner)",
        "%t = (f32[100]{0}, f32[100]{0}) tuple(%n, %x)",
        "%g = f32[100]{0} get-tuple-element(%t), index=0",
        "%h = f32[100]{0} get-tuple-element(%t), index=1",
        "%cg = f32[100]{0} copy(%g)",
        "%ch = f32[100]{0} copy(%h)",
        "ROOT %r = (f32[100]{0}, bf16[200]{0}, f32[100]{0}) tuple(%cg, %c, %ch)",
    ]
    copied = {"copied": 800 + 800, "copies": 2, "copied_cycles": 5}
    moved = {"bytes": 3 * 800, "off_chip": 3 * 800 + 400, "kernels": 3}
    assert of(*lines) == hlo.Figures(**moved, **copied)


def test_parts_that_are_fetched_are_no_kernels():
    """Half of y comes onto the chip by itself, and once more; both are named as one."""
    fetch = "((bf16[200]{0}), bf16[100]{0:S(1)}, s32[]{:S(2)}) slice-start(%y)"
    found = of(
        "%done = bf16[200]{0:S(1)} copy-done(%start)",
        f"%p = {fetch}, slice={{[0:100]}}",
        f"%q = {fetch}, slice={{[100:200]}}",
        "%pd = bf16[100]{0:S(1)} slice-done(%p)",
        "%qd = bf16[100]{0:S(1)} slice-done(%q)",
        "%b = bf16[200]{0:S(1)} custom-call(%pd, %qd), "
        'custom_call_target="ConcatBitcast"',
        "%out = (bf16[200]{0}, bf16[200]{0:S(1)}, u32[]{:S(2)}) copy-start(%b)",
        "ROOT %r = bf16[200]{0} copy-done(%out)",
    )
    assert found == EMPTY._replace(off_chip=400 + 2 * 200 + 400)


def test_a_copy_of_an_argument_that_came_in_parts_is_told_apart():
    found = of(
        "%p = ((bf16[200]{0}), bf16[200]{0:S(1)}, s32[]{:S(2)}) slice-start(%y)",
        "%pd = bf16[200]{0:S(1)} slice-done(%p)",
        '%b = bf16[200]{0} custom-call(%pd), custom_call_target="ConcatBitcast"',
        '%new = bf16[200]{0} custom-call(), custom_call_target="AllocateBuffer"',
        "%c = bf16[200]{0} copy(%b)",
        "%d = bf16[200]{0} copy(%new)",
        "ROOT %r = (bf16[200]{0}, bf16[200]{0}) tuple(%c, %d)",
    )
    assert (found.copies, found.copied) == (1, 800)
    assert (found.kernels, found.bytes) == (1, 800)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError) as error:
        hlo.figures("%f (x: f32[]) -> f32[] {\n}")
    assert str(error.value) == (
        "hlo.figures: the text must be that of a compiled program, with an ENTRY "
        "computation. Got '%f (x: f32[]) -> f32[] {\\n}'. Pass compiled.as_text()."
    )


def test_cases_are_different_and_have_every_norm():
    every = [case for group in programs.CASES.values() for case in group]
    assert len(set(every)) == len(every)
    assert len({case.name for case in every}) == len(every)
    norms = {"batch", "layer", "rms", "group", "instance", "add_layer", "add_rms"}
    assert {case.norm for case in every} == norms
    assert {case.norm for case in every if case.masked} == norms - {
        "add_layer",
        "add_rms",
    }
    assert {case.synced for case in every} == {"", "jit", "shard_map"}
    assert set(compiled.CASES) == set(targets.NAMES)
    for case in every:
        assert case in programs.CASES[case.group]
        small = math.prod(case.shape) < 2**15
        assert small == (case.group == "small")


@pytest.mark.parametrize("name", compiled.QUICK)
def test_quick_is_a_part_of_all(name):
    quick, whole = compiled.planned(name, quick=True), compiled.planned(name)
    assert set(quick.cases) < set(whole.cases)
    assert set(quick.peers) < set(whole.peers)
    some = compiled.planned(name, norms=["rms"])
    assert {case.norm for case, _ in some.cases} == {"rms"} and not some.steps


def test_a_step_alone_is_planned_alone():
    one = compiled.planned("H100", steps=["ViT-B"])
    assert one.steps == ("ViT-B",) and not one.cases
    assert set(compiled.planned("H100").steps) == set(networks.NETWORKS)


def test_least_bytes():
    of_norm = {case.norm: case for case in programs.CASES["main"]}
    least = {n: [c.least(m) for m in programs.MODES] for n, c in of_norm.items()}
    assert least["layer"] == least["rms"] == [2, 2, 3]
    assert least["batch"] == least["group"] == least["instance"] == [3, 3, 5]
    assert programs.Case("add_rms", (8, 64)).least("backward") == 4


def programs_of(f, inputs):
    return {mode: (made, kept) for mode, made, kept in programs.compiled(f, inputs)}


def test_programs_are_forward_training_and_backward():
    """Of y = x * scale, whose backward pass needs x and scale."""
    case = programs.Case("rms", (64, 1000))
    inputs = programs.inputs_of(case, jnp.bfloat16, jax.devices()[:1])

    def f(arrays, where):
        x, scale = arrays
        return x * scale.astype(x.dtype), None

    found = programs_of(f, inputs)
    x, scale = 2 * 64 * 1000, 2 * 1000
    assert found["training"][1] == x + scale
    figures = {mode: hlo.figures(made.as_text()) for mode, (made, _) in found.items()}
    assert 2 * x < figures["forward"].bytes < 2.2 * x
    assert 2 * x < figures["training"].bytes < 2.2 * x
    assert 2 * x <= figures["training"].copied < 2.2 * x  # x, to a result
    assert figures["backward"].bytes > 3 * x


def test_what_is_kept_is_counted_on_each_device():
    case = programs.Case("batch", (16, 5, 5, 8), synced="jit")
    f = programs.function("normjax", case, jnp.float32, jax.devices()[:4])
    found = programs_of(f, programs.inputs_of(case, jnp.float32, jax.devices()[:4]))
    x = case.x_bytes("float32")
    assert x == 4 * 5 * 5 * 8 * 4
    assert x < found["training"][1] < 1.2 * x


def test_a_compiler_that_is_absent_is_named(monkeypatch):
    def absent(*arguments, **options):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", absent)
    with pytest.raises(RuntimeError) as error:
        targets.target("H100")
    assert str(error.value) == (
        "targets.target: the compiler for H100 must be installed. Got RuntimeError: no "
        "plugin. Type: make compiled"
    )


def test_whoever_asks_is_told_of_the_target():
    before = jax.default_backend
    with targets.told("tpu"):
        assert jax.default_backend() == "tpu"
    assert jax.default_backend is before


@pytest.mark.parametrize(
    "name, parameters", [("ResNet-50", 25_557_032), ("ViT-B", 86_566_120)]
)
def test_networks_have_their_published_size(name, parameters):
    """Of a ViT-B 86,567,656 without the token and the position that are for a class."""
    make, shape = networks.NETWORKS[name]
    model, x = (
        make(peers.NORMJAX, jnp.bfloat16),
        jax.ShapeDtypeStruct(shape, "bfloat16"),
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(a.size for a in jax.tree.leaves(variables["params"])) == parameters


ROW = {"target": "v5e", "case": "layer [8, 64]", "dtype": "float32", "mode": "training"}
FIGURES = {"bytes": 5000, "kernels": 3, "collectives": 0, "kept": 1000}
FIGURES |= {"temporaries": 0, "cycles": 10_000}


def report(**changes):
    row = ROW | {"norm": "layer", "group": "small", "x_bytes": 2048, "least": 2}
    full = dict.fromkeys(hlo.Figures._fields, 0) | FIGURES
    return {"about": "here", "rows": [row | {"of": {"normjax": full | changes}}]}


@pytest.mark.parametrize(
    "name, worse, same",
    [
        ("bytes", 5001, 5000),
        ("kernels", 4, 3),
        ("collectives", 1, 0),
        ("kept", 1001, 1000),
        ("temporaries", 21, 20),
        ("cycles", 10_102, 10_100),
    ],
)
def test_compare_names_what_got_worse_and_better(name, worse, same):
    old = report()
    line = f"v5e, layer [8, 64], float32, training: {name} "
    found = compiled_report.compare(old, report(**{name: worse}))
    assert found.worse == [line + f"{worse:,}, were {FIGURES[name]:,}"]
    assert (found.better, found.same) == ([], 5)
    found = compiled_report.compare(report(**{name: worse}), old)
    assert found.better == [line + f"{FIGURES[name]:,}, were {worse:,}"]
    assert (found.worse, found.same) == ([], 5)
    found = compiled_report.compare(old, report(**{name: same}))
    assert found == compiled_report.Compared([], [], 6)


def test_compare_of_other_cases_is_refused():
    new = report()
    new["rows"][0]["case"] = "layer [9, 64]"
    with pytest.raises(ValueError, match="--compare needs a report that has some of"):
        compiled_report.compare(report(), new)


def test_host_names_what_differs():
    same, other = report()["rows"], report(kernels=4, bytes=6000)["rows"]
    words = compiled_report.host_text(same, copy.deepcopy(same))
    assert words == "\nother where jax.default_backend() is cpu: 0 of 1"
    words = compiled_report.host_text(same, other)
    line = (
        "v5e, layer [8, 64], float32, training: bytes 6,000 for 5,000, kernels 4 for 3"
    )
    assert words.splitlines()[1:] == [
        "other where jax.default_backend() is cpu: 1 of 1",
        f"- {line}",
    ]


def test_from_the_command_line(monkeypatch, tmp_path, capsys):
    """The whole script, for four CPUs that stand for the devices."""
    here = targets.Target("v5e", "tpu", jax.devices()[:4])
    plan = compiled.Plan([(SMALL, "float32")], programs.PEERS)
    monkeypatch.setattr(targets, "target", lambda name: here)
    monkeypatch.setattr(compiled, "planned", lambda *a: plan)
    monkeypatch.setattr(programs.Case, "group", "main")
    path = tmp_path / "compiled.json"
    argv = ["--target", "v5e", "--threads", "1"]
    assert compiled.main([*argv, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["mode"] for row in found["rows"]] == list(programs.MODES)
    for row in found["rows"]:
        assert list(row["of"]) == list(programs.PEERS)
        assert all(of["bytes"] > row["x_bytes"] for of in row["of"].values())
    measured = copy.deepcopy(found["rows"])
    monkeypatch.setattr(compiled, "measure", lambda *a: copy.deepcopy(measured))
    assert compiled.main([*argv, "--compare", str(path)]) == 0
    assert "worse than in" in capsys.readouterr().out
    found["rows"][0]["of"]["normjax"]["kernels"] = 0
    path.write_text(json.dumps(found))
    assert compiled.main([*argv, "--compare", str(path)]) == 1
    assert "forward: kernels" in capsys.readouterr().out
    monkeypatch.setattr(compiled, "measure", lambda *a: [])
    with pytest.raises(ValueError) as error:
        compiled.main(argv)
    assert str(error.value) == (
        "compiled.py: the options must leave something to compile. Got --target v5e "
        "--threads 1. Leave out --quick, or name more."
    )


def test_the_page_has_the_committed_figures():
    committed = json.loads((DOCS / "compiled.json").read_text())
    page = (DOCS / "compiled.md").read_text()
    assert page.endswith(f"{compiled_report.MARK}\n{compiled_report.text(committed)}\n")
    assert compiled_report.dumped(committed) == (DOCS / "compiled.json").read_text()
    keys = {(r["target"], r["case"], r["dtype"], r["mode"]) for r in committed["rows"]}
    want = {
        (name, case.name, dtype, mode)
        for name in targets.NAMES
        for case, dtype in compiled.planned(name).cases
        for mode in programs.MODES
    }
    want |= {
        (name, step, "bfloat16", "step")
        for name in targets.NAMES
        for step in compiled.planned(name).steps
    }
    assert keys == want


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    committed = json.loads((DOCS / "compiled.json").read_text())
    plot.draw_compiled(committed, tmp_path / "compiled.png")
    assert (tmp_path / "compiled.png").stat().st_size > 10_000
