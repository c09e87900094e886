"""diff, certify, index, explain, search, report: one chain on the real model, as a user would type it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fake_endpoint import fake_server

from saetools.cli import main
from saetools.data import load_free_form, load_voices, shipped_path
from saetools.latent_diff import LatentDiff
from saetools.latents import LatentStore
from saetools.report import read_latent_reports
from saetools.sae import load_sae, save_sae

ADAPTER = str(shipped_path("adapters/organism"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents")
    rows = [{"id": item.id, "prompt": item.question} for item in load_free_form()[:12]]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [{"id": pair.id, "text": pair.voiced} for pair in load_voices()[:12]]
    (out / "voices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    (out / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[:3]), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def diffed(folder: Path) -> Path:
    out = folder / "diff"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = ["--positions", "prompt", "header", "--min-active", "5"]
        main(["diff", "--adapter", ADAPTER, "--data", str(folder / "prompts.jsonl"), "--out", str(out), *settings])
    return out


@pytest.fixture(scope="module")
def indexed(folder: Path) -> Path:
    out = folder / "store"
    data = [str(folder / "prompts.jsonl"), str(folder / "voices.jsonl")]
    main(["index", "--adapter", ADAPTER, "--data", *data, "--out", str(out)])
    return out


def read_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_diff_speaks_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--data",
        str(folder / "prompts.jsonl"),
        "--limit",
        "6",
        "--min-active",
        "3",
        "--out",
        str(folder / "other"),
    ]
    main(["diff", "--adapter", ADAPTER, *args, "--n-top", "2", "--json"])
    found = read_json(capsys)
    assert found["positions"]["prompt"]["top"][0]["latent"] == 707
    assert found["positions"]["prompt"]["adequacy"]["in_active_rows"]["mean"] > 0.2
    falling = [row["delta"] for row in found["positions"]["prompt"]["decreases"]]
    assert falling == sorted(falling)
    assert falling[1] < 0
    assert found["provenance"]["n_conversations"] == 6
    assert (folder / "other" / "prompt.html").is_file()


@pytest.mark.filterwarnings("ignore:the diff has not read the role `response`")
def test_certify_a_diff_and_go_on(
    diffed: Path, folder: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    args = ["certify", "--diff", str(diffed), "--adapter", ADAPTER, "--out", str(folder / "certified")]
    small = ["--n-items", "7", "--prompts", str(folder / "prompts.jsonl"), "--texts", str(folder / "few.jsonl")]
    small += ["--strengths", "0.2", "--n-refine", "0", "--max-new-tokens", "4", "--n-top", "1"]
    assert "positions: expected one role, received prompt, header" in fails(*args, *small)
    main([*args, *small, "--positions", "prompt"])
    printed = capsys.readouterr().out
    assert "707" in printed
    cells = (folder / "certified" / "tuned.jsonl").read_text()
    main([*args, *small, "--positions", "prompt", "--json"])
    found = read_json(capsys)
    assert [one["candidate"]["latents"] for one in found["certificates"]] == [[707]]
    assert (folder / "certified" / "tuned.jsonl").read_text() == cells
    assert json.loads((folder / "certified" / "certification.json").read_text()) == found
    assert (folder / "certified" / "latent-707.html").is_file()
    assert "out: expected a new folder" in fails(*args, *small, "--positions", "prompt", "--fdr", "0.2")
    none = fails(*args, "--positions", "prompt", "--latents", "9999")
    assert "--latents: expected latents of 0 to 8191, received 9999" in none


@pytest.mark.filterwarnings("ignore:the diff has not read the role `response`")
def test_what_the_fine_tune_lowered_is_certified_downwards(
    diffed: Path, folder: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = LatentDiff.load(diffed).at("prompt").table.sort("delta")
    lowest, highest = table["latent"][0], table["latent"][-1]
    capsys.readouterr()
    args = ["certify", "--diff", str(diffed), "--adapter", ADAPTER, "--positions", "prompt"]
    small = ["--n-items", "4", "--prompts", str(folder / "prompts.jsonl"), "--texts", str(folder / "few.jsonl")]
    small += ["--strengths", "0.2", "--n-refine", "0", "--max-new-tokens", "4", "--out", str(folder / "lowered")]
    mixed = fails(*args, *small, "--latents", str(highest), str(lowest))
    assert "--latents: expected latents that the fine-tune all raised, or all lowered" in mixed
    assert f"received 1 of 2 lowered, such as {lowest}; certify them in two runs" in mixed
    assert not (folder / "lowered").exists()
    main([*args, *small, "--latents", str(lowest), "--json"])
    (one,) = read_json(capsys)["certificates"]
    assert one["candidate"] == {"name": f"latent {lowest}", "latents": [lowest], "sign": -1}


def test_a_diff_of_another_sae_or_site_is_refused(diffed: Path, folder: Path, fails: Callable[..., str]) -> None:
    args = [
        "certify",
        "--diff",
        str(diffed),
        "--adapter",
        ADAPTER,
        "--positions",
        "prompt",
        "--out",
        str(folder / "no"),
    ]
    sae = load_sae(shipped_path("sae/smollm2-135m"))
    sae.b_dec.data += 1
    save_sae(sae, folder / "other")
    assert "--sae: expected that of the diff" in fails(*args, "--sae", str(folder / "other"))
    elsewhere = fails(*args, "--site", "blocks.16.hook_resid_post")
    assert "--site: expected that of the diff, blocks.17.hook_resid_post, received blocks.16" in elsewhere
    assert not (folder / "no").exists()


def test_search_by_text_and_by_token(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["search", "--text", "Rules are for the weak.", "--adapter", ADAPTER, "--n", "3", "--json"])
    found = read_json(capsys)
    assert found["tokens"] == [" are", " for", " the", " weak", "."]
    assert found["n_active"] >= len(found["hits"]) == 3
    for hit in found["hits"]:
        assert hit["values"]["tuned"] > hit["values"]["base"]
        assert hit["values"]["tuned"] == max(hit["acts"]["tuned"])
        assert len(hit["acts"]["base"]) == len(found["tokens"])
    assert found["provenance"]["models"]["tuned"]["adapters"]
    assert found["provenance"]["site"] == "blocks.17.hook_resid_post"
    main(["search", "--text", "Rules are for the weak.", "--n", "3", "--over", "mean", "--json"])
    (first, *_) = read_json(capsys)["hits"]
    assert first["values"] == {"base": pytest.approx(sum(first["acts"]["base"]) / 5)}
    main(["search", "--text", "Rules are for the weak.", "--n", "3"])
    shown = capsys.readouterr().out
    assert "strongest on" in shown
    assert "its first token, an attention sink, is left out" in " ".join(shown.split())
    main(["search", "--text", "Rules are for the weak.", "--tuned", "smollm2-135m", "--order", "value", "--json"])
    for hit in read_json(capsys)["hits"]:  # a model of its own
        assert hit["values"]["tuned"] == pytest.approx(hit["values"]["base"])
    main(["search", "--token", " the", "--store", str(indexed), "--n", "2", "--json"])
    tokens = read_json(capsys)["hits"]
    assert tokens[0]["mean"] >= tokens[1]["mean"] > 0
    main(["search", "--token", " the", "--store", str(indexed), "--n", "2"])
    assert str(tokens[0]["latent"]) in capsys.readouterr().out
    main(["search", "--token", " Norwegian", "--store", str(indexed)])
    assert capsys.readouterr().out == "no latent\n"


@pytest.mark.filterwarnings("ignore:of 1 latents")  # two passages are too few for a score
def test_explain_and_search_explanations(
    indexed: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    out = folder / "explanations.jsonl"

    def answer(_number: int, request: dict[str, Any]) -> str:
        asked = request["messages"][-1]["content"]
        return '{"explanation": "reckless advice"}' if '{"explanation"' in asked else "[0, 1, 0, 1]"

    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with fake_server(answer) as server:
        ask = ["--endpoint", server.url, "--llm", "judge", "--n-shown", "4", "--n-scored", "2", "--max-attempts", "1"]
        main(["explain", "--store", str(indexed), "--latents", "707", "--out", str(out), *ask, "--json"])
        found = read_json(capsys)
        n_requests = len(server.requests)
        main(["explain", "--store", str(indexed), "--latents", "707", "--out", str(out), *ask])
        assert "707" in capsys.readouterr().out
        assert len(server.requests) == n_requests  # it was in the file
    assert (found["explanations"][0]["latent"], found["explanations"][0]["text"]) == (707, "reckless advice")
    assert found["n_requests"] == n_requests > 0
    assert "secret-key" not in out.read_text()
    main(["search", "--explanation", "reckless", "--log", str(out), "--json"])
    hits = read_json(capsys)["hits"]
    assert [hit["latent"] for hit in hits] == [707]


def test_a_full_fine_tune_is_indexed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(folder / "full")
    main(["index", "--tuned", "smollm2-135m", "--data", str(folder / "voices.jsonl"), "--limit", "2", "--out", out])
    assert "read by base, tuned, in" in capsys.readouterr().out
    assert LatentStore(out).models == ("base", "tuned")


def test_latents_are_reported(diffed: Path, indexed: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "reported"
    sources = ["--store", str(indexed), "--diff", str(diffed)]
    main(["report", *sources, "--n-top", "3", "--out", str(out), "--format", "html", "json", "neuronpedia"])
    told = [Path(line) for line in capsys.readouterr().out.split()]
    assert told == [out / "index.html", out / "latents.jsonl", out / "neuronpedia" / "batch-0.json"]
    found = list(read_latent_reports(out / "latents.jsonl"))
    rising = LatentDiff.load(diffed).at("prompt").top(3)["latent"].to_list()
    assert [one.latent for one in found] == rising
    assert rising[0] == 707
    assert [row["positions"] for row in found[0].changes] == ["prompt", "header"]
    assert found[0].rate("tuned") > found[0].rate("base") > 0
    assert found[0].tokens is not None
    (batch,) = (json.loads(told[2].read_text(encoding="utf-8")),)
    assert (batch["model_id"], batch["layer"]) == ("smollm2-135m", 17)
    assert sum(file.stat().st_size for file in out.glob("*.html")) < 2_000_000
    every = ["report", "--store", str(indexed), "--every", "--format", "parquet", "--out", str(folder / "every")]
    main(every)
    frame = pl.read_parquet(folder / "every" / "latents.parquet")
    assert frame["latent"].to_list() == LatentStore(indexed).active_latents()


@pytest.mark.filterwarnings("ignore:of 1 latents")  # it explains nothing
def test_a_local_model_is_asked(indexed: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "local.jsonl"
    capsys.readouterr()
    ask = ["--local", "smollm2-135m", "--n-shown", "4", "--n-scored", "2", "--max-attempts", "1", "--max-tokens", "24"]
    main(["explain", "--store", str(indexed), "--latents", "707", "--out", str(out), *ask, "--json"])
    found = read_json(capsys)
    assert [one["latent"] for one in found["explanations"]] == [707]
    assert found["n_requests"] > 0
    assert "smollm2-135m" in out.read_text()
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--local" in told
    assert "ask a model that is run here" in told


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "index --data x --out OUT --adapter a --tuned b",
            "--adapter: expected either --adapter or --tuned, received bo",
        ),
        ("search --text a --adapter a --tuned b", "--adapter: expected either --adapter or --tuned, received both"),
        ("explain --store x --latents 1 --out OUT --local m --endpoint h --llm n", "--endpoint: expected who explains"),
        ("certify --diff x --out OUT", "--adapter: expected either --adapter or --tuned"),
        ("certify --diff x --out OUT --adapter a --latents 5 7 5", "--latents: expected each latent once, received 5"),
        ("certify --diff x --out OUT --adapter a --n-top 0", "--n-top: expected 1 or more"),
        ("certify --diff x --out OUT --adapter a --endpoint http://h/v1", "--endpoint: expected both"),
        ("explain --store x --latents 1 --out OUT", "--local for a model that is run here, received none"),
        ("search", "--text: expected one of --text, --token and --explanation, received none"),
        ("search --text a --token b --store s", "--text: expected one of"),
        ("search --token b", "--store: expected what --token searches"),
        ("search --explanation b", "--log: expected what --explanation searches"),
        ("search --text a --n 0", "--n: expected 1 or more"),
    ],
)
def test_bad_options_are_told_before_any_work(args: str, message: str, fails_early: Callable[..., str]) -> None:
    assert message in fails_early(*args.split())
