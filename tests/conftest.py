"""Tests check every shape and type, and reach neither the network nor the user's cache.

The hook and the variable only count if they are set before anything else is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
install_import_hook("matryoshka_diffusion", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from tiny_models import make_clip, make_codec, make_t5  # noqa: E402

collect_ignore = ["device_contracts.py"]  # a process of its own (test_devices.py)
WORDS = ("a", "blue", "jay", "red", "apple", "on", "the")
"""The words that the tokenizers of `tiny_t5` and `tiny_clip` know."""

# The same examples in every run; a shared machine is no reason to fail.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _deterministic() -> Iterator[None]:
    """One thread and deterministic algorithms: sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a T5 with random weights."""
    folder = tmp_path_factory.mktemp("t5")
    make_t5(folder, ("▁", *WORDS))
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    make_clip(folder, WORDS)
    return folder


@pytest.fixture(scope="session")
def tiny_codec(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of autoencoders with random weights, each made once for its settings."""
    folders: dict[str, Path] = {}

    def folder(**settings: Any) -> Path:
        if (name := str(settings)) not in folders:
            folders[name] = tmp_path_factory.mktemp("codec")
            make_codec(folders[name], **settings)
        return folders[name]

    return folder
