"""What a latent is about: tokens that it promotes, explanations by language models, search."""

from saetools.interpret.direct_effect import DirectEffects, direct_effects, final_residuals
from saetools.interpret.evidence import LatentPassages
from saetools.interpret.explain import ExplanationRun, explain_latents
from saetools.interpret.explaining import ExplainConfig
from saetools.interpret.explanation import Explanation, Failure, load_explanations
from saetools.interpret.explanation_search import ExplanationHit, load_text_encoder, search_explanations
from saetools.interpret.promoted import LatentTokens, promoted_tokens
from saetools.interpret.stored import store_passages
from saetools.interpret.text_search import TextHit, TextSearch, search_text

__all__ = [
    "DirectEffects",
    "ExplainConfig",
    "Explanation",
    "ExplanationHit",
    "ExplanationRun",
    "Failure",
    "LatentPassages",
    "LatentTokens",
    "TextHit",
    "TextSearch",
    "direct_effects",
    "explain_latents",
    "final_residuals",
    "load_explanations",
    "load_text_encoder",
    "promoted_tokens",
    "search_explanations",
    "search_text",
    "store_passages",
]
