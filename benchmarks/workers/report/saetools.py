"""saetools: `index_latents` into a latent store, then `write_latent_reports` of what `report_latents` finds in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from workers.report.task import CONTEXT, N_BINS, N_PER_BIN, N_TOKENS, N_TOP, Item, Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from saetools import load_model, load_sae
    from saetools.latents import index

    lm = load_model(task.settings["model"], dtype=getattr(torch, task.settings["dtype"]))
    for parameter in lm.model.parameters():
        parameter.sum()  # read from the file that it may only be mapped from
    sae = load_sae(task.settings["sae"])
    index.stream_activations = _stopwatch(task, index.stream_activations)
    for item in turns.timed(task.items(), library="saetools"):
        if item is not None:
            answers = run(task, item, lm, sae)
    turns.finish(**task.tell(answers))


def run(task: Task, item: Item, lm: Any, sae: Any) -> dict[int, dict[str, Any]]:
    """Read, index, write; also what was found, for comparison."""
    from saetools import Conversation
    from saetools.latents import index_latents
    from saetools.report import NeuronpediaNames, report_latents, write_latent_reports

    text = lm.tokenizer.decode(task.contexts[: item.n_contexts].ravel())
    corpus = {"texts": [Conversation(text=text, id="texts")]}
    with task.stage("index"):
        store = index_latents({"base": lm}, sae, corpus, item.folder / "store", max_tokens=task.contexts.shape[1])
    answers: dict[int, dict[str, Any]] = {}

    def noted(reports: Iterator[Any]) -> Iterator[Any]:
        for report in reports:
            answers[report.latent] = _answer(report)
            yield report

    with task.stage("pages"):
        reports = report_latents(
            store,
            item.latents,
            lm=lm,
            sae=sae,
            n_top=N_TOP,
            n_bins=N_BINS,
            n_per_bin=N_PER_BIN,
            context=CONTEXT,
            n_tokens=N_TOKENS,
        )
        names = NeuronpediaNames.of_store(store.manifest)
        write_latent_reports(
            noted(reports), item.latents, item.folder / "report", formats=("html", "neuronpedia"), neuronpedia=names
        )
    _check_tokens(store, task.contexts[: item.n_contexts])
    return answers


def _answer(report: Any) -> dict[str, Any]:
    record = report.record
    return {
        "max": record.max,
        "n_active": record.n_active,
        "promoted": list(report.tokens.promoted),
        "top": [[one.document, one.start + one.peak] for one in record.top],
    }


def _check_tokens(store: Any, contexts: np.ndarray) -> None:
    """Its documents are the contexts."""
    n, length = contexts.shape
    starts = range(0, n * length, length)
    read = [store.passage(0, start + length // 2, context=length).token_ids for start in starts]
    assert np.array_equal(np.array(read), contexts)


def _stopwatch(task: Task, stream: Any) -> Any:
    """The stream, its time between one block and the next added to a stage."""

    def timed(*arguments: Any, **options: Any) -> Iterator[Any]:
        blocks = iter(stream(*arguments, **options))
        while True:
            with task.stage("forward"):
                block = next(blocks, None)
            if block is None:
                return
            yield block

    return timed


if __name__ == "__main__":
    serve(work)
