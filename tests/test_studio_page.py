"""The studio's page in Chromium: drawing, painting, history, clips, training, phone and keys."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("selenium")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from browsing import CHROMIUM, DRIVER, Page
from matryoshka_diffusion.studio.served import Served
from studio_server import exported, running
from test_pipeline import Words, class_model
from tiny_run import TinyClips, run, tiny_config, tiny_video

pytestmark = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()), reason="needs Debian's chromium, chromium-driver"
)
BLUE = [59, 125, 216]
"""The colour that the page begins with."""
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio with a run of 8 and 16 pixels, one whose finest level is of clips, and classes."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "still", tiny_config(dropout=0.0))
    video = tiny_video(dropout=0.0).model_copy(update={"name": "clips"})
    run(folder / "clips", video, loader=TinyClips())
    with (folder / "still" / "metrics.jsonl").open("a") as metrics:
        for images, fd, share in ((24, 250.0, 0.0), (48, 125.0, 0.5)):
            line = {"images_seen": images, "fd_256": fd, "retrieval_256": share}
            metrics.write(json.dumps(line) + "\n")
    preview = folder / "still" / "previews" / "0000000024.png"
    preview.parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 20), "red").save(preview)
    exported(class_model(), folder / "classes", name="classes")
    names = enumerate(("still", "clips", "classes"))
    models = [Served(str(folder / name), n, Words()) for n, name in names]
    with running(models) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(address, tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """The page, freshly loaded. Nothing may land in the console or go to another host."""
    _ = browser.errors(), browser.requests()  # those of a test that failed
    browser.resize(1280, 900)
    browser.forget()
    browser.open()
    browser.write("#steps", 6)
    yield browser
    assert browser.errors() == []
    for url in browser.requests():
        assert url.startswith((browser.address, "data:", "blob:" + browser.address)), url


def draw(page: Page, prompt: str, seed: int = 0) -> None:
    page.write("#prompt", prompt)
    page.write("#seed", seed)
    page.draws(lambda: page.click("#draw"))
    assert page.text("#status").startswith("Drawn")


def titles(page: Page) -> list[str]:
    """What is under the pictures of the history, the newest first."""
    return page.run("return [...document.querySelectorAll('#entries span')].map(e => e.innerText)")


def ask(page: Page, **request: Any) -> dict[str, Any]:
    """The last line that the server says to a request to draw."""
    body = json.dumps({"model": "0", **request}).encode()
    with urlopen(Request(f"{page.address}api/draw", body, JSON)) as answer:
        return json.loads(answer.read().splitlines()[-1])


def test_every_level_is_seen_to_denoise_and_one_can_go_back_through_time(page: Page):
    page.run(
        "window.seen = {}; const put = CanvasRenderingContext2D.prototype.putImageData;"
        "CanvasRenderingContext2D.prototype.putImageData = function (image, ...at) {"
        "  if (this.canvas.closest('#levels')) (seen[image.width] ??= new Set()).add("
        "    image.data.join());"
        "  return put.call(this, image, ...at); }"
    )
    page.write("#prompt", "a red square")
    page.draws(lambda: page.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER))
    # The last of them is the picture, and the states before it are at least five.
    seen = page.run("return Object.fromEntries(Object.entries(seen).map(([k, v]) => [k, v.size]))")
    assert seen == {"8": 6, "16": 6}
    assert page.text("#time output") == "step 6 of 6"
    picture = page.pixels(1)
    page.click("#levels li:nth-child(2) button")
    page.slide("#time input", 2)  # closes the painting
    assert not page.find("#tools").is_displayed()
    assert page.text("#time output") == "step 3 of 6"
    assert page.pixels(1) != picture
    page.slide("#time input", 5)
    assert page.pixels(1) == picture


def test_a_stopped_drawing_leaves_its_states_and_makes_way_for_the_next(page: Page):
    page.write("#steps", 250)
    page.write("#prompt", "red")
    page.click("#draw")
    page.wait(lambda: page.text("#time output").startswith("step 3"))
    page.draws(lambda: page.click("#stop"))
    assert page.text("#status").startswith("Stopped after step")
    page.write("#steps", 6)
    draw(page, "green")


def test_who_waits_sees_the_place_in_the_queue(page: Page):
    body = json.dumps({"model": "0", "prompt": "red", "steps": 250, "images": 16}).encode()
    with urlopen(Request(f"{page.address}api/draw", body, JSON)) as other:
        while b"state" not in other.readline():
            pass
        page.write("#prompt", "green")
        page.click("#draw")
        page.wait(lambda: "queue" in page.text("#status"))
    page.wait(lambda: page.text("#status") == "Drawn.")  # the other one has left


def test_a_painted_level_stays_and_the_others_follow(page: Page):
    draw(page, "red", seed=1)
    before = page.pixels(1)
    page.click("#levels li:nth-child(1) button")
    page.stroke(0, (0.1, 0.1), (0.9, 0.1), (0.9, 0.9))
    painted = page.pixels(0)
    assert painted.count(BLUE) == 15  # a row and a column of 8 pixels
    page.click("#undo")
    assert painted != page.pixels(0)
    page.stroke(0, (0.1, 0.1), (0.9, 0.1), (0.9, 0.9))
    page.draws(lambda: page.click("#redraw-others"))
    assert page.pixels(0) == painted
    finest = np.array(page.pixels(1)).reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(finest - np.array(painted).reshape(8, 8, 3)).mean() < 20
    assert page.pixels(1) != before
    page.click("#entries li:first-child button")
    assert "Held level8" in page.text("#entry-settings")
    page.draws(lambda: page.click("#entry-again"))
    assert page.pixels(0) == painted


def test_a_drawing_tries_harder_to_fit_what_is_kept(page: Page):
    draw(page, "red", seed=1)
    page.click("#levels li:nth-child(1) button")
    page.stroke(0, (0.1, 0.1), (0.9, 0.1))
    page.draws(lambda: page.click("#redraw-others"))
    plain = page.pixels(1)
    page.click("#harder summary")
    for name, number in (("correct", 1), ("resample", 2)):
        page.find(f"#{name}").send_keys(str(number))
    page.draws(lambda: page.click("#redraw-others"))
    page.click("#entries li:first-child button")
    assert "Corrections1" in page.text("#entry-settings").replace("\n", "")
    assert "Passes2" in page.text("#entry-settings").replace("\n", "")
    assert page.pixels(1) != plain


def test_only_what_is_marked_on_the_picture_is_drawn_anew(page: Page):
    draw(page, "red", seed=2)
    before = np.array(page.pixels(1)).reshape(16, 16, 3)
    page.click("#levels li:nth-child(2) button")
    page.click("label:has([value=mask])")
    page.slide("#size", 4)
    page.stroke(1, (0.2, 0.2), (0.4, 0.2), (0.4, 0.4))
    assert np.array_equal(np.array(page.pixels(1)).reshape(16, 16, 3), before)
    assert page.text("#draw") == "Redraw the marks"
    page.draws(lambda: page.click("#draw"))
    changed = (np.array(page.pixels(1)).reshape(16, 16, 3) != before).any(-1)
    assert changed[2:7, 2:7].any()
    assert not changed[10:].any()
    assert not changed[:, 10:].any()


def test_a_plan_is_followed_only_where_it_is_marked(page: Page):
    draw(page, "red", seed=2)
    before = np.array(page.pixels(1)).reshape(16, 16, 3)
    page.click("#levels li:nth-child(1) button")
    for tool in ("brush", "mask"):
        page.click(f"label:has([value={tool}])")
        page.stroke(0, (0.05, 0.05), (0.2, 0.05))
    page.draws(lambda: page.click("#redraw-marked"))
    assert page.pixels(0)[:2] == [BLUE] * 2
    changed = (np.array(page.pixels(1)).reshape(16, 16, 3) != before).any(-1)
    assert changed[:2, :4].all()
    assert changed.sum() == 8


def test_the_picker_takes_a_colour_and_the_eraser_brings_the_level_back(page: Page):
    draw(page, "red", seed=2)
    before = page.pixels(0)
    page.click("#levels li:nth-child(1) button")
    page.click("#swatches [aria-label=Green]")
    page.stroke(0, (0.05, 0.05), (0.95, 0.05))
    page.click("label:has([value=picker])")
    page.stroke(0, (0.55, 0.55))
    picked = page.find("#colour").get_property("value")
    assert picked == "#{:02x}{:02x}{:02x}".format(*before[4 * 8 + 4])
    assert page.find("[value=brush]").is_selected()
    page.click("label:has([value=eraser])")
    page.stroke(0, (0.05, 0.05), (0.95, 0.05))
    assert page.pixels(0) == before


def test_a_picture_of_any_size_is_put_on_a_level(page: Page, tmp_path: Path):
    Image.new("RGB", (50, 40), (10, 200, 30)).save(tmp_path / "green.png")
    draw(page, "red", seed=2)
    page.click("#levels li:nth-child(2) button")
    page.click("#upload")
    page.find("#file").send_keys(str(tmp_path / "green.png"))
    page.wait(lambda: page.pixels(1) == [[10, 200, 30]] * 256)
    page.draws(lambda: page.click("#redraw-others"))
    assert page.pixels(0) == [[10, 200, 30]] * 64


def test_a_photo_that_is_too_large_is_made_smaller_in_the_browser(page: Page, tmp_path: Path):
    """Upright, though its camera lay on its side: it is green above and red below."""
    photo = Image.new("RGB", (5000, 4000), (200, 20, 30))
    photo.paste((10, 200, 30), (0, 0, 2500, 4000))
    turned = Image.Exif()
    turned[274] = 6
    photo.save(tmp_path / "photo.jpg", exif=turned)
    draw(page, "red", seed=2)
    page.click("#levels li:nth-child(1) button")
    page.click("#upload")
    page.find("#file").send_keys(str(tmp_path / "photo.jpg"))
    page.wait(lambda: np.abs(np.array(page.pixels(0)[:24]) - (10, 200, 30)).max() < 6)
    assert np.abs(np.array(page.pixels(0)[-24:]) - (200, 20, 30)).max() < 6


def test_a_sketch_is_finished_without_a_picture_before_it(page: Page):
    page.run("indexedDB.deleteDatabase('matryoshka-studio')")
    page.open()
    page.write("#steps", 6)
    page.write("#prompt", "red")
    page.click("#levels li:nth-child(1) button")
    assert page.pixels(0) == [[255, 255, 255]] * 64
    assert page.text("#draw") == "Draw from 8 × 8"
    page.draws(lambda: page.click("#draw"))
    assert page.pixels(0) == [[255, 255, 255]] * 64


def test_a_picture_to_begin_with_is_kept_at_little_strength(page: Page):
    distances = []
    for seed, strength in ((3, 0.05), (4, 1.0)):
        draw(page, "red", seed)
        before = np.array(page.pixels(1))
        page.write("#seed", 5)
        page.slide("#strength", strength)
        page.draws(lambda: page.click("#begin"))
        distances.append(np.abs(np.array(page.pixels(1)) - before).mean())
    assert distances[0] < distances[1] / 2


def test_the_same_drawn_again_has_another_seed(page: Page):
    draw(page, "blue thing", seed=6)
    before = page.pixels(1)
    assert page.text("#draw") == "Draw another"
    page.draws(lambda: page.click("#draw"))
    assert page.pixels(1) != before
    page.write("#seed", 6)
    assert page.text("#draw") == "Draw"
    page.draws(lambda: page.click("#draw"))
    assert page.pixels(1) == before


def test_one_of_several_variations_is_kept(page: Page):
    draw(page, "blue thing", seed=10)
    before = titles(page)
    for _ in range(2):  # others each time
        page.draws(lambda: page.click("#variations-draw"))
    assert titles(page) == before
    page.click("#variations li:nth-child(3) button")
    chosen = page.pixels(1)
    page.click("#keep")
    page.wait(lambda: len(titles(page)) == len(before) + 1)
    page.click("#entries li:first-child button")
    assert "Seed17" in page.text("#entry-settings")
    page.click("#entry-use")
    assert page.find("#seed").get_property("value") == "17"
    assert page.pixels(1) == chosen


def test_a_dropped_picture_brings_its_settings_back(page: Page):
    settings = {"prompt": "blue thing", "seed": 77, "steps": 5, "sampler": "ddim", "eta": 0.5}
    png = ask(page, **settings, guidance=[1.5, 2.5])["done"]["images"][0]["png"]
    script = """
        const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
        for (const kind of ["dragover", "drop"]) {
          document.body.dispatchEvent(
            new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
        }"""
    page.run(script, png)
    page.wait(lambda: "settings" in page.text("#status"))
    shown = {"prompt": "blue thing", "seed": "77", "steps": "5", "sampler": "ddim"}
    assert {name: page.find(f"#{name}").get_property("value") for name in shown} == shown
    assert page.find("#guidance").get_property("value") == "1.5, 2.5"
    assert "eta 0.5" in page.text("#extras")
    image = np.array(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
    assert np.array_equal(np.array(page.pixels(1)), image.reshape(-1, 3))
    page.click("#forget")
    assert not page.find("#extras").is_displayed()
    page.run("window.blank = document.createElement('canvas').toDataURL().split(',')[1]")
    page.run(script, page.run("return blank"))
    page.wait(lambda: "no settings" in page.text("#status"))


def test_the_history_survives_a_reload_and_gives_its_settings_back(page: Page):
    draw(page, "a green square", seed=5)
    before, picture = titles(page), page.pixels(1)
    page.open()
    assert titles(page) == before
    assert before[0] == "a green square"
    assert page.pixels(1) == picture  # the newest is on the levels
    said = ["prompt", "seed"]  # of the picture that is shown
    form = [page.find(f"#{name}").get_property("value") for name in said]
    assert form == ["a green square", "5"]
    assert page.text("#draw") == "Draw another"
    page.write("#prompt", "red")
    page.click("#entries li:first-child button")
    page.click("#entry-use")
    assert page.find("#prompt").get_property("value") == "a green square"
    assert page.find("#steps").get_property("value") == "6"
    page.click("#entries li:first-child button")
    page.click("#entry-remove")
    page.wait(lambda: titles(page) == before[1:])


def test_a_prompt_with_html_is_shown_as_text(page: Page):
    prompt = "<img src=x onerror=\"document.title='broken'\"><b>red</b>"
    draw(page, prompt)
    assert titles(page)[0] == prompt
    page.click("#entries li:first-child button")
    assert page.text("#entry-title") == prompt
    assert page.run("return document.querySelectorAll('b, img[src=x]').length") == 0
    assert page.run("return document.title") == "Matryoshka studio"
    page.click("#entry-remove")


def test_errors_are_beside_their_field(page: Page):
    page.click("#draw")
    assert page.text("#prompt-error")
    assert page.run("return document.activeElement.id") == "prompt"
    page.write("#prompt", "red")
    page.write("#guidance", "1, 2, 3")
    page.click("#draw")
    assert not page.run("return document.getElementById('prompt-error')")
    assert page.find("#guidance").get_attribute("aria-describedby") == "guidance-error"
    page.write("#guidance", "2")
    page.write("#steps", 100_000)  # the server refuses it
    page.draws(lambda: page.click("#draw"))
    assert page.find("#steps").get_attribute("aria-invalid") == "true"
    assert page.text("#steps-error")
    assert page.text("#draw") == "Draw"  # nothing has been drawn, so the seed stays
    (error,) = page.errors()  # Chromium notes every answer of 400 by itself
    assert "400" in error


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page: Page):
    page.resize(390, 844, phone=True)
    page.open()
    page.write("#prompt", "red")
    page.draws(lambda: page.click("#draw"))
    page.click("#levels li:nth-child(1) button")
    page.click("#settings summary")
    script = """
        const right = (e) => e.getBoundingClientRect().right;
        return [document.documentElement.scrollWidth,
                Math.max(...[...document.querySelectorAll("main *, header *")].map(right))]"""
    assert max(page.run(script)) <= 390
    painted = page.run("return document.querySelector('.chosen canvas').getBoundingClientRect()")
    assert painted["width"] > 300  # large enough for a finger


def test_all_can_be_done_with_keys_alone(page: Page):
    def press(*keys: str) -> None:
        ActionChains(page.driver, duration=0).send_keys(*keys).perform()

    def tab_to(selector: str) -> None:
        script = "return document.activeElement.matches(arguments[0])"
        for _ in range(80):
            press(Keys.TAB)
            if page.run(script, selector):
                outline = "return getComputedStyle(document.activeElement)"
                seen = page.run(f"{outline}.outlineStyle + {outline[7:]}.borderBottomColor")
                assert seen != "none"
                return
        raise AssertionError(f"no key leads to {selector}")

    page.run("document.activeElement.blur()")
    tab_to("#prompt")
    press("red")
    tab_to("#draw")
    page.draws(lambda: press(Keys.ENTER))
    tab_to("#levels li:nth-child(1) button")
    press(Keys.ENTER)
    assert page.run("return document.activeElement.getAttribute('role')") == "application"
    assert BLUE not in page.pixels(0)
    press(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.SPACE)
    assert page.pixels(0)[3 * 8 + 3] == BLUE
    tab_to("#undo")
    press(Keys.ENTER)
    assert BLUE not in page.pixels(0)
    tab_to("#redraw-others")
    page.draws(lambda: press(Keys.ENTER))
    press(Keys.ESCAPE)
    assert not page.find("#tools").is_displayed()


def test_a_clip_plays(page: Page):
    page.choose("#model", "1")
    page.write("#steps", 3)
    draw(page, "red")
    page.wait(lambda: page.text("#clip output") == "frame 3 of 4")
    page.click("#clip button")
    frames = []
    for frame in range(4):
        page.slide("#clip input", frame)
        frames.append(page.pixels(1))
    assert frames[0] != frames[3]
    assert page.find("#download").get_attribute("download") == "red-0.webp"


def test_a_class_is_chosen_by_its_name(page: Page):
    page.choose("#model", "2")
    assert not page.find("#prompt").is_displayed()
    page.choose("#label", "1")
    page.draws(lambda: page.click("#draw"))
    assert titles(page)[0] == "dog"


def test_a_token_in_the_address_opens_the_studio(page: Page, tmp_path: Path):
    model = exported(class_model(), tmp_path, name="secret")
    with running([Served(str(model), 0, None)], token="a" * 20) as port:
        address = f"http://127.0.0.1:{port}/"
        page.driver.get(address)
        page.wait(lambda: "token" in page.text("#alert"))
        assert page.find("#composer").get_property("inert")
        page.driver.get("about:blank")  # another fragment alone would load nothing
        page.open(f"{address}#token={'a' * 20}")
        assert page.find("#label").is_displayed()
        assert not page.find("#composer").get_property("inert")
        assert all("401" in error for error in page.errors())
        page.requests()


def test_a_run_in_training_shows_its_losses_and_previews(page: Page):
    page.click("#view-training")
    page.wait(lambda: page.run("return document.getElementById('preview').naturalWidth") == 40)
    assert page.text("#training-status").startswith("48 of 48 images")
    assert page.text("#losses-legend").count("px") == 2
    drawn = page.run(
        "return [...document.querySelectorAll('#charts figure:not([hidden])')].map((figure) => {"
        "  const c = figure.querySelector('canvas');"
        "  const ink = c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean);"
        "  return [figure.innerText, ink];"
        "})"
    )
    assert all(ink for _, ink in drawn)
    assert [text.split(", ")[0].split("\n")[0] for text, _ in drawn] == [
        "Loss in training",
        "FD ↓",
        "Retrieval ↑",
    ]
    assert "125" in drawn[1][0]
    assert "0.5" in drawn[2][0]


def test_curves_of_one_run_are_gone_with_the_next(page: Page):
    page.click("#view-training")
    page.wait(lambda: "FD" in page.text("#charts"))
    page.choose("#model", "1")
    page.click("#view-training")
    page.wait(lambda: "px" in page.text("#losses-legend") and "FD" not in page.text("#charts"))
