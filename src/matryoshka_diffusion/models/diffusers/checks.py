"""Whether the parts of a pipeline are whole and belong together; the libraries would only warn."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.models.diffusers.network import MDMNetwork
from matryoshka_diffusion.pipeline import Matryoshka


def check_drawn(model: Matryoshka) -> None:
    """Raise UsageError for a model that draws what a pipeline could not, or with what it lacks."""
    name, ours = model.config.name, "mdm export without --format diffusers"
    if model.config.model.coarse is not None:
        raise UsageError(f"{name} is an upsampler, for which diffusers has no form")
    if model.config.codec is not None:
        raise UsageError(
            f"{name} draws codes (codec.path), which MDMPipeline cannot decode; {ours} carries the "
            "codec along"
        )
    if model.resolutions[-1].frames is not None:
        raise UsageError(f"{name} draws clips, MDMPipeline only pictures; {ours} writes it")


def check_encoder(
    network: MDMNetwork,
    text_encoder: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raise ValueError unless there is a text encoder exactly where the network needs it."""
    text = network.net.config.text
    if text is None and (text_encoder is not None or tokenizer is not None):
        raise UsageError("this network takes no text: leave out text_encoder and tokenizer")
    if text is not None and (text_encoder is None or tokenizer is None):
        raise UsageError("this network takes text: it needs a text_encoder and its tokenizer")
    if text is not None and text_encoder is not None:
        width = text_encoder.config.hidden_size
        if width != text.features:
            raise UsageError(
                f"this network takes text features of {text.features} numbers; the text encoder "
                f"gives {width}"
            )


def check_complete(text_encoder: PreTrainedModel) -> None:
    """Refuse an encoder whose folder holds other weights: transformers fills gaps at random.

    Raises:
        ValueError: the first weight that is missing or of no use, and how many there are.
    """
    folder = Path(str(text_encoder.name_or_path))
    saved: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            saved.update(file.keys())
    state = text_encoder.state_dict(keep_vars=True)
    loaded = {id(state[name]) for name in saved & state.keys()}  # tied weights have several names
    missing = [f"{name} is missing" for name, weight in state.items() if id(weight) not in loaded]
    surplus = [f"{name} is not in the encoder" for name in sorted(saved - state.keys())]
    if problems := missing + surplus:
        raise ValueError(f"{folder}: {problems[0]}, one of {len(problems)} such weights")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose folder holds no words: transformers makes one that knows none.

    Raises:
        FileNotFoundError: names the files of which one is needed.
    """
    folder = Path(str(tokenizer.name_or_path))
    names = list(tokenizer.vocab_files_names.values())
    if not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"{folder}: there is no {' or '.join(names)}")
