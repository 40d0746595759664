"""A WebDriver client in a page: enough of the protocol to open, type, click and measure.

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c", "Shift": "\ue008"}
KEYS |= {"Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015"}


def missing() -> str | None:
    """Return how to install what is missing, or None."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser and shutil.which("chromedriver"):
        return None
    return "needs a browser: apt-get install -y chromium chromium-driver"


class Browser:
    """A headless Chromium.

    Args:
        profile: Folder for its profile.
        width: Of the window, in px.
        height: Of the window, in px.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 900) -> None:
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        driver = shutil.which("chromedriver")
        if browser is None or driver is None:
            raise RuntimeError(missing())
        self.driver = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.url = ""
        try:
            assert self.driver.stdout is not None
            for line in self.driver.stdout:
                if found := re.search(r"on port (\d+)\.", line):
                    self.url = f"http://127.0.0.1:{found[1]}/session"
                    break
            # Root, as in a container, can have no sandbox.
            sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            arguments = [
                "--headless=new",
                *sandbox,
                "--disable-dev-shm-usage",
                "--disable-gpu",
                "--no-first-run",
                "--force-device-scale-factor=1",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
            ]
            wanted = {
                "goog:chromeOptions": {"args": arguments, "binary": browser},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            session = self._send("POST", "", {"capabilities": {"alwaysMatch": wanted}})
            self.url += f"/{session['sessionId']}"
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._send("DELETE", "")
        finally:
            self._end()

    def _end(self) -> None:
        self.driver.terminate()
        self.driver.wait()
        if self.driver.stdout is not None:
            self.driver.stdout.close()

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                value = json.load(error)["value"]
            raise RuntimeError(f"{value['error']}: {value['message']}") from None

    def open(self, page: Path, route: str = "") -> None:
        """Open a file from disk and wait until it is loaded."""
        self._send("POST", "/url", {"url": page.resolve().as_uri() + route})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the value of the body of a function in the page."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any, seconds: float = 15) -> Any:
        """Return the first true value of an expression in the page."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"return {script}", *arguments):
                return value
            time.sleep(0.03)
        raise TimeoutError(f"not true within {seconds} s: {script}")

    def click(self, selector: str) -> None:
        """Click the first element, as a mouse would."""
        found = self._send("POST", "/element", {"using": "css selector", "value": selector})
        self._send("POST", f"/element/{found[ELEMENT]}/click", {})

    def keys(self, *names: str) -> None:
        """Press keys one after another: names of `KEYS`, or characters."""
        actions = []
        for name in names:
            value = KEYS.get(name, name)
            actions += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        self._send(
            "POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]}
        )

    def point(self, x: float, y: float, press: bool = False) -> None:
        """Move the mouse to a place in the window, and click there if `press`."""
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        actions: list[dict[str, Any]] = [move]
        if press:
            actions += [{"type": f"pointer{way}", "button": 0} for way in ("Down", "Up")]
        mouse = {"type": "pointer", "id": "m", "actions": actions}
        self._send("POST", "/actions", {"actions": [mouse]})

    def pinch(self, x: float, y: float, begin: float, end: float) -> None:
        """Put two fingers above and below a place in the window, and move them apart."""
        fingers = []
        for side in (-1, 1):
            first, last = (
                {"type": "pointerMove", "duration": 100, "x": round(x), "y": round(y + side * far)}
                for far in (begin, end)
            )
            down, up = ({"type": f"pointer{way}", "button": 0} for way in ("Down", "Up"))
            kind = {"type": "pointer", "parameters": {"pointerType": "touch"}}
            fingers.append({**kind, "id": f"finger{side}", "actions": [first, down, last, up]})
        self._send("POST", "/actions", {"actions": fingers})

    def size(self, width: int, height: int) -> None:
        """Set what pages see as their window: Chromium's own window stops at 500 px."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._emulate("setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        """Ask pages for their "light" or "dark" scheme."""
        wanted = {"name": "prefers-color-scheme", "value": name}
        self._emulate("setEmulatedMedia", {"features": [wanted]})

    def _emulate(self, command: str, values: dict[str, Any]) -> None:
        self._send("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": values})

    def screenshot(self, path: Path) -> None:
        """Write what is on the screen as PNG."""
        path.write_bytes(base64.b64decode(self._send("GET", "/screenshot")))

    def errors(self) -> list[str]:
        """Return what the console has said since the last call."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return what pages asked for since the last call, `data:` and the browser's own aside."""
        log = self._send("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in log]
        urls = [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "chrome"))]
