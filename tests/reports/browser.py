"""A headless Chromium over its debugging pipe (--remote-debugging-pipe: JSON ended by NUL on descriptors 3 and 4), for
pages on disk."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One page in a window of `size`; a context manager."""

    def __init__(self, size: tuple[int, int] = (1280, 900), seconds: float = 60) -> None:
        self.seconds, self.numbers, self.waiting, self.events, self.held = seconds, itertools.count(1), b"", [], False
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]  # away from 3 and 4

        def wire() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        command += [
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            f"--user-data-dir={self.profile.name}",
            "--remote-debugging-pipe",
        ]
        command += [f"--window-size={size[0]},{size[1]}", "about:blank"]
        silent = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdout=silent, stderr=silent, stdin=silent, pass_fds=(3, 4), preexec_fn=wire
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.out)
        os.close(self.into)
        self.profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol; what else arrives goes to `events`."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + self.seconds
        while b"\0" not in self.waiting:
            assert select.select([self.into], [], [], max(0, until - time.monotonic()))[0], (
                "the browser does not answer"
            )
            read = os.read(self.into, 2**20)
            assert read, "the browser has ended"
            self.waiting += read
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        """Show a file from disk, and wait until it is loaded."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page (of a promise: what it resolves to)."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        until = time.monotonic() + self.seconds
        while not self.run(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Until what has changed is drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`kind` is Moved, Pressed or Released; moved while pressed it drags."""
        self.held = kind == "Pressed" or (kind == "Moved" and self.held)
        button = "left" if self.held or kind == "Released" else "none"
        self.call(
            "Input.dispatchMouseEvent",
            type=f"mouse{kind}",
            x=x,
            y=y,
            button=button,
            buttons=int(self.held),
            clickCount=1,
        )

    def click(self, x: float, y: float) -> None:
        """Press and release."""
        for kind in ("Moved", "Pressed", "Released"):
            self.mouse(kind, x, y)
        self.settle()

    def key(self, key: str) -> None:
        """Press and release a key, named as in KeyboardEvent.key."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS.get(key, 0), **text)
        self.settle()

    def screenshot(self, path: Path) -> None:
        """A PNG of the window."""
        self.settle()
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Errors that the page has logged, and addresses beyond the page itself that it asked for."""
        self.call("Runtime.evaluate", expression="0")
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", {}).get("description", params)))
            elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
            elif event.get("method") == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("data:", "about:")) and params.get("type") != "Document":
                    found.append(url)
        return found
