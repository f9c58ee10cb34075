"""Names of models, looked up without loading torch."""

from __future__ import annotations

from pathlib import Path

from matryoshka_diffusion.hints import did_you_mean


def shipped_models() -> dict[str, Path]:
    """Folders of the models inside the package, by name."""
    root = Path(__file__).with_name("shipped")
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model.safetensors"))}


def refuse_unknown(run: str | Path) -> None:
    """Raise FileNotFoundError unless `run` is a path that exists or the name of a shipped model."""
    shipped = shipped_models()
    if not Path(run).exists() and str(run) not in shipped:
        raise FileNotFoundError(
            f"{run}: no such folder, and no shipped model of that name"
            f"{did_you_mean(str(run), shipped) or ' (shipped: ' + ', '.join(shipped) + ')'}"
        )
