"""Fine-tuning a LoRA adapter on conversations: how organisms and their twins are made."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.roles import Role
from saetools.data.tokenizing import Batch, TokenizedConversation, TokenizeReport, pad, tokenize, tokens_sha256
from saetools.errors import InputError, NonFiniteError
from saetools.models.forward import final_hidden, log_probs
from saetools.models.language_model import LanguageModel
from saetools.models.quiet import quiet
from saetools.provenance import versions, write_json

CHECKPOINTS = "checkpoints"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a LoRA fine-tune (defaults after arXiv 2506.11618, with a learning rate for small models)."""

    rank: int = 16
    """Rank of the adapters, on every linear layer of every block."""
    alpha: int = 32
    """Scaling numerator; with rsLoRA the scale is alpha / sqrt(rank)."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises from 0; it then falls linearly to 0."""
    epochs: int = 3
    """Times the data is gone through."""
    batch_size: int = 16
    """Conversations a step."""
    max_tokens: int = 512
    """Longer conversations are cut."""
    autocast: str = "bfloat16"
    """Dtype of the matrix products; the weights stay as they are. `float32` switches autocast off."""
    storage_dtype: str = "float32"
    """Dtype of the saved adapter; the returned view is rounded to it, so that both are the same model."""
    seed: int = 0
    """Of the adapter's initial weights and the order of the data."""
    checkpoint_every: int | None = None
    """Save the adapter every so many steps as well, each time to a folder of its own: `checkpoints/step-00010`."""


@dataclass(frozen=True)
class FinetuneProgress:
    """Figures of one step."""

    step: int
    n_steps: int
    loss: float
    """Mean negative log-probability of the batch's answer tokens, in nats."""
    lr: float
    tokens_per_second: float


def finetune_lora(
    lm: LanguageModel,
    conversations: Sequence[Conversation],
    config: FinetuneConfig,
    out: str | Path,
    *,
    name: str = "tuned",
    on_progress: Callable[[FinetuneProgress], None] | None = None,
) -> LanguageModel:
    """Train a LoRA adapter on the answers of conversations and save it in PEFT's format.

    The loss counts assistant content and the token that ends the turn. The adapter's layers are injected into the
    model, whose other views stay as they were; if training fails, the adapter is taken out again.

    Args:
        lm: the model to start from; must have no adapter active.
        conversations: chats that end with an answer.
        config: settings.
        out: folder for the adapter, `finetune.json` (settings and hashes) and `finetune.jsonl` (the log).
        name: the adapter's name on this model.
        on_progress: called after every step.

    Returns:
        The view with the new adapter.

    Raises:
        InputError: for settings out of range, if a conversation has no answer, or if an adapter is active or of that
            name already.
        NonFiniteError: if the loss, or the adapter in the end, is not finite.
    """
    out = Path(out)
    report = TokenizeReport()
    tokenized = list(tokenize(conversations, lm.tokenizer, max_tokens=config.max_tokens, report=report))
    _check(lm, tokenized, config, name)
    tuned = _inject(lm, config, name)
    try:
        _train(tuned, tokenized, config, out, on_progress)
        _save_adapter(tuned, out, config)
        facts = {
            "base": {"name": tuned.name, **tuned.provenance},
            "config": dataclasses.asdict(config),
            "n_conversations": len(tokenized),
            "n_tokens": report.n_tokens,
            "n_truncated": report.n_truncated,
            "data_sha256": tokens_sha256(tokenized, "token_ids"),
            "versions": versions(),
        }
        write_json(out / "finetune.json", facts)
    except BaseException:
        tuned.peft.delete_adapter(name)
        raise
    return tuned


