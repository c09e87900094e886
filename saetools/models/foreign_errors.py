"""Errors of transformers, PEFT and the hub, turned into ours, which say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from saetools.errors import FetchError, InputError, IntegrityError, SaetoolsError


@contextmanager
def readable_errors(argument: str, location: str) -> Iterator[None]:
    """Turn errors of libraries that load `location` for `argument` into ours."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError
    from safetensors import SafetensorError

    try:
        yield
    except (SaetoolsError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise IntegrityError(f"damaged weights in {location!r}: {_short(error)}; fetch them again") from error
    except (OSError, ValueError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GatedRepoError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise FetchError(
                f"{location} is gated: accept its licence at {constants.ENDPOINT}/{location} "
                "and set HF_TOKEN to a token of that account"
            ) from error
        if isinstance(error, OSError):
            raise FetchError(f"cannot load {location!r}: {_short(error)}") from error
        raise InputError(
            argument,
            expected="files that fit the model" if argument == "adapter" else "files that transformers can read",
            received=f"{location!r} ({_short(error)})",
            remedy="check that this is the right folder or hub id",
        ) from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
