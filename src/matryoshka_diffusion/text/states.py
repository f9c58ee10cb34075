"""Hidden states of a transformers encoder, one row for each real token."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.files import require

_BATCH = 64
_PROBE = "Matryoshka: a doll in a doll, 3 levels deep."


class HiddenStates:
    """A frozen encoder and its tokenizer as a `TextEncoder`.

    `key` is made from the weights and the tokenizer themselves, so features in a cache belong to
    the model wherever it lies, and never to another one that took its place.

    The model is on `device` only while it encodes, because a large one would take the room that
    sampling needs; with `stay`, for encoding batch after batch, until `rest` is called. With
    `half` its weights are bf16, in half the memory. Several threads may call it.

    Raises:
        ConfigError: the model cannot take `max_tokens`.
        ValueError: the tokenizer gives an empty caption no token at all.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        max_tokens: int,
        *,
        device: torch.device | str = "cpu",
        half: bool = False,
        stay: bool = False,
    ) -> None:
        limit = getattr(model.config, "max_position_embeddings", max_tokens)
        if max_tokens > limit:
            raise ConfigError(f"encoder.max_tokens is {max_tokens}, but {name} takes {limit}")
        self.model = model.eval().requires_grad_(False).float()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.width: int = model.config.hidden_size
        if not self._tokens([""])["input_ids"].numel():
            raise ValueError(f"{name}: its tokenizer adds no end token, so '' has no token at all")
        self.key = f"{name}-{max_tokens}-{self._fingerprint()}"
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if half else torch.float32
        self._stay, self._told_of_cuts = stay, False
        self._one_at_a_time = threading.Lock()  # tokenizers cannot be shared between threads
        if half:
            self.model = self.model.bfloat16()
            self.key += "-bf16"

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]:
        """Features of each caption, at most `max_tokens` tokens, on the CPU in float32.

        Longer captions are cut, with one warning for all of them (for all calls with `stay`).
        """
        with self._one_at_a_time:
            self.model.to(self.device)
            try:
                batches = (captions[n : n + _BATCH] for n in range(0, len(captions), _BATCH))
                return [features for batch in batches for features in self._encode(list(batch))]
            finally:
                if not self._stay:
                    self.model.to("cpu")

    def rest(self) -> None:
        """Leave the device until the next call."""
        with self._one_at_a_time:
            self.model.to("cpu")

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """The tokens of each caption, up to one more than `max_tokens`: that one is cut off."""
        with self._one_at_a_time:
            return [min(len(self._longer(caption)), self.max_tokens + 1) for caption in captions]

    def _encode(self, captions: list[str]) -> list[Float[Tensor, "_ d"]]:
        tokens = self._tokens(captions)
        self._warn_of_cuts(captions, tokens["attention_mask"].sum(1).tolist())
        on_device = {name: value.to(self.device) for name, value in tokens.items()}
        states = self.model(**on_device).last_hidden_state.float().cpu()
        return [
            row[real].clone()
            for row, real in zip(states, tokens["attention_mask"].bool(), strict=True)
        ]

    def _tokens(self, captions: list[str]) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            captions,
            max_length=self.max_tokens,
            truncation=True,
            padding=True,
            return_tensors="pt",
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _longer(self, caption: str) -> list[int]:
        """The tokens of a caption, one more than are used at the most."""
        longest = self.max_tokens + 1
        return self.tokenizer(caption, max_length=longest, truncation=True)["input_ids"]

    def _warn_of_cuts(self, captions: Sequence[str], lengths: Sequence[int]) -> None:
        if self._stay and self._told_of_cuts:
            return
        full = [c for c, n in zip(captions, lengths, strict=True) if n == self.max_tokens]
        cut = [c for c in full if len(self._longer(c)) > self.max_tokens]
        if cut:
            self._told_of_cuts = True
            warnings.warn(
                f"{len(cut)} of {len(captions)} captions have more than {self.max_tokens} tokens "
                f"and were cut there, first {cut[0][:40]!r}...",
                stacklevel=4,
            )

    def _fingerprint(self) -> str:
        """A hash of the beginning of every weight and of how a sentence is cut into tokens."""
        state = hashlib.blake2b(digest_size=8)
        state.update(str(self._tokens([_PROBE])["input_ids"].tolist()).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            state.update(f"{name} {tuple(weight.shape)}".encode())
            state.update(weight.flatten()[:64].numpy().tobytes())
        return state.hexdigest()


def load_states(
    name: str,
    model_class: str,
    path: str,
    max_tokens: int,
    *,
    make: type[HiddenStates] = HiddenStates,
    device: torch.device | str = "cpu",
    half: bool = False,
    stay: bool = False,
) -> HiddenStates:
    """Load a model and its tokenizer from a folder or, unless HF_HUB_OFFLINE is set, the hub.

    Only safetensors are read and no code of the repository is run.

    Raises:
        MissingExtra: transformers is not installed.
        OSError: nothing usable at `path`, or weights that are not those of `model_class`.
    """
    transformers = require("transformers", "text", name)
    transformers.utils.logging.disable_progress_bar()  # a flash of a bar for local files
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"{path}: no such folder; {_remedy(name)}")
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder) if folder.is_dir() else path,
        "local_files_only": folder.is_dir(),
    }
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model, loading = getattr(transformers, model_class).from_pretrained(
            **source, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, LookupError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"cannot load {name} from {path}: {reason}; {_remedy(name)}") from error
    # transformers would go on with random weights; the pooler is not used here
    if missing := sorted(key for key in loading["missing_keys"] if "pooler" not in key):
        raise OSError(
            f"{path} is no {name} encoder: {len(missing)} weights are missing, "
            f"first {missing[0]}; {_remedy(name)}"
        )
    return make(name.lower(), model, tokenizer, max_tokens, device=device, half=half, stay=stay)


def _remedy(name: str) -> str:
    return (
        f"encoder.path takes a folder with {name}'s config.json, model.safetensors and "
        "tokenizer.json, or the id of such a model on the hub"
    )
