"""The exceptions of saetools, all under one root.

Every message says which argument is wrong, what was expected, what was received and what to change.
"""

from __future__ import annotations


class SaetoolsError(Exception):
    """Root of every error that saetools raises on purpose."""


class InputError(SaetoolsError, ValueError):
    """An argument, a file or a row that saetools cannot work with.

    Args:
        argument: name of the argument (or `file:line` of the row) at fault.
        expected: what would have been right.
        received: what was found.
        remedy: what the caller should change.

    Example:
        >>> raise InputError("k", expected="1 <= k <= 8", received=9, remedy="lower k or widen the SAE")
        Traceback (most recent call last):
        saetools.errors.InputError: k: expected 1 <= k <= 8, received 9; lower k or widen the SAE
    """

    def __init__(self, argument: str, *, expected: str, received: object, remedy: str) -> None:
        self.argument, self.expected, self.received, self.remedy = argument, expected, received, remedy
        super().__init__(f"{argument}: expected {expected}, received {received}; {remedy}")


class FetchError(SaetoolsError):
    """Model files could not be brought to this machine."""


class IntegrityError(SaetoolsError):
    """A file on disk is damaged, incomplete or not what its manifest says."""


class ResourceError(SaetoolsError):
    """Memory or disk space has run out."""


class NonFiniteError(SaetoolsError):
    """NaN or infinity in activations or in a loss."""


class SaetoolsWarning(UserWarning):
    """Something that a reader of the result has to know."""
