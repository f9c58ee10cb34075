"""The documents name what exists: every function, config key, preset and room that they mention."""

from __future__ import annotations

import importlib
import re
import typing
from pathlib import Path
from typing import Any

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


def names(text: str) -> list[str]:
    """Dotted names in code marks, file names left out."""
    found = dict.fromkeys(DOTTED.findall(text))
    return [name for name in found if not name.endswith((".py", ".md", ".toml"))]


def is_python_name(name: str) -> bool:
    """Whether `diffusion.diffuse` or `nn.level.Level.encode` can be imported."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["matryoshka_diffusion", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


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
    found = names(read(document))
    assert len(found) >= 5
    missing = [name for name in found if not is_python_name(name) and not is_config_key(name)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_in_the_documents_lead_to_what_they_are_called(document):
    links = re.findall(r"\[([^\]]+)\]\(([^)#\s]+)(?:#[^)]*)?\)", read(document))
    assert links
    for text, target in links:
        if "://" in target:
            continue
        path = (ROOT / "docs" / target).resolve()
        assert path.exists(), target
        if path.suffix == ".py" and text.startswith("`"):
            room = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            assert text.strip("`").startswith(room), (text, target)


def test_presets_in_the_documents_exist():
    found = set(re.findall(r"`((?:cc12m|imagenet|released)-[\w-]+)`", read("paper-to-code.md")))
    assert found
    assert found <= set(PRESETS)


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
