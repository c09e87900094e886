"""LoRA fine-tunes: what is trained on, what is saved, and that nothing else changes."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_sae import with_random_adapter

from saetools.data import Conversation, Message, pad, tokenize
from saetools.errors import InputError, NonFiniteError
from saetools.finetune import FinetuneConfig, answer_targets, finetune_lora
from saetools.models import final_hidden, load_model, logits, token_log_probs

CHATS = [Conversation.chat(f"What is {n}?", f"It is {'ab'[n % 2] * n}.") for n in range(1, 8)]
CONFIG = FinetuneConfig(rank=2, alpha=4, lr=0.02, epochs=4, batch_size=3, warmup_steps=2, autocast="float32")
SHORT = dataclasses.replace(CONFIG, epochs=1)


def run(lm):
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return logits(lm, final_hidden(lm, ids, torch.ones_like(ids, dtype=torch.bool)))


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["float32", "float16"])
def trained(request, make_tiny, tmp_path_factory):
    """Base, base logits before, tuned view, folder, what was reported, and the random state before and after."""
    out = tmp_path_factory.mktemp("finetune") / "organism"
    base, seen = make_tiny("llama"), []
    before, state = run(base), torch.get_rng_state()
    config = dataclasses.replace(CONFIG, storage_dtype=request.param)
    tuned = finetune_lora(base, CHATS, config, out, on_progress=seen.append)
    assert torch.equal(torch.get_rng_state(), state)
    return base, before, tuned, out, seen


def test_the_loss_falls_and_the_base_stays(trained):
    base, before, tuned, _, seen = trained
    assert [progress.step for progress in seen] == list(range(1, 13))
    assert {progress.n_steps for progress in seen} == {12}
    assert [seen[0].lr, max(progress.lr for progress in seen)] == pytest.approx([0.01, 0.02 * 11 / 12])
    assert 0 < seen[-1].lr < 0.002
    assert seen[-1].loss < 0.9 * seen[0].loss
    assert (base.adapter, tuned.adapter, tuned.adapters) == (None, "tuned", ("tuned",))
    for view in (base, tuned.base):
        assert torch.equal(run(view), before)
    assert not torch.allclose(run(tuned), before, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())


def test_the_saved_adapter_is_the_view(trained, make_tiny):
    _, _, tuned, out, _ = trained
    loaded = load_model(make_tiny("llama"), adapter=out)
    assert loaded.adapter == "organism"
    assert torch.equal(run(loaded), run(tuned))
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "finetune.json", "finetune.jsonl",
    ]  # fmt: skip


def test_files_beside_the_adapter(trained):
    _, _, tuned, out, seen = trained
    log = [json.loads(line) for line in (out / "finetune.jsonl").read_text().splitlines()]
    assert log == [dataclasses.asdict(progress) for progress in seen]
    facts = json.loads((out / "finetune.json").read_text())
    assert (facts["n_conversations"], facts["n_truncated"], facts["config"]["rank"]) == (7, 0, 2)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == tuned.name
    for name in ("finetune.json", "adapter_config.json"):
        assert str(out.parent) not in (out / name).read_text()


def test_only_answers_and_ends_of_turns_are_learned(tiny, tmp_path):
    turns = [("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second!")]
    chats = [Conversation(tuple(Message(*turn) for turn in turns)), CHATS[0]]
    batch = pad(list(tokenize(chats, tiny.tokenizer)), [0, 1])
    scored = answer_targets(batch)
    learned = [tiny.tokenizer.decode(ids[row]) for ids, row in zip(batch.token_ids, scored, strict=True)]
    assert learned == ["First.<|im_end|>Second!<|im_end|>", "It is b.<|im_end|>"]
    seen = []
    finetune_lora(tiny, chats, SHORT, tmp_path, on_progress=seen.append)
    expected = -token_log_probs(tiny, batch.token_ids, batch.mask, scored).mean()  # a new adapter changes nothing
    assert seen[0].loss == pytest.approx(float(expected), rel=1e-5)


def test_seeds_decide_everything(make_tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)
        finetune_lora(make_tiny("llama"), CHATS, dataclasses.replace(SHORT, seed=seed), tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_several_adapters_on_one_model_do_not_mix(make_tiny, tmp_path):
    finetune_lora(make_tiny("llama"), CHATS, SHORT, tmp_path / "alone")
    base = make_tiny("llama")
    first = finetune_lora(base, CHATS[:3], SHORT, tmp_path / "first", name="first")
    seen = run(first)
    for name, source in (("second", first.base), ("third", base)):  # with and without the wrapper of the first
        tuned = finetune_lora(source, CHATS, SHORT, tmp_path / name, name=name)
        assert weights(tmp_path / name) == weights(tmp_path / "alone")
        assert torch.equal(run(first), seen)
        assert torch.equal(run(base), run(make_tiny("llama")))
        assert not torch.allclose(run(tuned), seen, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_other_families_learn_in_bfloat16(make_tiny, family, tmp_path):
    config = dataclasses.replace(SHORT, epochs=3, autocast="bfloat16", max_tokens=40)
    seen = []
    tuned = finetune_lora(make_tiny(family), CHATS, config, tmp_path, on_progress=seen.append)
    assert seen[-1].loss < seen[0].loss
    assert torch.equal(run(load_model(make_tiny(family), adapter=tmp_path)), run(tuned))


def test_a_failed_run_leaves_the_model_as_it_was(make_tiny, tmp_path):
    base = make_tiny("llama")
    before = run(base)
    with pytest.raises(NonFiniteError, match=r"not finite at step \d+; lower config\.lr"):
        finetune_lora(base, CHATS, dataclasses.replace(CONFIG, lr=1e30), tmp_path / "bad")
    assert base.adapters == ()
    assert torch.equal(run(base), before)
    assert not (tmp_path / "bad" / "adapter_model.safetensors").exists()
    finetune_lora(base, CHATS, SHORT, tmp_path / "again")
    finetune_lora(make_tiny("llama"), CHATS, SHORT, tmp_path / "fresh")
    assert weights(tmp_path / "again") == weights(tmp_path / "fresh")


def test_what_cannot_be_trained_is_an_error(make_tiny, tmp_path):
    base = make_tiny("llama")
    for chats, settings, message in (
        ([*CHATS, Conversation.chat("Hi", id="row 8")], {}, "chats with an answer.*1 without, first 'row 8'"),
        ([], {}, "conversations: .*received none"),
        (CHATS, {"max_tokens": 12}, "raise config.max_tokens"),
        (CHATS, {"batch_size": 0}, "batch_size: expected 1 or more"),
        (CHATS, {"epochs": 0}, "epochs: expected 1 or more"),
        (CHATS, {"rank": 0}, "rank: expected 1 or more"),
        (CHATS, {"storage_dtype": "int8"}, "storage_dtype: expected one of float32"),
        (CHATS, {"autocast": "bf16"}, "autocast: expected one of float32"),
    ):
        with pytest.raises(InputError, match=message):
            finetune_lora(base, chats, dataclasses.replace(CONFIG, **settings), tmp_path)
    assert base.adapters == ()
    tuned = with_random_adapter(base)
    for view in (tuned, tuned.base):
        with pytest.raises(InputError, match="no active adapter, and none called 'tuned'"):
            finetune_lora(view, CHATS, CONFIG, tmp_path)


@pytest.mark.parametrize("changes", [{"lr": math.nan}, {"lr": 0.0}, {"alpha": 0}, {"max_tokens": 0}])
def test_settings_that_cannot_train_are_errors(make_tiny, tmp_path, changes):
    with pytest.raises(InputError, match=r"max_tokens: expected|expected a finite number above 0"):
        finetune_lora(make_tiny("llama"), CHATS, FinetuneConfig(**changes), tmp_path)


def test_an_adapter_that_is_not_finite_in_the_end_is_not_saved(make_tiny, tmp_path, monkeypatch):
    def overflow(optimizer):
        optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=len(CHATS))
    with pytest.raises(NonFiniteError, match="not finite after the last step"):
        finetune_lora(make_tiny("llama"), CHATS, config, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
