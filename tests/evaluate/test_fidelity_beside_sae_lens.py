"""Fidelity of the shipped SAE beside SAELens' own `run_evals`: the same weights, sequences and positions.

In float32: SAELens takes cross-entropies from logits in the model's dtype, and bfloat16 has three digits. Not on the
shared model: a TransformerBridge changes how its model attends.
"""

import types
import warnings

import pytest
import torch

from saetools.data import Conversation, load_voices, shipped_path, tokenize
from saetools.evaluate import measure_fidelity
from saetools.models import load_model
from saetools.sae import load_sae

FIRST = "<|endoftext|>"  # a first token that occurs nowhere else: SAELens leaves tokens out by their ids, not places
N_TOKENS, N_SEQUENCES = 48, 6
SAME = {
    "explained_variance": "explained_variance",
    "cossim": "cosine",
    "l2_ratio": "norm_ratio",
    "l0": "l0",
    "ce_loss_without_sae": "ce_clean",
    "ce_loss_with_sae": "ce_sae",
    "kl_div_with_sae": "kl",
}
ABLATION = {
    "ce_loss_with_ablation": "ce_zero",
    "ce_loss_score": "ce_recovered",
    "kl_div_with_ablation": "kl_zero",
    "kl_div_score": "kl_recovered",
}


@pytest.fixture(scope="module")
def lm():
    return load_model("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="module")
def conversations(lm):
    """Texts that fill the sequences, for SAELens' have no padding."""
    texts = [Conversation(text=FIRST + pair.neutral) for pair in load_voices()]
    lengths = map(len, tokenize(texts, lm.tokenizer))
    return [text for text, length in zip(texts, lengths, strict=True) if length >= N_TOKENS][:N_SEQUENCES]


@pytest.fixture(scope="module")
def token_ids(lm, conversations):
    return torch.stack([one.token_ids for one in tokenize(conversations, lm.tokenizer, max_tokens=N_TOKENS)])


def run_evals(lm, token_ids, left_out):
    """SAELens' figures, by name, and the share of tokens on which each latent fires."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        import sae_lens
        from sae_lens.evals import get_eval_everything_config, run_evals
        from sae_lens.training.activation_scaler import ActivationScaler
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers("x/llama", hf_model=lm.model, tokenizer=lm.tokenizer)
        sae = sae_lens.SAE.load_from_disk(shipped_path("sae/smollm2-135m"))
        store = types.SimpleNamespace(  # all that it asks of a store
            get_batch_tokens=lambda n_rows: token_ids,
            store_batch_size_prompts=len(token_ids),
            context_size=token_ids.shape[1],
            reset_input_dataset=lambda: None,
        )
        config = get_eval_everything_config(n_eval_reconstruction_batches=1)
        groups, by_latent = run_evals(sae, store, bridge, ActivationScaler(), config, exclude_special_tokens=left_out)
    figures = {name: value for group in groups.values() for name, value in group.items()}
    return figures, torch.tensor(by_latent["feature_density"])


@pytest.mark.parametrize("skip_first", [True, False])
def test_figures_equal_those_of_run_evals(lm, conversations, token_ids, skip_first):
    first = int(token_ids[0, 0])
    assert token_ids.shape == (N_SEQUENCES, N_TOKENS)
    assert (token_ids == first).sum() == N_SEQUENCES
    sae = load_sae(shipped_path("sae/smollm2-135m"))
    ours = measure_fidelity(lm, sae, conversations, max_tokens=N_TOKENS, skip_first=skip_first).all
    theirs, density = run_evals(lm, token_ids, [first] if skip_first else False)
    # With first positions left out, ablation cannot be compared: SAELens' mask holds for what is counted and for what
    # the SAE replaces, but zeros are put at every position, first ones too, which takes the attention sinks away.
    for name, own in (SAME if skip_first else SAME | ABLATION).items():
        assert getattr(ours, own).mean == pytest.approx(theirs[name], rel=1e-5), name
    assert ours.fvu.mean == pytest.approx(1 - theirs["explained_variance"], rel=1e-5)
    assert ours.dead == pytest.approx(float((density == 0).double().mean()))
    assert ours.dense == pytest.approx(float((density > 0.1).double().mean()))
    assert theirs["ce_loss_with_sae"] > theirs["ce_loss_without_sae"] + 0.01  # their hook fired
    if skip_first:
        assert ours.ce_zero.mean > theirs["ce_loss_with_ablation"] + 1
