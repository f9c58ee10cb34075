"""Build the docs site: the pages of docs/ and a reference of every module, from its docstrings.

`python site/build.py` stages both under build/site/ and lets Zensical make html of them there. A
warning, such as a link to a page that is not there, is an error. The page that draws needs a
runtime from npm, once. The site is built without that page where npm does not have it.

Formulas become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from latex2mathml.converter import convert
from ruamel.yaml import YAML

from drawing import MissingRuntime, assemble

ROOT = Path(__file__).parent.parent
STAGE = ROOT / "build" / "site"
PACKAGE = "src/matryoshka_diffusion/"
DRAWING = "draw/index.html"
API = "Python API"
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([.,:;)]*)', re.DOTALL
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Write build/site/html/."""
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", STAGE / "docs")
    shutil.copyfile(ROOT / "site" / "site.css", STAGE / "docs" / "site.css")
    config = YAML(typ="safe").load(ROOT / "site" / "zensical.yml")
    try:
        assemble(STAGE / "docs" / "draw", ROOT / "build" / "draw")
        config["nav"].insert(1, {"Draw here": DRAWING})
    except MissingRuntime as error:
        sys.stderr.write(f"Built without the page that draws: {error}.\n")
    code: set[str] = set()
    for page in sorted((STAGE / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        code |= {match[3] for match in LINK.finditer(text) if is_code(match[3])}
        page.write_text(LINK.sub(inside, text), encoding="utf-8")
    for path in sorted(code):
        listing = (ROOT / path).read_text(encoding="utf-8")
        write(f"source/{path}", f"# {path}\n\n````python\n{listing}````\n")
    api = next(tab[API] for tab in config["nav"] if API in tab)
    api.append({"All modules": [*reference()]})
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT / "src")]
    YAML().dump(config, STAGE / "mkdocs.yml")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    build = subprocess.run(command, cwd=STAGE, check=False, text=True, stderr=subprocess.PIPE)
    sys.stderr.write(build.stderr)
    for page in (STAGE / "html").rglob("index.html"):
        text = page.read_text(encoding="utf-8")
        if 'class="arithmatex"' in text:
            page.write_text(FORMULA.sub(drawn, text), encoding="utf-8")
    # What the docstrings' reader finds wrong it only prints.
    sys.exit(build.returncode or "griffe:" in build.stderr)


def drawn(formula: re.Match[str]) -> str:
    """A formula of LaTeX as MathML, in one line with a full stop or comma after it."""
    kind = "block" if formula[1] == "div" else "inline"
    result = convert(html.unescape(formula[2]), display=kind)
    if "\\" in result:
        sys.exit(f"unknown command in the formula {formula[2]}")
    return f'<span class="formula">{result}{formula[3]}</span>' if formula[3] else result


def is_code(path: str) -> bool:
    """Whether a linked file is shown as a listing: code that is not in the package."""
    return path.endswith(".py") and not path.startswith(PACKAGE)


def inside(link: re.Match[str]) -> str:
    """A link out of docs/ as a link within the site; other files of the repository lose theirs."""
    image, words, path, anchor = link[1], link[2], link[3], link[4] or ""
    if path.startswith(PACKAGE) and path.endswith(".py"):
        module = path.removeprefix(PACKAGE)
        page = page_of(module)
        if anchor:
            anchor = f"#matryoshka_diffusion.{name_of(module)}.{anchor[1:]}"
    elif is_code(path):
        page = f"source/{path}"
    elif path == f"site/{DRAWING}" and (STAGE / "docs" / DRAWING).is_file():
        return f"{image}[{words}]({DRAWING})"
    else:
        page = "index.md" if path == "README.md" else ""
    target = page.removesuffix(".py").removesuffix(".md")
    return f"{image}[{words}]({target}.md{anchor})" if page else words


def page_of(module: str) -> str:
    """The page of a module, by its path in the package."""
    return f"reference/{module.replace('__init__', 'index')}"


def name_of(module: str) -> str:
    """The dotted name of a module, by its path in the package."""
    return module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def reference() -> Iterator[Mapping[str, str | list[dict[str, str]]]]:
    """Write a page for every module, and yield the navigation: the paper first, then the rooms."""
    rooms: dict[str, list[dict[str, str]]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        module = path.relative_to(ROOT / PACKAGE).as_posix()
        room = Path(module).parent.as_posix()
        if path.name == "__main__.py" or (path.name == "__init__.py" and not defines(path)):
            continue
        name = name_of(module)
        page = write(page_of(module), f"# `{name}`\n\n::: matryoshka_diffusion.{name}\n")
        rooms.setdefault(room, []).append({name.rpartition(".")[2]: page})
    yield from rooms.pop(".")
    yield from ({f"{room}/": pages} for room, pages in rooms.items())


def defines(path: Path) -> bool:
    """Whether a package's first file has functions of its own; the root's only names others'."""
    return path.parent != ROOT / PACKAGE and "\ndef " in path.read_text(encoding="utf-8")


def write(path: str, text: str) -> str:
    """Write a page for a file of the repository, and return its name within docs/."""
    page = STAGE / "docs" / Path(path).with_suffix(".md")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return page.relative_to(STAGE / "docs").as_posix()


if __name__ == "__main__":
    main()
