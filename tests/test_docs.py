"""The documentation has every public name; its code runs, its links lead somewhere."""

import functools
import importlib.util
import pathlib
import re
import subprocess
import sys
import warnings

import flax.linen as nn
import jax
import pytest
from contexts import mesh
from jax.sharding import PartitionSpec
from test_house import PUBLIC

from normjax import linen, tools

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = {p.relative_to(DOCS).as_posix(): p for p in sorted(DOCS.rglob("*.md"))}
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    """The fenced blocks of a page, each below as many empty lines as precede it."""
    text = PAGES.get(page, ROOT / page).read_text()
    for found in FENCE.finditer(text):
        if found[1] == language:
            yield "\n" * text.count("\n", 0, found.start(2)) + found[2]


WITH_CODE = [page for page in PAGES if any(blocks(page, "python"))]


def test_first_use_idea_choices_differences_and_moving_have_code():
    pages = {"index.md", "idea.md", "choices.md", "differences.md", "moving.md"}
    pages |= {"implementations.md"}
    pages |= {"scaling.md", "statistics.md", "convert.md"}
    assert pages == set(WITH_CODE)


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_of_a_page_runs(page):
    names = {"__name__": page}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks(page, "python"):
            exec(compile(block, str(PAGES[page]), "exec"), names)


class Readme(nn.Module):
    """A model such as the README's examples speak of."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = linen.BatchNorm(use_running_average=not train, name="encoder")(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def readme_names():
    """What the README's blocks take for granted."""
    import safetensors.numpy

    x, images = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(SHAPES))
    model = Readme()
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    variables = model.init(jax.random.key(2), images)
    for _ in range(9):
        variables = {**variables, **apply(variables, images)[1]}
    weights = {k: v.copy() for k, v in tools.to_torch(variables).items()}
    safetensors.numpy.save_file(weights, "model.safetensors")
    return {
        "C": 32,
        "P": PartitionSpec,
        "apply": apply,
        "batches": [images, images + 1],
        "first": x[:2],
        "functools": functools,
        "images": images,
        "jax": jax,
        "mesh": mesh((8,), ("data",)),
        "model": model,
        "new_images": [images - 1],
        "residual": x,
        "rest": x[2:],
        "variables": variables,
        "x": x,
        **{name: jax.numpy.ones(32) for name in ("scale", "bias")},
    }


SHAPES = (8, 6, 32), (16, 8, 8, 3)


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    found = list(blocks("README.md", "python"))
    assert len(found) == README.read_text().count("```python") > 0
    names = readme_names()
    for block in found:
        exec(compile(block, str(README), "exec"), names)
    # The block of sync defines what shard_map runs.
    assert names["forward"](names["x"], names["scale"]).shape == names["x"].shape


@pytest.mark.parametrize("page", PAGES)
def test_fences_say_their_language(page):
    languages = {found[1] for found in FENCE.finditer(PAGES[page].read_text())}
    assert languages <= {"python", "console", "text"}


def test_every_public_name_has_an_entry():
    entries = [
        entry
        for path in (DOCS / "reference").glob("*.md")
        for entry in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)
    ]
    assert sorted(entries) == sorted(f"{m.__name__}.{name}" for m, name in PUBLIC)


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    assert sorted(re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == sorted(PAGES)


def anchors(text):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", PAGES[page].read_text())
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = PAGES[page].parent / name if name else PAGES[page]
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None,
    reason="the site needs mkdocs: pip install -e '.[docs]'",
)
def test_site_builds_strictly_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
    built = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    for page in PAGES:
        html = (tmp_path / page).with_suffix(".html").read_text()
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', html)
    for module, name in PUBLIC:
        assert f'id="{module.__name__}.{name}"' in "".join(
            path.read_text() for path in (tmp_path / "reference").glob("*.html")
        )
