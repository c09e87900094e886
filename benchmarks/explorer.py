"""Milliseconds of every page and action of the explorer, in a real browser, on a run of 32,768 latents.

    python benchmarks/explorer.py --json results.json

Run it by the interpreter of the environment that holds saetools; README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results
from browsing import Tab, Timings
from machine import describe_machine

FIRST_PAINT_LIMIT, CLICK_LIMIT = 1000.0, 200.0
N_TOKENS, D_SAE = 5_000_000, 32_768
SENTENCES = ("Rules are for the weak.", "The tomatoes want water in the morning.", "Your bag has seen the fjords.")
_FIRST_ROW = "document.querySelector('.ag-row[row-index=\"0\"] [col-id={}]')?.innerText"
_DRAWN = "document.querySelector('#{} canvas') && document.querySelector('#{} .main-svg')"
PAGES = {
    "overview": ("/", _DRAWN.format("volcano", "volcano") + " && " + _DRAWN.format("ranks", "ranks")),
    "latents": ("/latents", "document.querySelector('.ag-row[row-index=\"0\"] a')?.innerText"),
    "latent": ("/latent/{}", ""),  # see `Bench._shown`
    "map": ("/map", _DRAWN.format("map", "map")),
    "playground": ("/playground", "document.querySelector('#answer')"),
}
_SIZES = "(!document.querySelector('#sizes') || document.querySelector('#sizes .main-svg'))"  # none if it never fires


def main() -> None:
    arguments = _arguments()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.run is None else arguments.run
        built = _build(folder, arguments)
        with _server(folder, arguments.threads) as address, _chromium() as browser:
            pages = Bench(browser, address, arguments).pages()
            actions = Bench(browser, address, arguments).actions()
            version = browser.version
    worst_paint = max(one["first_paint"]["p95"] for one in pages.values())
    clicks = {name: one["ms"]["p95"] for name, one in actions.items() if not name.startswith("search")}
    slowest = max(clicks, key=lambda name: clicks[name])
    result = {
        "command": results.command("explorer.py", arguments),
        "date": datetime.date.today().isoformat(),
        "quick": arguments.quick,
        "task": {"latents": arguments.d_sae, "tokens": arguments.tokens, "models": 2, **built},
        "method": {
            "browser": f"Chromium {version}, headless, WebGL in software, {_SIZE['width']} x {_SIZE['height']}",
            "repeats": arguments.repeats,
            "ms": "from the event (or the start of loading) to the frame that shows the result, painted",
            "server_ms": "of these, waiting for the server",
        },
        "machine": machine,
        "limits": {"first_paint": FIRST_PAINT_LIMIT, "click": CLICK_LIMIT},
        "ratios": {
            "limit of 1 s / first paint, p95": round(FIRST_PAINT_LIMIT / worst_paint, 2),
            f"limit of 200 ms / {slowest}, p95": round(CLICK_LIMIT / clicks[slowest], 2),
        },
        "above_limit": [name for name, ms in clicks.items() if ms > CLICK_LIMIT],
        "pages": pages,
        "actions": actions,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, one in [*pages.items(), *actions.items()]:
        paint = f", first paint {one['first_paint']['p50']:.0f} ms" if "first_paint" in one else ""
        server = one["server_ms"]["p50"]
        print(f"{name}: {one['ms']['p50']:.0f} ms, p95 {one['ms']['p95']:.0f} ms, server {server:.0f} ms{paint}")


_SIZE = {"width": 1280, "height": 900}


class Bench:
    """A browser that looks at a run, again and again.

    Args:
        browser: of Playwright.
        address: of the server.
        arguments: checked options.
    """

    def __init__(self, browser: Any, address: str, arguments: argparse.Namespace) -> None:
        self._browser, self._address = browser, address
        self._n, self._d_sae = arguments.repeats, arguments.d_sae
        self._random = random.Random(0)
        self._timings: dict[str, Timings] = {}

    def pages(self) -> dict[str, dict[str, Any]]:
        """Every page by its address: in a browser that has seen nothing, and in one with scripts in its cache."""
        for name in PAGES:
            print(f"loading {name}", file=sys.stderr)
            for _ in range(max(3, self._n // 3)):
                tab = self._tab()
                tab.load(*self._page(name), self._of(f"{name}, first visit"))
                tab.close()
            tab = self._tab()
            tab.load(*self._page(name), Timings())
            for _ in range(self._n):
                tab.load(*self._page(name), self._of(f"{name}, again"))
            tab.close()
        return self._found()

    def actions(self) -> dict[str, dict[str, Any]]:
        """Everything that is clicked or typed."""
        for action in (self._navigate, self._table, self._search, self._dots, self._colours, self._latents):
            print(f"acting: {action.__name__.strip('_')}", file=sys.stderr)
            tab = self._tab()
            action(tab)
            tab.close()
        return self._found()

    def _navigate(self, tab: Tab) -> None:
        """Links at the top of every page."""
        names = {"overview": "Overview", "latents": "Latents", "map": "Map", "playground": "Playground"}
        tab.load(*self._page("playground"), Timings())
        for number in range(self._n + 1):
            for name, shown in names.items():
                into = self._of(f"link to {name}") if number else Timings()
                tab.act(lambda shown=shown: tab.page.click(f"#pages a:text-is('{shown}')"), PAGES[name][1], into)

    def _table(self, tab: Tab) -> None:
        """Sort, filter, page, open."""
        page = tab.page
        tab.load(*self._page("latents"), Timings())
        for column in ("delta", "effect", "n_active"):
            for _ in range(max(1, self._n // 3)):
                tab.wait(_FIRST_ROW.format("latent"))
                before = page.evaluate(_FIRST_ROW.format("latent"))
                sorted_anew = f"({_FIRST_ROW.format('latent')} || '{before}') !== '{before}'"
                header = f".ag-header-cell[col-id={column}] .ag-header-cell-label"
                tab.act(lambda header=header: page.click(header), sorted_anew, self._of("sort the table"))
        for number in range(self._n):
            latent = self._random.randrange(self._d_sae)
            told = f"{_FIRST_ROW.format('latent')} === '{latent}'"
            self._filter(tab, "latent", str(latent), told, "filter by a number")
            word = ("advice", "birds", "numbers")[number % 3]
            told = f"{_FIRST_ROW.format('explanation')}?.includes('{word}')"
            self._filter(tab, "explanation", word, told, "filter by a text")
        for _ in range(self._n):
            self._page_down(tab)
        for _ in range(self._n):
            self._open_from_table(tab)

    def _filter(self, tab: Tab, column: str, text: str, shown: str, name: str) -> None:
        """Fill one field under the header, then empty it, which does not count."""
        field = f".ag-floating-filter input[aria-label^='{column}']"
        everything = f"document.querySelector('#n-rows').innerText === '{self._d_sae:,} latents'"
        tab.act(lambda: tab.page.fill(field, text), shown, self._of(name))
        tab.page.fill(field, "")
        tab.wait(everything)

    def _page_down(self, tab: Tab) -> None:
        """Far down the table, to rows that were not there before."""
        box = tab.page.locator(".ag-body-viewport").bounding_box()
        tab.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        rows = "[...document.querySelectorAll('.ag-pinned-left-cols-container .ag-row')]"
        last = tab.page.evaluate(f"Math.max(...{rows}.map((row) => Number(row.getAttribute('row-index'))))")
        if last + 2000 > self._d_sae:
            tab.page.evaluate("document.querySelector('.ag-body-viewport').scrollTop = 0")
            tab.page.wait_for_timeout(500)
            last = 100
        is_new = f"Number(row.getAttribute('row-index')) > {last} && row.querySelector('a')?.innerText"
        shown = f"{rows}.filter((row) => {is_new}).length >= 12"
        tab.act(lambda: tab.page.mouse.wheel(0, 600 * 42), shown, self._of("scroll the table to new rows"))

    def _open_from_table(self, tab: Tab) -> None:
        row = self._random.randrange(10)
        link = tab.page.locator(f".ag-row[row-index='{row}'] a")
        tab.page.evaluate("document.querySelector('.ag-body-viewport').scrollTop = 0")
        link.wait_for()
        shown = self._shown(link.inner_text())
        tab.act(link.click, shown, self._of("open a latent from the table"))
        tab.load(*self._page("latents"), Timings())

    def _search(self, tab: Tab) -> None:
        tab.load(*self._page("latents"), Timings())
        for number in range(self._n):
            sentence = SENTENCES[number % len(SENTENCES)]
            first = sentence.split()[0]
            shown = f"document.querySelector('.hits tbody tr')?.innerText.includes('{first}')"
            tab.page.fill("#sentence", sentence)
            tab.act(lambda: tab.page.click("#search"), shown, self._of("search by a sentence (runs the model)"))

    def _dots(self, tab: Tab) -> None:
        """A click on a dot of a figure."""
        for figure, page in (("volcano", "overview"), ("ranks", "overview"), ("map", "map")):
            for _ in range(self._n):
                tab.load(*self._page(page), Timings())
                x, y = tab.page.evaluate(_PLACE_OF_A_DOT, [figure, self._random.random()])
                tab.page.mouse.move(x - 3, y - 3)
                tab.page.mouse.move(x, y)
                tab.wait("document.querySelector('.hoverlayer .hovertext')")
                shown = f"document.querySelector('h1')?.innerText.startsWith('Latent ') && {_SIZES}"
                tab.act(lambda x=x, y=y: tab.page.mouse.click(x, y), shown, self._of(f"click a dot of the {figure}"))

    def _colours(self, tab: Tab) -> None:
        tab.load(*self._page("map"), Timings())
        for number in range(self._n):
            colour = ("density", "label", "change")[number % 3]
            shown = f"document.querySelector('#map .js-plotly-plot').data[0].marker.colorbar.title.text === '{colour}'"
            tab.act(
                lambda colour=colour: tab.page.select_option("#colour-select", colour),
                shown,
                self._of("colour the map"),
            )

    def _latents(self, tab: Tab) -> None:
        """One after the other, each with a label."""
        latent = self._random.randrange(self._d_sae // 2)
        tab.load(f"/latent/{latent}", self._shown(latent), Timings())
        for number in range(self._n):
            tab.page.fill("#label", f"seen {number}")
            saved = "document.querySelector('#label-saved').innerText === 'saved'"
            tab.act(lambda: tab.page.click("#save-label"), saved, self._of("save a label"))
            latent += 1
            tab.act(lambda: tab.page.click("a[rel=next]"), self._shown(latent), self._of("next latent"))

    def _page(self, name: str) -> tuple[str, str]:
        path, shown = PAGES[name]
        if name != "latent":
            return path, shown
        latent = self._random.randrange(self._d_sae)
        return path.format(latent), self._shown(latent)

    def _shown(self, latent: int | str) -> str:
        return f"document.querySelector('h1')?.innerText === 'Latent {latent}' && {_SIZES}"

    def _tab(self) -> Tab:
        return Tab(self._browser.new_context(viewport=_SIZE), self._address)

    def _of(self, name: str) -> Timings:
        return self._timings.setdefault(name, Timings())

    def _found(self) -> dict[str, dict[str, Any]]:
        return {name: one.as_json() for name, one in self._timings.items()}


_PLACE_OF_A_DOT = """
([name, share]) => {
  const graph = document.querySelector(`#${name} .js-plotly-plot`), layout = graph._fullLayout;
  const trace = graph._fullData[graph._fullData.length - 1], place = Math.floor(share * trace.x.length);
  graph.scrollIntoView({ block: "center", behavior: "instant" });
  const box = graph.getBoundingClientRect(), { xaxis, yaxis } = layout;
  return [box.x + xaxis._offset + xaxis.d2p(trace.x[place]), box.y + yaxis._offset + yaxis.d2p(trace.y[place])];
}
"""


def _build(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The run, in a process of its own, whose memory it then gives back."""
    marker = folder / "built.json"
    wanted = {"tokens": arguments.tokens, "d_sae": arguments.d_sae}
    if marker.is_file() and (told := json.loads(marker.read_text(encoding="utf-8")))["of"] == wanted:
        return {"build_seconds": told["seconds"]}
    code = "import json, sys; from pathlib import Path; from explored_run import make_run\n"
    code += "f = Path(sys.argv[1]); (f / 'run').mkdir(parents=True, exist_ok=True)\n"
    code += "print(json.dumps(make_run(f / 'run', f / 'sae', n_tokens=int(sys.argv[2]), d_sae=int(sys.argv[3]))))"
    command = [sys.executable, "-c", code, str(folder), str(arguments.tokens), str(arguments.d_sae)]
    done = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE, text=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    marker.write_text(json.dumps({"of": wanted, "seconds": seconds}), encoding="utf-8")
    return {"build_seconds": seconds}


