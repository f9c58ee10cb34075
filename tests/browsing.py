"""Debian's Chromium on a page, for tests and for the pictures in docs/."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
LONGEST_WAIT = 20.0  # seconds


class Page:
    """A browser that looks at a studio, or at the page of the docs site that draws."""

    def __init__(self, address: str, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.address = address
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
        self.driver.get("about:blank")
        self.requests()  # those of Chromium's own first page

    def open(self, address: str | None = None) -> None:
        """Load the page anew."""
        self.driver.get(address or self.address)
        self.wait(lambda: self.run("return document.body.classList.contains('ready')"))

    def forget(self) -> None:
        """Delete the history; the page has to be opened anew."""
        data = {"origin": self.address.rstrip("/"), "storageTypes": "indexeddb"}
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", data)

    def close(self) -> None:
        self.driver.quit()

    def resize(self, width: int, height: int, *, scale: float = 1.0, phone: bool = False) -> None:
        """Look through a window of this size in CSS pixels."""
        shape = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)

    def colours(self, scheme: str) -> None:
        """Prefer "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def picture(self) -> bytes:
        """A PNG of the whole page, also of what is below the window."""
        asked = {"format": "png", "captureBeyondViewport": True}
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"]
        return base64.b64decode(data)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def write(self, selector: str, text: object) -> None:
        """Replace what is in a field, as typing does."""
        field = self.find(selector)
        field.clear()
        field.send_keys(str(text))

    def slide(self, selector: str, value: float) -> None:
        """Move a slider."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.run(script, self.find(selector), value)

    def choose(self, selector: str, value: str) -> None:
        """Choose from a list."""
        script = (
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
        )
        self.run(script, self.find(selector), value)

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Wait for something to hold, and return it. Fails after `LONGEST_WAIT`."""
        end = time.monotonic() + LONGEST_WAIT
        while time.monotonic() < end:
            with suppress(JavascriptException):
                if result := condition():
                    return result
            time.sleep(0.02)
        status, alert = self.text("#status"), self.text("#alert")
        raise AssertionError(f"nothing happened; the page says {status!r}, {alert!r}")

    def draws(self, start: Callable[[], Any]) -> None:
        """Start a drawing and wait for its end."""
        self.run(
            "window.drawings = 0; new MutationObserver(([change], self) => {"
            "  if (change.target.ariaBusy === 'false') { window.drawings++; self.disconnect(); }"
            "}).observe(document.getElementById('stage'), {attributeFilter: ['aria-busy']})"
        )
        start()
        self.wait(lambda: self.run("return window.drawings"))

    def pixels(self, level: int) -> list[list[int]]:
        """RGB of all pixels that a level shows, in rows from the top."""
        flat = self.run(
            "const canvas = document.querySelectorAll('#levels .picture')[arguments[0]];"
            "const copy = new OffscreenCanvas(canvas.width, canvas.width).getContext('2d');"
            "copy.drawImage(canvas, 0, 0);"
            "return [...copy.getImageData(0, 0, canvas.width, canvas.width).data]",
            level,
        )
        return [flat[n : n + 3] for n in range(0, len(flat), 4)]

    def stroke(self, level: int, *points: tuple[float, float]) -> None:
        """Draw over a level with the mouse; points are shares of its side."""
        canvas = self.driver.find_elements(By.CSS_SELECTOR, "#levels .picture")[level]
        self.run("arguments[0].scrollIntoView({block: 'center'})", canvas)
        size = canvas.size["width"]

        def move(point: tuple[float, float]) -> None:
            x, y = (round((share - 0.5) * size) for share in point)
            actions.move_to_element_with_offset(canvas, x, y)

        actions = ActionChains(self.driver, duration=0)
        move(points[0])
        actions.click_and_hold()
        for point in points[1:]:
            move(point)
        actions.release().perform()

    def errors(self) -> list[str]:
        """What the console has complained about since the last call."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        lines = (json.loads(line["message"]) for line in self.driver.get_log("performance"))
        events = [line["message"] for line in lines]
        sent = [one["params"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]
