"""The page: complete, self-contained, well-formed, accessible, and deaf to hostile text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from itertools import pairwise

import pytest
from html_page import HIDDEN, Page
from plotly.offline import get_plotlyjs
from sample_report import HOSTILE

from saetools.report import AnswerRow, PersonaReport, render_html


@pytest.fixture(scope="module")
def html(report: PersonaReport) -> str:
    return render_html(report)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def figures(page: Page) -> list[str]:
    scripts = [(attributes, "".join(text)) for tag, attributes, text in page.elements if tag == "script"]
    return [text for attributes, text in scripts if attributes.get("type") == "application/json"]


def shown(value: float, spec: str) -> str:
    return format(value, spec).replace("-", "\u2212")


def test_page_is_well_formed_and_accessible(page: Page) -> None:
    assert page.attributes("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    anchors = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    assert [attributes["href"] for attributes in page.attributes("a")] == [f"#{anchor}" for anchor in anchors]
    assert len(page.texts("caption")) == len(page.texts("table"))
    assert all(page.texts("caption"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.attributes("th"))
    assert len(page.texts("figcaption")) == len(page.texts("figure")) == 2 + 4
    assert all(page.texts("figcaption"))
    plots = [attributes for attributes in page.attributes("div") if attributes.get("class") == "plot"]
    assert len(plots) == len(figures(page)) == 2 + 2 * 4
    assert all(attributes["aria-label"] for attributes in plots)


def test_page_shows_every_latent_and_number(page: Page, report: PersonaReport) -> None:
    by_name: dict[str, str] = {}
    for text in page.texts("tr"):
        by_name.setdefault(text.split("\n")[0], " ".join(text.split("\n")))
    for row in report.scores:
        assert shown(row.score.mean, ".3f") in by_name[row.model]
    for latent in report.top_latents:
        for text in (
            shown(latent.delta, "+.3f"),
            shown(latent.low, "+.3f") + ", " + shown(latent.high, "+.3f"),
            shown(latent.effect, "+.2f"),
            f"{latent.mean_base:.3f} \u2192 {latent.mean_tuned:.3f}",
            f"{latent.rate_base:.2%} \u2192 {latent.rate_tuned:.2%}".replace("%", " %"),
        ):
            assert text in by_name[str(latent.latent)]
    everything = "\n".join(page.texts("main"))
    for dose in report.dose_response:
        for text in (f"{dose.perplexity:.2f}", shown(dose.score.mean, ".3f"), shown(dose.shift.mean, "+.3f")):
            assert text in everything
    for answer in report.answers:
        assert all(text in everything for text in answer.answers.values() if text.isprintable())
    assert "0.187" in everything
    assert "131,072" in everything
    assert "4f" * 32 in everything
    assert all(finding in page.texts("li") for finding in report.findings)


def test_tables_have_one_row_for_each_thing(html: str, report: PersonaReport) -> None:
    n_rows = {"Forced": 0, "Latents": 0, "Doses": 0, "Fidelity": 0}
    for caption, body in re.findall(r"<caption>(\w+).*?<tbody>(.*?)</tbody>", html, flags=re.DOTALL):
        n_rows[caption] = n_rows.get(caption, 0) + body.count("<tr>")
    assert n_rows["Forced"] == len(report.scores)
    assert n_rows["Latents"] == len(report.top_latents)
    assert n_rows["Doses"] == len(report.dose_response)
    assert n_rows["Fidelity"] == 10


def test_page_loads_nothing(page: Page, html: str) -> None:
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio", "source"}
    assert not [attributes for _, attributes, _ in page.elements if "src" in attributes]
    assert "url(" not in page.texts("style")[0]
    assert "@import" not in page.texts("style")[0]
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    for script in re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_plotly_is_there_once_and_the_rest_is_small(html: str) -> None:
    plotly = get_plotlyjs()
    assert html.count(plotly) == 1
    assert len(html) - len(plotly) < 500_000


def test_hostile_text_is_inert(page: Page, html: str) -> None:
    executable = [attributes for attributes in page.attributes("script") if "type" not in attributes]
    assert len(executable) == 2
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    assert not HIDDEN.search(html.replace(get_plotlyjs(), ""))
    headings, answers = page.texts("h3"), page.texts("blockquote")
    for text in HOSTILE:
        if text.replace("\n", "").isprintable():
            assert text in headings
            assert text in answers
    assert any("right[U+202E]to left[U+202C], [U+200B]zero width, bell[U+0007]" in text for text in answers)
    assert "[U+D83D] lone surrogate" in answers
    assert max(map(len, answers)) > 200_000


@pytest.mark.parametrize("text", [*HOSTILE, "<b>bold</b><a href='javascript:alert(1)'>x</a>"])
def test_hostile_labels_stay_within_their_figure(report: PersonaReport, text: str) -> None:
    hostile = dataclasses.replace(
        report,
        title=text,
        scores=tuple(dataclasses.replace(row, model=text) for row in report.scores[:1]),
        top_latents=tuple(dataclasses.replace(row, promoted=(text,)) for row in report.top_latents[:2]),
        dose_response=tuple(dataclasses.replace(row, model=text, edit=text) for row in report.dose_response[:3]),
        answers=(AnswerRow(text, {text: text}),),
    )
    page = Page(render_html(hostile))
    drawn = figures(page)
    assert len(drawn) == 4
    assert len(page.attributes("script")) == len(drawn) + 2
    for figure in drawn:
        assert not set("<>&\u2028\u2029") & set(figure)
        tags = re.findall(r"<[^>]*>", json.dumps(json.loads(figure)))
        assert set(tags) <= {"<br>", "<b>", "</b>"}
        assert "<b>bold" not in json.dumps(json.loads(figure))


def test_numbers_that_are_not_finite_and_single_doses(report: PersonaReport) -> None:
    dose = dataclasses.replace(report.dose_response[0], perplexity=float("inf"))
    html = render_html(dataclasses.replace(report, dose_response=(dose,), perplexity={}))
    assert "\u221e" in html
    assert all(json.loads(figure, parse_constant=pytest.fail) for figure in figures(Page(html)))


def test_an_empty_report_renders() -> None:
    empty = PersonaReport("Nothing", (), (), (), (), {}, (), {}, {})
    page = Page(render_html(empty))
    assert figures(page) == []
    assert page.texts("table") == []


def test_fidelity_on_several_models(report: PersonaReport) -> None:
    both = {"base": {"fvu": 0.1, "fvu_low": 0.08, "fvu_high": 0.12, "kl": 0.2}, "tuned": {"fvu": 0.35}, "d_sae": 8192}
    page = Page(render_html(dataclasses.replace(report, sae=both)))
    table = next(text for text in page.texts("table") if text.startswith("Fidelity"))
    assert [
        header
        for header in ("base", "tuned", "FVU", "0.100", "[0.080, 0.120]", "0.350", "\u2013")
        if header not in table
    ] == []


def test_warnings_are_drawn(report: PersonaReport) -> None:
    html = render_html(
        dataclasses.replace(report, warnings=("response: the SAE is blind", "<script>alert(1)</script>"))
    )
    notes = [attributes for attributes in Page(html).attributes("div") if attributes.get("class") == "warnings"]
    assert len(notes) == 1
    assert "<li>response: the SAE is blind</li>" in html
    assert "<li>&lt;script&gt;" in html
    assert 'class="warnings"' not in render_html(report)
