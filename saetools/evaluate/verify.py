"""Whether a loaded SAE fits the model it is used with and, if not, what is probably wrong.

Loading other people's SAEs goes wrong silently: a layer counted from another start, a bias subtracted or not, weights
that expect scaled activations. Each likely fault is undone in turn on real activations; those whose undoing clearly
lowers the unexplained variance are named. Not a measure of an SAE's quality: for that see `measure_fidelity`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import make_batches, tokenize
from saetools.diff import sae_site
from saetools.errors import InputError
from saetools.evaluate.fidelity import Fidelity, measure_fidelity
from saetools.models.forward import read
from saetools.models.language_model import LanguageModel
from saetools.models.site import STREAMS, Site
from saetools.sae.model import SAE

_GOOD_FVU = 0.5  # a working SAE explains more than half of the variance
_CLEARLY = 0.8  # undoing a fault counts if it leaves less than this share of the FVU
_REACH = 3  # layers to either side that are tried


@dataclass(frozen=True)
class Suspect:
    """A possible fault.

    Args:
        fault: what may be wrong.
        remedy: what to do about it.
        fvu: fraction of variance unexplained once it is undone.
    """

    fault: str
    remedy: str
    fvu: float


@dataclass(frozen=True)
class Verdict:
    """What verifying an SAE found.

    Args:
        fidelity: as the SAE was given, at the site that was given.
        suspects: faults whose undoing clearly lowers the FVU, the most likely first; none for an SAE that fits.
    """

    fidelity: Fidelity
    suspects: tuple[Suspect, ...]

    @property
    def fits(self) -> bool:
        """Whether the SAE explains what it should, and nothing does clearly better."""
        return not self.suspects and self.fidelity.all.fvu.mean < _GOOD_FVU

    def __str__(self) -> str:
        here = self.fidelity.all
        head = f"FVU {here.fvu.mean:.3f}, L0 {here.l0.mean:.1f}, CE recovered {here.ce_recovered.mean:.3f}"
        if self.fits:
            return f"{head}: fits"
        lines = [f"{one.fault} (FVU {one.fvu:.3f} without): {one.remedy}" for one in self.suspects]
        return "\n".join([head, *(lines or ["unexplained: another model, or an SAE that does not reconstruct"])])


@torch.inference_mode()
def verify_sae(
    sae: SAE,
    lm: LanguageModel,
    conversations: Sequence[Conversation],
    *,
    site: Site | None = None,
    max_tokens: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Measure an SAE on real activations and name the likely fault if they do not fit.

    Tried are: neighbouring layers and streams, `b_dec` subtracted or not, activations scaled to a mean norm of
    sqrt(d_in), decoder norms left out of the choice of latents, transposed weights, first positions counted in, and
    other views of the same weights (an adapter on or off).

    Args:
        sae: an autoencoder.
        lm: the model.
        conversations: some texts or chats; a few thousand tokens are enough.
        site: where to read; by default what the SAE's metadata says.
        max_tokens: longer ones are cut.
        on_progress: called with attempts done and in all.

    Raises:
        InputError: for a transcoder, an SAE of another width, or if no site is known.

    Example:
        >>> sae = load_sae("data/sae/smollm2-135m")
        >>> texts = [Conversation(text=pair.neutral) for pair in load_voices()[:4]]
        >>> verify_sae(sae, lm, texts).fits
        True
    """
    site = site or sae_site(sae)
    fidelity = measure_fidelity(lm, sae, conversations, site=site, max_tokens=max_tokens)
    acts = _Activations(lm, conversations, max_tokens)
    here = acts.at(site)
    given = _fvu(sae, here)
    attempts = [
        *_elsewhere(sae, site, acts, lm.n_layers),
        *_undoings(sae, here),
        _Attempt(
            "trained with first positions",
            "count first positions in: skip_first=False",
            lambda: _fvu(sae, acts.at(site, skip_first=False)),
        ),
        *_other_views(sae, site, lm, conversations, max_tokens),
    ]
    found = []
    for done, attempt in enumerate(attempts, start=1):
        fvu = attempt.fvu()
        if fvu is not None and fvu < _CLEARLY * given:
            found.append(Suspect(attempt.fault, attempt.remedy, fvu))
        if on_progress is not None:
            on_progress(done, len(attempts))
    return Verdict(fidelity, tuple(sorted(found, key=lambda suspect: suspect.fvu)))


@dataclass(frozen=True)
class _Attempt:
    """A fault, what mends it, and the FVU without it; `None` where that cannot be."""

    fault: str
    remedy: str
    fvu: Callable[[], float | None]


