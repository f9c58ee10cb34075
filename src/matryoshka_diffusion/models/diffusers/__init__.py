"""Models in the forms of other libraries."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from matryoshka_diffusion.files import refuse_full, whole_folder
from matryoshka_diffusion.pipeline import Matryoshka


def write_diffusers(model: Matryoshka, folder: Path) -> None:
    """Write a folder that `MDMPipeline.from_pretrained` loads; see `export/pipeline.py`.

    It holds the network with the run's config and, if the model has text, the text encoder with
    its tokenizer. It appears whole or not at all.

    Raises:
        UsageError: the model is an upsampler, or one of codes or clips.
        MissingExtra: diffusers or transformers is not installed.
        ConfigError: the folder holds something already.
        OSError: it cannot be written, or the text encoder cannot be loaded.
    """
    from matryoshka_diffusion.models.diffusers.pipeline import MDMPipeline

    folder = folder.resolve()
    refuse_full(folder)
    pipe = MDMPipeline.from_matryoshka(model)
    try:
        with whole_folder(folder) as unfinished:
            pipe.save_pretrained(unfinished)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"cannot write {folder}: {error}") from error
