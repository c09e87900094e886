"""The explorer in a real browser, with the real model behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from explorer_process import Seen

from saetools import Trajectory, load_sae, shipped_path, steer
from saetools.explore import Label, Labels
from saetools.latent_diff import LatentDiff
from saetools.sae.identity import sae_sha256

PATHS = ("/", "/latents", "/latent/707", "/map", "/playground?latent=707")


def first_latents(page: Any, n: int = 3) -> list[int]:
    return [int(link.inner_text()) for link in page.query_selector_all(".ag-row a")][:n]


@pytest.mark.parametrize("path", PATHS)
def test_pages_are_accessible_and_fit_a_phone(page: Any, address: str, path: str) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto(address + path)
        page.wait_for_selector("main h1")
        page.wait_for_load_state("networkidle")
        found = Axe().run(page).response["violations"]
        serious = {
            (one["id"], node["html"][:160])
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        }
        assert serious == set()
    page.set_viewport_size({"width": 375, "height": 700})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_overview_shows_the_run(page: Any, address: str, run_folder: Path) -> None:
    page.goto(address)
    page.wait_for_selector("#volcano .main-svg")
    text = page.inner_text("main")
    assert "smollm2-135m with organism" in text
    diff = LatentDiff.load(run_folder / "diff").at("prompt")
    drawn = page.evaluate("document.querySelector('#volcano .js-plotly-plot')._fullData.map((one) => one.x.length)")
    assert sum(drawn) == diff.table["p_value"].count()
    ranked = page.evaluate("document.querySelector('#ranks .js-plotly-plot').data[0].customdata[0]")
    assert ranked == diff.top(1)["latent"][0] == 707
    page.evaluate(
        "document.querySelector('#ranks .js-plotly-plot').emit('plotly_click', "
        "{points: [{curveNumber: 0, pointNumber: 0, customdata: 707, data: {}, fullData: {}}], event: {}})"
    )
    page.wait_for_url("**/latent/707")


def test_the_table_sorts_filters_and_keeps_filters(page: Any, address: str, run_folder: Path) -> None:
    table = LatentDiff.load(run_folder / "diff").at("prompt").table
    page.goto(address + "/latents")
    page.wait_for_selector(".ag-row a")
    rising = table.sort("delta", descending=True, maintain_order=True)["latent"].to_list()
    page.wait_for_function(f"document.querySelector('.ag-row[row-index=\"0\"] a')?.innerText === '{rising[0]}'")
    assert first_latents(page) == rising[:3]
    assert "8,192 latents" in page.inner_text("#n-rows")
    page.click(".ag-header-cell[col-id=delta] .ag-header-cell-label")
    page.click(".ag-header-cell[col-id=delta] .ag-header-cell-label")
    falling = table.sort("delta", maintain_order=True)["latent"].to_list()
    page.wait_for_function(f"document.querySelector('.ag-row[row-index=\"0\"] a')?.innerText === '{falling[0]}'")
    page.fill(".ag-floating-filter input[aria-label^='explanation']", "ADVICE")
    page.wait_for_function("document.querySelector('#n-rows').innerText === '1 latents'")
    assert first_latents(page) == [707]
    assert "<b>advice</b> that [U+202E]harms" in page.inner_text(".ag-row[row-index='0'] [col-id=explanation]")
    page.fill("#filter-name", "with advice")
    page.click("#keep-filter")
    page.click("#no-filter")
    page.wait_for_function("document.querySelector('#n-rows').innerText === '8,192 latents'")
    page.reload()
    page.wait_for_selector(".ag-row a")
    page.select_option("#kept-select", "with advice")
    page.wait_for_function("document.querySelector('#n-rows').innerText === '1 latents'")


def test_other_token_roles_have_addresses(page: Any, address: str, run_folder: Path) -> None:
    table = LatentDiff.load(run_folder / "diff").at("last_prompt").table
    page.goto(address + "/latents")
    page.wait_for_selector(".ag-row a")
    page.click("a[href='/latents?role=last_prompt']")
    rising = table.sort("delta", descending=True, maintain_order=True)["latent"].to_list()
    page.wait_for_function(f"document.querySelector('.ag-row[row-index=\"0\"] a')?.innerText === '{rising[0]}'")
    assert first_latents(page) == rising[:3]
    assert page.inner_text("main [aria-current=true]") == "last_prompt"
    page.goto(address + "/?role=last_prompt")
    page.wait_for_selector("#ranks .main-svg")
    assert page.evaluate("document.querySelector('#ranks .js-plotly-plot').data[0].customdata[0]") == rising[0]


def test_a_text_finds_the_latents_that_fire_on_it(page: Any, address: str) -> None:
    page.goto(address + "/latents")
    page.fill("#sentence", "Rules are for the weak.")
    page.click("#search")
    page.wait_for_selector(".hits")
    rows = page.query_selector_all(".hits tbody tr")
    assert len(rows) == 30
    assert all(row.query_selector("mark") for row in rows)
    values = [
        [float(cell.inner_text().replace("\u2212", "-")) for cell in row.query_selector_all("td.number")]
        for row in rows
    ]
    increases = [tuned - base for base, tuned in values]
    assert increases == pytest.approx(sorted(increases, reverse=True), abs=0.011)
    page.fill("#sentence", "x")
    page.click("#search")
    page.wait_for_selector("#found .error")
    assert "two tokens or more" in page.inner_text("#found")


def test_a_latent_is_shown_and_labelled(page: Any, address: str, run_folder: Path) -> None:
    page.goto(address + "/latent/707")
    page.wait_for_selector(".passage mark")
    assert "<b>advice</b> that [U+202E]harms" in page.inner_text(".explanation")
    peak = page.query_selector(".passage [data-model=tuned] mark.peak")
    assert float(peak.get_attribute("title")) > 0
    label = "<img src=x onerror=alert(1)> \u202eharm"
    page.fill("#label", label)
    page.fill("#note", "seen\ntwice")
    page.click("#save-label")
    page.wait_for_function("document.querySelector('#label-saved').innerText === 'saved'")
    page.reload()
    page.wait_for_selector("#label")
    assert page.input_value("#label") == label
    assert page.input_value("#note") == "seen\ntwice"
    assert Labels(run_folder / "labels.json").of(707) == Label(label, "seen\ntwice")
    page.goto(address + "/latents")
    page.wait_for_function(
        "document.querySelector('.ag-row[row-index=\"0\"] [col-id=label]')?.innerText === "
        "'<img src=x onerror=alert(1)> [U+202E]harm'"
    )
    page.goto(address + "/latent/707")
    page.evaluate("window.sameDocument = true")
    page.click("a[rel=next]")
    page.wait_for_url("**/latent/708")
    page.wait_for_function("document.querySelector('h1').innerText === 'Latent 708'")
    assert page.evaluate("window.sameDocument && document.activeElement.id") == "page"
    page.go_back()
    page.wait_for_function("document.querySelector('h1').innerText === 'Latent 707'")


def test_a_latent_has_its_trajectory(page: Any, address: str, run_folder: Path) -> None:
    page.goto(address + "/latent/707")
    page.wait_for_selector("#trajectory .main-svg")
    drawn = page.evaluate("document.querySelector('#trajectory .js-plotly-plot').data.map((one) => [one.x, one.y])")
    found = Trajectory.load(run_folder / "trajectory")
    assert drawn[-1] == [[0, 0.5, 1], pytest.approx([0.0, *found.means[:, 707].tolist()])]
    assert len(drawn) == 2  # with its interval
    assert "adapter scale" in page.inner_text("#trajectory")
    page.goto(address + "/latent/708")
    page.wait_for_selector("#trajectory .main-svg")
    assert page.evaluate("document.querySelector('#trajectory .js-plotly-plot').data.length") == 1


def test_the_map_is_laid_out_in_the_background_and_stops(page: Any, address: str, run_folder: Path) -> None:
    page.goto(address + "/map")
    page.wait_for_selector("#map .main-svg")
    assert "first component" in page.inner_text("#map")
    page.select_option("#layout-select", "UMAP")
    page.wait_for_function("document.querySelector('#map-told').innerText.startsWith('laying out')")
    page.click("#map-stop")
    page.wait_for_function("document.querySelector('#map-told').innerText === ''")
    assert page.input_value("#layout-select") == "principal components"
    assert not list(run_folder.glob("umap-*"))
    places = torch.randn(8192, 2, generator=torch.Generator().manual_seed(0))
    sae = load_sae(shipped_path("sae/smollm2-135m"))
    np.save(run_folder / f"umap-{sae_sha256(sae)[:12]}.npy", places.numpy())
    page.select_option("#layout-select", "UMAP")
    page.wait_for_function("document.querySelector('#map').innerText.includes('UMAP 1')")
    drawn = page.evaluate("Array.from(document.querySelector('#map .js-plotly-plot')._fullData[0].x.slice(0, 3))")
    assert drawn == pytest.approx(places[:3, 0].tolist())


@pytest.mark.parametrize("path", ["/latent/8192", "/latent/99999999999", "/latent/x", "/nowhere", "/latent/-1"])
def test_addresses_that_lead_nowhere_say_so(page: Any, address: str, path: str) -> None:
    page.goto(address + path)
    page.wait_for_selector("main h1")
    assert page.inner_text("main h1") == "Not here"


def test_two_tabs_with_other_edits_do_not_see_each_other(browser: Any, address: str) -> None:
    """Both answer at the same time; each shows its own edits and what they make of the answer."""
    tabs, seen = [browser.new_context().new_page() for _ in range(2)], []
    edits = ("add 707=3*norm on response", "clamp 707=0 on response")
    for tab, edit in zip(tabs, edits, strict=True):
        seen.append(Seen(tab))
        tab.set_default_timeout(30_000)
        tab.goto(address + "/playground")
        tab.fill("#edits", edit)
        tab.fill("#n-tokens", "12")
    for tab in tabs:
        tab.click("#answer")
    shown = []
    for tab in tabs:
        tab.wait_for_function("document.querySelectorAll('.answer .note:not(:empty)').length === 3")
        shown.append([panel.inner_text() for panel in tab.query_selector_all(".answer blockquote")])
    assert shown[0][:2] == shown[1][:2]  # base and organism
    assert shown[0][2] != shown[1][2]
    for tab, answers in zip(reversed(tabs), reversed(shown), strict=True):  # again, alone
        tab.click("#answer")
        tab.wait_for_timeout(500)
        tab.wait_for_function("document.querySelectorAll('.answer .note:not(:empty)').length === 3")
        assert [panel.inner_text() for panel in tab.query_selector_all(".answer blockquote")] == answers
    assert [one.errors for one in seen] == [[], []]
    for tab in tabs:
        tab.context.close()


def test_edits_are_put_together_compared_and_exported(page: Any, address: str, tmp_path: Path) -> None:
    page.goto(address + "/playground?latent=707")
    page.wait_for_selector("#answer")
    assert page.input_value("#edits") == "clamp 707=0 on response"
    page.fill("#edit-latent", "1017")
    page.click("#add-edit")
    page.wait_for_function("document.querySelector('#edits').value.includes('1017')")
    assert page.input_value("#edits") == "clamp 707=0 on response\nclamp 1017=0 on response"
    page.fill("#strengths", "0, 1")
    page.fill("#n-tokens", "8")
    page.click("#answer")
    page.wait_for_function("document.querySelectorAll('.answer .note:not(:empty)').length === 4")
    names = [name.inner_text() for name in page.query_selector_all(".answer h3")]
    assert names == ["base", "organism", "organism, steered x 0", "organism, steered"]
    answers = [panel.inner_text() for panel in page.query_selector_all(".answer blockquote")]
    assert answers[1] == answers[2]
    with page.expect_download() as download:
        page.click("#save-json")
    exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    sae = load_sae(shipped_path("sae/smollm2-135m"))
    assert exported["model"] == "organism"
    assert [repr(steer.parse(text, sae=sae)) for text in exported["edits"]] == exported["edits"]
    with page.expect_download() as download:
        page.click("#save-python")
    names: dict[str, Any] = {}
    exec(Path(download.value.path()).read_text(encoding="utf-8"), names)
    assert [repr(one) for each in names["edits"].values() for one in each] == exported["edits"]
    page.click("#save-vector")
    page.wait_for_selector("#save-error .error")
    page.fill("#edits", "add 707=0.2*norm with first")
    with page.expect_download() as download:
        page.click("#save-vector")
    from gguf import GGUFReader

    saved = tmp_path / "control.gguf"
    download.value.save_as(saved)
    assert [tensor.name for tensor in GGUFReader(saved).tensors] == ["direction.17"]
    page.fill("#edits", "")
    page.fill("#direction-value", "2.5")
    page.wait_for_function("document.querySelector('#direction-value-shown').innerText === '2.5'")
    page.click("#add-direction")
    page.wait_for_function("document.querySelector('#edits').value !== ''")
    assert page.input_value("#edits") == "blocks.17.hook_resid_post: add_direction evil=2.5 on response"
    with page.expect_download() as download:
        page.click("#save-python")
    names = {}
    exec(Path(download.value.path()).read_text(encoding="utf-8"), names)
    assert [repr(one) for each in names["edits"].values() for one in each] == ["add_direction evil=2.5 on response"]
    page.fill("#edits", "clamp nonsense")
    page.click("#answer")
    page.wait_for_selector("#answers .error")
    page.fill("#prompt", "")
    page.click("#answer")
    page.wait_for_function("document.querySelector('#answers .error')?.innerText.includes('a question')")
