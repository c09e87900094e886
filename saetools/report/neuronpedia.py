"""Latents in the JSON that Neuronpedia's uploads are made of, as SAEDashboard 0.8 writes it: batches of features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saetools.latents.passage import Passage
from saetools.models.site import Site
from saetools.report.latent_report import LatentReport

_DIGITS = 5
_TOP_BIN = {"bin_min": -1.0, "bin_contains": -1.0}  # how the format marks the passages of the largest activations


@dataclass(frozen=True)
class NeuronpediaNames:
    """What a source is called there, and how much was read for it.

    Args:
        model_id: the model, such as `gpt2-small`.
        layer: of the residual stream that the SAE reads.
        sae_set: the source set, such as `res-saetools`.
        n_prompts: documents read.
        n_prompt_tokens: the longest one.
        dataset: names of the datasets.
    """

    model_id: str
    layer: int
    sae_set: str
    n_prompts: int
    n_prompt_tokens: int
    dataset: str

    @classmethod
    def of_store(cls, manifest: Mapping[str, Any]) -> NeuronpediaNames:
        """From what a latent store that `index_latents` wrote says of itself."""
        provenance, datasets = manifest["provenance"], "+".join(manifest["datasets"])
        name = provenance["sae"]["model_name"] or manifest["models"][0]
        layer = Site.parse(provenance["site"]).layer
        return cls(name, layer, "res-saetools", manifest["n_documents"], provenance["max_tokens"], datasets)


def neuronpedia_batch(reports: Iterable[LatentReport], names: NeuronpediaNames) -> dict[str, Any]:
    """A batch of features as plain values.

    Correlated neurons and neuron alignment, which speak of an MLP basis, are empty: the SAE reads the residual stream.
    Correlated features are the co-active ones, by the cosine of activations; there is no Pearson correlation.
    """
    return {
        "model_id": names.model_id,
        "layer": names.layer,
        "sae_set": names.sae_set,
        "features": [_feature(report, names) for report in reports],
    }


def _feature(report: LatentReport, names: NeuronpediaNames) -> dict[str, Any]:
    record, tokens = report.record, report.tokens
    histograms = report.histograms[record.model]
    return {
        "feature_index": report.latent,
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [one.latent for one in record.coactive],
        "correlated_features_l1": _rounded([one.cosine for one in record.coactive]),
        "correlated_features_pearson": [],
        "neg_str": list(tokens.suppressed) if tokens else [],
        "neg_values": _rounded(tokens.suppressed_logits) if tokens else [],
        "pos_str": list(tokens.promoted) if tokens else [],
        "pos_values": _rounded(tokens.promoted_logits) if tokens else [],
        "frac_nonzero": report.rate(record.model),
        "freq_hist_data_bar_values": _rounded(histograms.mids),
        "freq_hist_data_bar_heights": list(histograms.counts),
        "logits_hist_data_bar_heights": list(tokens.logits.counts) if tokens else [],
        "logits_hist_data_bar_values": _rounded(tokens.logits.mids) if tokens else [],
        "n_prompts_total": names.n_prompts,
        "n_tokens_in_prompt": names.n_prompt_tokens,
        "dataset": names.dataset,
        "decoder_weights_dist": [],
        "activations": [
            *(_activation(one, record.model, {**_TOP_BIN, "bin_max": record.max}) for one in record.top),
            *(
                _activation(passage, record.model, _bin(one.low, one.high, one.passages, record.model))
                for one in record.bins
                for passage in one.passages
            ),
        ],
        "vector": [],
    }


def _bin(low: float, high: float, passages: Sequence[Passage], model: str) -> dict[str, float]:
    """A bin's smallest and largest activation among its passages, and its share of active tokens."""
    peaks = [passage.acts[model][passage.peak] for passage in passages]
    return {"bin_min": min(peaks), "bin_max": max(peaks), "bin_contains": high - low}


def _activation(passage: Passage, model: str, in_bin: Mapping[str, float]) -> dict[str, Any]:
    return {
        **{name: round(value, _DIGITS) for name, value in in_bin.items()},
        "tokens": list(passage.tokens),
        "values": _rounded(passage.acts[model]),
        "qualifying_token_index": passage.peak,
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, _DIGITS) if math.isfinite(value) else 0.0 for value in values]
