"""SAEDashboard: `SaeVisRunner` on TransformerLens' model, then pages of 20 latents and Neuronpedia's batches."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

from workers.report.task import CONTEXT, N_BINS, N_PER_BIN, N_TOKENS, N_TOP, PER_PAGE, Item, Task
from workers.turns import Turns, serve

os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from sae_dashboard.feature_data_generator import FeatureDataGenerator
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    model = hooked_model(task.settings["model"], task.settings["dtype"])
    sae = SAE.load_from_disk(task.settings["sae"], device="cpu", dtype="float32")
    # The runner asks for it, and SAELens refuses it for this kind of SAE, since other latents would be active then.
    sae.fold_W_dec_norm = lambda: None
    FeatureDataGenerator.get_model_acts = task.timed("forward", FeatureDataGenerator.get_model_acts)
    SaeVisRunner.run = task.timed("data", SaeVisRunner.run)
    for item in turns.timed(task.items(), library="sae-dashboard"):
        if item is not None:
            data = run(task, item, model, sae)
    turns.finish(**task.tell(_answers(data, model, task.contexts.size)))


def run(task: Task, item: Item, model: Any, sae: Any) -> Any:
    """Read, and write pages and batches."""
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner import NeuronpediaRunner
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    settings = task.settings
    config = SaeVisConfig(
        hook_point=settings["site"],
        features=item.latents,
        minibatch_size_features=settings["latents_at_once"],
        minibatch_size_tokens=settings["contexts_at_once"],
        ignore_positions=[0],
        feature_centric_layout=layout(settings["layout"]),
        device="cpu",
        dtype="float32",
    )
    data = SaeVisRunner(config).run(sae, model, torch.from_numpy(task.contexts[: item.n_contexts]))
    pages = [item.latents[start : start + PER_PAGE] for start in range(0, len(item.latents), PER_PAGE)]
    with task.stage("html"):
        for number, some in enumerate(pages):
            save_feature_centric_vis(data, item.folder / f"latents-{number}.html", some[0], include_only=some)
    with task.stage("neuronpedia"):
        n, length = task.contexts.shape
        names = NeuronpediaRunnerConfig("res-saetools", "", "", n_prompts_total=n, n_tokens_in_prompt=length)
        vocabulary = NeuronpediaRunner.get_vocab_dict(SimpleNamespace(model=model))
        text = NeuronpediaConverter.convert_to_np_json(model, data, names, vocabulary)
        (item.folder / "batch-0.json").write_text(text, encoding="utf-8")
    return data


def layout(kind: str) -> Any:
    """Its own default, or that with passages of our number and length."""
    from sae_dashboard.layout import SaeVisLayoutConfig

    found = SaeVisLayoutConfig.default_feature_centric_layout()
    if kind == "equal":
        passages = found.seq_cfg
        passages.buffer, passages.top_acts_group_size = (CONTEXT, CONTEXT), N_TOP
        passages.n_quantiles, passages.quantile_group_size = N_BINS, N_PER_BIN
        passages.__post_init__()  # which counts them
        found.logits_table_cfg.n_rows = N_TOKENS
    return found


def hooked_model(folder: str, dtype: str) -> Any:
    """The model as `from_pretrained` loads those that it knows, with layer norms folded into the weights."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(folder)
    of = source.config
    config = HookedTransformerConfig(
        n_layers=of.num_hidden_layers,
        d_model=of.hidden_size,
        n_ctx=2048,
        d_head=of.head_dim,
        n_heads=of.num_attention_heads,
        n_key_value_heads=of.num_key_value_heads,
        d_mlp=of.intermediate_size,
        d_vocab=of.vocab_size,
        act_fn=of.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=of.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=of.head_dim,
        rotary_base=of.rope_theta,
        original_architecture="LlamaForCausalLM",
        tokenizer_prepends_bos=False,
        dtype=getattr(torch, dtype),
        device="cpu",
    )
    model = HookedSAETransformer(config, AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(convert_llama_weights(source, config))
    return model.eval().requires_grad_(False)


def _answers(data: Any, model: Any, n_tokens: int) -> dict[int, dict[str, Any]]:
    """What is to be compared; of active tokens it tells a share in per cent, with three decimals."""
    answers = {}
    for latent, one in data.feature_data_dict.items():
        top = one.sequence_data.seq_group_data[0]
        if one.acts_histogram_data.title is None:  # in bfloat16 it does not fire
            answers[latent] = {"max": 0.0, "n_active": 0, "promoted": [], "top": []}
            continue
        share = float(one.acts_histogram_data.title.rpartition(" = ")[2].rstrip("%")) / 100
        promoted = one.logits_table_data.top_token_ids[:N_TOKENS]
        answers[latent] = {
            "max": float(top.title.rpartition(" = ")[2]),
            "n_active": round(share * n_tokens),
            "promoted": [model.tokenizer.decode([token]) for token in promoted],
            "top": [[seq.original_index, seq.qualifying_token_index] for seq in top.seq_data],
        }
    return answers


if __name__ == "__main__":
    serve(work)
