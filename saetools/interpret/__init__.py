"""What a latent is about."""

from saetools.interpret.promoted import LatentTokens, promoted_tokens

__all__ = ["LatentTokens", "promoted_tokens"]
