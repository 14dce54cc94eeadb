"""Headless Chromium, which opens a page at a width and in a color scheme and says what it finds there."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const below = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = rgba(getComputedStyle(each).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, style, title")) continue;
    if (!element.getClientRects().length) continue;
    const inPicture = element.closest("svg");
    const style = getComputedStyle(element);
    texts.push({
      text: walker.currentNode.data.trim().slice(0, 40),
      contrast: contrast(rgba(inPicture ? style.fill : style.color), below(inPicture ? inPicture : element)),
      size: parseFloat(style.fontSize) * (inPicture ? inPicture.getScreenCTM().a : 1),
    });
  }
  const wide = [...document.querySelectorAll("body *")].filter((element) => {
    if (element.closest(".scroll") && !element.matches(".scroll")) return false;
    return !element.closest("svg, script, style") && element.getBoundingClientRect().right > innerWidth + 0.5;
  });
  const found = {
    width: innerWidth,
    scrollWidth: document.documentElement.scrollWidth,
    wide: wide.map((element) => element.tagName + "." + element.className).slice(0, 5),
    images: [...document.images].map((image) => image.naturalWidth),
    pictures: [...document.querySelectorAll("svg")].filter((svg) => !svg.closest("tr.more")).map((svg) => {
      const box = svg.getBoundingClientRect();
      return [svg.getAttribute("aria-label"), Math.round(box.width), Math.round(box.height)];
    }),
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    texts,
    text: document.body.innerText,
    hidden: [...document.querySelectorAll("tbody tr")].filter((row) => !row.getClientRects().length).length,
    buttons: document.querySelectorAll("button").length,
  };
  for (const each of window.SAQ_CLICKS ?? []) document.querySelectorAll(each[0])[each[1]].click();
  found.rows = [...document.querySelectorAll("table.layers tbody tr")].map((row) => row.cells[0].textContent);
  parent.postMessage(JSON.stringify(found), "*");
}, 50));
</script>
</body>
"""
# A window cannot be narrower than 500 pixels, so the page is shown in a frame.
FRAME = """<!doctype html>
<meta name="color-scheme" content="light dark">
<body style="margin: 0">
<script>
addEventListener("message", (event) => {
  document.body.append(Object.assign(document.createElement("pre"), {id: "found", textContent: event.data}));
});
</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>
"""


def look_at(
    page: Path,
    width: int,
    *,
    dark: bool = False,
    script: bool = True,
    clicks: list[tuple[str, int]] | None = None,
) -> dict[str, Any]:
    """What a browser finds on a page.

    Args:
        page: an HTML file.
        width: of the window in pixels.
        dark: whether the reader prefers dark colors.
        script: whether the page's own script runs.
        clicks: elements to click, each by its selector and index, before the rows of tables are read.
    """
    assert CHROMIUM is not None
    text = page.read_text(encoding="utf-8")
    if not script:
        text = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    probe = PROBE.replace("<script>", f"<script>window.SAQ_CLICKS = {json.dumps(clicks or [])};", 1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(text.replace("</body>", probe), encoding="utf-8")
        frame = Path(folder) / "frame.html"
        frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"),
            *(
                f"--user-data-dir={folder}/profile",
                f"--window-size={max(width, 500)},1000",
                "--virtual-time-budget=2000",
            ),
            *(
                ["--blink-settings=preferredColorScheme=0"]
                if dark
                else ["--blink-settings=preferredColorScheme=1"]
            ),
            frame.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found
