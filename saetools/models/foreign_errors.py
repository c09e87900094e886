"""Errors of transformers, PEFT and the hub, turned into ours or forestalled, which say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from saetools.errors import FetchError, InputError, IntegrityError, SaetoolsError


def check_place(argument: str, place: str | Path) -> None:
    """Let the hub not be asked, and waited for, where a path was meant: raise if nothing is at it.

    A path is a `Path` or a string that starts with `.`, `/` or `~`, has several slashes, ends as files of weights do,
    or has an existing folder as its first part; any other string may be an id on the hub.

    Raises:
        InputError: if it is a path and no such file or folder exists.
    """
    path, text = Path(place).expanduser(), str(place)
    looks_like_path = (
        isinstance(place, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or text.endswith((".gguf", ".safetensors"))
        or ("/" in text and Path(path.parts[0]).is_dir())
    )
    if looks_like_path and not path.exists():
        raise InputError(
            argument,
            expected="a file or folder that exists",
            received=f"{text!r}, and there is none",
            remedy="check the path",
        )


@contextmanager
def readable_errors(argument: str, location: str) -> Iterator[None]:
    """Turn errors of libraries that load `location` for `argument` into ours."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
    from safetensors import SafetensorError

    try:
        yield
    except (SaetoolsError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise IntegrityError(f"damaged weights in {location!r}: {_short(error)}; fetch them again") from error
    except (OSError, ValueError, RuntimeError) as error:
        causes = list(_causes(error))
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            raise FetchError(
                f"{location} is gated: accept its licence at {constants.ENDPOINT}/{location} "
                "and set HF_TOKEN to a token of that account"
            ) from error
        if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes) and not Path(location).exists():
            raise FetchError(
                f"{argument}: expected a file or folder here or a repository of the hub, received {location!r}; "
                "there is no such file or folder, and the hub could not be reached: check the name or the connection"
            ) from error
        if isinstance(error, OSError):
            raise FetchError(f"cannot load {location!r}: {_short(error)}") from error
        raise InputError(
            argument,
            expected="files that fit the model" if argument == "adapter" else "files that transformers can read",
            received=f"{location!r} ({_short(error)})",
            remedy="check that this is the right folder or hub id",
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
