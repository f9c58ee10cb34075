"""The documents name what exists: every function, config key, preset and room that they mention."""

from __future__ import annotations

import pkgutil
import re
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.presets import PRESETS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "matryoshka_diffusion"
DOCUMENTS = ("design.md", "method.md", "paper-to-code.md")
DOTTED = re.compile(r"`([a-z][a-z_]*(?:\.\w+)+)`")


def read(document: str) -> str:
    return (ROOT / "docs" / document).read_text(encoding="utf-8")


def is_python_name(name: str) -> bool:
    """Whether `diffusion.diffuse` or `nn.level.Level.encode` can be imported."""
    try:
        pkgutil.resolve_name(f"matryoshka_diffusion.{name}")
    except (ImportError, AttributeError):
        return False
    return True


def is_config_key(name: str, model: type[BaseModel] = RunConfig) -> bool:
    """Whether `model.text.layers` is a path into a `RunConfig`."""
    first, _, rest = name.partition(".")
    if first not in model.model_fields:
        return False
    annotation = model.model_fields[first].annotation
    inner = [annotation, *typing.get_args(annotation)]
    models = [part for part in inner if isinstance(part, type) and issubclass(part, BaseModel)]
    return not rest or any(is_config_key(rest, part) for part in models)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_the_documents_exist(document):
    dotted = set(DOTTED.findall(read(document)))
    names = [name for name in dotted if not name.endswith((".py", ".md", ".toml"))]
    assert len(names) >= 5
    assert not [name for name in names if not is_python_name(name) and not is_config_key(name)]


def test_links_to_modules_lead_to_what_they_are_called():
    text = "".join(map(read, DOCUMENTS))
    links = re.findall(r"\[`([^`\]]+)`\]\(([^)#:\s]+\.py)(?:#[^)]*)?\)", text)
    assert len(links) > 20
    for name, target in links:  # test_docs checks that the file exists
        path = (ROOT / "docs" / target).resolve()
        assert name.startswith(".".join(path.relative_to(PACKAGE).with_suffix("").parts)), target


def test_presets_in_the_documents_exist():
    names = set(re.findall(r"`((?:cc12m|imagenet|released)-[\w-]+)`", read("paper-to-code.md")))
    assert names
    assert names <= set(PRESETS)


def test_the_tests_that_show_the_promises_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", read("promises.md"))
    assert len(named) > 40
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text("utf-8"), (file, test)


def test_every_room_is_described():
    text = read("design.md")
    files = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    folders = [f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")]
    assert not [room for room in (*files, *folders) if f"`{room}`" not in text]


def test_the_layers_in_the_design_are_those_that_are_enforced():
    block = re.search(r"\nlayers = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert block
    layers = "\n".join(f"    {layer}" for layer in re.findall(r'"([^"]+)"', block[1]))
    assert layers in read("design.md")


def test_what_does_not_exist_is_noticed():
    assert not is_python_name("diffusion.refuse")
    assert not is_python_name("diffusions.diffuse")
    assert not is_config_key("model.text.depth")
