"""Damaged, ambiguous and hostile files: one clear error each, and nothing from a file is ever run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saetools.errors import InputError, IntegrityError
from saetools.sae import SAE, load_sae, save_sae

FILES = {"sparsify": "sae.safetensors", "dictionary_learning": "ae.pt"}


@pytest.fixture
def saved(make_sae: Callable[..., SAE], tmp_path: Path) -> Callable[[str], Path]:
    """`saved(format)`: a folder with a TopK SAE in that format."""

    def save(format: str) -> Path:
        any_format: Any = format
        return save_sae(make_sae("topk"), tmp_path / format, format=any_format)

    return save


def forget(folder: Path) -> None:
    """Leave only what the other library would have written."""
    (folder / "saetools.json").unlink()


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    pickled = file.suffix == ".pt"
    entries: dict[str, Any] = torch.load(file, weights_only=True) if pickled else load_file(file)
    entries = {name: value.clone() for name, value in entries.items()}
    change(entries)
    if pickled:
        torch.save(entries, file)
    else:
        save_file({name: value.contiguous() for name, value in entries.items()}, file)


# Code in files


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return exec, (f"import pathlib; pathlib.Path({self.target!r}).write_text('ran')",)


def test_the_bomb_works(tmp_path: Path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_pickled_file_is_not_run(
    saved: Callable[[str], Path], make_sae: Callable[..., SAE], tmp_path: Path, legacy: bool
):
    folder, ran = saved("dictionary_learning"), tmp_path / "ran"
    forget(folder)
    entries = torch.load(folder / "ae.pt", weights_only=True)
    hostile = {**entries, "encoder.bias": Bomb(ran)}
    torch.save(hostile, folder / "ae.pt", _use_new_zipfile_serialization=not legacy)
    for path in (folder, folder / "ae.pt"):
        with pytest.raises(InputError, match=r"ae\.pt, which holds objects that run code when read \(Unsupported"):
            load_sae(path)
    (folder / "ae.pt").write_bytes(pickle.dumps(Bomb(ran)))
    with pytest.raises((InputError, IntegrityError), match=r"ae\.pt"):
        load_sae(folder)
    assert not ran.exists()


def test_code_in_an_array_file_is_not_run(tmp_path: Path):
    ran = tmp_path / "ran"
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    arrays = {name: np.array([Bomb(ran)], dtype=object) for name in names}
    np.savez(tmp_path / "params.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"params\.npz, which holds objects that run code"):
        load_sae(tmp_path)
    assert not ran.exists()


def test_a_whole_pickled_module_and_a_script_are_refused(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(InputError, match=r"save the state_dict\(\)"):
        load_sae(tmp_path)
    torch.save(torch.ones(3), tmp_path / "module.pt")
    with pytest.raises(InputError, match="a file that maps names to tensors, received Tensor"):
        load_sae(tmp_path)


# Damage


@pytest.mark.parametrize("format", FILES)
def test_damaged_weights(saved: Callable[[str], Path], format: str):
    folder = saved(format)
    file = folder / FILES[format]
    whole = file.read_bytes()
    for damaged in (whole[:-10], whole[:20], b"", b"garbage " * 100):
        file.write_bytes(damaged)
        for path in (folder, file):
            with pytest.raises(IntegrityError, match=f"{file.name} is damaged"):
                load_sae(path)


def test_damaged_array_file(tmp_path: Path):
    np.savez(tmp_path / "params.npz", W_enc=np.ones(3))
    (tmp_path / "params.npz").write_bytes((tmp_path / "params.npz").read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=r"params\.npz is damaged"):
        load_sae(tmp_path)


@pytest.mark.parametrize(("format", "config"), [("sparsify", "cfg.json"), ("dictionary_learning", "config.json")])
def test_damaged_configs(saved: Callable[[str], Path], format: str, config: str):
    folder = saved(format)
    for text in ("{", "[]"):
        (folder / config).write_text(text)
        with pytest.raises((IntegrityError, InputError), match=rf"{config.replace('.', '[.]')}"):
            load_sae(folder)


def test_settings_that_make_no_sense(saved: Callable[[str], Path]):
    folder = saved("sparsify")
    good = json.loads((folder / "cfg.json").read_text())
    for change, error, words in (
        ({"k": 0}, InputError, "k: expected 1 or more"),
        ({"k": 65}, InputError, "k: expected at most d_sae = 64"),
        ({"k": "many"}, IntegrityError, r"cfg\.json is damaged \(ValueError"),
        ({"d_in": None}, IntegrityError, r"cfg\.json is damaged \(TypeError"),
        ({"activation": "groupmax"}, InputError, "an SAE with activation topk, received 'groupmax'"),
        ({"num_latents": 32}, IntegrityError, r"encoder\.weight in .*: expected shape \(32, 16\), received \(64, 16\)"),
    ):
        (folder / "cfg.json").write_text(json.dumps(good | change))
        with pytest.raises(error, match=words):
            load_sae(folder)


@pytest.mark.parametrize("format", FILES)
def test_other_weights_under_our_notes(saved: Callable[[str], Path], format: str):
    folder = saved(format)
    edit(folder / FILES[format], lambda entries: entries.update({"b_dec": entries["b_dec"] + 1}))
    with pytest.raises(IntegrityError, match=r"is not the file that saetools\.json was written with"):
        load_sae(folder)
    forget(folder)
    load_sae(folder)


# Shapes


@pytest.mark.parametrize(
    ("format", "key"),
    [
        ("sparsify", "encoder.weight"),
        ("sparsify", "W_dec"),
        ("sparsify", "b_dec"),
        ("dictionary_learning", "encoder.weight"),
        ("dictionary_learning", "decoder.weight"),
        ("dictionary_learning", "encoder.bias"),
    ],
)
def test_wrong_shapes_and_missing_weights(saved: Callable[[str], Path], format: str, key: str):
    folder = saved(format)
    forget(folder)
    file = folder / FILES[format]
    name = key.replace(".", r"\.")
    if key.endswith("weight") or key == "W_dec":
        edit(file, lambda entries: entries.update({key: entries[key].T}))
        with pytest.raises(IntegrityError, match=rf"{name} in .*received \(\d+, \d+\); it is transposed"):
            load_sae(folder)
        edit(file, lambda entries: entries.update({key: entries[key].T[:-1]}))
    else:
        edit(file, lambda entries: entries.update({key: entries[key][:-1]}))
    with pytest.raises(IntegrityError, match=r"expected shape \("):
        load_sae(folder)
    edit(file, lambda entries: entries.pop(key))
    with pytest.raises(IntegrityError, match=rf"{name} in .*received nothing"):
        load_sae(folder)


def test_transposed_gemma_scope(tmp_path: Path):
    arrays = {"W_enc": np.ones((8, 4)), "W_dec": np.ones((4, 8)), "b_enc": np.ones(8), "b_dec": np.ones(4)}
    np.savez(tmp_path / "params.npz", **arrays, threshold=np.ones(8))  # type: ignore[arg-type]
    with pytest.raises(
        IntegrityError, match=r"w_enc in .*expected shape \(4, 8\), received \(8, 4\); it is transposed"
    ):
        load_sae(tmp_path)


def test_weights_that_nothing_is_known_about(saved: Callable[[str], Path]):
    folder = saved("sparsify")
    forget(folder)
    edit(folder / "sae.safetensors", lambda entries: entries.update(W_skip=torch.ones(16, 16)))
    with pytest.raises(InputError, match="also W_skip"):  # the config has no skip_connection
        load_sae(folder)


# Which format, which file


def test_two_saes_in_a_folder(saved: Callable[[str], Path]):
    folder = saved("sparsify")
    (folder / "older.safetensors").write_bytes((folder / "sae.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"one SAE, received 2 in .*: older\.safetensors, sae\.safetensors; name the"):
        load_sae(folder)
    load_sae(folder / "sae.safetensors")


def test_two_configs_for_the_weights(saved: Callable[[str], Path]):
    folder = saved("sparsify")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "other.json").write_text(json.dumps(config | {"k": 9}))
    assert load_sae(folder).nonlinearity.k == 4  # type: ignore[union-attr]  # the library's own name decides
    (folder / "cfg.json").rename(folder / "one.json")
    with pytest.raises(InputError, match=r"one config that fits the weights, received one\.json, other\.json beside"):
        load_sae(folder)


def test_files_that_do_not_matter(saved: Callable[[str], Path]):
    """What trainers and people leave beside: optimizer states, notes, other JSON, half-readable files."""
    folder = saved("dictionary_learning")
    (folder / "eval_results.json").write_text(json.dumps({"l0": 3, "trainer": 1}))
    (folder / "notes.json").write_text("{ not JSON")
    (folder / "trainer_state.pt").write_bytes(b"garbage")
    torch.save({"optimizer": {}, "step": 3}, folder / "optimizer.pt")
    load_sae(folder)


@pytest.mark.parametrize("content", ["nothing", "other weights", "no config", "text"])
def test_what_is_no_sae(saved: Callable[[str], Path], tmp_path: Path, content: str):
    folder = tmp_path / "folder"
    folder.mkdir()
    words = "which has no weights"
    path = folder
    if content == "other weights":
        save_file({"model.embed.weight": torch.ones(2, 2)}, folder / "model.safetensors")
        words = r"model\.safetensors \(model\.embed\.weight\) with no config"
    elif content == "no config":
        folder = path = saved("sparsify")
        (folder / "cfg.json").unlink()
        words = r"\(W_dec, b_dec, encoder\.bias, encoder\.weight\) with no config"
    elif content == "text":
        path = folder / "cfg.json"
        path.write_text("{}")
        words = r"cfg\.json \(no tensors\)"
    with pytest.raises(InputError, match=words) as caught:
        load_sae(path)
    assert "path: expected a folder with cfg.json" in str(caught.value)


def test_classes_of_dictionary_learning_that_are_not_known(saved: Callable[[str], Path]):
    folder = saved("dictionary_learning")
    for trainer, error, words in (
        (
            {"dict_class": "CrossCoder"},
            InputError,
            "a class of dictionary_learning: AutoEncoder, .* received 'CrossCoder'",
        ),
        (
            {"dict_class": "AutoEncoderTopK", "k": 7},
            IntegrityError,
            r"k for .*: expected one number, received \[4, 7\]",
        ),
    ):
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
        with pytest.raises(error, match=words):
            load_sae(folder)


def test_a_batch_topk_file_without_a_threshold(saved: Callable[[str], Path]):
    folder = saved("dictionary_learning")
    forget(folder)
    edit(folder / "ae.pt", lambda entries: entries.pop("threshold"))
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE", "k": 4}}))
    with pytest.raises(IntegrityError, match=r"threshold in .*expected one number"):
        load_sae(folder)


@pytest.mark.parametrize("format", FILES)
def test_a_save_that_fails_leaves_nothing_that_loads_as_new(
    saved: Callable[[str], Path], make_sae: Callable[..., SAE], monkeypatch: pytest.MonkeyPatch, format: Any
):
    folder = saved(format)

    def half(tensors: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    monkeypatch.setattr("torch.save", half)
    with pytest.raises(OSError, match="disk full"):
        save_sae(make_sae(), folder, format=format)
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(InputError):
        load_sae(folder)
