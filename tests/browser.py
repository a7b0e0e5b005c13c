"""A Chromium without a window, driven through two pipes by its DevTools protocol: nothing but the browser is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# What is on a page: (issue, element) pairs, computed as WCAG 2.2 says it.
AUDIT = """(() => {
  const found = [];
  const name = node => `${node.tagName.toLowerCase()} ${(node.textContent || node.alt || '').trim().slice(0, 40)}`;
  const channel = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const color = text => {
    const values = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith('color(') ? 255 : 1;
    return [values[0] * scale, values[1] * scale, values[2] * scale, values[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map(index => top[3] * top[index] + (1 - top[3]) * below[index]);
  const background = node => {
    if (!node || node.nodeType !== 1) return [255, 255, 255];
    const own = color(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, background(node.parentNode));
  };
  for (const node of document.querySelectorAll('body *')) {
    const style = getComputedStyle(node), box = node.getBoundingClientRect();
    if (style.visibility === 'hidden' || !box.width || !box.height || box.right < 0) continue;
    if (node.closest('svg, math')) continue;
    const text = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (text && !node.closest('.visually-hidden, script, style')) {
      const behind = background(node), ink = luminance(over(color(style.color), behind)), page = luminance(behind);
      const ratio = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
      const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(2)}: ${name(node)}`);
    }
    const scrolls = node.scrollWidth > node.clientWidth + 1 && /auto|scroll/.test(style.overflowX);
    if (scrolls && node.tabIndex < 0 && !node.querySelector('a, button, input, [tabindex]'))
      found.push(`scrolls without a keyboard: ${name(node)}`);
  }
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) found.push(`missing image: ${image.src.slice(0, 80)}`);
    if (!image.alt.trim()) found.push(`no alternative text: ${image.src.slice(0, 80)}`);
  }
  for (const link of document.querySelectorAll('a[href]')) {
    const target = new URL(link.href), here = target.pathname === location.pathname;
    if (here && target.hash.length > 1 && !document.getElementById(decodeURIComponent(target.hash.slice(1))))
      found.push(`missing anchor: ${link.href}`);
  }
  for (const region of document.querySelectorAll('a, button, [role=region]'))
    if (!region.textContent.trim() && !region.ariaLabel && !region.title && !region.querySelector('[alt], svg'))
      found.push(`no name: ${region.outerHTML.slice(0, 80)}`);
  if (!document.documentElement.lang) found.push('no language');
  if (document.querySelectorAll('h1').length !== 1) found.push('not one h1');
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) found.push(`sideways scroll: ${width} px in ${innerWidth}`);
  return [...new Set(found)];
})()"""


class Browser:
    """One page of a Chromium, and all that it complains of."""

    def __init__(self, folder: Path) -> None:
        program = next(filter(None, map(shutil.which, BROWSERS)), None)
        if program is None:
            raise RuntimeError(f"one of {', '.join(BROWSERS)} must be installed, as by apt-get install chromium")
        ours, theirs = os.pipe(), os.pipe()  # it reads from descriptor 3 and writes to 4
        script = f"exec {program} --headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe"
        script += f" --user-data-dir='{folder}' about:blank 3<&{ours[0]} 4>&{theirs[1]}"
        self.process = subprocess.Popen(
            ["bash", "-c", script], pass_fds=(ours[0], theirs[1]), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(ours[0]), os.close(theirs[1])
        self.input, self.output = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb")
        self.number, self.events, self.session = 0, [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait()
        self.input.close(), self.output.close()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.input.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self.output.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            content += byte
        answer = json.loads(content)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def open(self, page: Path, width: int = 1200, height: int = 900, dark: bool = False) -> list[str]:
        """Load a page, and say what its console and its files complain of."""
        phone = width < 500
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()
        return [json.dumps(event["params"])[:300] for event in self.events if _is_complaint(event)]

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def audit(self) -> list[str]:
        """What is wrong with the page that is shown."""
        return self.run(AUDIT)

    def press(self, key: str, code: int) -> None:
        """A key goes down and up."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "char" else {}
            if kind != "char" or text:
                self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        content = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(content))


def _is_complaint(event: dict[str, Any]) -> bool:
    method, said = event["method"], event["params"]
    return (
        method in ("Runtime.exceptionThrown", "Network.loadingFailed")
        or (method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"))
        or (method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"))
    )
