"""Inputs of a step besides the weights: images, times, noise, conditions."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.conditioning import AUGMENT_NUMBERS, Conditioning, pad
from matryoshka_diffusion.config import CoarseConfig, RunConfig
from matryoshka_diffusion.configfile import to_yaml
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.diffusion import augment_coarse
from matryoshka_diffusion.philox import send
from matryoshka_diffusion.pyramid import (
    Pyramid,
    Resolution,
    build_pyramid,
    down_sample,
    ragged,
    resolution_of,
    resolutions_of,
)
from matryoshka_diffusion.rng import normal, stratified, uniform
from matryoshka_diffusion.schedule import build_schedules, wakes_at
from matryoshka_diffusion.training.distributed import ALONE, RanksDiffer, World
from matryoshka_diffusion.training.stages import Step

Encode = Callable[[Sequence[str]], list[Tensor]]
"""Captions -> the features of each caption's tokens, (n, d)."""


@runtime_checkable
class Batches(Protocol):
    """Source of the samples with given global numbers, such as `data.loader.Loader`.

    The images of a batch have one shape, of which `shape_of` is the number, known without reading
    them. A subclass inherits that of images that are all alike.
    """

    def batch(self, ids: Sequence[int]) -> Batch: ...

    def shape_of(self, n: int) -> int:
        return 0


@dataclass(frozen=True)
class Inputs:
    """Arguments of the loss for a rank's images of one shape in one step.

    `x` and `noise` may be ragged; everything else has a row for each sample. `ids` are global
    sample numbers and `keys` the source's names, for error reports. `count` is the number of these
    images on all ranks.
    """

    step: Step
    x: Pyramid
    noise: Pyramid
    t: Float[Tensor, " b"]
    cond: Conditioning
    ids: tuple[int, ...]
    keys: tuple[str, ...]
    count: int

    def rows(self, rows: slice) -> Inputs:
        """Take some of the rows, with their share of the finer levels."""
        x, noise = (tuple(level[rows] for level in levels) for levels in (self.x, self.noise))
        ids, keys, t, cond = self.ids[rows], self.keys[rows], self.t[rows], self.cond.rows(rows)
        return Inputs(self.step, x, noise, t, cond, ids, keys, self.count)

    def awaited(self, event: torch.cuda.Event | None) -> Inputs:
        """Let the current stream of a GPU wait for the event, and keep memory until its end."""
        if event is not None:
            stream = torch.cuda.current_stream(self.t.device)
            stream.wait_event(event)
            for x in (*self.x, *self.noise, self.t):
                x.record_stream(stream)
            self.cond.map(lambda x: x.record_stream(stream) or x)
        return self


def compare_ranks(
    world: World, config: RunConfig | CodecRunConfig, parts: Sequence[Inputs]
) -> None:
    """Raise RanksDiffer unless config and step are equal, samples and noise different.

    Two ranks with the same sample would count its gradient twice.
    """
    run = hashlib.sha256(f"{to_yaml(config)}{parts[0].step}".encode()).hexdigest()
    noise, ids = (z for part in parts for z in part.noise[0]), [n for x in parts for n in x.ids]
    digests = [hashlib.sha256(z.cpu().numpy().tobytes()).hexdigest() for z in noise]
    owner: dict[object, int] = {}
    for rank, (its_run, its_ids, its_noise) in enumerate(world.gather((run, ids, digests))):
        if rank == 0:
            run = its_run
        if its_run != run:
            raise RanksDiffer(
                f"rank {rank} was started with another config or checkpoint than rank 0: give "
                "every rank the same command and a run folder that all of them see"
            )
        for item in (*its_ids, *its_noise):
            if owner.setdefault(item, rank) != rank:
                raise RanksDiffer(
                    f"ranks {owner[item]} and {rank} were given the same sample or noise ({item}): "
                    "every rank needs a number of its own (RANK)"
                )


MakeInputs = Callable[[Step], Sequence[Inputs]]
"""A step -> its inputs, for each shape of images."""