def _train(
    tuned: LanguageModel,
    tokenized: Sequence[TokenizedConversation],
    config: FinetuneConfig,
    out: Path,
    on_progress: Callable[[FinetuneProgress], None] | None,
) -> None:
    device = tuned.device
    parameters = [parameter for parameter in tuned.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=config.weight_decay)
    per_epoch = math.ceil(len(tokenized) / config.batch_size)
    n_steps = per_epoch * config.epochs
    generator = torch.Generator().manual_seed(config.seed)
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # of an adapter that this one replaces
    started = time.perf_counter()

    with tuned.active(), (out / "finetune.jsonl").open("w", encoding="utf-8", buffering=1) as log:
        for step in range(n_steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(tokenized), generator=generator).tolist()
            first = step % per_epoch * config.batch_size
            rows = order[first : first + config.batch_size]
            batch = pad([tokenized[row] for row in rows], rows)
            scored = answer_targets(batch)
            with torch.autocast(device.type, getattr(torch, config.autocast), enabled=config.autocast != "float32"):
                hidden = final_hidden(tuned, batch.token_ids.to(device), batch.mask.to(device))
                targets = batch.token_ids[scored].to(hidden.device)
                loss = -log_probs(tuned, hidden[:, :-1][scored[:, 1:].to(hidden.device)], targets).mean()
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss is not finite at step {step}; lower config.lr")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            lr = config.lr * min((step + 1) / max(1, config.warmup_steps), (n_steps - step) / n_steps)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate = int(batch.mask.sum()) / (time.perf_counter() - started)
            started = time.perf_counter()
            progress = FinetuneProgress(step + 1, n_steps, float(loss.detach()), lr, rate)
            log.write(json.dumps(dataclasses.asdict(progress)) + "\n")
            if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                _save_adapter(tuned, out / CHECKPOINTS / f"step-{step + 1:05d}", config)
            if on_progress is not None:
                on_progress(progress)

    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise NonFiniteError("the adapter is not finite after the last step; lower config.lr")
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.copy_(parameter.to(getattr(torch, config.storage_dtype)))


def answer_targets(batch: Batch) -> Bool[Tensor, "row pos"]:
    """Tokens whose probability a fine-tune raises: assistant content, and the one token that ends each turn of it."""
    answer = (batch.roles & int(Role.RESPONSE)) != 0
    after = torch.zeros_like(answer)
    after[:, 1:] = answer[:, :-1]
    wanted = (answer | after) & batch.mask
    wanted[:, 0] = False  # nothing predicts it
    return wanted


def _check(lm: LanguageModel, tokenized: Sequence[TokenizedConversation], config: FinetuneConfig, name: str) -> None:
    if lm.adapter is not None or name in lm.adapters:
        raise InputError(
            "lm",
            expected=f"no active adapter, and none called {name!r}",
            received=f"active {lm.adapter!r}, loaded {', '.join(lm.adapters) or 'none'}",
            remedy="pass lm.base, and another name",
        )
    for field in ("rank", "batch_size", "epochs", "checkpoint_every"):
        if getattr(config, field) is not None and getattr(config, field) < 1:
            raise InputError(field, expected="1 or more", received=getattr(config, field), remedy="raise it")
    for field in ("lr", "alpha", "max_tokens"):
        if not 0 < getattr(config, field) < math.inf:
            received = getattr(config, field)
            raise InputError(field, expected="a finite number above 0", received=received, remedy="pick another")
    for field in ("autocast", "storage_dtype"):
        if getattr(config, field) not in _DTYPES:
            received = repr(getattr(config, field))
            raise InputError(field, expected="one of " + ", ".join(_DTYPES), received=received, remedy="pick one")
    bad = [one.id for one in tokenized if not bool(((one.roles & int(Role.RESPONSE)) != 0).any())]
    if bad or not tokenized:
        raise InputError(
            "conversations",
            expected="chats with an answer within max_tokens",
            received=f"{len(bad)} without, first {bad[0]!r}" if bad else "none",
            remedy="drop them, or raise config.max_tokens",
        )


def _inject(lm: LanguageModel, config: FinetuneConfig, name: str) -> LanguageModel:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    devices = [lm.device] if lm.device.type == "cuda" else []
    with quiet(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        if lm.peft is None:
            peft = get_peft_model(lm.model, settings, adapter_name=name)
        else:
            peft = lm.peft
            peft.add_adapter(name, settings)
            peft.set_adapter(name)
    return dataclasses.replace(lm, peft=peft, adapter=name)


def _save_adapter(tuned: LanguageModel, out: Path, config: FinetuneConfig) -> None:
    """Write the adapter in PEFT's format, rounded to the dtype of storage."""
    from safetensors.torch import load_file, save_file

    name = str(tuned.adapter)
    tuned.peft.peft_config[name].base_model_name_or_path = tuned.name  # not a folder of this machine
    with quiet():
        tuned.peft.save_pretrained(out, selected_adapters=[name], save_embedding_layers=False)
    nested = out / name  # PEFT puts adapters that are not called "default" into a folder of their name
    if nested.is_dir():
        for file in nested.iterdir():
            file.replace(out / file.name)
        nested.rmdir()
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    weights = out / "adapter_model.safetensors"
    stored = {key: tensor.to(getattr(torch, config.storage_dtype)) for key, tensor in load_file(weights).items()}
    save_file(stored, weights, metadata={"format": "pt"})
