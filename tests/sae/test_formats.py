"""Every format beside a dense reference of what its own library computes, and round trips through those we write."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saetools.errors import FetchError, InputError, SaetoolsWarning
from saetools.sae import SAE, AbsTopK, JumpReLU, ReLU, SAEMetadata, TopK, load_sae, save_sae

D, M, K = 12, 40, 5
Weights = dict[str, Tensor]


def draw(**shapes: tuple[int, ...]) -> Weights:
    """Random tensors; thresholds are positive. Names with `__` become names with a dot."""
    made = {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}
    return {name: tensor.abs() if name == "threshold" else tensor for name, tensor in made.items()}


def same(sae: SAE, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Latents and reconstruction agree with a dense reference: `encode(x)`, `decode(latents, x)`."""
    x = 3 * torch.randn(200, sae.d_in) + 1
    latents = encode(x)
    assert 0 < int((latents != 0).sum()) < latents.numel()
    for ours, reference in ((sae.encode(x).to_dense(), latents), (sae(x), decode(latents, x))):
        assert bool(((ours - reference).norm(dim=1) <= 1e-5 * reference.norm(dim=1)).all())
    assert torch.equal(sae.encode(x).to_dense() != 0, latents != 0)


def top(pre: Tensor, k: int = K) -> Tensor:
    kept = pre.relu().topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, kept.indices, kept.values)


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return pre.relu() * (pre > threshold)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


# sparsify


def sparsify_weights(**more: tuple[int, ...]) -> Weights:
    return draw(encoder__weight=(M, D), encoder__bias=(M,), W_dec=(M, D), b_dec=(D,), **more)


def write_sparsify(folder: Path, weights: Weights, **config: Any) -> Path:
    write_json(folder / "cfg.json", {"d_in": D, "k": K, "num_latents": M, "expansion_factor": 32, **config})
    save_file(weights, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("transcode", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_sparsify(tmp_path: Path, transcode: bool, skip: bool):
    w = sparsify_weights(**({"W_skip": (D, D)} if skip else {}))
    sae = load_sae(write_sparsify(tmp_path / "layers.3", w, transcode=transcode, skip_connection=skip))
    centre = 0 if transcode else w["b_dec"]

    def decode(latents: Tensor, x: Tensor) -> Tensor:
        return latents @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)

    same(sae, lambda x: top((x - centre) @ w["encoder.weight"].T + w["encoder.bias"]), decode)
    assert sae.metadata.site == ("layers.3" if transcode else "blocks.3.hook_resid_post")


def test_sparsify_by_expansion_factor_and_by_absolute_value(tmp_path: Path):
    w = draw(encoder__weight=(4 * D, D), encoder__bias=(4 * D,), W_dec=(4 * D, D), b_dec=(D,))
    write_json(tmp_path / "config.json", {"model": "tiny", "batch_size": 3})
    folder = write_sparsify(tmp_path / "embed_tokens", w, num_latents=0, expansion_factor=4, signed=True)
    sae = load_sae(folder)
    assert isinstance(sae.nonlinearity, AbsTopK)
    assert (sae.metadata.model_name, sae.metadata.site) == ("tiny", "")

    def encode(x: Tensor) -> Tensor:
        pre = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
        kept = pre.abs().topk(K, dim=1).indices
        return torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept))

    same(sae, encode, lambda latents, x: latents @ w["W_dec"] + w["b_dec"])


def test_a_run_of_sparsify_lists_its_hookpoints(tmp_path: Path):
    for layer in (10, 2):
        write_sparsify(tmp_path / f"layers.{layer}", sparsify_weights())
    with pytest.raises(InputError, match=r"2 subfolders hold weights: layers\.2, layers\.10; pass sae_id='layers\.2'"):
        load_sae(tmp_path)
    assert load_sae(tmp_path, sae_id="layers.10").metadata.site == "blocks.10.hook_resid_post"
    with pytest.raises(InputError, match=r"layers\.7, which is missing"):
        load_sae(tmp_path, sae_id="layers.7")


