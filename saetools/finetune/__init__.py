"""Changing a model: LoRA fine-tunes, from which organisms and their twins are made."""

from saetools.finetune.lora import FinetuneConfig, FinetuneProgress, answer_targets, finetune_lora

__all__ = ["FinetuneConfig", "FinetuneProgress", "answer_targets", "finetune_lora"]
