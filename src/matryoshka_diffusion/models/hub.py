"""Download a model from the Hugging Face hub, or upload one with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from matryoshka_diffusion import codec as codecs
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.configfile import dump
from matryoshka_diffusion.features import FILE
from matryoshka_diffusion.models import peft
from matryoshka_diffusion.models.save import carry_frozen, shared_config
from matryoshka_diffusion.train.weights import LORA, MODEL, export_weights

FILES = (
    *(MODEL, LORA, "config.json", FILE, *(f"{codecs.OWN}/{name}" for name in codecs.FILES)),
    *(peft.SETTINGS, peft.WEIGHTS),
)
"""Files of a repository that a model or adapters need; no other file is downloaded."""


def download(repository: str, revision: str | None = None) -> Path:
    """Fetch a model once into the hub's own cache; return its folder.

    Raises:
        OSError: the download fails; names the repository and the reason.
    """
    import huggingface_hub as hub  # slow to import, and seldom needed

    try:
        folder = hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
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
        card = model_card(shared, repository, license=license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        api = hub.HfApi(token=token)
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload {config.name}"
        )
    return str(address)


CARD = """---
{header}
---

# {name}

A [Matryoshka diffusion model](https://arxiv.org/abs/2310.15111): one network
denoises every {one} at the sides {sides} at once. It is conditioned on {condition}.

```python
from matryoshka_diffusion import Matryoshka

model = Matryoshka.from_pretrained("{repository}")
samples = model.sample({call}n=4)
samples.{result}; samples.levels holds all sides
```

{origin} What the {one}s show, whom they belong to and what the model must not be used for, only
the person who trained it can say: please do, here.
"""


def model_card(config: RunConfig, repository: str, *, license: str | None = None) -> str:
    """Text of a repository's `README.md`: what the model is and how it is called."""
    model = config.model
    task, condition, call = None, "nothing", ""
    one, many = "image", "images"
    result = "pictures  # uint8, (images, height, width, channels)"
    clips = model.levels[-1].frames is not None
    if clips:
        one, many = "clip", "clips"
        result = "videos  # uint8, (clips, frames, height, width, channels)"
    if model.text:
        task, condition, call = f"text-to-{'video' if clips else 'image'}", "a text", '"a prompt", '
    elif model.classes:
        condition, call = "a class", "classes=0, "
    if task is None and not clips:  # the hub has no task for other clips
        task = "unconditional-image-generation"
    origin = "Converted from the checkpoint of the paper's release."
    if not config.name.startswith("released-"):
        origin = (
            f"Trained on {config.train.images:,} {many} of the source `{config.data.source}` as "
            "`config.json`\nsays."
        )
    header = {"library_name": "matryoshka-diffusion", "pipeline_tag": task}
    header |= {"tags": ["matryoshka-diffusion", "diffusion"], "license": license}
    return CARD.format(
        header=dump({name: value for name, value in header.items() if value}).strip(),
        name=config.name,
        one=one,
        sides=", ".join(level.size for level in model.levels[model.hidden :]),
        condition=condition,
        repository=repository,
        call=call,
        result=result,
        origin=origin,
    )
