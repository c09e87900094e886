"""SAEs on disk: our own round trip, SAELens' reading of ours, our reading of SAELens', and clear errors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.sae import SAE, ReLU, SAEMetadata, TopK, load_sae, save_sae

WEIGHTS = "sae_weights.safetensors"
KINDS = ["topk", "relu", "jumprelu", "gated", "abstopk", "matching_pursuit"]


@pytest.fixture(scope="session")
def sae_lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
        import sae_lens.registry
        import sae_lens.saes.sae
    return sae_lens


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors, and the hash in the config with them."""
    from saetools.provenance import sha256_of_file

    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / "cfg.json").read_text())
    if "saetools" in config["metadata"]:
        config["metadata"]["saetools"]["weights_sha256"] = sha256_of_file(folder / WEIGHTS)
        (folder / "cfg.json").write_text(json.dumps(config))


# Our own files


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_bit_for_bit(make_sae: Callable[..., SAE], tmp_path: Path, kind: str):
    metadata = SAEMetadata("tiny", "blocks.1.hook_mlp_out", 164.25, {"train": {"k": 4}})
    sae = make_sae(kind, metadata=metadata, apply_b_dec_to_input=kind == "matching_pursuit")
    sae.p99 = torch.rand(64)
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in sae.state_dict().items())
    assert loaded.metadata == metadata
    assert loaded.apply_b_dec_to_input == sae.apply_b_dec_to_input
    assert type(loaded.nonlinearity) is type(sae.nonlinearity)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {file.name for file in (tmp_path / "sae").iterdir()} == {
        "cfg.json",
        WEIGHTS,
        "latent_statistics.safetensors",
    }


def test_saving_again_forgets_old_statistics(make_sae: Callable[..., SAE], tmp_path: Path):
    sae = make_sae()
    sae.p99 = torch.rand(64)
    save_sae(sae, tmp_path)
    sae.p99 = None
    assert load_sae(save_sae(sae, tmp_path)).p99 is None


def test_half_precision_storage(make_sae: Callable[..., SAE], tmp_path: Path, sae_lens: Any):
    sae = make_sae()
    save_sae(sae, tmp_path, storage_dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    loaded = load_sae(tmp_path)
    assert loaded.W_dec.dtype == torch.float32
    assert torch.equal(loaded.W_dec, sae.W_dec.half().float())
    assert load_sae(tmp_path, dtype=torch.bfloat16).W_dec.dtype == torch.bfloat16
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.W_dec.dtype == torch.float32
    torch.testing.assert_close(theirs.W_dec, loaded.W_dec)


# SAELens


def assert_same(ours: SAE, theirs: Any) -> None:
    x = 3 * torch.randn(100, ours.d_in)
    with torch.no_grad():
        pairs = [(ours.encode(x).to_dense(), theirs.encode(x)), (ours(x), theirs(x))]
    for got, expected in pairs:
        assert bool(((got - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all())
        assert torch.equal(got != 0, expected != 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [True, False])
def test_sae_lens_reads_ours(make_sae: Callable[..., SAE], tmp_path: Path, sae_lens: Any, kind: str, centred: bool):
    sae = make_sae(kind, apply_b_dec_to_input=centred)
    if kind == "matching_pursuit" and not centred:
        with pytest.raises(InputError, match="a matching-pursuit SAE that subtracts the b_dec it adds"):
            save_sae(sae, tmp_path)
        sae.b_dec.zero_()
    theirs = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path))
    assert_same(sae, theirs)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "tiny"


def their_sae(sae_lens: Any, kind: str, **settings: Any) -> Any:
    from sae_lens.saes.sae import SAEMetadata as TheirMetadata

    metadata = TheirMetadata(model_name="tiny", hook_name="blocks.2.hook_resid_pre")
    if "transcoder" in kind:
        settings |= {"apply_b_dec_to_input": False}
    sae_class, config_class = sae_lens.registry.get_sae_class(kind)
    sae = sae_class(config_class(d_in=16, d_sae=64, metadata=metadata, **settings))
    for key, parameter in sae.named_parameters():
        parameter.data = torch.randn_like(parameter)
        if key == "threshold":
            parameter.data.abs_()
        if key == "W_dec" and kind == "matching_pursuit":
            parameter.data = torch.nn.functional.normalize(parameter.data, dim=1)
        elif key == "W_dec":
            parameter.data *= torch.linspace(0.3, 3, 64)[:, None]
    return sae


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": False}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("topk", {"k": 5, "apply_b_dec_to_input": False}),
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("topk", {"k": 5, "normalize_activations": "constant_norm_rescale"}),
        ("jumprelu", {}),
        ("gated", {}),
        ("gated", {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"}),
        ("abstopk", {"k": 5}),
        ("abstopk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("matching_pursuit", {"residual_threshold": 1.5}),
        ("matching_pursuit", {"residual_threshold": 0.0, "max_iterations": 7}),
        ("matching_pursuit", {"max_iterations": 9, "stop_on_duplicate_support": False, "apply_b_dec_to_input": False}),
        ("transcoder", {"d_out": 5}),
        ("skip_transcoder", {"d_out": 16}),
        ("jumprelu_transcoder", {"d_out": 16}),
        ("jumprelu_skip_transcoder", {"d_out": 5}),
    ],
)
def test_ours_reads_sae_lens(tmp_path: Path, sae_lens: Any, kind: str, settings: dict[str, Any]):
    theirs = their_sae(sae_lens, kind, **settings)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    assert_same(ours, theirs)
    assert (ours.metadata.model_name, ours.metadata.site) == ("tiny", "blocks.2.hook_resid_pre")
    again = load_sae(save_sae(ours, tmp_path / "again"))
    assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path / "again"))


