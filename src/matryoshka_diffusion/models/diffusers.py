"""`MDMPipeline`: a model of this project as a pipeline of the diffusers library.

The pipeline samples through a `DiffusionModel`, as `Matryoshka` does, so a seed gives the same
image in both. Importing this file needs the extra `diffusers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Float, Shaped
from safetensors import SafetensorError
from torch import Tensor

from matryoshka_diffusion.changes import edit_of
from matryoshka_diffusion.conditioning import Conditioning, pad
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.data.given import Given
from matryoshka_diffusion.files import refuse_full, require, whole_folder
from matryoshka_diffusion.models.card import model_card, write_card
from matryoshka_diffusion.models.hub import download
from matryoshka_diffusion.models.names import is_hub_id
from matryoshka_diffusion.models.pipeline_forms import FORMS, Images, in_form, seeds_of
from matryoshka_diffusion.models.prompt_embeds import (
    PromptEncoder,
    one_each,
    pipeline_encoder,
    texts_of,
)
from matryoshka_diffusion.models.save import without_paths
from matryoshka_diffusion.nn.nested import NestedUNet, present_name
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.samplers import State
from matryoshka_diffusion.sampling import DiffusionModel
from matryoshka_diffusion.tensorfile import check_folder
from matryoshka_diffusion.text.components import check_encoder, check_tokenizer
from matryoshka_diffusion.text.encoder import load_encoder
from matryoshka_diffusion.training.weights import load_weights

for _package in ("diffusers", "transformers"):
    require(_package, "diffusers", "MDMPipeline")

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback  # noqa: E402
from diffusers.configuration_utils import ConfigMixin, register_to_config  # noqa: E402
from diffusers.models.modeling_utils import ModelMixin  # noqa: E402
from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # noqa: E402
from diffusers.utils.outputs import BaseOutput  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

StepCallback: TypeAlias = Callable[
    ["MDMPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None
]
FILES = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
"""Files of a pipeline on the hub: settings, weights and tokenizers, no pickles and no code."""
OF_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""Options of diffusers that decide what is downloaded."""


def write_diffusers(model: DiffusionModel, folder: Path, *, license: str | None = None) -> None:
    """Write a folder that `MDMPipeline.from_pretrained` loads; it appears whole or not at all.

    A card for the hub lies beside the components.

    Raises:
        ConfigError: the folder holds something already.
        UsageError, OSError: as `MDMPipeline.from_model`, or the folder cannot be written.
    """
    folder = folder.resolve()
    refuse_full(folder)
    pipe = MDMPipeline.from_model(model)
    try:
        with whole_folder(folder) as unfinished:
            pipe.save_pretrained(unfinished)
            mode = (unfinished / "model_index.json").stat().st_mode
            for weights in unfinished.rglob("*.safetensors"):
                weights.chmod(mode)  # safetensors lets only the owner read
            card = model_card(pipe.network.run_config, form="diffusers", license=license)
            write_card(unfinished, card)
    except SafetensorError as error:  # raised on a full disk
        raise OSError(f"cannot write {folder}: {error}") from error


