"""Reading a written page: what stands in it, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a page holds: ids, visible text, links and loads, and its JSON scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.loads, self.scripts, self.text, self.tags = set(), [], [], [], ["start"]
        self.classes = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.classes.update((attributes.get("class") or "").split())
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if tag == "script":
            self.scripts.append([attributes, ""])
        self.loads += [attributes[key] for key in ("src", "srcset", "data", "poster") if key in attributes]
        if tag in ("link", "base", "iframe", "object", "embed") or attributes.get("href", "#")[0] != "#":
            self.loads.append(f"{tag} {attributes}")

    def handle_data(self, data):
        (self.scripts[-1] if self.tags[-1] == "script" else self.text).append(data)

    def handle_endtag(self, tag):
        if tag == "script":
            self.tags.append("after")

    def json(self, **wanted: str) -> list:
        found = [s for s in self.scripts if wanted.items() <= s[0].items()]
        return [json.loads("".join(s[1:])) for s in found]


def open_in_browser(
    path: Path, width: int, tmp_path: Path, more: str = ""
) -> tuple[list[str], dict[str, str]]:
    """Open a page so wide in a browser, without a network.

    Args:
        more: members of a JavaScript object, evaluated when all figures are drawn and reported too.
    Returns:
        lines of the browser's console; and the number of figures `drawn`, the `width` there is and the one
        `needed`, how many `resources` were fetched, and what `more` gave.
    """
    probe = f"""<script type="module">
      const root = document.documentElement;
      while (!root.dataset.drawn) await new Promise((resolve) => setTimeout(resolve, 20));
      parent.postMessage({{ drawn: root.dataset.drawn, width: root.clientWidth, needed: root.scrollWidth,
        resources: performance.getEntriesByType("resource").length, {more} }}, "*");
    </script>"""
    head, tail = path.read_text().rsplit("</body>", 1)  # the last one: the libraries hold others in strings
    path.write_text(head + probe + "</body>" + tail)
    frame = tmp_path / "frame.html"  # a window is never narrower than 500 pixels, a frame may be
    frame.write_text(
        f"""<html><body><iframe src="{path.name}" style="width: {width}px; height: 900px; border: 0"></iframe>
        <script>onmessage = (event) => Object.assign(document.documentElement.dataset, event.data)</script>"""
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    )
    flags += "--disable-sync --no-first-run --enable-logging=stderr --virtual-time-budget=60000 --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM or "chromium", *flags.split(), profile, "--window-size=1400,1000", frame.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    root = re.search(r"<html[^>]*>", run.stdout)
    assert root is not None
    data = {key: unescape(value) for key, value in re.findall(r'data-([\w-]+)="([^"]*)"', root[0])}
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line], data
