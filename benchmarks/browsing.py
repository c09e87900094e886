"""Milliseconds of what is done in a browser: from the event of a user to the frame that shows what came of it.

A script in every document notes when the event came, looks at every frame whether a condition holds, and when it does,
what time it is once that frame is painted. It outlives the document, so that a click that loads another page counts to
what that page shows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_WATCH = """
(() => {
  const kept = sessionStorage;
  window.documentName = String(Math.random());
  const note = (event) => {
    if (kept.getItem("test") && !kept.getItem("start")) kept.setItem("start", performance.timeOrigin + event.timeStamp);
  };
  for (const name of ["pointerdown", "keydown", "input", "change", "wheel"]) addEventListener(name, note, true);
  const look = () => {
    const start = kept.getItem("start"), left = kept.getItem("left") === window.documentName;
    if (start && !left && !kept.getItem("seen") && new Function("return " + kept.getItem("test"))()) {
      kept.setItem("seen", "1");
      requestAnimationFrame(() => setTimeout(() => {
        const from = kept.getItem("left") ? performance.timeOrigin : Number(start);
        const to = performance.timeOrigin + performance.now();
        const asked = performance.getEntriesByType("resource").filter((one) =>
          one.name.includes("_dash-update-component") && performance.timeOrigin + one.startTime >= from);
        kept.setItem("took", JSON.stringify({
          ms: to - from,
          server_ms: asked.reduce((sum, one) => sum + one.responseStart - one.requestStart, 0),
          bytes: asked.reduce((sum, one) => sum + one.decodedBodySize, 0),
        }));
      }));
    }
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
  new PerformanceObserver((list) => { for (const one of list.getEntries()) window.largestPaint = one.startTime; })
    .observe({ type: "largest-contentful-paint", buffered: true });
})();
"""
_PATIENCE = 60.0  # seconds


@dataclass
class Timings:
    """Of one page or action."""

    ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    """Waiting for answers of the server in it."""
    first_paint: list[float] = field(default_factory=list)
    """Of pages only."""
    largest_paint: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    """Of the server's answers."""

    def as_json(self) -> dict[str, Any]:
        """Median and 95th percentile of each, and all of the first."""
        found: dict[str, Any] = {"n": len(self.ms)}
        for name in ("ms", "server_ms", "first_paint", "largest_paint"):
            if figures := sorted(getattr(self, name)):
                found[name] = {"p50": _rank(figures, 0.5), "p95": _rank(figures, 0.95), "max": round(figures[-1], 1)}
        found["answer_bytes"] = int(_rank(sorted(self.bytes), 0.5)) if self.bytes else 0
        return found | {"all_ms": [round(one, 1) for one in self.ms]}


def _rank(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))], 1)


class Tab:
    """A tab of Chromium with the script in it.

    Args:
        context: of Playwright; the tab is its only one.
        address: of the server, without a slash at its end.
    """

    def __init__(self, context: Any, address: str) -> None:
        self._context, self.address = context, address
        context.add_init_script(_WATCH)
        self.page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.goto(address + "/assets/explore.css")  # of the same origin, so that the script can keep things

    def load(self, path: str, shown: str, into: Timings) -> None:
        """Time the loading of a page, by its address.

        Args:
            path: the page.
            shown: an expression of JavaScript that is true once it shows what it is about.
            into: where the times go.
        """
        self._arm(shown, load=True)
        self.page.goto(self.address + path, wait_until="commit")
        self._took(into)
        paints = self.page.evaluate(
            "[performance.getEntriesByName('first-contentful-paint')[0]?.startTime, window.largestPaint]"
        )
        into.first_paint.append(paints[0] or 0.0)
        into.largest_paint.append(paints[1] or 0.0)

    def act(self, do: Callable[[], Any], shown: str, into: Timings) -> None:
        """Time an action, from its first event.

        Args:
            do: the action.
            shown: an expression of JavaScript that is false before and true once it has happened.
            into: where the times go.
        """
        assert not self.page.evaluate(f"Boolean({shown})"), f"before the action: {shown}"
        self._arm(shown)
        do()
        self._took(into)

    def wait(self, shown: str) -> None:
        """Until an expression is true."""
        self.page.wait_for_function(shown)

    def close(self) -> None:
        """And forget all that it has cached."""
        self._context.close()

    def _arm(self, shown: str, *, load: bool = False) -> None:
        """Have the script look out; with `load`, in documents that come after this one only."""
        self.page.evaluate(
            "([test, load]) => { sessionStorage.clear(); sessionStorage.setItem('test', test);"
            " if (load) sessionStorage.setItem('left', window.documentName), sessionStorage.setItem('start', '0'); }",
            [shown, load],
        )

    def _took(self, into: Timings) -> None:
        end = time.monotonic() + _PATIENCE
        while not (told := self.page.evaluate("sessionStorage.getItem('took')")):
            if time.monotonic() > end:
                raise TimeoutError(self.page.evaluate("JSON.stringify({...sessionStorage})"))
            time.sleep(0.02)
        took = json.loads(told)
        self.page.evaluate("sessionStorage.clear()")
        into.ms.append(took["ms"])
        into.server_ms.append(took["server_ms"])
        into.bytes.append(took["bytes"])
