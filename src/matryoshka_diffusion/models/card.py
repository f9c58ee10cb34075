"""The card of a model that is shared: `README.md`, which the Hugging Face hub shows and indexes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.models.names import is_hub_id
from matryoshka_diffusion.training.weights import fingerprint

CARD, RESULTS = "README.md", Path("eval", "results.jsonl")
"""The card in a shared folder, and the figures in a run's."""
Form = Literal["mdm", "diffusers", "peft"]
_FOLDERS = re.compile(r"(?<![\w:/])(hf:)?[~.]*/(?:\S*/)?")
"""Folders before the last part of a path; addresses and ids of the hub have no such begin."""


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation."""

    key: str  # such as "fid"
    metric: str  # with protocol and remarks
    value: float
    error: float | None
    n: int
    reference: str


def read_figures(run: Path, weights: Mapping[str, Tensor]) -> tuple[Figure, ...]:
    """The newest figures of each metric that were measured in a run with these weights.

    A line that no evaluation has written is passed over.
    """
    file = run / RESULTS
    if not file.is_file():
        return ()
    own = fingerprint({name: value.float() for name, value in weights.items()})
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    figures = [figure for line in lines if (figure := _figure(line, own)) is not None]
    return tuple({figure.metric: figure for figure in figures}.values())


def _figure(line: str, weights: str) -> Figure | None:
    """The figure in a line, if it is one of the weights with this hash."""
    try:
        entry = json.loads(line)
        if entry["weights"] != weights or not math.isfinite(entry["value"]):
            return None
        fields: dict[str, Any] = {name: entry[name] for name in Figure.__dataclass_fields__}
        fields |= {name: _shareable(str(entry[name])) for name in ("metric", "reference")}
        return Figure(**fields)
    except (ValueError, TypeError, LookupError, RecursionError):  # cut by a crash
        return None


def _shareable(text: str) -> str:
    """Text of a table's cell without folders of this computer: of a path the last part stays."""
    return _FOLDERS.sub(r"\1", " ".join(text.split())).replace("|", "\\|")


def write_card(folder: Path, card: str) -> None:
    """Write the card into a folder."""
    write_atomically(folder / CARD, lambda file: file.write(card.encode()))


def model_card(
    config: RunConfig,
    *,
    form: Form = "mdm",
    repository: str | None = None,
    license: str | None = None,
    figures: Sequence[Figure] = (),
) -> str:
    """Text of the card: header for machines, use, training, attribution and figures.

    Args:
        config: as it is shared, without paths of this computer.
        form: what lies beside the card.
        repository: its id on the hub; without one the card names the folder it is in.
        license: identifier as the hub spells it, such as cc-by-4.0.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # slow to import

    base = config.train.init if config.train.init and is_hub_id(config.train.init) else None
    task = _task(config)
    # The hub needs a task for figures, and has none for some models.
    measured = [
        EvalResult(
            task_type=task,
            dataset_type=config.data.source,
            dataset_name=figure.reference or config.data.source,
            metric_type=figure.key,
            metric_name=figure.metric,
            metric_value=figure.value,
        )
        for figure in figures
        if task is not None
    ]
    tags = ["matryoshka-diffusion", "diffusion", *(["lora"] if form == "peft" else [])]
    data = ModelCardData(
        library_name="peft" if form == "peft" else "matryoshka-diffusion",
        pipeline_tag=task,
        tags=tags,
        license=license,
        base_model=base,
        base_model_relation=base and ("adapter" if form == "peft" else "finetune"),
        model_name=config.name,
        eval_results=measured or None,
    )
    text = (
        f"# {config.name}\n\n{_about(config, form)}\n\n## Use\n\n{_use(config, form, repository)}"
    )
    text += f"\n\n## Training\n\n{_training(config, license)}\n"
    if figures:
        rows = [
            f"| {one.metric} | {_value(one)} | {one.n:,} | {one.reference} |" for one in figures
        ]
        text += "\n## Figures\n\n| metric | value | samples | reference |\n|---|---|---|---|\n"
        text += "\n".join(rows) + "\n"
    if not measured:
        data.pop("model_name")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _task(config: RunConfig) -> str | None:
    """The hub's name of what the model does; it has none for clips without text."""
    clips = config.model.levels[-1].frames is not None
    if config.model.text:
        return f"text-to-{'video' if clips else 'image'}"
    return None if clips else "unconditional-image-generation"


def _nouns(config: RunConfig) -> tuple[str, str]:
    """The words for one sample and for several."""
    return ("image", "images") if config.model.levels[-1].frames is None else ("clip", "clips")


def _about(config: RunConfig, form: Form) -> str:
    model, (one, _) = config.model, _nouns(config)
    kind = "A [Matryoshka diffusion model](https://arxiv.org/abs/2310.15111)"
    if form == "peft":
        kind = (
            "Adapters (LoRA) for a [Matryoshka diffusion model](https://arxiv.org/abs/2310.15111)"
        )
    condition = "a text" if model.text else "a class" if model.classes else "nothing"
    sides = ", ".join(level.size for level in model.levels[model.hidden :])
    return (
        f"{kind}: one network\ndenoises every {one} at the sides {sides} at once. It is "
        f"conditioned on {condition}."
    )


def _use(config: RunConfig, form: Form, repository: str | None) -> str:
    """Code that draws with the model."""
    place, (_, many) = repository or "this-folder", _nouns(config)
    model = config.model
    call = '"a prompt", ' if model.text else "classes=0, " if model.classes else ""
    word = "-p TEXT " if model.text else "--class 0 " if model.classes else ""
    if form == "diffusers":
        calls = {'"a prompt", ': '"a prompt"', "classes=0, ": "class_labels=0"}.get(call, "")
        return (
            "```python\nfrom matryoshka_diffusion import MDMPipeline\n\n"
            f'pipe = MDMPipeline.from_pretrained("{place}")\nimage = pipe({calls}).images[0]\n```'
        )
    load, lora = f'from_pretrained("{place}")', f"{place} "
    if form == "peft":
        load, lora = f'load("MODEL", adapters={{"{place}": 1.0}})', f"MODEL --lora {place} "
    result = f"pictures  # uint8, ({many}, height, width, channels)"
    if many == "clips":
        result = "videos  # uint8, (clips, frames, height, width, channels)"
    return (
        "```python\nfrom matryoshka_diffusion import Matryoshka\n\n"
        f"model = Matryoshka.{load}\nsamples = model.sample({call}n=4)\n"
        f"samples.{result}; samples.levels holds all sides\n```\n\n"
        f"On the command line: `mdm sample {lora}{word}-n 4`."
    )


def _training(config: RunConfig, license: str | None) -> str:
    """The data, its owners, and what only the person who trained the model can add."""
    _, many = _nouns(config)
    origin = "Converted from the checkpoint of the paper's release."
    if not config.name.startswith("released-"):
        base = f", from the weights of `{config.train.init}`" if config.train.init else ""
        if config.train.lora is not None:
            base += f", around the weights with the hash `{config.train.lora.base[:16]}`"
        origin = (
            f"Trained on {config.train.images:,} {many} of the source `{config.data.source}`, each "
            f"counted as\noften as it was seen{base}."
        )
    if config.attribution is not None:
        origin += f"\n\n{config.attribution}"
    missing = "" if license else "under which licence it may be used, "
    return (
        f"{origin}\n\nWhat the {many} show, whom they belong to, {missing}and what the model must "
        "not be used for, only\nthe person who trained it can say: please do, here."
    )


def _value(figure: Figure) -> str:
    error = "" if figure.error is None else f" ± {figure.error:.2g}"
    return f"{figure.value:.4g}{error}"
