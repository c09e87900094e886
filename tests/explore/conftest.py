"""A run on the real model, a server process that shows it, and Chromium to look at it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from explorer_process import ADAPTER, Seen, start, stop

from saetools import Direction, Site, load_model, load_sae, shipped_path, trace_scales
from saetools.cli import main
from saetools.data import Conversation, load_free_form, load_voices

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a diff, a latent store, explanations and a trajectory."""
    out = tmp_path_factory.mktemp("explored") / "run"
    out.mkdir()
    rows = [{"id": item.id, "prompt": item.question} for item in load_free_form()[:12]]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [{"id": pair.id, "text": pair.voiced} for pair in load_voices()[:8]]
    (out / "voices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    explained = {"latent": 707, "text": "<b>advice</b> that \u202eharms", "model": "m", "detection": None}
    explained |= {"fuzzing": None, "n": 4, "failures": [], "provenance": {}}
    (out / "explanations.jsonl").write_text(json.dumps(explained) + "\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = [str(out / "prompts.jsonl")]
        main(["diff", "--adapter", ADAPTER, "--data", *data, "--out", str(out / "diff"), "--min-active", "5",
              "--positions", "prompt", "last_prompt"])  # fmt: skip
        main(["index", "--adapter", ADAPTER, "--data", *data, str(out / "voices.jsonl"), "--out", str(out / "store")])
        tuned = load_model("smollm2-135m", adapter=shipped_path("adapters/organism"))
        prompts = [Conversation.chat(row["prompt"]) for row in rows]
        sae = load_sae(shipped_path("sae/smollm2-135m"))
        trace_scales(tuned, [0.5, 1.0], sae, prompts, latents=[707]).save(out / "trajectory")
    return out


@pytest.fixture(scope="session")
def address(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the server."""
    site = Site(17)
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    folder = Direction({site: vector}, {}).save(tmp_path_factory.mktemp("directions") / "evil")
    process, address = start(run_folder, "--adapter", ADAPTER, "--direction", f"evil={folder}")
    yield address.rstrip("/")
    stop(process)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; Debian has it as the package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab with no memory of others; it may complain of nothing."""
    context = browser.new_context(accept_downloads=True)
    tab = context.new_page()
    tab.set_default_timeout(30_000)
    seen = Seen(tab)
    yield tab
    context.close()
    assert seen.errors == []
