"""Ground truth: a small model and an organism whose woken latents are known, and how well methods find them."""

from saetools.planted.language import Language, draw_prompts
from saetools.planted.model import PlantedConfig, PlantedModel, plant_model
from saetools.planted.recovery import (
    Coverage,
    Detection,
    FalseDiscoveries,
    Recovery,
    RecoveryConfig,
    Rejections,
    measure_recovery,
    true_changes,
)
from saetools.planted.verdicts import VerdictConfig, Verdicts, measure_verdicts
from saetools.planted.weights import PLANTED_SITE

__all__ = [
    "PLANTED_SITE",
    "Coverage",
    "Detection",
    "FalseDiscoveries",
    "Language",
    "PlantedConfig",
    "PlantedModel",
    "Recovery",
    "RecoveryConfig",
    "Rejections",
    "VerdictConfig",
    "Verdicts",
    "draw_prompts",
    "measure_recovery",
    "measure_verdicts",
    "plant_model",
    "true_changes",
]
