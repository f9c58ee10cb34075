"""Requests to the studio: what may be asked for, within which bounds, and settings of pictures."""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from PIL import ExifTags
from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError

from matryoshka_diffusion.config import GridName, SamplerName, Threshold
from matryoshka_diffusion.configfile import explain
from matryoshka_diffusion.data.image import PICTURES, judge, open_image, opened
from matryoshka_diffusion.draw.grid import SETTINGS_KEY
from matryoshka_diffusion.modelconfig import Count, Natural, Share, Strict

LARGEST_SEED = 2**53 - 1
"""The last whole number that JavaScript's numbers hold exactly."""
MOST_REPEATS = 8  # corrections of a step, and times that steps are taken
STRONGEST = 100.0  # weight of guidance, in either direction

_OPTION = re.compile(r" \(-[^)]*\)")  # such as " (--image)"


@dataclass(frozen=True)
class Limits:
    """Bounds of everything that a client may ask for or send.

    Attributes:
        prompt_bytes: of a prompt or negative prompt in UTF-8.
        steps: sampler steps.
        images: of one request; a model may draw fewer at a time.
        picture_bytes: of one picture that is sent.
        picture_pixels: of one picture that is sent.
        body_bytes: of a request.
        bodies_bytes: of all requests that are being read at one time.
        queue: requests that wait, of all clients.
        queue_of_client: requests that wait, of one client.
        queue_seconds: time that a request may wait.
        seconds: time that a drawing may take.
        read_seconds: time that a client may take to send a request, or to receive a line.
    """

    prompt_bytes: int = 1_000
    steps: int = 250
    images: int = 16
    picture_bytes: int = 6_000_000
    picture_pixels: int = 16_000_000
    body_bytes: int = 18_000_000
    bodies_bytes: int = 72_000_000
    queue: int = 32
    queue_of_client: int = 4
    queue_seconds: float = 600.0
    seconds: float = 300.0
    read_seconds: float = 30.0


class Refused(Exception):
    """A request that is not served: an HTTP status, a sentence, and the field it is about."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


def error_of(message: str, field: str | None = None) -> dict[str, Any]:
    """An error as JSON. Options of the command in the message are left out."""
    return {"error": {"message": _OPTION.sub("", message), "field": field}}


# --- what may be asked for -----------------------------------------------------------------------


def _decoded(text: Any) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError("send the file in base64") from error


def encoded(content: bytes) -> str:
    """Bytes in base64, as JSON carries them."""
    return base64.b64encode(content).decode()


File = Annotated[bytes, BeforeValidator(_decoded), PlainSerializer(encoded, when_used="json")]
Id = Annotated[str, Field(pattern=r"^[0-9]{1,3}$")]
Weight = Annotated[float, Field(ge=-STRONGEST, le=STRONGEST)]
Settings = dict[str, Any]
Body = TypeVar("Body", bound=Strict)

OF_SAMPLER = ("sampler", "steps", "grid", "guidance", "eta", "rescale")
OF_SAMPLER += ("guidance_interval", "threshold", "wake")
"""Settings of a drawing that `SamplingConfig` has, too; None is the model's own."""
OF_EDIT = ("until", "strength", "correct", "resample")
"""Numbers of an edit, as `Matryoshka.edit` takes them."""


class Draw(Strict):
    """A drawing: the conditions, the sampler, and the pictures that it edits.

    Sides of levels are in pixels.
    """

    model: Id
    prompt: str | None = None
    label: Natural | None = None
    negative: str | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    images: Count = 1
    sampler: SamplerName | None = None
    steps: Count | None = None
    grid: GridName | None = None
    guidance: Annotated[tuple[Weight, ...], Field(min_length=1)] | None = None
    eta: Share | None = None
    rescale: Share | None = None
    guidance_interval: tuple[float, float] | None = None
    threshold: Annotated[tuple[Threshold, ...], Field(min_length=1)] | None = None
    wake: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    keep: dict[Count, File] = Field(default={})  # by the side of the level that keeps it
    until: Share = 0.0
    image: File | None = None
    mask: File | None = None
    strength: Share | None = None
    correct: Annotated[int, Field(ge=0, le=MOST_REPEATS)] = 0
    resample: Annotated[int, Field(ge=1, le=MOST_REPEATS)] = 1

    @property
    def settings(self) -> Settings:
        """The settings of the sampler that differ from the model's own."""
        values = {name: getattr(self, name) for name in OF_SAMPLER}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def edits(self) -> bool:
        """True if pictures are given."""
        return bool(self.keep) or self.image is not None


