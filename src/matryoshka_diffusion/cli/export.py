"""The command export: a model in a form for sharing or for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matryoshka_diffusion.cli.models import sampling_command
from matryoshka_diffusion.cli.options import (
    DTYPES,
    MODEL,
    MODEL_FOLDER,
    adapters,
    add_command,
    add_shared,
    guidance_weights,
    positive,
    sampling,
)
from matryoshka_diffusion.cli.terminal import show
from matryoshka_diffusion.models.names import refuse_unknown

STORED = {"mdm": DTYPES, "diffusers": ("fp32",), "onnx": ("fp32", "fp16"), "peft": DTYPES}
"""Formats of an export, and the types of weights that each stores."""


def export(options: argparse.Namespace) -> None:
    refuse_unknown(options.model)
    _refuse_other_formats(options)
    from matryoshka_diffusion.models.save import export_adapters, export_model

    if options.format == "diffusers":
        from matryoshka_diffusion.files import refuse_full
        from matryoshka_diffusion.models.diffusers import write_diffusers
        from matryoshka_diffusion.pipeline import Matryoshka

        refuse_full(options.out)
        model = Matryoshka.load(
            options.model,
            text_encoder=options.text_encoder,
            adapters=adapters(options),
            device="cpu",
        )
        write_diffusers(model, options.out, license=options.license)
        show(f"{options.out}: matryoshka_diffusion.MDMPipeline.from_pretrained loads it")
    elif options.format == "onnx":
        _export_onnx(options)
    elif options.format == "peft":
        export_adapters(options.model, options.out, options.dtype, license=options.license)
        show(f"{options.out}: mdm sample MODEL --lora {options.out} and peft load it")
    else:
        config = export_model(
            *(options.model, options.out, options.dtype, options.text_encoder),
            adapters=adapters(options),
            license=options.license,
        )
        show(f"{options.out}: {sampling_command(options.out, config)} draws with it")


def _refuse_other_formats(options: argparse.Namespace) -> None:
    """Raise UsageError for an option that the format of an export has no use for."""
    from matryoshka_diffusion.config import UsageError

    form = options.format
    if options.dtype not in STORED[form]:
        raise UsageError(f"--dtype {options.dtype}: {form} takes {', '.join(STORED[form])}")
    for name, option in (("captions", "captions"), ("steps", "steps"), ("guidance", "cfg")):
        if form != "onnx" and getattr(options, name) is not None:
            raise UsageError(f"--{option} is for --format onnx: omit it")
    if form == "onnx" and options.license is not None:
        raise UsageError("--license is for the card, which --format onnx does not write: omit it")
    for name, option in (("lora", "lora"), ("text_encoder", "text-encoder")):
        if form == "peft" and getattr(options, name):
            raise UsageError(f"--{option} is not for --format peft, which writes adapters: omit it")


def _export_onnx(options: argparse.Namespace) -> None:
    """Write graphs, weights, stored captions and a sampler in numpy."""
    from matryoshka_diffusion.models.onnx import export_onnx
    from matryoshka_diffusion.pipeline import Matryoshka

    place: Any = {"device": "cpu", "precision": "fp32", "adapters": adapters(options)}
    model = Matryoshka.load(options.model, text_encoder=options.text_encoder, **place)
    captions = options.captions.read_text("utf-8").splitlines() if options.captions else ()
    settings = sampling(options)
    export_onnx(model, options.out, captions=captions, dtype=options.dtype, **settings)
    show(f"{options.out}: python {options.out / 'sample.py'} draws with numpy and onnxruntime")


def add_commands(commands: Any) -> None:
    """Add the command of this module to the parser."""
    text = "write a model for sharing, for diffusers or as ONNX, or adapters for peft"
    command = add_command(commands, "export", export, text)
    command.add_argument("model", metavar="RUN", help=MODEL)
    command.add_argument("-o", "--out", **MODEL_FOLDER)
    add = command.add_argument
    add("--format", choices=[*STORED], default="mdm", help="for mdm (the default) or others")
    text = "of stored weights (fp32); bf16 is for mdm and peft, fp16 for onnx"
    add("--dtype", choices=(*DTYPES, "fp16"), default="fp32", help=text)
    add("--captions", type=Path, metavar="FILE", help="onnx: prompts whose features are stored")
    add("--steps", type=positive, metavar="N", help="onnx: sampler steps (the model's own)")
    text = "onnx: guidance weight for all levels, or one for each level, coarse to fine"
    add("--cfg", type=guidance_weights, dest="guidance", metavar="W[,W...]", help=text)
    text = "licence on the card (README.md), as the Hugging Face hub spells it: cc-by-4.0, ..."
    add("--license", metavar="ID", help=text)
    add_shared(command, "--lora", "--text-encoder")
