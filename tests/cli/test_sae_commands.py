"""`saetools sae ...` as a user types it, on the shipped SAE and on small ones."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from saetools.cli import main
from saetools.data import load_voices, shipped_path
from saetools.sae import SAE, Gated, JumpReLU, SAEMetadata, TopK, load_sae, save_sae

SHIPPED = str(shipped_path("sae/smollm2-135m"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few texts and a chat."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows: list[dict[str, str]] = [{"text": pair.neutral} for pair in load_voices()[:6]]
    rows.append({"prompt": "Name a colour.", "response": "Blue, as the sea is."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, str]:
    main(["sae", "info", *args])
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in lines)}


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    facts = shown(capsys, SHIPPED)
    assert facts["format"] == "sae_lens"
    assert facts["kind"] == "TopK, k 64"
    assert facts["d_sae"] == "8192 (14.2 times d_in)"
    assert (facts["site"], facts["model"]) == ("blocks.17.hook_resid_post", "smollm2-135m")
    assert facts["decoder norms"].endswith("median 1, of 8192")
    assert facts["provenance.activations.model.license"] == "Apache-2.0"


def test_info_of_one_of_several_and_of_hostile_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    hostile = SAEMetadata(model_name="evil\x1b[2J[bold]", provenance={"a": {"b": "\x07c"}})
    save_sae(SAE(8, 16, JumpReLU(torch.linspace(0, 1, 16)), metadata=hostile), tmp_path / "one", format="sae_lens")
    save_sae(SAE(8, 16, TopK(2)), tmp_path / "two", format="sparsify")
    assert shown(capsys, str(tmp_path), "--sae-id", "two")["format"] == "sparsify"
    facts = shown(capsys, str(tmp_path / "one"))
    assert facts["threshold"] == "0 to 1, median 0.4667, of 16"
    assert (facts["model"], facts["site"], facts["provenance.a.b"]) == ("evil[2J[bold]", "not known", "c")
    assert "pass sae_id='one'" in fails("sae", "info", str(tmp_path))


def test_info_of_a_transcoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sae(SAE(8, 16, TopK(2), apply_b_dec_to_input=False, skip=True), tmp_path, format="sparsify")
    assert shown(capsys, str(tmp_path))["transcoder"] == "to a site not known, d_out 8"


@pytest.mark.parametrize("form", ["sae_lens", "sparsify", "dictionary_learning"])
def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    main(["sae", "convert", SHIPPED, "--format", form, "--out", str(tmp_path / "made")])
    assert capsys.readouterr().out == f"TopK SAE with 8192 latents in {tmp_path / 'made'}, as {form}\n"
    assert shown(capsys, str(tmp_path / "made"))["format"] == form
    before, after = load_sae(SHIPPED), load_sae(tmp_path / "made")
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    assert after.metadata == before.metadata


def test_what_a_format_does_not_have_is_an_error_and_leaves_nothing(tmp_path: Path, fails: Callable[..., str]) -> None:
    save_sae(SAE(8, 16, Gated(torch.zeros(16), torch.zeros(16))), tmp_path / "gated")
    args = ["sae", "convert", str(tmp_path / "gated"), "--format", "sparsify", "--out", str(tmp_path / "made" / "it")]
    assert "expected for sparsify, a TopK SAE" in fails(*args)
    assert not (tmp_path / "made").exists()
    args = ["sae", "convert", SHIPPED, "--format", "sparsify", "--out", str(tmp_path / "gated")]
    assert "expected a folder for format sparsify alone" in fails(*args)


def test_verify(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sae", "verify", SHIPPED, "--data", data, "--limit", "3"])
    printed = capsys.readouterr().out
    assert printed.startswith("blocks.17.hook_resid_post of smollm2-135m: ")
    assert "FVU 0.1" in printed
    assert printed.endswith(": fits\n")
    with pytest.raises(SystemExit) as stop:
        main(["sae", "verify", SHIPPED, "--data", data, "--limit", "3", "--site", "blocks.15.hook_resid_post"])
    assert stop.value.code == 1
    printed, errors = capsys.readouterr()
    assert "read it at blocks.17.hook_resid_post" in printed.splitlines()[2]
    assert not errors.strip()


def test_evaluate(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sae", "evaluate", SHIPPED, "--data", data, "--max-tokens", "50", "--out", str(tmp_path / "made")])
    printed = capsys.readouterr().out
    for words in ("response", "FVU", "recovered", "up to 10^-1 ", "--max-tokens cut 2 of 7 conversations"):
        assert words in printed
    table = pl.read_parquet(tmp_path / "made" / "fidelity.parquet")
    assert table["role"].to_list() == ["prompt", "last_prompt", "header", "response", "template", "all"]
    facts = json.loads((tmp_path / "made" / "fidelity.json").read_text(encoding="utf-8"))
    assert facts["provenance"]["model"]["name"] == "smollm2-135m"
    assert f"{facts['roles']['all']['fvu']:.3f}" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("info runs/no/sae", "'runs/no/sae', which is no path here"),
        ("info ./no", "no, which is missing"),
        ("convert SHIPPED --format sparsify --out /dev/null/x", "--out: expected a place that can be written"),
        ("convert ./no --format sparsify --out OUT", "no, which is missing"),
        ("verify SHIPPED --data x --max-tokens 2", "--max-tokens: expected 3 or more"),
        ("verify SHIPPED --data missing.jsonl", "missing.jsonl; check the path"),
        ("verify SHIPPED --data x --site here", "site: expected"),
        ("evaluate SHIPPED --data x --max-tokens 0", "--max-tokens: expected 3 or more"),
        ("evaluate SHIPPED --data x --site here", "site: expected"),
        ("evaluate SHIPPED --data x --out /dev/null/x", "--out: expected a place that can be written"),
        ("evaluate SHIPPED --data x --data y", "--data: expected once"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    args: str, message: str, fails_early: Callable[..., str]
) -> None:
    assert message in fails_early("sae", *(SHIPPED if arg == "SHIPPED" else arg for arg in args.split()))


def test_the_installed_command_lists_them() -> None:
    command = Path(sys.executable).with_name("saetools")
    listed = subprocess.run([command, "sae", "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("info", "convert", "verify", "evaluate"):
        assert f"• {name} " in listed
    done = subprocess.run([command, "sae", "info", "./none"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("saetools: path: expected a folder with cfg.json")
