"""Where a fine-tune saved its adapter on its way."""

from __future__ import annotations

import json
from pathlib import Path

from saetools.errors import InputError


def find_checkpoints(folder: str | Path) -> dict[int, Path]:
    """The adapters that `finetune_lora` saved on its way, by step, and the one it ended with.

    Raises:
        InputError: if there are none, or nothing says after how many steps the last one was saved.
    """
    folder = Path(folder)
    found = {int(path.name.removeprefix("step-")): path for path in sorted(folder.glob("checkpoints/step-*"))}
    if not found:
        raise InputError(
            "checkpoints",
            expected="a folder with checkpoints/step-00010 and so on",
            received=str(folder),
            remedy="fine-tune with checkpoint_every, or pass {step: folder}",
        )
    if (folder / "adapter_config.json").is_file():
        log = folder / "finetune.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        if not lines:
            raise InputError(
                "checkpoints", expected="a log beside the adapter", received=str(folder), remedy="pass {step: folder}"
            )
        found.setdefault(json.loads(lines[-1])["step"], folder)
    return found
