"""`MDMPipeline`: a model of this project as any pipeline of the diffusers library.

It builds a `Matryoshka` around its components and lets that sample, so a seed gives the same
picture in both. Importing this file needs the extra `diffusers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor

from matryoshka_diffusion.files import require
from matryoshka_diffusion.models.diffusers.lockstep import lockstep
from matryoshka_diffusion.models.diffusers.pictures import FORMS, Pictures
from matryoshka_diffusion.models.diffusers.seeds import seeds_of
from matryoshka_diffusion.models.save import without_paths
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.samplers import State
from matryoshka_diffusion.text.encoder import HiddenStates, load_encoder
from matryoshka_diffusion.train.checkpoint import load_weights

for _package in ("diffusers", "transformers"):
    require(_package, "diffusers", "MDMPipeline")

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback  # noqa: E402
from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # noqa: E402
from diffusers.utils.outputs import BaseOutput  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

from matryoshka_diffusion.models.diffusers.checks import (  # noqa: E402
    check_complete,
    check_drawn,
    check_encoder,
    check_vocabulary,
)
from matryoshka_diffusion.models.diffusers.encoder import encoder_of  # noqa: E402
from matryoshka_diffusion.models.diffusers.network import CalledNest, MDMNetwork  # noqa: E402

StepCallback: TypeAlias = Callable[
    ["MDMPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None
]


@dataclass
class MDMPipelineOutput(BaseOutput):
    """Pictures of every level.

    Attributes:
        images: the finest level.
        levels: all levels, coarse to fine, each in the form of `images`.
    """

    images: Pictures
    levels: tuple[Pictures, ...]


class MDMPipeline(DiffusionPipeline):
    """Prompts or classes to pictures of every level.

    Example:
        >>> pipe = MDMPipeline.from_pretrained("folder")  # doctest: +SKIP
        >>> pipe("red apple", num_images_per_prompt=4).images[0].size  # doctest: +SKIP
        (64, 64)
    """

    model_cpu_offload_seq = "text_encoder->network"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "estimates"]

    def __init__(
        self,
        network: MDMNetwork,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Raises ValueError if a text encoder is missing, superfluous or of another width."""
        super().__init__()
        check_encoder(network, text_encoder, tokenizer)
        self.register_modules(network=network, text_encoder=text_encoder, tokenizer=tokenizer)
        self._interrupt = False
        self._num_timesteps = 0

    @classmethod
    def from_matryoshka(cls, model: Matryoshka) -> MDMPipeline:
        """A pipeline with a copy of a loaded model's network and with its text encoder.

        Raises:
            UsageError: the model is an upsampler, or one of codes or clips.
            OSError: the text encoder cannot be loaded.
        """
        check_drawn(model)
        config = without_paths(model.config)
        network = MDMNetwork(config.model_dump(mode="json"), len(model.net.levels))
        load_weights(network.net, model.net.state_dict(), where=model.config.name)
        network.eval()
        if model.config.encoder is None:
            return cls(network)
        encoder = load_encoder(model.config.encoder)
        assert isinstance(encoder, HiddenStates), "all encoders are transformers' own"
        return cls(network, encoder.model, encoder.tokenizer)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> MDMPipeline:
        """Load a folder that `write_diffusers` or `save_pretrained` wrote; only safetensors.

        `options` are those of `DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError: weights or components do not fit each other or are missing.
            OSError: a file is missing or damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():  # from the hub, diffusers takes no class of another library
            raise FileNotFoundError(
                f"{folder}: no such folder; what is on the hub has to be fetched before, as "
                "huggingface_hub.snapshot_download does"
            )
        try:
            pipe = super().from_pretrained(folder, **(options | {"use_safetensors": True}))
        except (RuntimeError, SafetensorError) as error:  # what transformers says about weights
            raise ValueError(f"cannot load {folder}: {' '.join(str(error).split())}") from error
        if pipe.text_encoder is not None and "text_encoder" not in options:
            check_complete(pipe.text_encoder)
        if pipe.tokenizer is not None and "tokenizer" not in options:
            check_vocabulary(pipe.tokenizer)
        return pipe

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the latest call."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: str | int | Sequence[str | int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> MDMPipelineOutput | tuple[Pictures, tuple[Pictures, ...]]:
        """Make `num_images_per_prompt` pictures for each prompt or class.

        What is None is as in the exported run.

        Args:
            class_labels: names or numbers, for a model of classes; all of them if None.
            guidance_scale: one number, or one for each level.
            negative_prompt: what guidance leads away from: one text, or one for each prompt.
            generator: see `seeds_of`. A picture depends on its seed, not on its batch.
            output_type: "pil"; "np" (n, h, w, c) or "pt" (n, c, h, w), both 0 to 1; or "latent".
            return_dict: False for a tuple (images, levels).
            callback_on_step_end: called after each step with the pipeline, the number of the step
                from 0, the time reached (1 noise, 0 picture) and the tensors asked for. It may
                return other `latents`, and set `_interrupt` of the pipeline to stop.
            callback_on_step_end_tensor_inputs: of "latents" and "estimates", the pictures as the
                network sees them at present; both are tuples of levels, coarse to fine.
            settings: more of `SamplingConfig`: sampler, grid, threshold, eta, guidance_interval,
                rescale.

        Raises:
            ValueError: something was asked for that the model cannot do.
            TypeError: a setting is given under a name that has another one here.
        """
        if output_type not in FORMS:
            raise ValueError(f"output_type {output_type!r}: there are {', '.join(FORMS)}")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_tensor_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        model = self._matryoshka()
        sampling = model.sampling(
            native_settings(settings, steps=num_inference_steps, guidance=guidance_scale)
        )
        check_prompts(prompt, negative_prompt, num_images_per_prompt)
        captions, cond = model.condition(prompt, class_labels, num_images_per_prompt)
        seeds = seeds_of(generator, len(captions))
        negative = for_each_row(negative_prompt, num_images_per_prompt)

        self._interrupt = False
        self._num_timesteps = sampling.steps
        state = None
        bar: Any = self.progress_bar(total=sampling.steps)  # pyright: ignore[reportCallIssue]
        with bar:
            for state in lockstep(model, cond, seeds, sampling, negative):
                bar.update()
                if callback_on_step_end is not None:
                    named = {"latents": state.z, "estimates": state.x}
                    asked = {name: named[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, state.step - 1, state.t, asked) or {}
                    replace_latents(state, returned.get("latents", state.z))
                if self._interrupt:  # set by the callback
                    break
        assert state is not None, "a config has at least one step"
        form, pixels = FORMS[output_type], model.config.data.pixels
        levels = tuple(form(z, pixels) for z in state.z)
        self.maybe_free_model_hooks()
        return MDMPipelineOutput(levels[-1], levels) if return_dict else (levels[-1], levels)

    def _matryoshka(self) -> Matryoshka:
        """The components as they are now, which samples."""
        network, device = self.network.eval(), self._execution_device
        config = network.run_config
        encoder = None
        if config.encoder is not None:
            encoder = encoder_of(config.encoder, self.text_encoder, self.tokenizer, device)
        return Matryoshka(CalledNest(network), config, encoder=encoder, device=device)


# --- what was asked for ------------------------------------------------------------------------


def native_settings(settings: Mapping[str, Any], **renamed: Any) -> dict[str, Any]:
    """Sampling settings by the names of `SamplingConfig`, those given as None left out.

    Raises:
        TypeError: `settings` has a name that is renamed in diffusers.
    """
    if twice := settings.keys() & renamed.keys():
        raise TypeError(
            f"{min(twice)} is no argument of the pipeline: diffusers says num_inference_steps and "
            "guidance_scale"
        )
    return {**settings, **{name: value for name, value in renamed.items() if value is not None}}


def check_prompts(
    prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None, copies: int
) -> None:
    """Raise ValueError if there is nothing to make, or negative prompts do not match prompts."""
    if copies < 1:
        raise ValueError(f"num_images_per_prompt is {copies}: ask for at least 1")
    prompts = [prompt] if prompt is None or isinstance(prompt, str) else prompt
    if not prompts:
        raise ValueError("prompt is an empty list")
    if negative is not None and not isinstance(negative, str) and len(negative) != len(prompts):
        raise ValueError(
            f"negative_prompt: {len(negative)} texts for {len(prompts)} prompts; give one text, "
            "or one for each prompt"
        )


def for_each_row(negative: str | Sequence[str] | None, copies: int) -> str | list[str] | None:
    """Negative prompts, if there are several, for each of the pictures."""
    if negative is None or isinstance(negative, str):
        return negative
    return [text for text in negative for _ in range(copies)]


def check_tensor_inputs(asked: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError if a callback asks for tensors that there are not."""
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: there is no {unknown[0]!r}, only "
            f"{' and '.join(known)}"
        )


def replace_latents(state: State, latents: Sequence[Tensor]) -> None:
    """Write a callback's latents into those that sampling goes on from.

    Raises:
        ValueError: they have other shapes.
    """
    shapes, found = ([tuple(z.shape) for z in pyramid] for pyramid in (state.z, latents))
    if shapes != found:
        raise ValueError(f"the callback's latents are of shapes {found}, the sampler's {shapes}")
    for own, new in zip(state.z, latents, strict=True):
        own.copy_(new)