def test_sae_lens_transposes_the_decoder_of_sparsify_and_we_do_not(tmp_path: Path):
    w = sparsify_weights()
    folder = write_sparsify(tmp_path / "layers.3", w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
    _, theirs = sparsify_disk_loader(folder)
    assert theirs["W_dec"].shape == (D, M)
    assert torch.equal(load_sae(folder).W_dec, w["W_dec"])


# dictionary_learning


def dictionary_weights(class_name: str) -> Weights:
    linear = {"encoder__weight": (M, D), "decoder__weight": (D, M)}
    plain = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,)}
    match class_name:
        case "AutoEncoder":
            return draw(**linear, encoder__bias=(M,), bias=(D,))
        case "AutoEncoderNew":
            return draw(**linear, encoder__bias=(M,), decoder__bias=(D,))
        case "GatedAutoEncoder":
            return draw(**linear, r_mag=(M,), gate_bias=(M,), mag_bias=(M,), decoder_bias=(D,))
        case "JumpReluAutoEncoder":
            return draw(**plain, threshold=(M,))
        case "MatryoshkaBatchTopKSAE":
            batch = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(2.0)}
            return draw(**plain) | batch | {"group_sizes": torch.tensor([M // 4, M - M // 4])}
        case _:
            batch = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(2.0)}
            return draw(**linear, encoder__bias=(M,), b_dec=(D,)) | batch


def dictionary_reference(
    class_name: str, w: Weights
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Encode and decode of a class of dictionary_learning, on dense tensors."""
    W_enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    W_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    out = next(w[name] for name in ("b_dec", "bias", "decoder.bias", "decoder_bias") if name in w)
    centre = 0 if class_name in ("AutoEncoderNew", "JumpReluAutoEncoder") else out
    bias = w.get("b_enc", w.get("encoder.bias", torch.zeros(M)))

    def encode(x: Tensor) -> Tensor:
        pre = (x - centre) @ W_enc + bias
        if class_name == "GatedAutoEncoder":
            return (pre * w["r_mag"].exp() + w["mag_bias"]).relu() * (pre + w["gate_bias"] > 0)
        if class_name == "AutoEncoderTopK":
            return top(pre)
        return jump(pre, w.get("threshold", 0.0))

    return encode, lambda latents, x: latents @ W_dec + out


DICTIONARY_CLASSES = [
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
]


def write_dictionary(folder: Path, class_name: str, entries: Mapping[str, Any]) -> Path:
    trainer = {"dict_class": class_name, "layer": 4, "lm_name": "tiny", "submodule_name": "resid_post_layer_4"}
    write_json(folder / "config.json", {"trainer": {**trainer, "k": K} if "TopK" in class_name else trainer})
    torch.save(dict(entries), folder / "ae.pt")
    return folder


@pytest.mark.parametrize("class_name", DICTIONARY_CLASSES)
def test_dictionary_learning(tmp_path: Path, class_name: str):
    w = dictionary_weights(class_name)
    sae = load_sae(write_dictionary(tmp_path, class_name, w))
    same(sae, *dictionary_reference(class_name, w))
    assert (sae.metadata.model_name, sae.metadata.site) == ("tiny", "blocks.4.hook_resid_post")


@pytest.mark.parametrize("class_name", DICTIONARY_CLASSES)
def test_files_from_the_middle_of_a_run_are_scaled_as_the_final_one_is(tmp_path: Path, class_name: str):
    """Training sees x / norm_factor; what it reconstructs times norm_factor is what the loaded SAE reconstructs."""
    w, factor = dictionary_weights(class_name), 7.5
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict()
    nested = {"step": 10, "ae": w, "optimizer": optimizer, "config": {"dict_class": class_name}, "norm_factor": factor}
    encode, decode = dictionary_reference(class_name, w)
    for folder in (write_dictionary(tmp_path / "with", class_name, nested), tmp_path / "without"):
        if folder.name == "without":  # the config inside the file is enough
            folder.mkdir()
            torch.save(nested, folder / "ae.pt")
        sae = load_sae(folder)
        same(
            sae,
            lambda x: factor * encode(x / factor),
            lambda latents, x: factor * decode(latents / factor, x / factor),
        )
        assert torch.equal(sae.encoder, w["W_enc"].T if "W_enc" in w else w["encoder.weight"])


def test_a_middle_without_norm_factor_is_not_scaled(tmp_path: Path):
    w = dictionary_weights("AutoEncoder")
    torch.save({"step": 1, "ae": w, "optimizer": {}, "config": None, "norm_factor": None}, tmp_path / "ae.pt")
    same(load_sae(tmp_path), *dictionary_reference("AutoEncoder", w))


@pytest.mark.parametrize("class_name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_learnt(tmp_path: Path, class_name: str):
    w = dictionary_weights(class_name) | {"threshold": torch.tensor(-1.0)}
    write_dictionary(tmp_path, class_name, {"ae": w, "optimizer": {}, "norm_factor": 3.0})
    with pytest.warns(SaetoolsWarning, match="before training learnt a threshold"):
        sae = load_sae(tmp_path)
    assert isinstance(sae.nonlinearity, JumpReLU)
    assert not sae.nonlinearity.threshold.any()


@pytest.mark.parametrize("class_name", DICTIONARY_CLASSES)
def test_classes_without_a_config(tmp_path: Path, class_name: str):
    w = dictionary_weights(class_name)
    torch.save(w, tmp_path / "any name.pth")
    if class_name in ("AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"):  # their weights have the same names
        with pytest.raises(InputError, match=r"fit several; put config\.json with trainer\.dict_class beside it"):
            load_sae(tmp_path)
    else:
        same(load_sae(tmp_path / "any name.pth"), *dictionary_reference(class_name, w))


def test_checkpoints_of_a_run_find_the_config_one_folder_up(tmp_path: Path):
    w = dictionary_weights("AutoEncoderTopK")
    write_dictionary(tmp_path, "AutoEncoderTopK", w)
    (tmp_path / "checkpoints").mkdir()
    torch.save(w, tmp_path / "checkpoints" / "ae_100.pt")
    for path in (tmp_path, tmp_path / "checkpoints" / "ae_100.pt"):
        same(load_sae(path), *dictionary_reference("AutoEncoderTopK", w))


@pytest.mark.parametrize(
    ("submodule", "site"), [("mlp_out_layer_4", "mlp_out_layer_4"), (None, "blocks.4.hook_resid_post")]
)
def test_the_site_of_a_dictionary(tmp_path: Path, submodule: str | None, site: str):
    write_dictionary(tmp_path, "AutoEncoder", dictionary_weights("AutoEncoder"))
    trainer = {"dict_class": "AutoEncoder", "layer": 4, "submodule_name": submodule}
    write_json(tmp_path / "config.json", {"trainer": trainer})
    assert load_sae(tmp_path).metadata == SAEMetadata(site=site, provenance={"dictionary_learning": trainer})


# Gemma Scope


def write_npz(file: Path, weights: Weights) -> None:
    np.savez(file, **{name: tensor.numpy() for name, tensor in weights.items()})  # type: ignore[arg-type]


def test_gemma_scope(tmp_path: Path):
    w = draw(W_enc=(D, M), W_dec=(M, D), b_enc=(M,), b_dec=(D,), threshold=(M,))
    write_npz(tmp_path / "params.npz", w | {"scaling_factor": torch.ones(M)})
    sae = load_sae(tmp_path)
    same(
        sae,
        lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]),
        lambda latents, x: latents @ w["W_dec"] + w["b_dec"],
    )
    write_npz(tmp_path / "params.npz", w | {"scaling_factor": torch.full((M,), 2.0)})
    with pytest.raises(InputError, match="also scaling_factor"):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "affine"])
def test_gemma_scope_2(tmp_path: Path, kind: str):
    d_out = D if kind == "sae" else 7
    w = draw(w_enc=(D, M), w_dec=(M, d_out), b_enc=(M,), b_dec=(d_out,), threshold=(M,))
    if kind == "affine":
        w["affine_skip_connection"] = torch.randn(D, d_out)
    save_file(w, tmp_path / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma", "hf_hook_point_in": "model.layers.9.output"}
    if kind != "sae":
        config["hf_hook_point_in"] = "model.layers.9.pre_feedforward_layernorm.output"
        config["hf_hook_point_out"] = "model.layers.9.post_feedforward_layernorm.output"
    write_json(tmp_path / "config.json", config)
    sae = load_sae(tmp_path)

    def decode(latents: Tensor, x: Tensor) -> Tensor:
        recon = latents @ w["w_dec"] + w["b_dec"]
        return recon + x @ w["affine_skip_connection"] if kind == "affine" else recon

    same(sae, lambda x: jump(x @ w["w_enc"] + w["b_enc"], w["threshold"]), decode)
    if kind == "sae":
        assert sae.metadata == SAEMetadata("gemma", "blocks.9.hook_resid_post")
        (tmp_path / "config.json").unlink()  # the names of the weights are enough
        assert torch.equal(load_sae(tmp_path / "params.safetensors").W_dec, w["w_dec"])
    else:
        assert sae.metadata.site == "model.layers.9.pre_feedforward_layernorm.output"
        assert sae.metadata.site_out == "blocks.9.hook_mlp_out"


def test_a_cross_layer_transcoder_is_refused(tmp_path: Path):
    save_file(
        draw(w_enc=(D, M), w_dec=(M, 3, D), b_enc=(M,), b_dec=(D,), threshold=(M,)), tmp_path / "params.safetensors"
    )
    with pytest.raises(InputError, match="of one layer, received jump_relu with a w_dec of 3 dimensions"):
        load_sae(tmp_path)


# Llama Scope


def write_llama(folder: Path, weights: Weights, **config: Any) -> Path:
    settings = {
        "d_model": D,
        "d_sae": M,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.3,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 10.0, "out": 10.0},
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
    }
    write_json(folder / "hyperparams.json", settings | config)
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    return folder


def llama_weights() -> Weights:
    return draw(encoder__weight=(M, D), encoder__bias=(M,), decoder__weight=(D, M), decoder__bias=(D,))


@pytest.mark.parametrize("centred", [True, False])
def test_llama_scope(tmp_path: Path, centred: bool):
    """Inputs and outputs are multiplied by s = sqrt(d_model) / norm, and the threshold with them."""
    w, s = llama_weights(), math.sqrt(D) / 10
    folder = write_llama(tmp_path, w, apply_decoder_bias_to_pre_encoder=centred)
    centre = w["decoder.bias"] if centred else 0
    for path in (folder, folder / "checkpoints" / "final.safetensors"):
        sae = load_sae(path)
        same(
            sae,
            lambda x: jump((x * s - centre) @ w["encoder.weight"].T + w["encoder.bias"], 0.3 * s),
            lambda latents, x: (latents @ w["decoder.weight"].T + w["decoder.bias"]) / s,
        )
    assert sae.metadata == SAEMetadata(site="blocks.15.hook_resid_post")


def test_llama_scope_counts_the_norm_of_decoder_rows_in_as_its_own_loader_does(tmp_path: Path):
    """Their loader: biases and decoder to the unscaled stream, then decoder rows to norm 1, then the threshold."""
    w, s_in, s_out = llama_weights(), math.sqrt(D) / 10, math.sqrt(D) / 4
    sae = load_sae(
        write_llama(
            tmp_path,
            w,
            sparsity_include_decoder_norm=True,
            dataset_average_activation_norm={"in": 10.0, "out": 4.0},
            hook_point_out="blocks.15.hook_mlp_out",
        )
    )
    bias, bias_out = w["encoder.bias"] / s_in, w["decoder.bias"] / s_out
    rows = w["decoder.weight"].T * s_in / s_out
    norms = rows.norm(dim=1)

    def encode(x: Tensor) -> Tensor:
        return jump((x @ w["encoder.weight"].T + bias) * norms, 0.3)

    x = 3 * torch.randn(100, D)
    torch.testing.assert_close(sae(x), encode(x) @ (rows / norms[:, None]) + bias_out)
    torch.testing.assert_close(sae.encode(x).to_dense(), encode(x) / norms * s_in)
    assert sae.metadata.site_out == "blocks.15.hook_mlp_out"


def test_llama_scope_without_norm_bias_or_jump(tmp_path: Path):
    w = llama_weights()
    del w["decoder.bias"]
    sae = load_sae(write_llama(tmp_path, w, act_fn="relu", norm_activation="inference", use_decoder_bias=False))
    assert isinstance(sae.nonlinearity, ReLU)
    same(
        sae,
        lambda x: (x @ w["encoder.weight"].T + w["encoder.bias"]).relu(),
        lambda latents, x: latents @ w["decoder.weight"].T,
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"act_fn": "topk", "jump_relu_threshold": 0.0}, "act_fn jumprelu or relu, received 'topk'"),
        ({"norm_activation": "token-wise"}, "norm_activation dataset-wise or inference, received 'token-wise'"),
        ({"use_glu_encoder": True}, "use_glu_encoder False, received True"),
    ],
)
def test_llama_scope_settings_that_are_refused(tmp_path: Path, setting: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        load_sae(write_llama(tmp_path, llama_weights(), **setting))


# SAELens' own conversion of Gemma Scope and Llama Scope, fed from local files


def test_sae_lens_converts_scopes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
        from sae_lens.loading import pretrained_sae_loaders as loaders

    def local(repo_id: str, filename: str, subfolder: str = "", **more: Any) -> str:
        return str(tmp_path / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    gemma = tmp_path / "layer_12/width_16k/average_l0_5"
    gemma.mkdir(parents=True)
    write_npz(gemma / "params.npz", draw(W_enc=(D, M), W_dec=(M, D), b_enc=(M,), b_dec=(D,), threshold=(M,)))
    sizes = {"d_in": D, "d_sae": M, "device": "cpu", "dtype": "float32"}
    name = str(gemma.relative_to(tmp_path))
    from_gemma = loaders.gemma_2_sae_huggingface_loader("gemma-scope-2b-pt-res", name, cfg_overrides=sizes)
    llama = write_llama(tmp_path / "Llama3_1-8B-Base-L15R-8x", llama_weights())
    from_llama = loaders.llama_scope_sae_huggingface_loader("llama", llama.name, cfg_overrides=sizes)
    for folder, (config, weights, _) in ((gemma, from_gemma), (llama, from_llama)):
        config = loaders.handle_config_defaulting(config)
        theirs = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig.from_dict(config)).requires_grad_(False)
        theirs.load_state_dict(weights)
        if folder == llama:  # as it does for a release, with the factor in its list
            theirs.fold_activation_norm_scaling_factor(math.sqrt(D) / 10)
        same(load_sae(folder), theirs.encode, lambda latents, x, decode=theirs.decode: decode(latents))


# OpenAI


@pytest.mark.parametrize("kind", ["ReLU", "TopK", "tied"])
def test_openai(tmp_path: Path, kind: str):
    w = draw(pre_bias=(D,), encoder__weight=(M, D), latent_bias=(M,), decoder__weight=(D, M))
    entries: dict[str, Any] = dict(w)
    if kind == "tied":
        w["decoder.weight"] = w["encoder.weight"].T
        del entries["decoder.weight"]
        entries["decoder.linear.weight"] = w["encoder.weight"]
    entries |= {"activation": kind.replace("tied", "ReLU"), "stats_last_nonzero": torch.zeros(M, dtype=torch.long)}
    if kind == "TopK":
        entries["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    torch.save(entries, tmp_path / "8.pt")
    sae = load_sae(tmp_path / "8.pt")

    def scales(x: Tensor) -> tuple[Tensor, Tensor]:
        if kind != "TopK":
            return torch.zeros(1), torch.ones(1)
        return x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5

    def encode(x: Tensor) -> Tensor:
        mean, deviation = scales(x)
        pre = ((x - mean) / deviation - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
        return top(pre) if kind == "TopK" else pre.relu()

    def decode(latents: Tensor, x: Tensor) -> Tensor:
        mean, deviation = scales(x)
        return (latents @ w["decoder.weight"].T + w["pre_bias"]) * deviation + mean

    same(sae, encode, decode)


@pytest.mark.parametrize("activation", [{"activation": "Identity"}, {"activation": "TopK"}])
def test_openai_activations_that_are_refused(tmp_path: Path, activation: dict[str, Any]):
    w = draw(pre_bias=(D,), encoder__weight=(M, D), latent_bias=(M,), decoder__weight=(D, M))
    settings = {"activation_state_dict": {"k": 3, "postact_fn": "Identity"}}
    torch.save(dict(w) | activation | settings, tmp_path / "8.pt")
    with pytest.raises(InputError, match="activation ReLU, or TopK with a k and postact_fn ReLU"):
        load_sae(tmp_path)


# What we write

WRITABLE: list[tuple[str, str, dict[str, Any]]] = [
    ("sparsify", "topk", {}),
    ("sparsify", "topk", {"apply_b_dec_to_input": False}),
    ("sparsify", "topk", {"apply_b_dec_to_input": False, "skip": True}),
    ("sparsify", "topk", {"skip": True}),
    ("dictionary_learning", "topk", {}),
    ("dictionary_learning", "relu", {}),
    ("dictionary_learning", "relu", {"apply_b_dec_to_input": False}),
    ("dictionary_learning", "gated", {}),
    ("dictionary_learning", "jumprelu", {"apply_b_dec_to_input": False}),
]


@pytest.mark.parametrize(("format", "kind", "settings"), WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trips_are_bit_equal(
    make_sae: Callable[..., SAE],
    tmp_path: Path,
    format: Any,
    kind: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
):
    metadata = SAEMetadata("tiny", "blocks.1.hook_resid_post", 164.25, {"train": {"k": 4}})
    sae = make_sae(kind, metadata=metadata, **settings).to(dtype)
    sae.p99 = torch.rand(64)
    save_sae(sae, tmp_path, format=format)
    files = {file.name for file in tmp_path.iterdir()}
    loaded = load_sae(tmp_path, dtype=dtype)
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in sae.state_dict().items())
    assert loaded.metadata == metadata
    assert type(loaded.nonlinearity) is type(sae.nonlinearity)
    assert loaded.apply_b_dec_to_input == sae.apply_b_dec_to_input
    x = torch.randn(20, 16, dtype=dtype)
    assert torch.equal(loaded(x), sae(x))
    sae.p99 = None
    save_sae(sae, tmp_path, format=format)
    assert load_sae(tmp_path).p99 is None
    assert files - {file.name for file in tmp_path.iterdir()} == {"latent_statistics.safetensors"}


def test_a_batch_topk_sae_goes_back_to_its_class(make_sae: Callable[..., SAE], tmp_path: Path):
    folder = write_dictionary(tmp_path / "a", "BatchTopKSAE", dictionary_weights("BatchTopKSAE"))
    sae = load_sae(folder)
    again = save_sae(sae, tmp_path / "b", format="dictionary_learning")
    stored, first = torch.load(again / "ae.pt", weights_only=True), torch.load(folder / "ae.pt", weights_only=True)
    assert stored.keys() == first.keys()
    assert all(torch.equal(stored[key], first[key]) and stored[key].dtype == first[key].dtype for key in first)
    assert json.loads((again / "config.json").read_text())["trainer"]["dict_class"] == "BatchTopKSAE"
    assert load_sae(again).metadata == sae.metadata


@pytest.mark.parametrize("format", ["sparsify", "dictionary_learning"])
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_half_precision_storage(make_sae: Callable[..., SAE], tmp_path: Path, format: Any, storage: torch.dtype):
    sae = make_sae("topk")
    save_sae(sae, tmp_path, format=format, storage_dtype=storage)
    loaded = load_sae(tmp_path)
    assert loaded.W_dec.dtype == torch.float32
    assert torch.equal(loaded.W_dec, sae.W_dec.to(storage).float())
    assert load_sae(tmp_path, dtype=torch.bfloat16).W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("relu", {}),
        ("abstopk", {}),
        ("topk", {"input_norm": "layer_norm"}),
        ("topk", {"d_out": 5, "apply_b_dec_to_input": False}),
    ],
)
def test_what_sparsify_cannot_express(
    make_sae: Callable[..., SAE], tmp_path: Path, kind: str, settings: dict[str, Any]
):
    with pytest.raises(InputError, match=r'for sparsify, a TopK SAE .*; save it with format="sae_lens"'):
        save_sae(make_sae(kind, **settings), tmp_path, format="sparsify")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("abstopk", {}),
        ("matching_pursuit", {}),
        ("jumprelu", {}),  # a threshold per latent, and b_dec subtracted
        ("topk", {"apply_b_dec_to_input": False}),
        ("gated", {"apply_b_dec_to_input": False}),
        ("topk", {"skip": True}),
        ("topk", {"input_norm": "constant_norm"}),
    ],
)
def test_what_dictionary_learning_cannot_express(
    make_sae: Callable[..., SAE], tmp_path: Path, kind: str, settings: dict[str, Any]
):
    with pytest.raises(InputError, match=r'for dictionary_learning, .*; save it with format="sae_lens"'):
        save_sae(make_sae(kind, **settings), tmp_path, format="dictionary_learning")
    assert not list(tmp_path.iterdir())


def test_unknown_formats_and_folders_of_another_format(make_sae: Callable[..., SAE], tmp_path: Path):
    unknown: Any = "gguf"
    with pytest.raises(Exception, match="gguf"):
        save_sae(make_sae(), tmp_path, format=unknown)
    save_sae(make_sae(), tmp_path)
    with pytest.raises(InputError, match=r"for format sparsify alone, received .* holds sae_weights\.safetensors"):
        save_sae(make_sae(), tmp_path, format="sparsify")
    assert isinstance(load_sae(tmp_path).nonlinearity, TopK)


# The hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, str], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda release, sae_id, device: answer(release, sae_id))


def test_a_release_goes_through_sae_lens(make_sae: Callable[..., SAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
    sae = make_sae("jumprelu")
    theirs = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path))
    asked = []
    fake_hub(monkeypatch, lambda *names: asked.append(names) or theirs)
    for release, sae_id in (("someone/some-sae", "layer_3"), ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")):
        ours = load_sae(release, sae_id=sae_id)
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in sae.state_dict().items())
        assert ours.metadata == sae.metadata
    assert asked == [("someone/some-sae", "layer_3"), ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")]


def test_names_that_are_no_release(monkeypatch: pytest.MonkeyPatch):
    fake_hub(monkeypatch, lambda release, sae_id: pytest.fail("asked the hub"))
    with pytest.raises(
        InputError, match=r"received 'gpt2-small-res-bj', which is no path here .*near to it are gpt2-small"
    ):
        load_sae("gpt2-small-res-bj")
    with pytest.raises(InputError, match="'runs/nothing', which is no path here"):
        load_sae("runs/nothing")
    with pytest.raises(InputError, match=r"sae_id: expected one of the \d+ SAEs of gpt2-small-res-jb, received None"):
        load_sae("gpt2-small-res-jb")
    with pytest.raises(InputError, match="path: expected"):
        load_sae("./gpt2-small-res-jb")


def test_without_a_connection(monkeypatch: pytest.MonkeyPatch):
    def offline(release: str, sae_id: str) -> Any:
        raise ConnectionError("no route to host\nmore")

    fake_hub(monkeypatch, offline)
    words = (
        r"'someone/sae' is no path here, and SAELens could not fetch 'l1' of it .*ConnectionError: no route to host\)"
    )
    with pytest.raises(FetchError, match=words):
        load_sae("someone/sae", sae_id="l1")


def test_weights_on_disk_are_not_the_memory_of_the_sae(tmp_path: Path):
    w = dictionary_weights("AutoEncoder")
    sae = load_sae(write_dictionary(tmp_path, "AutoEncoder", w))
    raw = (tmp_path / "ae.pt").read_bytes()
    (tmp_path / "ae.pt").write_bytes(b"\0" * len(raw))  # in place, as a careless copy would
    assert torch.equal(sae.encoder, w["encoder.weight"])


def test_file_names_do_not_matter(make_sae: Callable[..., SAE], tmp_path: Path):
    for format, weights, config in (
        ("sparsify", "sae.safetensors", "cfg.json"),
        ("sae_lens", "sae_weights.safetensors", "cfg.json"),
        ("dictionary_learning", "ae.pt", "config.json"),
    ):
        any_format: Any = format
        sae, folder = make_sae("topk"), tmp_path / format
        save_sae(sae, folder, format=any_format)
        renamed = folder / f"layer 10{Path(weights).suffix}"
        (folder / weights).rename(renamed)
        (folder / config).rename(folder / "settings.json")
        for path in (folder, renamed):
            assert torch.equal(load_sae(path).W_dec, sae.W_dec)
    assert load_file(tmp_path / "sparsify" / "layer 10.safetensors").keys() == sparsify_weights().keys()
