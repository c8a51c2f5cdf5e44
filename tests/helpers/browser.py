"""A page in headless Chromium, driven over its DevTools protocol; needs nothing of Python beyond the core packages."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab. What it logs and fails to load is kept in ``complaints``."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection, self.number = connection, 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.connection.recv(timeout=60))
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"])[:500])
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return dict(message["result"])

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 90) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, f"not true within {seconds:g} s: {expression}; {self.complaints}"
            time.sleep(0.1)

    def press(self, key: str) -> None:
        """One key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" else "")

    def screenshot(self, path: Path, width: int, height: int, scheme: str = "light") -> None:
        """A PNG of the page at a size."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def page(url: str, folder: Path) -> Iterator[Page]:
    """A headless Chromium with its profile in ``folder``, at ``url``."""
    options = ["--headless", "--no-first-run", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1400,900"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # Chromium refuses to run as root with it
    command = [str(CHROMIUM), *options, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found, deadline = folder / "profile" / "DevToolsActivePort", time.monotonic() + 60
        while not (found.exists() and found.read_text().count("\n")):
            assert browser.poll() is None, "Chromium ended"
            assert time.monotonic() < deadline, "Chromium did not start within 60 s"
            time.sleep(0.1)
        port = found.read_text().split("\n")[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        tabs = json.load(opener.open(f"http://127.0.0.1:{port}/json/list", timeout=20))
        tab = next(tab for tab in tabs if tab["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            one = Page(connection)
            one.call("Page.navigate", url=url)
            yield one
    finally:
        browser.terminate()
        browser.wait(20)
