"""The driver that puts faults into normjax/ finds them, and knows who sees them."""

import ast

import mutants
import pytest


def texts(source, tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "m.py").write_text(source)
    return [f.put(source) for f in mutants.faults_of("m.py")]


@pytest.mark.parametrize(
    "source, fault",
    [
        ("def f(a, b):\n    return a + b\n", "return (a)"),
        ("def f(a, b):\n    return a + b\n", "return (b)"),
        ("def f(a):\n    return stop(a, k=1)\n", "return (a)"),
        ("def f(a):\n    return stop(a, k=1)\n", "return (stop(a))"),
        ("def f(a):\n    if a < 0:\n        return 1\n", "if (a <= 0):"),
        ("def f(a):\n    if a < 0:\n        return 1\n", "if False:"),
        ("def f(a):\n    a = a * 2\n    return a\n", "    pass\n"),
        ("def f(a):\n    raise error('a fact')\n", "    pass\n"),
        ("K = 'mul rsqrt'.split()\n", "K = ('mul'.split())"),
        ("é = not True  # é\n", "é = (True)  # é"),
    ],
)
def test_faults_of_a_text(source, fault, tmp_path, monkeypatch):
    found = texts(source, tmp_path, monkeypatch)
    assert any(fault in text for text in found), found
    for text in found:
        ast.parse(text)


def test_words_of_an_error_and_docstrings_are_left_alone(tmp_path, monkeypatch):
    source = 'def f(a):\n    """Says 1 + 1."""\n    raise error(f"{a + 1}", 2)\n'
    found = texts(source, tmp_path, monkeypatch)
    assert found == ['def f(a):\n    """Says 1 + 1."""\n    pass\n']


def test_words_of_help_and_what_zip_looks_for_are_left_alone(tmp_path, monkeypatch):
    found = texts("add('--a', help='b', metavar='A', n=f())\n", tmp_path, monkeypatch)
    assert found == ["pass\n", "(add('--a', help='b', metavar='A'))\n"]
    found = texts("a = zip(b, c, strict=True)\n", tmp_path, monkeypatch)
    assert found == ["a = (b)\n"]
    found = texts("a = zip(b, c, strict=False)\n", tmp_path, monkeypatch)
    assert "a = zip(b, c, strict=(True))\n" in found


def test_lines_of_a_fault_are_those_of_its_statement(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    source = "def f(\n    a=1,\n):\n    if (\n        a + 1\n    ):\n        b(2 * a)\n"
    (tmp_path / "m.py").write_text(source)
    lines = {f.start[0]: f.lines for f in mutants.faults_of("m.py")}
    assert lines == {2: (1, 3), 5: (4, 6), 7: (7, 7)}


def test_tests_that_run_a_line_come_first_and_the_quickest_of_them_first():
    seconds = {"a::1": 3.0, "a::2": 1.0, "a::3": 0.1, "b::1": 0.1, "a::4": 999.0}
    ran = {"normjax/x.py": {5: ["a::1", "a::2"], 6: []}}
    known = {"tests": seconds, "ran": ran}
    node = ast.parse("x").body[0]
    fault = mutants.Fault("normjax/x.py", node, "y", (4, 5))
    assert mutants.tests_for(fault, known) == ["a::2", "a::1", "a::3"]
    # What runs on import is run by whatever runs the file.
    fault = mutants.Fault("normjax/x.py", node, "y", (6, 6))
    assert mutants.tests_for(fault, known) == ["a::2", "a::1", "a::3"]
    # No test runs it.
    fault = mutants.Fault("normjax/x.py", node, "y", (7, 7))
    assert mutants.tests_for(fault, known) == []


def test_of_each_function_of_tests_one_case_comes_first():
    seconds = {"a::f[1]": 0.1, "a::f[2]": 0.2, "a::g": 0.3}
    known = {"tests": seconds, "ran": {"normjax/x.py": {1: list(seconds)}}}
    fault = mutants.Fault("normjax/x.py", ast.parse("x").body[0], "y", (1, 1))
    assert mutants.tests_for(fault, known) == ["a::f[1]", "a::g", "a::f[2]"]


def test_a_fault_is_told_by_the_lines_before_and_after(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    source = "a = (\n    b\n    + 1\n)\nif a:\n    raise Fault(\n        1\n    )\n"
    (tmp_path / "m.py").write_text(source)
    assert [f.told(source) for f in mutants.faults_of("m.py")] == [
        "m.py: b + 1 => (b)",
        "m.py: b + 1 => (1)",
        "m.py: b + 1 => (b - 1)",
        "m.py: + 1 => + (2)",
        "m.py: if a: => if True:",
        "m.py: if a: => if False:",
        "m.py: raise Fault( 1 ) => pass",
    ]


def test_every_fault_of_the_core_is_a_program():
    paths = sorted(p.name for p in (mutants.ROOT / "normjax").glob("_[a-z]*.py"))
    for path in paths:
        source = (mutants.ROOT / "normjax" / path).read_text()
        for fault in mutants.faults_of(f"normjax/{path}")[::10]:
            compile(fault.put(source), path, "exec")
