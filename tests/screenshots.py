"""The pictures of docs/studio.md and docs/onnx.md: `python -m screenshots RUN`.

RUN is a run in training. The page that draws is that of `make site`.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from browsing import Page
from matryoshka_diffusion.studio.served import Served
from static_files import serving
from studio_server import running

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
WIDE, PHONE = (1200, 800), (390, 844)
LARGEST = 250_000  # bytes; a larger PNG gets a palette


def main(run: str) -> None:
    models = [Served(name, number) for number, name in enumerate(("openmoji", run))]
    with running(models) as port, tempfile.TemporaryDirectory() as profile:
        page = Page(f"http://127.0.0.1:{port}/", Path(profile))
        try:
            page.resize(*WIDE)
            page.open()
            _wide(page)
            _painting(page)
            _dark(page)
            _phone(page)
            _training(page)
        finally:
            page.close()
    browser()


def browser() -> None:
    """The page of the docs site that draws, with a painted apple."""
    with serving(ROOT / "build/site/html") as address, tempfile.TemporaryDirectory() as profile:
        page = Page(f"{address}draw/", Path(profile))
        try:
            page.resize(*WIDE)
            page.open()
            _draw(page, "red apple", 3)
            _paint(page, "#redraw", "browser")
        finally:
            page.close()


def _draw(page: Page, prompt: str, seed: int) -> None:
    page.write("#prompt", prompt)
    page.run("document.getElementById('seed').value = arguments[0]", seed)
    page.draws(lambda: page.click("#draw"))


def _wide(page: Page) -> None:
    for prompt, seed in (("umbrella", 4), ("sailboat", 3), ("cat face", 3), ("teddy bear", 3)):
        _draw(page, prompt, seed)
    _draw(page, "red apple", 3)
    _save(page, "studio-wide")


def _painting(page: Page) -> None:
    page.write("#guidance", 1)
    _paint(page, "#redraw-others", "studio-painting")
    page.click("#leave")
    page.write("#guidance", 3)


def _paint(page: Page, redraw: str, name: str) -> None:
    """A red apple is painted blue on its 16-pixel level, and the others follow."""
    page.click("#levels li:nth-child(1) button")
    for row in range(5, 13):
        inset = 4.5 if row in (5, 12) else 3.5
        page.stroke(0, (inset / 16, (row + 0.5) / 16), (1 - inset / 16, (row + 0.5) / 16))
    page.draws(lambda: page.click(redraw))
    _save(page, name)


def _dark(page: Page) -> None:
    page.colours("dark")
    _draw(page, "sailboat", 3)
    page.slide("#time input", 11)
    _save(page, "studio-dark")
    page.colours("light")


def _phone(page: Page) -> None:
    page.resize(*PHONE, scale=2, phone=True)
    page.open()
    _draw(page, "cat face", 3)
    _save(page, "studio-phone", height=PHONE[1] + 260)
    page.resize(*WIDE)


def _training(page: Page) -> None:
    page.open()
    page.choose("#model", "1")
    page.click("#view-training")
    page.wait(lambda: page.run("return document.getElementById('preview').naturalWidth"))
    _save(page, "studio-training")


def _save(page: Page, name: str, height: int | None = None) -> None:
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    image = Image.open(io.BytesIO(page.picture())).convert("RGB")
    if height is not None:
        image = image.crop((0, 0, image.width, min(2 * height, image.height)))
    path = PICTURES / f"{name}.png"
    image.save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        image.quantize(dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
