"""Tests check every shape and type, and reach neither the network nor the user's cache.

The hook and the variable only count if they are set before anything else is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
install_import_hook("matryoshka_diffusion", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run; a shared machine is no reason to fail.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _deterministic() -> Iterator[None]:
    """One thread and deterministic algorithms: sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with random weights, as wide as the features of the small released network (24)."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "▁", "a", "blue", "jay", "red", "apple", "on", "the"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=len(words), d_model=24, d_kv=4, d_ff=32, num_layers=2
        )
        transformers.T5EncoderModel(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights for pictures of 32 pixels and captions of 8 tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    words = ["<start>", "<end>", "<unk>", "a", "blue", "jay", "red", "apple", "on", "the"]
    layers = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 8, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config={**layers, **text, **tokens},
            vision_config={**layers, **vision},
            projection_dim=16,
            initializer_factor=10.0,
        )
        transformers.CLIPModel(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_codec(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders of autoencoders with random weights, each once, by their settings."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    kind: Any = AutoencoderKL  # whose annotations ask for tuples of one
    folders: dict[str, Path] = {}

    def folder(*, factor: int = 4, channels: int = 4, colours: int = 3, **settings: object) -> Path:
        name = f"{factor}-{channels}-{colours}-{settings}"
        if name not in folders:
            steps = factor.bit_length()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = kind(
                    in_channels=colours,
                    out_channels=colours,
                    latent_channels=channels,
                    block_out_channels=(8,) * steps,
                    down_block_types=("DownEncoderBlock2D",) * steps,
                    up_block_types=("UpDecoderBlock2D",) * steps,
                    norm_num_groups=4,
                    mid_block_add_attention=False,
                    **{"scaling_factor": 2.0, **settings},
                )
            folders[name] = tmp_path_factory.mktemp("codec")
            model.save_pretrained(folders[name])
        return folders[name]

    return folder
