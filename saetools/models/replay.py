"""Forward passes that start in the middle: layers below an edit are run once, and later passes take up from there.

For comparing many edits of one site on the same texts. What lies below the site computes the same under each of them;
at layer 17 of 30 that is three fifths of the work. Not for edits at several depths, and not while weights change.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from saetools.errors import InputError
from saetools.models.editing import Edits
from saetools.models.language_model import LanguageModel
from saetools.models.layout import locate
from saetools.models.site import Site


class LayerReplay:
    """What the layers below a site computed in earlier forward passes, on the device of the model.

    Kept are one residual per token and pass, found again by the tokens that were run; under another adapter, or for
    other tokens, the layers run anew.

    Args:
        lm: the model; any view of it may be run.
        site: the first site that will be edited.

    Raises:
        InputError: if the site's layer does not exist.

    Example:
        >>> replay = LayerReplay(lm, Site(1))
        >>> items = load_forced_choice()[:2]
        >>> first, again = (score_forced_choice(lm, items, replay=replay) for _ in range(2))
        >>> torch.equal(first.gaps, again.gaps)
        True
    """

    def __init__(self, lm: LanguageModel, site: Site) -> None:
        module, access = locate(lm.model, lm.layout, site)
        layers = list(lm.layers)
        is_output = module is layers[site.layer] and access == "output"  # an edit after the layer itself
        self.site = site
        self._layers = layers[: site.layer + is_output]
        self._outputs: dict[bytes, Any] = {}

    def check(self, edits: Edits) -> None:
        """Refuse edits of layers that are not run.

        Raises:
            InputError: if an edit lies below the site.
        """
        below = sorted(site for site in edits if site < self.site)
        if below:
            raise InputError(
                "edits",
                expected=f"edits at {self.site} or after it, with this replay",
                received=", ".join(map(str, below)),
                remedy="make a LayerReplay for the first site that is edited",
            )

    @contextmanager
    def over(self, lm: LanguageModel, *tokens: Tensor) -> Iterator[None]:
        """Record or replay the one forward pass that runs inside the block.

        Args:
            lm: the view that is run.
            tokens: everything that the pass depends on: token ids, cached ones included, and masks.
        """
        if not self._layers:
            yield
            return
        key = _digest(lm.adapter, tokens)
        with ExitStack() as patches:
            if key in self._outputs:
                for index, layer in enumerate(self._layers):
                    patches.enter_context(_forward_of(layer, _skip(index, self._outputs[key])))
            else:
                patches.enter_context(_forward_of(self._layers[-1], self._keep(key, self._layers[-1].forward)))
            yield

    def _keep(self, key: bytes, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._outputs[key] = forward(*args, **kwargs)
            return self._outputs[key]

        return run


def _digest(adapter: str | None, tokens: tuple[Tensor, ...]) -> bytes:
    digest = hashlib.sha256(repr(adapter).encode())
    for tensor in tokens:
        digest.update(repr(tensor.shape).encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.digest()


def _skip(index: int, output: Any) -> Callable[..., Any]:
    """In place of a layer: hands out the last skipped layer's output, and keeps the length of the cache right."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        from transformers import Cache

        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                stub = hidden[:, None, :, :1]  # [row, head, token, width]; nobody reads it
                value.update(stub, stub, index)
        return output

    return forward


@contextmanager
def _forward_of(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(layer)  # wrappers around layers pass plain assignments on
    before = own.get("forward")  # a library may have put one there
    own["forward"] = functools.wraps(layer.forward)(forward)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
