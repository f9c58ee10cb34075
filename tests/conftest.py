"""Tests check every shape and type, and reach neither the network nor the user's cache.

The hook and the variable only count if they are set before anything else is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
install_import_hook("matryoshka_diffusion", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

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