class MDMNetwork(ModelMixin, ConfigMixin):
    """A nest, `net`, with the resolved config of its run, `run_config`, as a model of diffusers."""

    @register_to_config
    def __init__(self, run: dict[str, Any], levels: int) -> None:
        """`run` is a `RunConfig` in JSON's types; the nest has the first `levels` of its levels."""
        super().__init__()
        self.run_config = from_dict(run, where="the network's config.json")
        self.net = NestedUNet(self.run_config.model.first(levels))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, **options: Any
    ) -> MDMNetwork:
        """Load as `ModelMixin.from_pretrained`; raise `ValueError` where diffusers would warn."""
        strict = {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **(options | strict))
        network, loading = loaded
        problems = {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys}
        if problems:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit its config: {problems}; it belongs "
                "to another config or version"
            )
        return network

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Tensor]) -> None:
        """Rename, in place, what version 0.1.0 exported: diffusers calls this before it loads."""
        for name in list(state_dict):
            state_dict[present_name(name)] = state_dict.pop(name)

    def forward(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        """Predict as `NestedUNet.forward`; weights of half precision run under autocast."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(z[0].device.type, self.dtype if half else None, enabled=half):
            return self.net(z, t, cond)


@dataclass
class MDMPipelineOutput(BaseOutput):
    """Images of the finest level, and of all `levels`, coarse to fine."""

    images: Images
    levels: tuple[Images, ...]


class MDMPipeline(DiffusionPipeline):
    """Prompts or classes to images of every level.

    Examples:
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
        """Without text encoder and tokenizer, prompts are features (`prompt_embeds`).

        Raises `ValueError` if an encoder is superfluous, of another width or without tokenizer.
        """
        super().__init__()
        text, parts = network.net.config.text, (text_encoder, tokenizer)
        if text is None and any(part is not None for part in parts):
            raise UsageError("this network takes no text: omit text_encoder and tokenizer")
        if len([part for part in parts if part is None]) == 1:
            raise UsageError("add both text_encoder and its tokenizer, or None for both")
        width = text_encoder and text_encoder.config.hidden_size
        if text is not None and width not in (None, text.features):
            raise UsageError(
                f"text_encoder gives {width} numbers, the network takes {text.features}"
            )
        self.register_modules(network=network, text_encoder=text_encoder, tokenizer=tokenizer)
        self._interrupt = False
        self.num_timesteps = 0  # steps of the latest call

    @classmethod
    def from_model(cls, model: DiffusionModel) -> MDMPipeline:
        """Make a pipeline with a copy of a model's network and with the text encoder it names.

        Raises:
            UsageError: the model is an upsampler, or one of latents or clips.
            OSError: the text encoder cannot be loaded.
        """
        config, net = model.config, model.net
        assert isinstance(net, NestedUNet), "a loaded model has one"
        for refused, kind in (
            (config.model.coarse is not None, "is an upsampler, for which diffusers has no form"),
            (config.codec is not None, "draws latents (codec.path), MDMPipeline only pixels"),
            (config.features is not None, "has a level of features, MDMPipeline only pixels"),
            (model.resolutions[-1].frames is not None, "draws clips, MDMPipeline only images"),
        ):
            if refused:
                raise UsageError(f"{config.name} {kind}: omit --format diffusers")
        network = MDMNetwork(without_paths(config).model_dump(mode="json"), len(model.model.levels))
        load_weights(network.net, net.state_dict(), where=config.name)
        network.eval()
        if config.encoder is None:
            return cls(network)
        encoder = load_encoder(config.encoder)
        return cls(network, encoder.model, encoder.tokenizer)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> MDMPipeline:
        """Load a folder that `write_diffusers` or `save_pretrained` wrote; only safetensors.

        `owner/name` is such a folder on the hub, which is downloaded once, unless it is one here.
        `options` are those of diffusers, among them `revision` and `token` for the hub.

        Raises:
            ValueError: weights or components do not fit each other or are missing.
            OSError: a file is missing or damaged, or the hub does not give the model.
        """
        folder = Path(pretrained_model_name_or_path)
        if is_hub_id(pretrained_model_name_or_path):
            where = {name: options.pop(name) for name in OF_HUB if name in options}
            folder = download(str(folder), files=FILES, **where)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, and no id of the hub (owner/name)")
        try:
            for part in folder.iterdir():
                check_folder(part)
            pipe = super().from_pretrained(folder, **(options | {"use_safetensors": True}))
        except (RuntimeError, TypeError, AttributeError, LookupError, SafetensorError) as error:
            raise ValueError(f"cannot load {folder}: {' '.join(str(error).split())}") from error
        for weight in pipe.network.parameters():
            # A file's weights may lie at addresses for which kernels sum in another order.
            weight.data = weight.data.clone()
        if pipe.text_encoder is not None and "text_encoder" not in options:
            check_encoder(pipe.text_encoder)
        if pipe.tokenizer is not None and "tokenizer" not in options:
            check_tokenizer(pipe.tokenizer)
        return pipe

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """Read `model_index.json`. The class of the network is this one, wherever it once lay."""
        config = super().load_config(*arguments, **options)
        index = config[0] if isinstance(config, tuple) else config
        if isinstance(index, dict) and all(index.get("network") or [None]):
            index["network"] = [MDMNetwork.__module__, MDMNetwork.__name__]
        return config

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: str | int | Sequence[str | int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Float[Tensor, "_ _ d"] | None = None,
        prompt_attention_mask: Shaped[Tensor, "_ _"] | None = None,
        negative_prompt_embeds: Float[Tensor, "_ _ d"] | None = None,
        negative_prompt_attention_mask: Shaped[Tensor, "_ _"] | None = None,
        image: Given | None = None,
        mask_image: Given | None = None,
        strength: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> MDMPipelineOutput | tuple[Images, tuple[Images, ...]]:
        """Draw `num_images_per_prompt` images for each prompt or class.

        Args (None is as in the exported run):
            class_labels: names or numbers, for a model of classes; by default all classes.
            height, width: the size of the finest images in pixels; by default a square.
            guidance_scale: one number, or one for each level.
            negative_prompt: what guidance leads away from: one text, or one for each prompt.
            prompt_embeds, negative_prompt_embeds: features in place of the texts, as
                `encode_prompt` returns them, with masks that are true for tokens and not padding.
            image: a picture to change, of any size; it needs `mask_image`, `strength` or both.
            mask_image: white where `image` is drawn anew (inpainting).
            strength: how much noise `image` begins under (image-to-image): 0 returns it.
            generator: see `seeds_of`. An image depends on its seed, not on its batch.
            output_type: "pil"; "np" (n, h, w, c) or "pt" (n, c, h, w), both 0 to 1; or "latent".
            return_dict: False for a tuple (images, levels).
            callback_on_step_end: called after each step with the pipeline, the step from 0, the
                time reached (1 noise, 0 image) and tensors by name. It may return other
                `latents`, and set `_interrupt` of the pipeline to stop.
            callback_on_step_end_tensor_inputs: names of those tensors, each a tuple of levels:
                `latents` are noisy, `estimates` of the clean images.
            settings: other keys of `SamplingConfig`: sampler, grid, eta, threshold, ...

        Raises:
            ValueError, TypeError: wrong arguments, or the model cannot do what they ask for.
        """
        if output_type not in FORMS:
            raise ValueError(f"output_type {output_type!r}: there are {', '.join(FORMS)}")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._refuse_unknown(settings, callback_on_step_end_tensor_inputs)
        values = {"steps": num_inference_steps, "guidance": guidance_scale}
        settings |= {name: value for name, value in values.items() if value is not None}
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}: set at least 1")

        encoder = self._encoder()
        given = (prompt_embeds, prompt_attention_mask)
        away = (negative_prompt_embeds, negative_prompt_attention_mask)
        texts = {"prompt": (prompt, *given), "negative_prompt": (negative_prompt, *away)}
        prompt, negative_prompt = texts_of(encoder, texts)
        model = self._model(encoder).sized(height, width)
        sampling = model.sampling(settings)
        captions, cond = model.condition(prompt, class_labels, num_images_per_prompt)
        negative = one_each(negative_prompt, len(captions), num_images_per_prompt)
        seeds = seeds_of(generator, len(captions))
        picture = {"image": image, "mask": mask_image, "strength": strength}
        edit = edit_of(model, None, keep={}, until=0.0, **picture)
        states = model.lockstep(cond, seeds, sampling, negative, edit.rows)
        names = callback_on_step_end_tensor_inputs
        z = self._last(states, sampling.steps, callback_on_step_end, names)
        levels = tuple(in_form(z_r, model.config.data.pixels, output_type) for z_r in z)
        self.maybe_free_model_hooks()
        return MDMPipelineOutput(levels[-1], levels) if return_dict else (levels[-1], levels)

    def _last(
        self,
        states: Iterator[State],
        steps: int,
        callback: StepCallback | None,
        names: Sequence[str],
    ) -> Pyramid:
        """The latents after the last step, or after that in which the callback interrupts."""
        self._interrupt, self.num_timesteps, state = False, steps, None
        bar: Any = self.progress_bar(total=steps)  # pyright: ignore[reportCallIssue]
        with bar:
            for state in states:
                bar.update()
                if callback is not None:
                    tensors = {"latents": state.z, "estimates": state.x}
                    chosen = {name: tensors[name] for name in names}
                    changes = callback(self, state.step - 1, state.t, chosen) or {}
                    replace_latents(state, changes.get("latents", state.z))
                if self._interrupt:  # set by the callback
                    break
        assert state is not None, "a config has at least one step"
        return state.z

    def _refuse_unknown(self, settings: Mapping[str, Any], tensors: Sequence[str]) -> None:
        """Raise if a setting has another name in a pipeline, or a callback's tensor none."""
        if unknown := {*tensors} - {*self._callback_tensor_inputs}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: there is no {unknown.pop()!r}, only latents "
                "and estimates"
            )
        for name, new in (("steps", "num_inference_steps"), ("guidance", "guidance_scale")):
            if name in settings:
                raise TypeError(f"{name} is no argument of the pipeline: use {new}")

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str]
    ) -> tuple[Float[Tensor, "n t d"], Bool[Tensor, "n t"]]:
        """Features of prompts, and a mask that is true for tokens and false for padding."""
        encoder = self._encoder()
        if encoder is None:
            raise UsageError("this network takes no text")
        embeds = pad(encoder([prompt] if isinstance(prompt, str) else [*prompt]))
        self.maybe_free_model_hooks()
        return embeds

    def _encoder(self) -> PromptEncoder | None:
        """The text encoder of the components as they are now; None for a network without text."""
        config, text = self.network.run_config.encoder, self.network.net.config.text
        if config is None or text is None:
            return None
        parts = (self.text_encoder, self.tokenizer, self._execution_device)
        return pipeline_encoder(config, text.features, *parts)

    def _model(self, encoder: PromptEncoder | None) -> DiffusionModel:
        """The model of the components as they are now."""
        network = self.network.eval()
        parts = (network, network.net.config, network.run_config)
        return DiffusionModel(*parts, encoder=encoder, device=self._execution_device)


def replace_latents(state: State, latents: Sequence[Tensor]) -> None:
    """Continue sampling from a callback's latents. Raises `ValueError` if the shapes differ."""
    shapes, new_shapes = ([tuple(z.shape) for z in pyramid] for pyramid in (state.z, latents))
    if shapes != new_shapes:
        raise ValueError(
            f"the callback's latents are of shapes {new_shapes}, the sampler's {shapes}"
        )
    for own, new in zip(state.z, latents, strict=True):
        own.copy_(new)
