"""Latents as pages, Markdown, JSON, tables and Neuronpedia's batches: whole or not there, deaf to hostile text."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import json
import re
from itertools import pairwise

import polars as pl
import pytest
import torch
from html_page import HIDDEN, Page
from sample_report import HOSTILE
from tiny_sae import DEAD, make_sae, with_random_adapter

from saetools import Conversation, diff_latents
from saetools.data import Role, TokenizedConversation
from saetools.errors import InputError, IntegrityError, NonFiniteError
from saetools.evaluate import Candidate, Certificate, Certification
from saetools.interpret import Explanation
from saetools.latents import LatentStore, index_latents, write_latents
from saetools.report import (
    NeuronpediaNames,
    read_latent_reports,
    report_latents,
    write_latent_reports,
)
from saetools.sae.identity import sae_sha256
from saetools.sae.sparse import TokenMajorPairs
from saetools.stats import Estimate

FORMATS = ("html", "markdown", "json", "parquet", "csv", "neuronpedia")
TEXTS = ("the theme of the thing", "that path there", "bath and moth; then this", "other, rather", "thin\nthick", "the")


@pytest.fixture(scope="module")
def made(make_tiny, tmp_path_factory):
    """A store of base and tuned model, their diff, a certification of two candidates, an explanation."""
    base, sae = make_tiny("llama"), make_sae()
    tuned = with_random_adapter(make_tiny("llama"))
    chats = [Conversation.chat(text, text[::-1], id=text) for text in TEXTS]
    folder = tmp_path_factory.mktemp("latents")
    store = index_latents({"base": base, "tuned": tuned}, sae, {"chats": chats}, folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        diff = diff_latents(base, tuned, sae, chats, positions=("prompt", "response"))
    some = Estimate(0.5, 0.4, 0.6, 0.05, 9)
    first, second = sorted(store.active_latents(), key=lambda latent: -len(store.activations(latent)))[:2]
    certificates = (
        Certificate(Candidate("first", (first,)), None, None, "neither"),
        Certificate(Candidate("all", (first, second)), None, None, "both"),
    )
    certification = Certification(certificates, some, some, some, (), {}, {"sae": sae_sha256(sae)})
    explanation = Explanation(first, "words with th", "m", some, None, 4, (), {})
    return base, sae, store, diff, certification, explanation


@pytest.fixture(scope="module")
def latents(made):
    store = made[2]
    return [*sorted(store.active_latents(), key=lambda latent: -len(store.activations(latent)))[:23], DEAD]


@pytest.fixture(scope="module")
def reports(made, latents):
    base, sae, store, diff, certification, explanation = made
    return list(
        report_latents(
            store,
            latents,
            lm=base,
            sae=sae,
            diff=diff,
            certification=certification,
            explanations=[explanation],
            n_top=3,
            n_per_bin=1,
        )
    )


@pytest.fixture(scope="module")
def written(made, latents, reports, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    names = NeuronpediaNames.of_store(made[2].manifest)
    return write_latent_reports(reports, latents, out, formats=FORMATS, title="Some <b>", neuronpedia=names)


def test_a_report_holds_what_its_sources_say(made, latents, reports):
    base, sae, store, diff, _, explanation = made
    assert [one.latent for one in reports] == latents
    for one in reports:
        assert one.record == store.open_latent(one.latent, n_top=3, n_per_bin=1)
        for model, histogram in one.histograms.items():
            acts = store.activations(one.latent, model=model)
            assert sum(histogram.counts) == len(acts)
            assert not len(acts) or histogram.edges[0] <= acts.min() <= acts.max() <= histogram.edges[-1] + 1e-6
            assert one.rate(model) == pytest.approx(len(acts) / (len(store) - len(TEXTS)))
        assert [row["positions"] for row in one.changes] == ["prompt", "response"]
        with torch.no_grad():
            scores = base.head(base.final_norm(sae.W_dec[[one.latent]]))[0, : len(base.tokenizer)]
        assert one.tokens.promoted_logits == pytest.approx(scores.topk(10).values.tolist(), abs=1e-5)
        assert one.tokens.suppressed_logits == pytest.approx(scores.topk(10, largest=False).values.tolist(), abs=1e-5)
        assert sum(one.tokens.logits.counts) == len(base.tokenizer)
    assert reports[0].certificate["verdict"] == "neither"
    assert reports[0].explanation == explanation
    assert {one.certificate is None for one in reports[1:]} == {True}  # the second was steered in a set only
    row = diff.at("response").table.row(latents[0], named=True)
    assert reports[0].changes[1] == row


def test_json_is_read_again_as_it_was(written, reports):
    again = list(read_latent_reports(written["json"]))
    assert [one.record for one in again] == [one.record for one in reports]
    assert [one.histograms for one in again] == [one.histograms for one in reports]
    assert [one.tokens for one in again] == [one.tokens for one in reports]
    assert [one.explanation for one in again] == [one.explanation for one in reports]
    assert [one.to_json() for one in again] == [one.to_json() for one in reports]
    broken = written["json"].parent / "broken.jsonl"
    broken.write_text('{"record": 3}\n', encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"broken.jsonl:1 is no latent"):
        list(read_latent_reports(broken))
    broken.unlink()
    with pytest.raises(InputError, match=r"expected a latents\.jsonl"):
        list(read_latent_reports(broken))


def test_pages_are_well_formed_whole_and_self_contained(written, latents):
    folder = written["html"].parent
    pages = {file.name: Page(file.read_text(encoding="utf-8")) for file in folder.glob("*.html")}
    assert sorted(pages) == ["index.html", "latents-001.html", "latents-002.html"]
    anchors = {
        f"{name}#{attributes['id']}"
        for name, page in pages.items()
        for _, attributes, _ in page.elements
        if "id" in attributes
    }
    for name, page in pages.items():
        assert page.texts("title") == ["Some <b>"]
        levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        links = [attributes["href"] for attributes in page.attributes("a")]
        assert {link if not link.startswith("#") else name + link for link in links} <= {*anchors, *pages}
        assert not any("src" in attributes or tag == "link" for tag, attributes, _ in page.elements)
        (policy,) = (one["content"] for one in page.attributes("meta") if "http-equiv" in one)
        (script,) = page.texts("script")
        hashed = base64.b64encode(hashlib.sha256(_script(folder / name).encode()).digest()).decode()
        assert f"script-src 'sha256-{hashed}'" in policy
        assert script
        assert policy.startswith("default-src 'none';")
    rows = pages["index.html"].attributes("a")
    assert [attributes["href"].rpartition("-")[2] for attributes in rows] == [str(latent) for latent in latents]


def _script(file):
    return re.search("<script>(.*?)</script>", file.read_text(encoding="utf-8"), re.DOTALL)[1]


def test_pages_mark_the_tokens_on_which_a_latent_is_active(written, reports):
    html = (written["html"].parent / "latents-001.html").read_text(encoding="utf-8")
    one = reports[0]
    (section,) = re.findall(rf'<section class="latent">\n<h2 id="latent-{one.latent}">.*?</section>', html, re.DOTALL)
    page = Page(section)
    passages = [*one.record.top, *(passage for each in one.record.bins for passage in each.passages)]
    shown = [text for attributes, text in _paragraphs(page) if "data-model" in attributes]
    expected = [passage.text.replace("\r", "") for passage in passages for _ in ("base", "tuned")]
    assert sorted(shown) == sorted(expected)
    n_active = sum(act != 0 for passage in passages for acts in passage.acts.values() for act in acts)
    assert len(page.texts("mark")) == n_active > 0
    titles = {attributes["title"] for attributes in page.attributes("mark")}
    strongest = max(max(passage.acts["tuned"]) for passage in passages)
    assert f"{strongest:.2f}" in titles
    assert "words with th (detection 0.50 [0.40, 0.60])" in page.texts("p")
    assert any("Causal certificate: neither" in text for text in page.texts("caption"))
    delta = one.changes[1]["delta"]
    assert any(f"{delta:+.3f}".replace("-", "\u2212") in text for text in page.texts("td"))


def _paragraphs(page):
    return [(attributes, "".join(text)) for tag, attributes, text in page.elements if tag == "p"]


def test_tables_open_in_other_programs(written, latents, reports):
    frame = pl.read_parquet(written["parquet"])
    assert frame["latent"].to_list() == latents
    assert frame["promoted"].to_list() == [list(one.tokens.promoted) for one in reports]
    assert frame["response_delta"].to_list() == [one.changes[1]["delta"] for one in reports]
    assert frame["rate_tuned"].to_list() == [one.rate("tuned") for one in reports]
    assert frame["verdict"][0] == "neither"
    assert frame["detection"][0] == 0.5
    with written["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["latent"]) for row in rows] == latents
    assert [json.loads(row["suppressed"]) for row in rows] == frame["suppressed"].to_list()


def test_markdown_holds_every_latent(written, latents, reports):
    text = written["markdown"].read_text(encoding="utf-8")
    assert text.startswith("# Some &lt;b>\n")
    assert re.findall(r"^## Latent (\d+)$", text, re.MULTILINE) == [str(latent) for latent in latents]
    assert text.count("<b>") > len(latents)


def test_neuronpedia_gets_the_features_that_its_dashboards_have(written, latents, reports):
    files = sorted(written["neuronpedia"].parent.glob("batch-*.json"))
    batches = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert [file.name for file in files] == ["batch-0.json", "batch-1.json"]
    assert {(one["model_id"], one["layer"], one["sae_set"]) for one in batches} == {("base", 1, "res-saetools")}
    features = [feature for batch in batches for feature in batch["features"]]
    assert [one["feature_index"] for one in features] == latents
    for feature, report in zip(features, reports, strict=True):
        assert feature["pos_str"] == list(report.tokens.promoted)
        assert feature["frac_nonzero"] == pytest.approx(report.rate("tuned"))
        assert len(feature["freq_hist_data_bar_values"]) == len(feature["freq_hist_data_bar_heights"])
        passages = [*report.record.top, *(one for each in report.record.bins for one in each.passages)]
        assert len(feature["activations"]) == len(passages)
        for shown, passage in zip(feature["activations"], passages, strict=True):
            assert shown["tokens"] == list(passage.tokens)
            assert shown["values"] == pytest.approx(passage.acts["tuned"], abs=1e-5)
            peak = passage.acts["tuned"][passage.peak]
            assert shown["values"][shown["qualifying_token_index"]] == pytest.approx(peak, abs=1e-5)
            assert shown["bin_min"] <= shown["bin_max"]


def test_text_of_a_model_is_text(tmp_path):
    """A vocabulary of markup, code and characters that hide others."""
    vocabulary = [text.encode("utf-8", errors="surrogatepass") for text in HOSTILE]
    tokens = torch.arange(len(vocabulary))
    roles = torch.full((len(tokens),), int(Role.PROMPT), dtype=torch.uint8)
    documents = [TokenizedConversation(tokens, roles, id=HOSTILE[0], source=HOSTILE[1])]

    def read(some):
        every = TokenMajorPairs(tokens, torch.zeros(len(tokens), dtype=torch.long), 1.0 + tokens, len(tokens))
        return {HOSTILE[3]: every}

    write_latents(
        tmp_path / "store",
        documents,
        read,
        models=[HOSTILE[3]],
        directions=torch.eye(4),
        vocabulary=vocabulary,
        provenance={},
        skip_first=False,
    )
    hostile = Explanation(0, HOSTILE[4], "m", None, None, 1, (), {})
    found = report_latents(LatentStore(tmp_path / "store"), [0], explanations=[hostile])
    files = write_latent_reports(found, [0], tmp_path / "out", title=HOSTILE[2])
    for file in files["html"].parent.glob("*.html"):
        page = Page(file.read_text(encoding="utf-8"))
        assert {tag for tag, _, _ in page.elements} <= {
            *(
                "html",
                "head",
                "meta",
                "title",
                "style",
                "body",
                "header",
                "p",
                "h1",
                "h2",
                "h3",
                "nav",
                "ul",
                "li",
                "a",
            ),
            *("main", "section", "figure", "svg", "path", "line", "text", "figcaption", "i", "div", "mark", "details"),
            *("summary", "table", "caption", "thead", "tr", "th", "button", "tbody", "td", "b", "bdi", "span", "code"),
            "script",
        }
        assert len(page.texts("script")) == 1
        shown = [text for tag, _, each in page.elements if tag not in ("script", "style") for text in each]
        assert not any(HIDDEN.search(text) for text in shown)
        assert not any(name.startswith("on") for _, attributes, _ in page.elements for name in attributes)
    markdown = files["markdown"].read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert not HIDDEN.search(markdown)
    assert next(read_latent_reports(files["json"])).explanation == hostile


def test_nothing_is_left_where_a_report_breaks_off(made, reports, latents, tmp_path):
    def breaks():
        yield reports[0]
        raise NonFiniteError("no more")

    with pytest.raises(NonFiniteError, match="no more"):
        write_latent_reports(breaks(), latents, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="latents: expected those of the reports, in their order"):
        write_latent_reports(reports[:2], latents, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(InputError, match="out: expected a new or empty folder"):
        write_latent_reports(reports, latents, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text(encoding="utf-8") == "kept"
    for wrong, message in (((), "received none"), (("pdf",), r"received \['pdf'\]")):
        with pytest.raises(InputError, match=message):
            write_latent_reports(reports, latents, tmp_path / "new", formats=wrong)
    with pytest.raises(InputError, match="neuronpedia: expected names of model and source"):
        write_latent_reports(reports, latents, tmp_path / "new", formats=("neuronpedia",))


def test_sources_of_another_sae_are_refused(made):
    base, _, store, diff, certification, _ = made
    other = make_sae("relu")
    with pytest.raises(InputError, match="sae: expected the SAE that the store was made with"):
        report_latents(store, [3], lm=base, sae=other)
    with pytest.raises(InputError, match="diff: expected the SAE that the store was made with"):
        report_latents(store, [3], diff=dataclasses.replace(diff, provenance={**diff.provenance, "sae": "0" * 64}))
    with pytest.raises(InputError, match="certification: expected the SAE"):
        report_latents(store, [3], certification=dataclasses.replace(certification, provenance={"sae": "0" * 64}))
    with pytest.raises(InputError, match="lm and sae: expected both or neither"):
        report_latents(store, [3], lm=base)
    with pytest.raises(InputError, match=r"latents: expected 0 to 47, received \[48\]"):
        report_latents(store, [48])
    with pytest.raises(InputError, match="latents: expected one or more"):
        report_latents(store, [])
