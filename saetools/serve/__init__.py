"""An OpenAI-compatible server whose requests name their edits and their adapter."""

from saetools.serve.app import ServerConfig, make_app

__all__ = ["ServerConfig", "make_app"]
