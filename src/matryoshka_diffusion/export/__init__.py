"""Models in the forms of other libraries."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from safetensors import SafetensorError

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.pipeline import Matryoshka


def write_diffusers(model: Matryoshka, folder: Path) -> None:
    """Write a folder that `MDMPipeline.from_pretrained` loads; see `export/pipeline.py`.

    It holds the network with the run's config and, if the model has text, the text encoder with
    its tokenizer. It appears whole or not at all.

    Raises:
        UsageError: the model is an upsampler.
        MissingExtra: diffusers or transformers is not installed.
        FileExistsError: the folder holds something already.
        OSError: it cannot be written, or the text encoder cannot be loaded.
    """
    if model.config.model.coarse is not None:
        raise UsageError(f"{model.config.name} is an upsampler, for which diffusers has no form")
    from matryoshka_diffusion.export.pipeline import MDMPipeline

    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is no empty folder: name a new one")
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        MDMPipeline.from_matryoshka(model).save_pretrained(unfinished)
        if folder.exists():
            folder.rmdir()
        os.rename(unfinished, folder)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
