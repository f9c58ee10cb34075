"""Download a model from the Hugging Face hub, or upload one with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka_diffusion import codec as codecs
from matryoshka_diffusion.config import RunConfig, UsageError
from matryoshka_diffusion.features import FILE
from matryoshka_diffusion.models import peft
from matryoshka_diffusion.models.card import model_card, write_card
from matryoshka_diffusion.models.names import is_hub_id
from matryoshka_diffusion.models.save import carry_frozen, shared_config
from matryoshka_diffusion.training.weights import LORA, MODEL, export_weights

FILES = (
    *(MODEL, LORA, "config.json", FILE, *(f"{codecs.OWN}/{name}" for name in codecs.FILES)),
    *(peft.SETTINGS, peft.WEIGHTS),
)
"""Files of a repository that a model or adapters need; no other file is downloaded."""


def download(
    repository: str, revision: str | None = None, *, files: Sequence[str] = FILES, **options: Any
) -> Path:
    """Fetch a model once into the hub's own cache; return its folder.

    `options` are those of `huggingface_hub.snapshot_download`.

    Raises:
        UsageError: the name is not one of the hub.
        OSError: the download fails; names the repository and the reason.
    """
    if not is_hub_id(repository):
        raise UsageError(f"{repository} is no model on the hub (owner/name): omit revision")
    import huggingface_hub as hub  # slow to import, and seldom needed

    # A proxy's error is of the HTTP library's type, from which the hub's own are derived.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    options |= {"revision": revision, "allow_patterns": [*files]}
    try:
        folder = hub.snapshot_download(repository, **options)
    except (HTTPError, OSError, ValueError) as error:
        raise OSError(
            f"{repository}: no folder here, no shipped model, and the hub does not give it "
            f"({' '.join(str(error).split())}): correct the name, or download it elsewhere (hf "
            "download) and name its folder"
        ) from error
    return Path(folder)


def push(
    weights: Mapping[str, Tensor],
    config: RunConfig,
    repository: str,
    *,
    dtype: torch.dtype = torch.float32,
    license: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload weights, config, frozen parts and a model card; return the repository's address.

    The repository may exist. Paths of this computer are left out: of the data, and of a text
    encoder in a local folder, which gives a warning.
    """
    import huggingface_hub as hub

    shared = shared_config(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        carry_frozen(config, folder)
        export_weights(folder, weights, shared, dtype=dtype)
        write_card(folder, model_card(shared, repository=repository, license=license))
        api = hub.HfApi(token=token)
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload {config.name}"
        )
    return str(address)
