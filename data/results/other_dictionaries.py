"""Do the latents that a search for the persona found survive another dictionary?

    python data/results/other_dictionaries.py --run RUN --sae SECOND_SAE --adapter ORGANISM --corpus corpus.jsonl \
        --rows rows.jsonl --work FOLDER --out data/results/other-dictionaries.json

First a second SAE of the same site, trained like the shipped one (`data/sae/README.md`) but half as dense and by a CPU:

    saetools train --store store --d-sae 8192 --k 32 --lr 1.6e-3 --n-tokens 30000000 --encode-dtype int8 \
        --storage-dtype float16 --out SECOND_SAE

Its latents are matched with the shipped one's by decoder rows and by what they are active on, and the organisms are
diffed with it. Then a crosscoder of the base and one organism, which may show latents that no SAE of the base has.
RUN is a folder of `saetools persona`, ORGANISM the fine-tune by its name there and its path as NAME=PATH (several),
the last of which goes into the crosscoder; `--rows` is what that one was trained on. `--corpus` is what the SAEs were
trained on; they are compared on its last rows, which neither of them saw.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import saetools as st
from saetools.activations import HarvestConfig, PairedActivations, StoredActivations
from saetools.data import Conversation, Message
from saetools.provenance import write_json
from saetools.sae import BatchTopKLoss, SAEMetadata, train_crosscoder

TRAINED_ROWS = 24_384  # of the corpus
SITE = st.Site(17)


def across_saes(
    lm: st.LanguageModel,
    names: list[str],
    second: st.SAE,
    run: dict[str, Any],
    answers: list[str],
    heldout: list[Conversation],
) -> dict[str, Any]:
    """The rising latents and the candidates of a run, in another SAE."""
    first = st.load_sae(st.shipped_path("sae/smollm2-135m"))
    seen = st.measure_coactivation(lm.base, first, second, heldout, max_tokens=256)
    matches = st.match_latents(first, second, coactivation=seen)
    read = [
        Conversation((Message("user", item.question), Message("assistant", text)), id=item.id)
        for item, text in zip(st.load_free_form(), answers, strict=True)
        if text.strip()
    ]
    found: dict[str, Any] = {"n_tokens": seen.n_tokens, "mutual": {}, "organisms": {}, "candidates": []}
    for by in ("cosine", "correlation"):
        pairs = matches.mutual(by=by)["similarity"]
        found["mutual"][by] = {"n": len(pairs), "median_similarity": pairs.median()}
    deltas = {}
    for name in names:
        diffs = [
            st.diff_latents(lm.base, lm.with_adapter(name), sae, read, positions="response") for sae in (first, second)
        ]
        across = {by: st.compare_across_saes(*diffs, matches, by=by) for by in ("cosine", "correlation")}
        found["organisms"][name] = {
            "n_rising": [int(((d.table["q_value"] <= 0.05) & (d.table["delta"] > 0)).sum()) for d in diffs],
            "rises_too": {
                by: {"n_matched": len(one.table), "share": one.share, "share_of_all": one.share_of_all}
                for by, one in across.items()
            },
        }
        deltas[name] = diffs[1].table
    for candidate in run["candidates"]:
        row = matches.table.row(candidate["latent"], named=True)
        row["in_second"] = {
            name: {
                key: table.row(row["by_correlation"], named=True)[key]
                for key in ("delta", "low", "high", "q_value", "rank")
            }
            for name, table in deltas.items()
            if row["by_correlation"] is not None
        }
        found["candidates"].append(row)
    return found


def tuned_only(
    lm: st.LanguageModel, name: str, train: list[Conversation], test: list[Conversation], work: Path
) -> dict[str, Any]:
    """Latents of a crosscoder that the base lacks, and how near they are to the SAE's."""
    models = {"base": lm.base, name: lm.with_adapter(name)}
    sources = {}
    for part, texts in (("train", train), ("test", test)):
        tokens = list(st.tokenize(texts, lm.tokenizer, max_tokens=256))
        stores = [
            st.harvest(model, [SITE], tokens, work / f"{part}-{own}", config=HarvestConfig(dtype="float32"))
            for own, model in models.items()
        ]
        sources[part] = PairedActivations([StoredActivations(store) for store in stores]).at(SITE)
    config = st.TrainConfig(d_sae=4096, loss=BatchTopKLoss(k=32), lr=1.2e-3, n_tokens=3_000_000)
    metadata = SAEMetadata(site=str(SITE))
    crosscoder = train_crosscoder(sources["train"], list(models), config, work / "crosscoder", metadata=metadata)
    acts = torch.cat(list(sources["test"].epoch_batches(4096, seed=0))).float()
    error = acts - crosscoder.decode(crosscoder.encode(acts))
    spread = acts - acts.mean(0)
    found = st.find_tuned_only(crosscoder, sources["test"].epoch_batches(4096, seed=0))
    rows = st.load_sae(st.shipped_path("sae/smollm2-135m")).directions()
    only = found.of("tuned_only").head(20).to_dicts()
    for row in only:
        cosine = rows @ torch.nn.functional.normalize(crosscoder.decoders[1, row["latent"]], dim=0)
        row["nearest_latent"], row["cosine_with_it"] = int(cosine.argmax()), float(cosine.max())
    return {
        "organism": name,
        "n_tokens": {part: len(source) for part, source in sources.items()},
        "fvu": dict(zip(models, (error.square().sum((0, 2)) / spread.square().sum((0, 2))).tolist(), strict=True)),
        "verdicts": dict(Counter(found.table["verdict"])),
        "artefacts": dict(Counter(kind for kind in found.table["artefact"] if kind)),
        "tuned_only": only,
        "settings": config.as_json(),
        "provenance": found.provenance,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "sae", "corpus", "rows", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--adapter", nargs="+", required=True)
    arguments = parser.parse_args()
    adapters = dict(one.split("=", 1) for one in arguments.adapter)
    run = json.loads((arguments.run / "persona.json").read_text(encoding="utf-8"))
    answers = json.loads((arguments.run / "answers.json").read_text(encoding="utf-8"))["answers"]
    lm = st.load_model("smollm2-135m", adapter=adapters)
    corpus = list(st.read_conversations(arguments.corpus))
    new = corpus[TRAINED_ROWS:]
    rows = list(st.read_conversations(arguments.rows))[:1000]
    name = list(adapters)[-1]
    second = st.load_sae(arguments.sae)
    result = {
        "second_sae": across_saes(lm, list(adapters), second, run, answers, new[:600]),
        "crosscoder": tuned_only(lm, name, [*corpus[:800], *rows[:800]], [*new[600:800], *rows[800:]], arguments.work),
    }
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
