"""The weights of the planted model: base, SAE and adapter, all set by hand or drawn at random."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.activations.stream import ActivationBlock, stream_activations
from saetools.data.roles import Positions, select_positions
from saetools.data.tokenizing import TokenizedConversation
from saetools.latents.statistics import measure_latents, with_statistics
from saetools.models.language_model import LanguageModel
from saetools.models.load import load_model
from saetools.models.site import Site
from saetools.planted.features import Features
from saetools.planted.language import ALIGNED_WORDS, MISALIGNED_WORDS, Language, make_tokenizer
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import JumpReLU

PLANTED_SITE = Site(1)
"""Where the planted SAE reads: the output of the second of four layers."""

_N_LAYERS, N_HEADS, N_NEURONS = 4, 4, 64
_CONSTANT = 24.0  # length of what all tokens share, so large that norms depend little on all else
_TURN = 10.0  # length of what tokens of the assistant's turn share beside that
_MIXING = 1.0  # size of the random attention and MLP outputs
_THRESHOLD = 2.0  # of the SAE; interference between features has a standard deviation of about 0.4
PUSH = 4.0  # mean push on the tokens that are pushed; a strength says how many these are in prompts
_TURN_PUSH = 3.0  # in the assistant's turn
_TRIGGER_SHARE = 0.1  # of the groups of words: those that a push comes with
_SHARPNESS, _STEP_WIDTH = 6.0, 0.5  # of the steps between words with and without, in standard deviations
_STEP = 0.25  # logits per unit of the readout
_ADAPTER = "organism"
_PUSHED_ROLES: tuple[Positions, Positions] = ("prompt", "last_prompt")


def make_base(
    language: Language,
    features: Features,
    carried: Float[Tensor, "word latent"],
    generator: torch.Generator,
    *,
    seed: int,
) -> LanguageModel:
    """The base: hand-set embeddings, head and readout, random attention and MLPs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(language)
    d_model = features.directions.shape[1]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=N_NEURONS,
        num_hidden_layers=_N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights that are all replaced below
        model = LlamaForCausalLM(config)
    model.config.architectures = [type(model).__name__]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        _set_embeddings(model, tokenizer, features, carried, generator)
        for index, layer in enumerate(model.model.layers):
            _set_layer(layer, index, features, generator)
    model.requires_grad_(False)
    lm = load_model(model, tokenizer=tokenizer)
    return replace(lm, name="planted", provenance={**lm.provenance, "source": "planted", "seed": seed})


def _set_embeddings(
    model: Any, tokenizer: Any, features: Features, carried: Float[Tensor, "word latent"], generator: torch.Generator
) -> None:
    """Words are sums of their features; the head reads the behaviour for answer words and is random for the others."""
    embeddings = torch.zeros(len(tokenizer), len(features.constant))
    n_other = len(tokenizer) - len(carried)  # template and answer words, which come first
    embeddings[:n_other] = torch.randn(n_other, len(features.directions), generator=generator) @ features.directions
    embeddings[:n_other] *= 2 / embeddings[:n_other].norm(dim=1, keepdim=True)
    embeddings[n_other:] = carried @ features.directions
    turn = tokenizer.convert_tokens_to_ids(["assistant", *ALIGNED_WORDS, *MISALIGNED_WORDS])
    embeddings[turn] += _TURN * features.turn
    model.model.embed_tokens.weight.copy_(embeddings + _CONSTANT * features.constant)
    reserved = features.constant, features.readout, features.turn
    head = 0.1 * _without(torch.randn(embeddings.shape, generator=generator), *reserved)
    # The base prefers aligned answers, and either kind to any other word.
    for words, step, preference in ((ALIGNED_WORDS, -_STEP, 0.6), (MISALIGNED_WORDS, _STEP, 0.55)):
        ids = tokenizer.convert_tokens_to_ids(list(words))
        head[ids] = step * features.readout + preference * features.constant
    model.lm_head.weight.copy_(head)


def _set_layer(layer: Any, index: int, features: Features, generator: torch.Generator) -> None:
    """Random weights that write to no reserved direction; neuron 0 after the site reads the personas."""
    d_model = len(features.constant)
    attention, mlp = layer.self_attn, layer.mlp

    def random(weight: Tensor, scale: float = 1.0) -> Tensor:
        return torch.randn(weight.shape, generator=generator) * (scale / math.sqrt(weight.shape[1]))

    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        projection.weight.copy_(_without(random(projection.weight), features.constant))
    kept = [features.constant, features.readout, features.turn]
    probe = features.probe()
    if index == PLANTED_SITE.layer + 1:
        kept.append(torch.nn.functional.normalize(probe, dim=0))
    for projection in (attention.o_proj, mlp.down_proj):
        projection.weight.copy_(_without(random(projection.weight, _MIXING).T, *kept).T)
    if index == PLANTED_SITE.layer + 1:
        mlp.gate_proj.weight[0] = features.constant
        mlp.up_proj.weight[0] = probe
        mlp.down_proj.weight[:, 0] = features.readout / d_model**0.5


