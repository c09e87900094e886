"""The edit of a task as saetools has it."""

from __future__ import annotations

from typing import Any

from workers.steer.task import Task


def edits(task: Task, strength: float = 1.0) -> dict[Any, Any]:
    """By site."""
    from saetools import Site, load_sae, steer

    if task.edit == "plain":
        return {}
    if task.edit == "direction":
        change = steer.add_direction(task.vector, strength)
    else:
        sae = load_sae(task.settings["sae"])
        change = steer.clamp(sae, task.latents, (strength * task.values).tolist())
    return {Site(task.layer): change.on(skip_first=False)}