def test_a_transcoder_knows_its_sites(make_sae: Callable[..., SAE], tmp_path: Path, sae_lens: Any):
    metadata = SAEMetadata("tiny", "blocks.1.hook_resid_mid", site_out="blocks.1.hook_mlp_out")
    sae = make_sae("relu", apply_b_dec_to_input=False, metadata=metadata)
    assert load_sae(save_sae(sae, tmp_path)).metadata == metadata
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"
    assert_same(sae, theirs)
    with pytest.raises(InputError, match=r"sae: expected for SAELens, a ReLU or JumpReLU transcoder .* with TopK"):
        save_sae(make_sae("topk", d_out=5, apply_b_dec_to_input=False), tmp_path / "none")


@pytest.mark.parametrize("rescale", [True, False])
def test_ours_reads_what_sae_lens_trained(tmp_path: Path, sae_lens: Any, rescale: bool):
    from sae_lens.saes.sae import TrainStepInput

    settings = {"k": 4, "rescale_acts_by_decoder_norm": rescale, "normalize_activations": "expected_average_only_in"}
    trained = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=16, d_sae=64, **settings))
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for step in range(20):
        batch = TrainStepInput(torch.randn(64, 16) + 1, {}, None, step, False)
        optimizer.zero_grad()
        trained.training_forward_pass(batch).loss.backward()
        optimizer.step()
    trained.fold_activation_norm_scaling_factor(0.25)  # as its runner does at the end
    trained.save_inference_model(tmp_path)
    ours = load_sae(tmp_path)
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path))
    assert_same(ours, trained)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": "none"}, TopK),
        ({"activation_fn": "relu", "architecture": "standard", "normalize_activations": False}, ReLU),
        ({}, ReLU),
    ],
)
def test_configs_from_before_version_6(
    make_sae: Callable[..., SAE], tmp_path: Path, sae_lens: Any, config: dict[str, Any], kind: type
):
    save_sae(make_sae(), tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update(scaling_factor=torch.ones(64)))
    old = {"model_name": "tiny", "hook_point": "blocks.2.hook_resid_pre", "d_in": 16, "d_sae": 64, "dtype": "float32"}
    (tmp_path / "cfg.json").write_text(json.dumps(old | config))
    ours = load_sae(tmp_path)
    assert isinstance(ours.nonlinearity, kind)
    assert (ours.metadata.model_name, ours.metadata.site) == ("tiny", "blocks.2.hook_resid_pre")
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path))


