"""An interactive explorer of a run: latents, what fires them, what they do, in the browser."""

from saetools.explore.app import make_app
from saetools.explore.inline import Shown, explore_run
from saetools.explore.labels import Label, Labels
from saetools.explore.workspace import Sources, Workspace

__all__ = ["Label", "Labels", "Shown", "Sources", "Workspace", "explore_run", "make_app"]