class Dropped(Strict):
    """A picture whose settings are asked for."""

    picture: File


class AtLevel(Strict):
    """A picture that is brought to a level of a model, as training does it."""

    model: Id
    picture: File
    side: Count


def parsed(body: bytes | bytearray, kind: type[Body]) -> Body:
    """A request from JSON. Raises `Refused`, which names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        place = error.errors(include_url=False)[0]["loc"]
        field = str(place[0]) if place else None
        raise Refused(400, explain(error, kind), field) from error


def check_bounds(request: Draw, limits: Limits) -> None:
    """Raise `Refused` for a drawing that is too large whatever the model, or contradicts itself."""
    for name in ("prompt", "negative"):
        size = len((getattr(request, name) or "").encode())
        if size > limits.prompt_bytes:
            message = f"the {name} has {size:,} bytes: shorten it to {limits.prompt_bytes:,}"
            raise Refused(413, message, name)
    steps = request.steps or 0
    if steps > limits.steps:
        raise Refused(400, f"{steps:,} steps: take at most {limits.steps}", "steps")
    if request.image is None and (request.mask is not None or request.strength is not None):
        raise Refused(400, "a mask or a strength needs a picture to change: add one", "image")
    if request.image is not None and request.mask is None and request.strength is None:
        raise Refused(400, "a picture to change needs a mask or a strength: add one", "strength")
    if not request.keep and request.mask is None:
        for name, idle in (("correct", 0), ("resample", 1)):
            if getattr(request, name) != idle:
                raise Refused(400, f"{name} needs something to keep: a level or a mask", name)


def check_picture(content: bytes, field: str, limits: Limits) -> tuple[int, int]:
    """The width and height of a picture by its header.

    Raises:
        Refused: it is too large to be decoded.
        PictureError: it is no picture.
    """
    if len(content) > limits.picture_bytes:
        most = limits.picture_bytes // 10**6
        raise Refused(413, f"the picture has more than {most} MB: send a smaller one", field)
    with opened(content, PICTURES) as stream, open_image(stream) as image:
        judge(*image.size, max_pixels=limits.picture_pixels)
        return image.size


# --- settings in pictures ------------------------------------------------------------------------


def settings_in(content: bytes) -> Settings | None:
    """The settings that `draw` stores in its PNGs and animated WebPs; None if there are none.

    Raises:
        PictureError: it is no picture.
    """
    with opened(content, PICTURES) as stream, open_image(stream) as image:
        text = image.info.get(SETTINGS_KEY)
        described = image.getexif().get(ExifTags.Base.ImageDescription)
    try:
        if isinstance(text, str):
            found = json.loads(text)
        else:
            found = json.loads(described)[SETTINGS_KEY] if isinstance(described, str) else None
        json.dumps(found, ensure_ascii=False).encode()  # half a letter cannot be sent
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def described(record: Settings, model: Id, labels: tuple[str, ...] | None, name: str) -> Settings:
    """The request that draws the first sample of some metadata again, and its origin.

    Args:
        record: metadata of `mdm sample`, `mdm edit` or the studio. Of an edit, only the studio's
            holds the pictures.
        labels: names of the classes, for a model of classes.
        name: of the model.

    Raises:
        ValueError: values are missing or of another type.
    """
    try:
        caption, edit = record["captions"][0], record.get("edit") or {}
        condition = {"prompt": caption} if labels is None else {"label": labels.index(caption)}
        values = {"model": model, "seed": record["seeds"][0], **condition}
        values |= {name: record.get(name) for name in ("negative", *OF_SAMPLER)}
        if isinstance(edit.get("keep"), dict):
            values |= edit
        request = Draw.model_validate_json(json.dumps(values))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("these settings are not of a drawing") from error
    made = {"name": name, "version": str(record.get("version"))}
    return {**request.model_dump(mode="json"), **made}
