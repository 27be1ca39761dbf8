"""Drive Debian's Chromium through its debugging pipe: no driver, no package, no port.

The protocol is JSON between two pipes, each message ended by a zero byte (``--remote-debugging-pipe``).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # in a container, as root, there is none to be had
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL without a GPU
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--remote-debugging-pipe",
)
SECONDS = 120.0
"""Longest wait for anything; a busy machine is slow, and no test measures it."""


def missing() -> str | None:
    """Say why no browser can be started here, or None."""
    return None if _program() else "no chromium here; Debian: apt-get install chromium"


def _program() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab: what it runs, what it says on its console, and what it asked the network for."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.requests: list[dict[str, Any]] = []
        self.said: list[str] = []
        browser.pages[session] = self
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol in this tab."""
        return self._browser.call(method, parameters, self._session)

    def open(self, url: str) -> None:
        """Go to an address, without waiting for it."""
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Run JavaScript, await a promise; its value. Raises AssertionError with what it threw."""
        made = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in made:
            details = made["exceptionDetails"]
            raise AssertionError(details.get("exception", {}).get("description") or details["text"])
        return made["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until JavaScript gives something true; that. Raises AssertionError with what the tab shows."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                if found := self.run(script):
                    return found
            except AssertionError as error:
                if "context" not in str(error) and "null" not in str(error):
                    raise
            time.sleep(0.05)
        shown = self.run("document.body.innerText")
        raise AssertionError(f"never true: {script}\n{shown}\n{self.said}")

    def text(self, selector: str) -> str:
        """Read what an element shows."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).textContent"))

    def choose_files(self, selector: str, *paths: Path) -> None:
        """Choose files in an input, as a person would."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def screenshot(self, path: Path) -> None:
        """Write what the tab shows, all of it, as a PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def hear(self, message: dict[str, Any]) -> None:
        """Take note of an event."""
        parameters = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(parameters["request"])
        elif message["method"] == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(one.get("value", one.get("description"))) for one in parameters["args"]))
        elif message["method"] == "Runtime.exceptionThrown":
            self.said.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif message["method"] == "Log.entryAdded":
            self.said.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")


class Browser:
    """The process and its pipe."""

    def __init__(self, profile: Path, *flags: str) -> None:
        program = _program()
        assert program
        read_there, write_here = os.pipe()
        read_here, write_there = os.pipe()

        def hand_over() -> None:  # the protocol is spoken on descriptors 3 and 4
            first, second = os.dup(read_there), os.dup(write_there)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", *flags, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=hand_over,
        )
        os.close(read_there)
        os.close(write_there)
        self._read, self._write, self._buffer, self._number = read_here, write_here, b"", 0
        self.pages: dict[str, Page] = {}

    def page(self) -> Page:
        """Open a tab."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        return Page(self, session)

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        """Call a method, and hear events until it answers."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        end = time.monotonic() + SECONDS
        while True:
            heard = self._message(end)
            if heard.get("id") == number:
                if "error" in heard:
                    raise AssertionError(f"{method}: {heard['error']['message']}")
                return dict(heard["result"])
            if page := self.pages.get(heard.get("sessionId", "")):
                page.hear(heard)

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._read, 1 << 20) if ready else b""
            if not piece:
                raise AssertionError("the browser does not answer" if not ready else "the browser has ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait(20)
        os.close(self._read)
        os.close(self._write)


@contextmanager
def browsing(profile: Path, *flags: str) -> Iterator[Browser]:
    """Run a browser with a profile of its own; ended with the block."""
    browser = Browser(profile, *flags)
    try:
        yield browser
    finally:
        browser.close()
