"""Language models: loading, sites, reading and editing the residual stream. Only this package knows architectures."""

from saetools.models.adapters import scaled_adapter
from saetools.models.editing import Edits, edit
from saetools.models.elsewhere import edit_modules, hook_functions
from saetools.models.forward import final_hidden, log_probs, logits, read, token_log_probs
from saetools.models.language_model import LanguageModel
from saetools.models.load import check_pair, load_model
from saetools.models.replay import LayerReplay
from saetools.models.site import STREAMS, Site, Stream
from saetools.models.where import Edit, Where

__all__ = [
    "STREAMS",
    "Edit",
    "Edits",
    "LanguageModel",
    "LayerReplay",
    "Site",
    "Stream",
    "Where",
    "check_pair",
    "edit",
    "edit_modules",
    "final_hidden",
    "hook_functions",
    "load_model",
    "log_probs",
    "logits",
    "read",
    "scaled_adapter",
    "token_log_probs",
]
