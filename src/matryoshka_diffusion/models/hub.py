"""Models on the Hugging Face hub: fetching one, and sharing one with a card that explains it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor

from matryoshka_diffusion.codec import folder as codecs
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.train.checkpoint import export_weights

FILES = ("model.safetensors", "config.json", *(f"{codecs.OWN}/{name}" for name in codecs.FILES))
PAPER = "https://arxiv.org/abs/2310.15111"


def download(repository: str, revision: str | None = None) -> Path:
    """The folder of a model on the hub, fetched once into the hub's own cache.

    Raises:
        OSError: it cannot be had; names the repository and the reason.
    """
    import huggingface_hub as hub  # slow to load, and seldom needed

    try:
        folder = hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise OSError(
            f"{repository}: no folder here, no shipped model, and the hub does not give it "
            f"({' '.join(str(error).split())})"
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
    """Upload weights, config and a model card; returns the address. The repository may exist.

    A codec goes along. Paths of this computer are not shared: the data's is left out, and so is a
    text encoder's that is a local folder, with a warning.
    """
    import huggingface_hub as hub

    shared = without_paths(config)
    if shared.encoder != config.encoder and config.encoder is not None:
        warnings.warn(
            f"the text encoder {config.encoder.path} is a local folder and is not uploaded: "
            "whoever loads the model must name one (--text-encoder, text_encoder=)",
            stacklevel=3,
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codecs.carry_codec(config, folder)
        export_weights(folder, weights, shared, dtype=dtype)
        card = model_card(shared, repository, license=license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        api = hub.HfApi(token=token)
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload {config.name}"
        )
    return str(address)


def without_paths(config: RunConfig) -> RunConfig:
    """The config without folders of this computer, which nobody else has or should see."""
    data = config.data.model_copy(update={"path": None})
    train = config.train
    if train.init is not None and _is_here(train.init):
        train = train.model_copy(update={"init": None})
    encoder = config.encoder
    if encoder is not None and encoder.path is not None and _is_here(encoder.path):
        encoder = encoder.model_copy(update={"path": None})
    codec = config.codec
    if codec is not None:
        codec = codec.model_copy(update={"path": None})
    update = {"data": data, "codec": codec, "encoder": encoder, "train": train}
    return without_base(config.model_copy(update=update))


def without_base(config: RunConfig) -> RunConfig:
    """The config of an upsampler without a base that is a folder of this computer."""
    base = config.sampling.base
    if base is None or not _is_here(base.path):
        return config
    sampling = config.sampling.model_copy(update={"base": None})
    return config.model_copy(update={"sampling": sampling})


def _is_here(path: str) -> bool:
    return path.startswith(("/", "~", ".")) or Path(path).exists()


def model_card(config: RunConfig, repository: str, *, license: str | None = None) -> str:
    """The text of a repository's `README.md`: what the model is and how it is called."""
    model = config.model
    takes = "text" if model.text else "class" if model.classes else "nothing"
    clips = model.levels[-1].frames is not None
    task = _task(takes == "text", clips)
    header = {
        "library_name": "matryoshka-diffusion",
        **({"pipeline_tag": task} if task else {}),
        "tags": ["matryoshka-diffusion", "diffusion"],
        **({"license": license} if license else {}),
    }
    call = {
        "text": 'model.sample("a prompt", n=4)',
        "class": "model.sample(classes=0, n=4)",
        "nothing": "model.sample(n=4)",
    }[takes]
    one, many, result = (
        ("clip", "clips", "samples.videos  # uint8, (clips, frames, height, width, channels)")
        if clips
        else ("picture", "images", "samples.pictures  # uint8, (pictures, height, width, channels)")
    )
    origin = (
        "Converted from the checkpoint of the paper's release."
        if config.name.startswith("released-")
        else f"Trained on {config.train.images:,} {many} of the source `{config.data.source}` as "
        "`config.json`\nsays."
    )
    sides = ", ".join(level.size for level in model.levels)
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {config.name}

A [Matryoshka diffusion model]({PAPER}): one network denoises every {one} at the sides {sides}
at once. It is conditioned on {"nothing" if takes == "nothing" else f"a {takes}"}.

```python
from matryoshka_diffusion import Matryoshka

model = Matryoshka.from_pretrained("{repository}")
samples = {call}
{result}; samples.levels holds all sides
```

{origin} What the {one}s show, whom they belong to and what the model must not be used for, only
the person who trained it can say: please do, here.
"""


def _task(text: bool, clips: bool) -> str | None:
    """The hub's name for what a model does; it has none for clips of classes or of nothing."""
    if clips:
        return "text-to-video" if text else None
    return "text-to-image" if text else "unconditional-image-generation"