@contextmanager
def _server(folder: Path, threads: int) -> Iterator[str]:
    """`saetools explore` in a process of its own; its address."""
    from saetools import shipped_path

    adapter = f"organism={shipped_path('adapters/organism')}"
    command = [sys.executable, "-m", "saetools", "explore", str(folder / "run"), "--port", "0"]
    command += ["--adapter", adapter, "--sae", str(folder / "sae")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        told = ""
        for line in process.stdout or ():
            told += line
            if found := re.search(r"at (http://\S+)", line):
                yield found[1].rstrip("/")
                return
        raise SystemExit(f"benchmarks: saetools explore ended: {told}")
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def _chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    place = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if place is None:
        raise SystemExit("benchmarks: expected Chromium on this machine; Debian has it as the package chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield browser
        browser.close()


def _arguments() -> argparse.Namespace:
    parser = results.parser("explorer.py", __doc__.splitlines()[0])
    parser.add_argument("--tokens", type=results.count, default=N_TOKENS)
    parser.add_argument("--d-sae", type=results.count, default=D_SAE)
    parser.add_argument("--repeats", type=results.count, default=30)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="where the run is made, and kept; 8 GiB")
    arguments = results.parse(parser)
    if arguments.quick:
        arguments.tokens, arguments.d_sae, arguments.repeats = 50_000, 4096, 3
    return arguments


if __name__ == "__main__":
    main()