class _Activations:
    """Residuals of the conversations, site by site."""

    def __init__(self, lm: LanguageModel, conversations: Sequence[Conversation], max_tokens: int) -> None:
        self._lm = lm
        tokenized = list(tokenize(conversations, lm.tokenizer, max_tokens=max_tokens))
        self._batches = list(make_batches(tokenized))

    def at(self, site: Site, *, skip_first: bool = True) -> Float[Tensor, "token d_model"]:
        """Activations of all counted tokens, in float32."""
        parts = []
        with self._lm.active():
            for batch in self._batches:
                acts = read(self._lm, batch.token_ids.to(self._lm.device), batch.mask.to(self._lm.device), [site])[site]
                counted: Bool[Tensor, "row pos"] = batch.counted(skip_first=skip_first)
                parts.append(acts[counted.to(acts.device)].float())
        return torch.cat(parts)

    def fvu_at(self, site: Site, sae: SAE) -> float | None:
        """FVU at another site; `None` where the architecture does not have it."""
        try:
            return _fvu(sae, self.at(site))
        except InputError:
            return None


def _elsewhere(sae: SAE, site: Site, acts: _Activations, n_layers: int) -> Iterator[_Attempt]:
    """Other streams of the layer, and the same stream of layers nearby."""
    layers = range(max(0, site.layer - _REACH), min(n_layers, site.layer + _REACH + 1))
    for other in (*(Site(site.layer, stream) for stream in STREAMS), *(Site(layer, site.stream) for layer in layers)):
        if other != site:
            fvu = partial(acts.fvu_at, other, sae)
            yield _Attempt(f"trained at another site than {site}", f"read it at {other}", fvu)


def _other_views(
    sae: SAE, site: Site, lm: LanguageModel, conversations: Sequence[Conversation], max_tokens: int
) -> Iterator[_Attempt]:
    """The same weights with another adapter, or without."""
    for name in (None, *lm.adapters):
        if name != lm.adapter:
            view = lm.base if name is None else lm.with_adapter(name)
            label = "without an adapter" if name is None else f"with the adapter {name!r}"
            fvu = partial(_Activations(view, conversations, max_tokens).fvu_at, site, sae)
            yield _Attempt("trained on another view of the model", f"read the model {label}", fvu)


def _undoings(sae: SAE, x: Float[Tensor, "token d_in"]) -> Iterator[_Attempt]:
    """Faults of an SAE's files."""
    centred = "not " if sae.apply_b_dec_to_input else ""
    toggled = copy.copy(sae)
    toggled.apply_b_dec_to_input = not sae.apply_b_dec_to_input
    yield _Attempt(
        "b_dec subtracted from the input, or not",
        f"load it with apply_b_dec_to_input={toggled.apply_b_dec_to_input}: b_dec is {centred}subtracted",
        lambda: _fvu(toggled, x),
    )
    scale = math.sqrt(sae.d_in) / float(torch.linalg.vector_norm(x, dim=1).mean())
    yield _Attempt(
        "a scale of activations that is not folded into the weights",
        f"multiply activations by {scale:.4g}, or fold that into the weights",
        lambda: _fvu(sae, x * scale),
    )
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1).clamp_min(1e-8)
    by_norm = {"encoder": sae.encoder * norms[:, None], "b_enc": sae.b_enc * norms, "W_dec": sae.W_dec / norms[:, None]}
    yield _Attempt(
        "decoder norms left out of the choice of latents",
        "multiply encoder and b_enc by the decoder norms and divide the decoder by them",
        lambda: _fvu(_with(sae, **by_norm), x),
    )
    longer = {"W_dec": sae.W_dec / norms[:, None]}
    yield _Attempt(
        "a decoder that was not normalised",
        "divide decoder rows by their norms",
        lambda: _fvu(_with(sae, **longer), x),
    )
    for name, weight in (("W_dec", sae.W_dec), ("encoder", sae.encoder)):
        yield _Attempt(
            f"transposed weights ({name})",
            f"transpose {name} before loading",
            lambda name=name, weight=weight: _fvu(_with(sae, **{name: _transposed(weight)}), x),  # type: ignore[misc]
        )


def _transposed(weight: Tensor) -> Tensor:
    """The matrix whose numbers were read in the order of its transpose."""
    return weight.reshape(weight.shape[1], weight.shape[0]).T.contiguous()


def _with(sae: SAE, **weights: Tensor) -> SAE:
    """A copy of the SAE with other weights in some places."""
    other = copy.deepcopy(sae, {id(weight): weight for weight in sae.parameters()})
    for name, weight in weights.items():
        setattr(other, name, nn.Parameter(weight, requires_grad=False))
    return other


def _fvu(sae: SAE, x: Float[Tensor, "token d_in"]) -> float:
    x = x.to(sae.W_dec.device)
    error = (x - sae(x).float()).double().square().sum()
    return float(error / (x - x.mean(0)).double().square().sum())
