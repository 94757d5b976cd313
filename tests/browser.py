"""A headless Chromium with one page, over its debugging pipe. No package needed."""

import json
import os
import shutil
import subprocess
from typing import Any

NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), "")


class Browser:
    """One page. Messages are JSON and end with a zero byte; commands come in on descriptor 3."""

    def __init__(self, folder: str):
        theirs, self.out = os.pipe()
        self.answers, ours = os.pipe()
        options = f"--headless --no-sandbox --remote-debugging-pipe --user-data-dir={folder}"
        command = f"exec {CHROMIUM} {options} 3<&{theirs} 4>&{ours} 2>/dev/null"
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(theirs, ours))
        os.close(theirs), os.close(ours)
        self.number, self.rest, self.where = 0, b"", {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        found = self("Target.attachToTarget", targetId=target, flatten=True)
        self.where = {"sessionId": found["sessionId"]}
        self.said: list[str] = []  # errors of the page's scripts
        self("Runtime.enable"), self("Page.enable")

    def __call__(self, method: str, **parameters: Any) -> dict:
        """Runs one command of the DevTools protocol, and returns what it answers."""
        self.number += 1
        told = {"id": self.number, "method": method, "params": parameters} | self.where
        os.write(self.out, json.dumps(told).encode() + b"\0")
        while (message := self.read()).get("id") != self.number:
            if message.get("method") == "Runtime.exceptionThrown":
                self.said.append(json.dumps(message["params"]))
        assert "error" not in message, message
        return message["result"]

    def read(self) -> dict:
        while b"\0" not in self.rest:
            part = os.read(self.answers, 1 << 16)
            assert part, "the browser has gone"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme_is = [dict(name="prefers-color-scheme", value=scheme)]
        self("Emulation.setEmulatedMedia", features=scheme_is)
        self("Page.navigate", url=url)
        while not self.run("document.readyState == 'complete' && location.href != 'about:blank'"):
            pass

    def mouse(self, element: str, *kinds: str) -> None:
        """Events of the mouse in the middle of the first line of an element."""
        self.run(f"({element}).scrollIntoView({{block: 'center'}})")
        r = self.run(f"({element}).getClientRects()[0].toJSON()")
        at = dict(x=r["x"] + r["width"] / 2, y=r["y"] + r["height"] / 2)
        for kind in kinds:
            pressed = {} if kind == "mouseMoved" else dict(button="left", clickCount=1)
            self("Input.dispatchMouseEvent", type=kind, **at, **pressed)

    def point(self, element: str) -> None:
        self.mouse(element, "mouseMoved")

    def click(self, element: str) -> None:
        self.mouse(element, "mouseMoved", "mousePressed", "mouseReleased")

    def press(self, key: str) -> None:
        text = dict(text=key) if len(key) == 1 else {}
        self("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self) -> None:
        os.close(self.out), os.close(self.answers)
        self.process.kill(), self.process.wait()