class Feed:
    """Makes a rank's inputs of any step: a pure function of the run's seed, the step and the rank.

    Raises ValueError if a level is conditioned on something that the data does not have, or on
    text without an encoder.
    """

    def __init__(
        self,
        config: RunConfig,
        loader: Batches,
        encode: Encode | None = None,
        device: torch.device | str = "cpu",
        world: World = ALONE,
    ) -> None:
        self._config, self._loader, self._encode, self._device = config, loader, encode, device
        self._world, self._seed = world, config.train.seed
        self._schedules = build_schedules(config.model)
        self._floors = config.model.floors(config.train.wake)
        wakes = [*map(wakes_at, self._schedules, self._floors)]
        self._wakes = torch.tensor(wakes, dtype=torch.float64, device="cpu")
        self._micro = config.model.micro_names
        if unknown := self._micro - {"scale"}:
            raise ValueError(
                f"model.levels[].micro: the data has no {min(unknown)!r}, only 'scale', the side "
                "of the original image"
            )
        if config.model.text is not None and encode is None:
            raise ValueError("model.text is set, but training was given no text encoder")

    def __call__(self, step: Step) -> tuple[Inputs, ...]:
        """Return the inputs of `step` for this rank, on the device, for each shape of images.

        Samples with more levels come first. A rank may have no row of the finer levels, or none at
        all. It still walks through the network with its zero rows, so that every rank is at the
        same collective.
        """
        numbers, times, step = self._finest_first(step)
        alike: dict[int, list[int]] = {}
        for place, n in enumerate(numbers):
            alike.setdefault(self._loader.shape_of(n), []).append(place)
        return tuple(self._of_shape(places, numbers, times, step) for places in alike.values())

    def _of_shape(
        self, places: Sequence[int], numbers: Sequence[int], times: Tensor, step: Step
    ) -> Inputs:
        """The inputs of this rank among samples of one shape, at their places in the step."""
        mine = [place for place in places if place in self._world.mine(range(step.count))]
        count, places = len(places), mine or places[:1]
        ids = [numbers[place] for place in places]
        batch = self._loader.batch(ids)
        config, model = self._config, self._config.model.first(len(step.rows))
        # Finer levels hold the first rows of the step, hence the first of each rank's.
        rows = [sum(place < count for place in places) for count in step.rows]
        picture = batch.numbers(self._device)
        resolutions = resolutions_of(model)  # of squares, also of larger ones
        if config.data.shapes == "own":
            side = config.data_side // config.pixels_per_side  # of a square in the picture's place
            resolutions = resolutions_of(model, resolution_of(picture), side)
        features = None if batch.features is None else send(batch.features, self._device)
        x = ragged(build_pyramid(picture, resolutions, features), rows)
        noise = [self._noise("noise", ids[: len(level)], level, r) for r, level in enumerate(x)]
        inputs = Inputs(
            step=step,
            x=x,
            noise=tuple(noise),
            t=send(times[places].float(), self._device),
            cond=self._conditions(batch, picture).to(self._device),
            ids=tuple(batch.ids.tolist()),
            keys=batch.keys,
            count=count,
        )
        return inputs if mine else inputs.rows(slice(0))

    def _finest_first(self, step: Step) -> tuple[list[int], Float[Tensor, " b"], Step]:
        """The samples of a step in the order of their levels, their times, and their true rows.

        A sample has the levels that its place in the step gives it and that are awake at its time.
        Where shares of a mix give the levels, its time is drawn evenly where all of them are awake.
        """
        place = torch.arange(step.count, device="cpu")
        t = stratified(self._seed, "t", step.first + place)
        if self._config.train.stages[step.stage].mix:
            t = t * self._wakes[sum(place < count for count in step.rows) - 1]
        levels = torch.ones_like(place)
        for count, floor, schedule in [
            *zip(step.rows, self._floors, self._schedules, strict=False)
        ][1:]:
            levels += (place < count) & (schedule.log_snr(t) >= floor)
        order = levels.argsort(descending=True, stable=True)
        rows = tuple(int((levels > level).sum()) for level in range(len(step.rows)))
        return (step.first + order).tolist(), t[order], step._replace(rows=rows)

    def _noise(self, purpose: str, ids: Sequence[int], like: Tensor, *level: int) -> Tensor:
        """Normal noise in the shape of `like`, a row for each sample number."""
        places = [(self._seed, n, *level) for n in ids]
        return normal(purpose, places, tuple(like.shape[1:]), like.device)

    def _conditions(self, batch: Batch, picture: Float[Tensor, "b c *grid"]) -> Conditioning:
        """Labels, text and micro-conditions. Some rows are hidden, because guidance needs a null.

        A network without a learned null gets the empty caption in its place.
        """
        train, model, ids = self._config.train, self._config.model, batch.ids.tolist()
        dropped = uniform(self._seed, "condition-dropout", ids) < train.condition_dropout
        has_null = model.text is None or model.text.learned_null
        tokens = mask = None
        if self._encode is not None and model.text is not None:
            captions = [
                caption if has_null or not drop else ""
                for caption, drop in zip(batch.captions, dropped.tolist(), strict=True)
            ]
            tokens, mask = pad(self._encode(captions))
        image = image_t = None
        if model.coarse is not None:
            image, image_t = self._coarse(picture, ids, model.coarse)
        augment = batch.augment
        if model.augment and augment is None:  # all its weights are in use in every step
            augment = torch.zeros(len(batch.keys), AUGMENT_NUMBERS)
        return Conditioning(
            labels=self._labels(batch) if model.classes else None,
            tokens=tokens,
            mask=mask,
            micro=dict.fromkeys(self._micro, batch.original_side),
            augment=augment if model.augment else None,
            image=image,
            image_t=image_t,
            dropped=dropped if has_null else None,
        )

    def _coarse(
        self, picture: Float[Tensor, "b c h w"], ids: Sequence[int], coarse: CoarseConfig
    ) -> tuple[Float[Tensor, "b c y x"], Float[Tensor, " b"]]:
        """D^r of the image enlarged, under noise of a random time; both belong to the sample."""
        model = self._config.model
        side = model.levels[0].side
        like = torch.empty(0, model.channels, side, side, device=picture.device)
        t = coarse.max_noise * uniform(self._seed, "coarse-t", ids)
        small = down_sample(picture, Resolution(coarse.side, coarse.side))
        noise = self._noise("coarse-noise", ids, like)
        return augment_coarse(small, t, noise, build_schedules(model)[0]), t.float()

    def _labels(self, batch: Batch) -> Tensor:
        classes = self._config.model.classes
        known = 0 if batch.labels is None else int(batch.labels.max()) + 1
        if batch.labels is None or known > classes:
            number = f"at least {known}" if known else "none"
            raise ValueError(f"model.classes is {classes}, but the data has {number}")
        return batch.labels


class Beside:
    """Makes inputs in a thread of their own, and on a GPU in a stream beside the network's."""

    def __init__(self, inputs_of: MakeInputs, device: torch.device) -> None:
        self._inputs_of = inputs_of
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: Step) -> tuple[Sequence[Inputs], torch.cuda.Event | None]:
        """Return the inputs of a step, and the event of their being made on a GPU."""
        torch.set_num_threads(1)  # of this thread, so that the network keeps its own
        if self._stream is None:
            return self._inputs_of(step), None
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            inputs = self._inputs_of(step)
            event.record(self._stream)
        return inputs, event


def fetched(
    ahead: Iterator[tuple[Sequence[Inputs], torch.cuda.Event | None]],
) -> tuple[Sequence[Inputs], float, OSError | None]:
    """Next inputs, the seconds until they came, and the system's error in their place."""
    began = time.perf_counter()
    try:
        parts, event = next(ahead, ((), None))
        seconds = time.perf_counter() - began
        return [part.awaited(event) for part in parts], seconds, None
    except OSError as error:
        return (), 0.0, error