# What cannot be read


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(InputError, match=r"path: expected a folder with cfg\.json and sae_weights\.safetensors"):
        load_sae(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "temporal"}, "architecture topk, standard, .* received 'temporal'"),
        ({"normalize_activations": "covariance_whitening"}, "one of none, layer_norm, .* received 'covariance"),
        ({"reshape_activations": "hook_z"}, "reshape_activations of none, received 'hook_z'"),
        ({"k": 0}, "k: expected 1 or more"),
        ({"k": 65}, "k: expected at most d_sae = 64"),
    ],
)
def test_unsupported_configs(make_sae: Callable[..., SAE], tmp_path: Path, changes: dict[str, Any], words: str):
    edit_config(save_sae(make_sae(), tmp_path), **changes)
    with pytest.raises(InputError, match=words):
        load_sae(tmp_path)


def test_other_activation_functions_of_old_configs(make_sae: Callable[..., SAE], tmp_path: Path):
    save_sae(make_sae(), tmp_path)
    old = {"activation_fn_str": "tanh-relu", "d_in": 16, "d_sae": 64}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="received 'standard with tanh-relu'"):
        load_sae(tmp_path)


def test_a_scale_that_may_not_be_folded_is_a_warning(make_sae: Callable[..., SAE], tmp_path: Path):
    edit_config(save_sae(make_sae(), tmp_path), normalize_activations="expected_average_only_in")
    with pytest.warns(SaetoolsWarning, match="mean norm of sqrt"):
        load_sae(tmp_path)


def test_weights_beyond_the_known_ones(make_sae: Callable[..., SAE], tmp_path: Path):
    edit_weights(save_sae(make_sae(), tmp_path), lambda tensors: tensors.update(r_mag=torch.ones(64)))
    with pytest.raises(InputError, match="also r_mag"):
        load_sae(tmp_path)
    save_sae(make_sae(), tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update(scaling_factor=torch.full((64,), 2.0)))
    with pytest.raises(InputError, match="also scaling_factor"):
        load_sae(tmp_path)


@pytest.mark.parametrize("key", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_wrong_shapes_and_missing_weights(make_sae: Callable[..., SAE], tmp_path: Path, key: str):
    edit_weights(save_sae(make_sae("jumprelu"), tmp_path), lambda tensors: tensors.update({key: tensors[key][:-1]}))
    with pytest.raises(IntegrityError, match=rf"{key} in .*: expected shape \(.*, received \("):
        load_sae(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(IntegrityError, match=f"{key} in .*received nothing"):
        load_sae(tmp_path)


def test_changed_weights(make_sae: Callable[..., SAE], tmp_path: Path):
    save_sae(make_sae(), tmp_path)
    raw = bytearray((tmp_path / WEIGHTS).read_bytes())
    raw[-5] ^= 1
    (tmp_path / WEIGHTS).write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"is not the file that cfg\.json was written with"):
        load_sae(tmp_path)


def test_damaged_files(make_sae: Callable[..., SAE], tmp_path: Path, sae_lens: Any):
    their_sae(sae_lens, "standard").save_model(tmp_path)  # theirs has no hash of the weights
    whole = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (whole[:-10], whole[:20], b""):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(IntegrityError, match=f"{WEIGHTS} is damaged"):
            load_sae(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    good = json.loads((tmp_path / "cfg.json").read_text())
    without_width = json.dumps({key: value for key, value in good.items() if key != "d_in"})
    for text in ("{", "[]", "{}", without_width):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"cfg\.json is damaged"):
            load_sae(tmp_path)


def test_damaged_statistics(make_sae: Callable[..., SAE], tmp_path: Path):
    save_sae(make_sae(), tmp_path)
    save_file({"p99": torch.rand(63)}, tmp_path / "latent_statistics.safetensors")
    with pytest.raises(IntegrityError, match="does not belong to these weights"):
        load_sae(tmp_path)


def test_a_save_that_fails_leaves_nothing_that_loads(
    make_sae: Callable[..., SAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_sae(make_sae(), tmp_path)

    def half(tensors: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_sae(make_sae(), tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(InputError, match="expected a folder with"):
        load_sae(tmp_path)
