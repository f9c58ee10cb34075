"""Names of models, looked up without loading torch."""

from __future__ import annotations

import re
from pathlib import Path

from matryoshka_diffusion.hints import did_you_mean


def shipped_models() -> dict[str, Path]:
    """Folders of the models inside the package, by name."""
    root = Path(__file__).with_name("shipped")
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model.safetensors"))}


def is_hub_id(run: str | Path) -> bool:
    """True for `owner/name` of a model on the Hugging Face hub.

    A path that exists takes precedence. If only the folder `owner` exists, `name` is a mistyped
    path in it: the hub is not asked.
    """
    owner, _, name = str(run).partition("/")
    words = all(re.fullmatch(r"\w[\w.-]*", word, re.ASCII) for word in (owner, name))
    return words and not Path(owner).exists()


def refuse_unknown(run: str | Path) -> None:
    """Raise FileNotFoundError unless `run` is a path, the name of a shipped model or a hub id.

    Whether the hub has the model is left to the download.
    """
    shipped = shipped_models()
    if not Path(run).exists() and str(run) not in shipped and not is_hub_id(run):
        raise FileNotFoundError(
            f"{run}: no such folder, and no shipped model of that name"
            f"{did_you_mean(str(run), shipped) or ' (shipped: ' + ', '.join(shipped) + ')'}"
        )
