"""The site of the documentation: it builds, its links lead somewhere, and nothing public is missing from it."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import UnionType
from typing import get_origin
from urllib.parse import unquote, urlsplit

import markdown
import pytest

import saetools
from saetools.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
CARDS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "data").rglob("README.md"))


class Page(HTMLParser):
    """What a page defines, links and loads, and the names in its signatures that are no links."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.unlinked: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif name == "src" or (name == "href" and tag == "link"):
                self.loads.append(value or "")
            elif name == "title" and tag == "span":
                self.unlinked.add(value or "")


def broken(at: Path, page: Page, pages: dict[Path, Page], root: Path) -> Iterator[str]:
    """What leads to a file that does not exist, or to a place that is not in it; what leads elsewhere is left out."""
    for link in (*page.links, *page.loads):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        path = unquote(parts.path)
        start = root if path.startswith("/") else at.parent
        target = (start / path.lstrip("/")).resolve() if path else at
        if not target.exists() or (parts.fragment and unquote(parts.fragment) not in pages[target].ids):
            yield f"{at.name}: {link}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site").resolve()
    # not --quiet: it would keep warnings from --strict, too
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert [link for at, page in pages.items() for link in broken(at, page, pages, site)] == []
    assert [load for page in pages.values() for load in page.loads if urlsplit(load).netloc] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not any(re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style) for style in styles)


def test_broken_links_are_found(tmp_path: Path) -> None:
    at = tmp_path / "a.html"
    at.touch()
    page = Page('<p id="x"><a href="#x"><a href="a.html#x"><a href="#y"><a href="b.html"><img src="c.png">')
    assert list(broken(at, page, {at: page}, tmp_path)) == ["a.html: #y", "a.html: b.html", "a.html: c.png"]


def test_every_public_name_has_an_entry(pages: dict[Path, Page]) -> None:
    ids = {name for page in pages.values() for name in page.ids}
    packages = [info.name for info in pkgutil.iter_modules(saetools.__path__, "saetools.") if info.ispkg]
    for path in ("saetools", *packages):
        module = importlib.import_module(path)
        for name in [] if path == "saetools.cli" else getattr(module, "__all__", []):
            value = getattr(module, name)
            top = [f"saetools.{name}"] if getattr(saetools, name, None) is value else []
            assert ids & {f"{path}.{name}", *top}, f"{path}.{name}"
    assert {f"saetools.{name}" for name in saetools.__all__} <= ids
    assert {name for name, value in vars(saetools.errors).items() if isinstance(value, type)} <= {
        name.removeprefix("saetools.errors.") for name in ids
    }


def test_types_in_signatures_are_links(pages: dict[Path, Page]) -> None:
    for name in {name for page in pages.values() for name in page.unlinked}:
        if re.fullmatch(r"saetools(\.[a-zA-Z]\w*)+", name):
            value = pkgutil.resolve_name(name)
            assert not isinstance(value, type | UnionType), name
            assert get_origin(value) is None, name


def test_every_command_has_an_entry(site: Path, pages: dict[Path, Page]) -> None:
    ids = pages[site / "reference" / "command_line.html"].ids
    assert {f"saetools-{name}" for name in COMMANDS} | {"saetools-sae-verify"} <= ids


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "benchmarks/README.md", *CARDS])
def test_links_of_readmes_lead_somewhere(name: str) -> None:
    at = ROOT / name
    page = Page(markdown.markdown(at.read_text(encoding="utf-8"), extensions=["extra", "toc"]))
    assert list(broken(at, page, {at: page}, ROOT)) == []
