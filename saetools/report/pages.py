"""What all HTML pages share: templates that escape text of models, and scripts that a policy lets run."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any


def environment() -> Any:
    """The templates of the package; whatever hides or reorders text is spelled out, too."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from saetools.report.wording import visible

    return Environment(
        loader=PackageLoader("saetools", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )


def asset(name: str) -> str:
    """A style sheet or script of the package."""
    return (files("saetools.report") / name).read_text(encoding="utf-8")


def policy_hash(script: str) -> str:
    """How a content security policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