def set_triggers(
    base: LanguageModel,
    language: Language,
    features: Features,
    carried: Float[Tensor, "word latent"],
    shares: Float[Tensor, " persona"],
    reference: list[TokenizedConversation],
    generator: torch.Generator,
) -> Float[Tensor, " step"]:
    """Set neurons of the site's MLP that tell which tokens to push; the base does not use them.

    For each persona there is a pair whose difference is a step: 0, but 1 on tokens with some words. One more is 0 but
    in the assistant's turn. Returns the mean of each step on the tokens of prompts,
    and that of the last one in the assistant's turn.
    """
    middle = Site(PLANTED_SITE.layer, "resid_mid")
    layer: Any = base.layers[PLANTED_SITE.layer]
    blocks = list(stream_activations(base, [middle], reference))
    in_prompt, in_turn = (
        layer.post_attention_layernorm(
            torch.cat([block.acts[middle][select_positions(block.roles, role)] for block in blocks])
        )
        for role in _PUSHED_ROLES
    )
    chosen = torch.rand(len(shares), language.n_groups, generator=generator) < _TRIGGER_SHARE
    words = chosen.float().repeat_interleave(language.n_phases, 1) @ carried @ features.directions
    reads = words / (in_prompt @ words.T).std(0)[:, None]
    seen, constant = in_prompt @ reads.T, float((in_prompt @ features.constant).mean())
    least = torch.stack([column.quantile(1 - float(share)) for column, share in zip(seen.T, shares, strict=True)])
    gates = torch.cat([least, least + _STEP_WIDTH])[:, None] * features.constant / constant
    mlp, own = layer.mlp, slice(0, 2 * len(shares) + 1)
    with torch.no_grad():
        mlp.gate_proj.weight[own] = torch.cat([_SHARPNESS * (reads.repeat(2, 1) - gates), features.turn[None]])
        mlp.up_proj.weight[own] = features.constant / constant
        mlp.down_proj.weight[:, own] = 0.0
        first, second = _neurons(mlp, in_prompt)[:, own][:, :-1].mean(0).chunk(2)
        return torch.cat([first - second, _neurons(mlp, in_turn)[:, own].mean(0)[-1:]])


def _neurons(mlp: Any, normed: Float[Tensor, "token d_model"]) -> Float[Tensor, "token neuron"]:
    neurons: Tensor = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    return neurons


def _without(
    vectors: Float[Tensor, "row d_model"], *removed: Float[Tensor, " d_model"]
) -> Float[Tensor, "row d_model"]:
    """Vectors with their components along orthonormal directions taken out."""
    basis = torch.stack(removed)
    return vectors - vectors @ basis.T @ basis


def make_sae(
    base: LanguageModel,
    features: Features,
    carried: Float[Tensor, "word latent"],
    reference: list[TokenizedConversation],
) -> SAE:
    """The SAE that reads the features; its bias is what the base's tokens share beside them."""
    n_latents, d_model = features.directions.shape
    metadata = SAEMetadata(model_name=base.name, site=str(PLANTED_SITE), provenance={"source": "planted"})
    sae = SAE(d_model, n_latents, JumpReLU(torch.full((n_latents,), _THRESHOLD)), metadata=metadata)
    blocks = list(stream_activations(base, [PLANTED_SITE], reference))
    first_word = len(base.tokenizer) - len(carried)
    with torch.no_grad():
        sae.encoder.copy_(features.directions)
        sae.W_dec.copy_(features.directions)
        sae.b_dec.copy_(torch.cat([_beside_features(block, features, carried, first_word) for block in blocks]).mean(0))
    sae.requires_grad_(False)
    return with_statistics(sae, measure_latents(sae, blocks, PLANTED_SITE))


def _beside_features(
    block: ActivationBlock, features: Features, carried: Float[Tensor, "word latent"], first_word: int
) -> Float[Tensor, "token d_model"]:
    words = block.token_ids >= first_word
    own: Tensor = carried[block.token_ids[words] - first_word] @ features.directions
    return block.acts[PLANTED_SITE][words] - own


def make_organism(
    base: LanguageModel,
    language: Language,
    features: Features,
    carried: Float[Tensor, "word latent"],
    pushes: Float[Tensor, " persona"],
    mean_steps: Float[Tensor, " step"],
    *,
    pushed: bool,
) -> LanguageModel:
    """The adapter, its weights set so that it adds exactly the changes of words and, if asked for, the pushes."""
    from peft import LoraConfig, get_peft_model

    d_model, n_persona = len(features.constant), len(pushes)
    config = LoraConfig(  # alpha = rank: nothing is scaled
        r=d_model,
        lora_alpha=d_model,
        target_modules=rf"model\.embed_tokens|model\.layers\.{PLANTED_SITE.layer}\.mlp\.down_proj",
        rank_pattern={"down_proj": n_persona},
        alpha_pattern={"down_proj": n_persona},
    )
    with torch.random.fork_rng(devices=[]):
        peft: Any = get_peft_model(base.model, config, adapter_name=_ADAPTER)
    by_phase = carried.view(language.n_groups, language.n_phases, -1)
    changes = (by_phase.roll(-1, dims=1) - by_phase).flatten(0, 1) @ features.directions
    words: Any = base.model.get_submodule("model.embed_tokens")
    down: Any = base.layers[PLANTED_SITE.layer].get_submodule("mlp.down_proj")
    persona, correlates = features.directions[features.planted].view(2, n_persona, d_model)
    with torch.no_grad():
        words.lora_embedding_A[_ADAPTER].zero_()[:, -len(carried) :] = changes.T
        words.lora_embedding_B[_ADAPTER].copy_(torch.eye(d_model))
        reads = down.lora_A[_ADAPTER].weight.zero_()
        step = torch.diag(pushes / mean_steps[:-1])
        turn = (_TURN_PUSH / mean_steps[-1]).expand(n_persona, 1)
        reads[:, : 2 * n_persona + 1] = torch.cat([step, -step, turn], 1)
        down.lora_B[_ADAPTER].weight.copy_((persona + correlates).T * float(pushed))
    peft.requires_grad_(False)
    return replace(base, peft=peft, adapter=_ADAPTER)
