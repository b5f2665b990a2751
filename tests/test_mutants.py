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


def test_tests_that_enter_come_first_and_the_quickest_of_them_first(monkeypatch):
    known = {
        "tests": {"a::1": 3.0, "a::2": 1.0, "a::3": 0.1, "b::1": 0.1, "a::4": 99.0},
        "entered": {"normjax/x.py::f": ["a::1", "a::2"]},
    }
    node = ast.parse("x").body[0]
    fault = mutants.Fault("normjax/x.py", "f", node, "y")
    assert mutants.tests_for(fault, known) == ["a::2", "a::1", "a::3"]
    # What is outside of functions is run by whatever enters the file.
    fault = mutants.Fault("normjax/x.py", "<module>", node, "y")
    assert mutants.tests_for(fault, known) == ["a::2", "a::1", "a::3"]


def test_every_fault_of_the_core_is_a_program():
    paths = sorted(p.name for p in (mutants.ROOT / "normjax").glob("_[a-z]*.py"))
    for path in paths:
        source = (mutants.ROOT / "normjax" / path).read_text()
        for fault in mutants.faults_of(f"normjax/{path}")[::10]:
            compile(fault.put(source), path, "exec")
