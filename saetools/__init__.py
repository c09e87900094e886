"""saetools: find the persona a fine-tune woke up in a language model, prove it, and switch it off."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saetools.activations import ActivationStore, HarvestConfig, harvest, stream_activations
    from saetools.attribution import attribute_latents
    from saetools.consensus import Consensus, find_consensus
    from saetools.data import (
        Conversation,
        Message,
        load_advice,
        load_forced_choice,
        load_free_form,
        load_voices,
        read_conversations,
        shipped_path,
        tokenize,
    )
    from saetools.diff import LatentDiff, diff_latents
    from saetools.directions import Direction, mean_difference
    from saetools.endpoint import Endpoint
    from saetools.evaluate import (
        certify_latents,
        dose_response,
        max_coherent_strength,
        measure_fidelity,
        measure_perplexity,
        plot_dose_response,
        score_forced_choice,
        sweep_edits,
    )
    from saetools.explore import explore_run
    from saetools.finetune import FinetuneConfig, finetune_lora
    from saetools.generation import Generation, SamplingConfig, generate
    from saetools.interpret import (
        Explanation,
        direct_effects,
        explain_latents,
        promoted_tokens,
        search_explanations,
        search_text,
        store_passages,
    )
    from saetools.latents import LatentStore, index_latents, measure_latents
    from saetools.matching import compare_across_saes, match_latents, measure_coactivation
    from saetools.models import LanguageModel, Site, edit, edit_modules, hook_functions, load_model, read
    from saetools.persona import find_persona
    from saetools.rankings import Rankings, compare_rankings
    from saetools.readings import ChangeSplit, split_change
    from saetools.report import PersonaReport, report_latents, write_latent_reports, write_report
    from saetools.sae import SAE, TrainConfig, load_sae, save_sae, train_sae
    from saetools.steer_export import bake_edits, export_control_vector
    from saetools.steered import steered_model
    from saetools.trajectory import Trajectory, trace_checkpoints, trace_scales
    from saetools.tuned_only import find_tuned_only

_HOMES = {
    "activations": ("ActivationStore", "HarvestConfig", "harvest", "stream_activations"),
    "attribution": ("attribute_latents",),
    "consensus": ("Consensus", "find_consensus"),
    "data": (
        "Conversation",
        "Message",
        "load_advice",
        "load_forced_choice",
        "load_free_form",
        "load_voices",
        "read_conversations",
        "shipped_path",
        "tokenize",
    ),
    "diff": ("LatentDiff", "diff_latents"),
    "directions": ("Direction", "mean_difference"),
    "endpoint": ("Endpoint",),
    "evaluate": (
        "certify_latents",
        "dose_response",
        "max_coherent_strength",
        "measure_fidelity",
        "measure_perplexity",
        "plot_dose_response",
        "score_forced_choice",
        "sweep_edits",
    ),
    "explore": ("explore_run",),
    "finetune": ("FinetuneConfig", "finetune_lora"),
    "generation": ("Generation", "SamplingConfig", "generate"),
    "interpret": (
        "Explanation",
        "direct_effects",
        "explain_latents",
        "promoted_tokens",
        "search_explanations",
        "search_text",
        "store_passages",
    ),
    "latents": ("LatentStore", "index_latents", "measure_latents"),
    "matching": ("compare_across_saes", "match_latents", "measure_coactivation"),
    "models": ("LanguageModel", "Site", "edit", "edit_modules", "hook_functions", "load_model", "read"),
    "persona": ("find_persona",),
    "rankings": ("Rankings", "compare_rankings"),
    "readings": ("ChangeSplit", "split_change"),
    "report": ("PersonaReport", "report_latents", "write_latent_reports", "write_report"),
    "sae": ("SAE", "TrainConfig", "load_sae", "save_sae", "train_sae"),
    "steer_export": ("bake_edits", "export_control_vector"),
    "steered": ("steered_model",),
    "trajectory": ("Trajectory", "trace_checkpoints", "trace_scales"),
    "tuned_only": ("find_tuned_only",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("steer",)

__all__ = [
    "SAE",
    "ActivationStore",
    "ChangeSplit",
    "Consensus",
    "Conversation",
    "Direction",
    "Endpoint",
    "Explanation",
    "FinetuneConfig",
    "Generation",
    "HarvestConfig",
    "LanguageModel",
    "LatentDiff",
    "LatentStore",
    "Message",
    "PersonaReport",
    "Rankings",
    "SamplingConfig",
    "Site",
    "TrainConfig",
    "Trajectory",
    "attribute_latents",
    "bake_edits",
    "certify_latents",
    "compare_across_saes",
    "compare_rankings",
    "diff_latents",
    "direct_effects",
    "dose_response",
    "edit",
    "edit_modules",
    "explain_latents",
    "explore_run",
    "export_control_vector",
    "find_consensus",
    "find_persona",
    "find_tuned_only",
    "finetune_lora",
    "generate",
    "harvest",
    "hook_functions",
    "index_latents",
    "load_advice",
    "load_forced_choice",
    "load_free_form",
    "load_model",
    "load_sae",
    "load_voices",
    "match_latents",
    "max_coherent_strength",
    "mean_difference",
    "measure_coactivation",
    "measure_fidelity",
    "measure_latents",
    "measure_perplexity",
    "plot_dose_response",
    "promoted_tokens",
    "read",
    "read_conversations",
    "report_latents",
    "save_sae",
    "score_forced_choice",
    "search_explanations",
    "search_text",
    "shipped_path",
    "split_change",
    "steer",
    "steered_model",
    "store_passages",
    "stream_activations",
    "sweep_edits",
    "tokenize",
    "trace_checkpoints",
    "trace_scales",
    "train_sae",
    "write_latent_reports",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"saetools.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'saetools' has no attribute {name!r}")
    return getattr(import_module(f"saetools.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
