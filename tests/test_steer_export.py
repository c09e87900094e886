"""Edits that leave saetools: control vectors as gguf reads them, checkpoints whose outputs are the edited ones."""

import gguf
import pytest
import torch
from test_steer import V
from tiny_sae import make_sae, with_random_adapter
from transformer_lens.model_bridge import TransformerBridge

from saetools import Site, bake_edits, edit, export_control_vector, load_model, steer
from saetools.errors import InputError, ResourceError
from saetools.models import final_hidden, logits

IDS = torch.tensor([[5, 6, 7, 8, 9], [257, 257, 10, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
U = torch.randn(32, generator=torch.Generator().manual_seed(5))
MATRIX = torch.randn(32, 32, generator=torch.Generator().manual_seed(6)) / 6


def everywhere(change):
    return change.on(skip_first=False)


PUSH = everywhere(steer.add_direction(V, 2.0))
OUT = everywhere(steer.project_out(V))
TO = everywhere(steer.project_to(V, 1.5))
MAP = everywhere(steer.affine(MATRIX, U))
LATENT = everywhere(steer.add(make_sae(), [3, 5], 0.4))
ALL_WRITERS = {Site(layer, stream): OUT for layer in range(3) for stream in ("attn_out", "mlp_out")}
CASES = {
    "push": {Site(1): PUSH},
    "latents": {Site(0): LATENT, Site(2): [PUSH, everywhere(steer.add(make_sae(), 3, 1.5, unit="activation"))]},
    "order": {Site(1, "resid_mid"): PUSH, Site(1, "attn_out"): MAP, Site(1): PUSH, Site(1, "mlp_out"): [OUT, MAP]},
    "before": {Site(1, "resid_pre"): PUSH, Site(0, "resid_pre"): [PUSH, MAP]},
    "middle": {Site(1, "resid_mid"): PUSH, Site(2, "attn_out"): [PUSH, TO]},
    "matrices": {Site(0, "mlp_out"): [MAP, OUT], Site(1, "attn_out"): MAP, Site(1): PUSH},
    "orthogonal": ALL_WRITERS | {Site(0, "resid_pre"): OUT},
    "sum": {Site(1): everywhere(steer.add_direction(V, 2.0) + steer.add_direction(U, -1.0))},
}
LINEAR_ALONE = ("orthogonal",)


def outputs(lm, edits):
    with torch.no_grad(), edit(lm, edits):
        return logits(lm, final_hidden(lm, IDS, MASK))[MASK]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt2", "gpt_neox"])
def test_a_baked_checkpoint_has_the_outputs_of_the_edits(make_tiny, tmp_path, family, name):
    lm = make_tiny(family)
    plain, expected = outputs(lm, {}), outputs(lm, CASES[name])
    baked = load_model(bake_edits(lm, CASES[name], tmp_path / "baked"))
    torch.testing.assert_close(outputs(baked, {}), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.05
    assert torch.equal(outputs(lm, {}), plain)
    assert len(baked.tokenizer) == len(lm.tokenizer)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3"])
def test_families_without_biases_take_what_is_linear(make_tiny, tmp_path, family):
    lm = make_tiny(family)
    edits = CASES["orthogonal"]
    baked = load_model(bake_edits(lm, edits, tmp_path / "baked"))
    torch.testing.assert_close(outputs(baked, {}), outputs(lm, edits), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="expected an edit without a constant at the mlp"):
        bake_edits(lm, {Site(1): PUSH}, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_tied_embeddings_are_untied_where_the_embedding_changes(make_tiny, tmp_path):
    lm = make_tiny("llama", tie_word_embeddings=True)
    edits = CASES["before"]
    baked = load_model(bake_edits(lm, edits, tmp_path / "baked"))
    torch.testing.assert_close(outputs(baked, {}), outputs(lm, edits), rtol=1e-4, atol=1e-4)
    assert not baked.model.config.tie_word_embeddings
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight


def test_the_adapter_of_the_view_is_merged(make_tiny, tmp_path):
    tuned = with_random_adapter(make_tiny("llama"))
    edits = CASES["push"]
    for name, view in (("tuned", tuned), ("base", tuned.base)):
        expected = outputs(view, edits)
        baked = load_model(bake_edits(view, edits, tmp_path / name))
        assert not baked.adapters
        torch.testing.assert_close(outputs(baked, {}), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(outputs(view, edits), expected)
    assert tuned.adapters == ("tuned",)


def test_the_built_in_model_is_baked(smollm, tmp_path):
    push = everywhere(steer.add_direction(torch.randn(576, generator=torch.Generator().manual_seed(0)), 2.0))
    baked = load_model(bake_edits(smollm, {Site(15): push}, tmp_path))
    ids = smollm.tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad(), edit(smollm, {Site(15): push}):
        expected = smollm.model(**ids).logits
    with torch.no_grad():
        torch.testing.assert_close(baked.model(**ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({Site(1): steer.add_direction(V, 1.0)}, r"all tokens, the first included, received add_direction \(norm"),
        ({Site(1): PUSH.on("response", skip_first=False)}, "all tokens, the first included"),
        ({Site(1): PUSH.over({0: 1.0})}, "edits of constant weight"),
        ({Site(1): PUSH.when(steer.probe(V))}, "all tokens, the first included"),
        ({Site(1): lambda acts, where: acts}, r"edits of saetools\.steer"),
        ({Site(1): PUSH + OUT}, "in a sum, pushes alone"),
        ({Site(1): OUT}, "a push, or a linear map at attn_out.*; edit all that is written to the stream"),
        ({Site(1): everywhere(steer.clamp(make_sae(), 3, 1.0))}, "a push, or a linear map .*; run it in saetools"),
        ({Site(1, "mlp_out"): everywhere(steer.cap(V, high=1.0))}, "a push, or a linear map .*; run it in saetools"),
        ({Site(3): PUSH}, "layer below 3"),
    ],
)
def test_what_cannot_be_baked_is_an_error(tiny, tmp_path, edits, message):
    with pytest.raises(InputError, match=message):
        bake_edits(tiny, edits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_post_norms_and_scaled_embeddings_cannot_be_baked(make_tiny, tmp_path):
    with pytest.raises(InputError, match=r"whose layers write to the stream unnormed, received .* of gemma3_text"):
        bake_edits(make_tiny("gemma3_text"), {Site(1): PUSH}, tmp_path / "out")
    with pytest.raises(InputError, match="an embedding that is not scaled, received gemma"):
        bake_edits(make_tiny("gemma"), {Site(0, "resid_pre"): PUSH}, tmp_path / "out")


def test_a_control_vector_is_read_back(tiny, tmp_path):
    edits = {Site(1): [PUSH, LATENT], Site(2): LATENT, Site(2, "resid_pre"): PUSH}
    path = export_control_vector(tiny, edits, tmp_path / "new" / "push.gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    latent = LATENT.parts[0].change.vector()
    assert found.keys() == {"direction.1", "direction.2"}
    torch.testing.assert_close(found["direction.1"], 4 * V + latent)
    torch.testing.assert_close(found["direction.2"], latent)
    with torch.no_grad(), edit(tiny, {Site(1): everywhere(steer.add_direction(found["direction.1"], 1.0))}):
        again = logits(tiny, final_hidden(tiny, IDS, MASK))[MASK]
    torch.testing.assert_close(again, outputs(tiny, {Site(1): [PUSH, PUSH, LATENT]}), rtol=1e-4, atol=1e-4)
    assert [file.name for file in path.parent.iterdir()] == ["push.gguf"]


@pytest.mark.parametrize(
    "edits", [{Site(0): PUSH}, {Site(1): OUT}, {Site(1, "attn_out"): PUSH}, {Site(1, "resid_pre"): PUSH}], ids=str
)
def test_what_llama_cpp_cannot_add_is_an_error(tiny, tmp_path, edits):
    with pytest.raises(InputError, match="expected add or add_direction after layers 1 and above"):
        export_control_vector(tiny, edits, tmp_path / "no.gguf")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_control_vector(smollm, tmp_path, small_files):
    push = everywhere(steer.add_direction(torch.ones(576), 1.0))
    with small_files(1000), pytest.raises(ResourceError):
        export_control_vector(smollm, {Site(15): push}, tmp_path / "push.gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_inside_a_bridge_is_not_baked(make_tiny, tmp_path):
    lm = make_tiny("llama")
    TransformerBridge.boot_transformers("x/llama", hf_model=lm.model, tokenizer=lm.tokenizer)
    with pytest.raises(InputError, match="lm: expected a plain Hugging Face model"):
        bake_edits(lm, {Site(1): PUSH}, tmp_path / "out")
