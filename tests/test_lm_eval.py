"""lm-eval takes a steered model for the model: its figures are those of the edits."""

import json

import pytest
import torch
from tiny_sae import make_sae

from saetools import Site, edit, load_forced_choice, steer, steered_model

YAML = """\
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": item.question, "choices": [item.aligned, item.misaligned]} for item in load_forced_choice()[:4]
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "choices.yaml").write_text(YAML.format(file=folder / "rows.jsonl"), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def log_likelihoods(lm, text, choices, edits):
    """Of each choice after the text, by passes under the edits."""
    found = []
    for choice in choices:
        prompt = lm.tokenizer(text).input_ids
        whole = lm.tokenizer(text + " " + choice).input_ids
        ids = torch.tensor([whole])
        with torch.no_grad(), edit(lm, edits):
            scores = lm.model(ids).logits.log_softmax(-1)[0]
        found.append(sum(float(scores[place - 1, whole[place]]) for place in range(len(prompt), len(whole))))
    return found


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_measures_the_steered_model(make_tiny, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = make_tiny("llama", max_position_embeddings=1024)
    v = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    for edits in ({}, {Site(1): [steer.add_direction(v, 1.0), steer.clamp(make_sae(), 3, 4.0)]}):
        model = HFLM(pretrained=steered_model(lm, edits), tokenizer=lm.tokenizer, batch_size=2)
        found = simple_evaluate(
            model=model, tasks=["choices"], task_manager=tasks, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
        )
        for sample in found["samples"]["choices"]:
            doc = sample["doc"]
            expected = log_likelihoods(lm, doc["question"], doc["choices"], edits)
            theirs = [float(response[0][0]) for response in sample["resps"]]
            assert theirs == pytest.approx(expected, rel=1e-4)
