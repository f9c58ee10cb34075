"""Models with random weights that stand in for T5, CLIP and autoencoders in tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def make_t5(folder: Path, words: Sequence[str]) -> None:
    """Save a T5, as wide as the features of the small released network (24), and its tokenizer."""
    import transformers

    words = ("<pad>", "</s>", "<unk>", *words)
    config = transformers.T5Config(vocab_size=len(words), d_model=24, d_kv=4, d_ff=32, num_layers=2)
    _save(transformers.T5EncoderModel, config, folder)
    save_tokenizer(folder, words, pad_token="<pad>", eos_token="</s>")


def make_clip(folder: Path, words: Sequence[str]) -> None:
    """Save a CLIP for images of 32 pixels and captions of 8 tokens, and its tokenizer."""
    import transformers
    from tokenizers import processors

    words = ("<start>", "<end>", "<unk>", *words)
    layers = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 8, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**layers, **text, **tokens},
        vision_config={**layers, **vision},
        projection_dim=16,
        initializer_factor=10.0,
    )
    _save(transformers.CLIPModel, config, folder)
    processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    names = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    save_tokenizer(folder, words, processor, **names)


def make_vit(folder: Path, seed: int = 0) -> None:
    """Save a vision transformer for images of 16 pixels, with patches of 4."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    _save(transformers.ViTModel, config, folder, seed)


def make_codec(
    folder: Path, *, factor: int = 4, channels: int = 4, colours: int = 3, **settings: object
) -> None:
    """Save an autoencoder whose latents have 1 / `factor` of the side."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    kind: Any = AutoencoderKL  # its annotations ask for tuples of one
    steps = factor.bit_length()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(
            in_channels=colours,
            out_channels=colours,
            latent_channels=channels,
            block_out_channels=(8,) * steps,
            down_block_types=("DownEncoderBlock2D",) * steps,
            up_block_types=("UpDecoderBlock2D",) * steps,
            norm_num_groups=4,
            mid_block_add_attention=False,
            **{"scaling_factor": 2.0, **settings},
        ).save_pretrained(folder)


def _save(model: Any, config: Any, folder: Path, seed: int = 0) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model(config).save_pretrained(folder)


def save_tokenizer(folder: Path, words: Sequence[str], processor: Any = None, **names: str) -> None:
    """Save a tokenizer for which every word is a token."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if processor is not None:
        core.post_processor = processor
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", **names
    ).save_pretrained(folder)
