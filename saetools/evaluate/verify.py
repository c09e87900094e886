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

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import Batch, make_batches, tokenize
from saetools.errors import InputError
from saetools.evaluate.fidelity import Fidelity, measure_fidelity, ticker
from saetools.models.forward import read
from saetools.models.language_model import LanguageModel
from saetools.models.layout import locate
from saetools.models.site import STREAMS, Site
from saetools.sae.identity import sae_site
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
        on_progress: called with batches read and in all.

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
    batches = list(make_batches(list(tokenize(conversations, lm.tokenizer, max_tokens=max_tokens))))
    elsewhere, views = _elsewhere(lm, site), _other_views(lm)
    tick = ticker(on_progress, len(batches) * (1 + len(views)))
    acts = _read(lm, sae, site, elsewhere, batches, tick)
    given = _fvu(sae, acts.counted)
    suspects = [
        Suspect(f"trained at another site than {site}", f"read it at {other}", unexplained.fvu)
        for other, unexplained in acts.elsewhere.items()
    ]
    suspects += [Suspect(fault, remedy, _fvu(undone, x)) for fault, remedy, undone, x in _undoings(sae, acts)]
    for label, view in views.items():
        fvu = _fvu(sae, _read(view, sae, site, [], batches, tick).counted)
        suspects.append(Suspect("trained on another view of the model", f"read the model {label}", fvu))
    clear = sorted((one for one in suspects if one.fvu < _CLEARLY * given), key=lambda one: one.fvu)
    return Verdict(fidelity, tuple(clear))


class _Unexplained:
    """Sums over tokens of an SAE's squared error and of what it could explain."""

    def __init__(self) -> None:
        self._error = self._squares = self._sum = torch.zeros((), dtype=torch.double)
        self._n = 0

    def add(self, sae: SAE, x: Float[Tensor, "token d_in"]) -> None:
        x = x.to(sae.W_dec)
        self._error = self._error + (x - sae(x)).double().square().sum().cpu()
        self._squares = self._squares + x.double().square().sum().cpu()
        self._sum = self._sum + x.double().sum(0).cpu()
        self._n += len(x)

    @property
    def fvu(self) -> float:
        return float(self._error / (self._squares - self._sum.square().sum() / self._n))


@dataclass(frozen=True)
class _Activations:
    """Activations at a site, which of them are not at first positions, and how the SAE does at other sites."""

    all: Float[Tensor, "token d_model"]
    is_counted: Bool[Tensor, " token"]
    elsewhere: dict[Site, _Unexplained]

    @property
    def counted(self) -> Float[Tensor, "counted d_model"]:
        return self.all[self.is_counted]


def _read(
    lm: LanguageModel,
    sae: SAE,
    site: Site,
    elsewhere: Sequence[Site],
    batches: Sequence[Batch],
    tick: Callable[[], None],
) -> _Activations:
    """Read all sites in one pass; only the activations of one of them are kept."""
    here, is_counted = [], []
    others = {other: _Unexplained() for other in elsewhere}
    with lm.active():
        for batch in batches:
            acts = read(lm, batch.token_ids.to(lm.device), batch.mask.to(lm.device), [site, *elsewhere])
            counted = batch.counted()
            for other, unexplained in others.items():
                unexplained.add(sae, acts[other][counted.to(acts[other].device)])
            here.append(acts[site][batch.mask.to(acts[site].device)].to(sae.W_dec))
            is_counted.append(counted[batch.mask])
            tick()
    return _Activations(torch.cat(here), torch.cat(is_counted).to(here[0].device), others)


def _elsewhere(lm: LanguageModel, site: Site) -> list[Site]:
    """Other streams of the layer, and the same stream of layers nearby, where the model has them."""
    layers = range(max(0, site.layer - _REACH), min(lm.n_layers, site.layer + _REACH + 1))
    near = (*(Site(site.layer, stream) for stream in STREAMS), *(Site(layer, site.stream) for layer in layers))
    return [other for other in near if other != site and _has(lm, other)]


def _has(lm: LanguageModel, site: Site) -> bool:
    try:
        locate(lm.model, lm.layout, site)
    except InputError:
        return False
    return True


def _other_views(lm: LanguageModel) -> dict[str, LanguageModel]:
    """The same weights with another adapter, or without."""
    views = {"without an adapter": lm.base} if lm.adapter else {}
    return views | {f"with the adapter {name!r}": lm.with_adapter(name) for name in lm.adapters if name != lm.adapter}


def _undoings(sae: SAE, acts: _Activations) -> Iterator[tuple[str, str, SAE, Tensor]]:
    """Faults in how an SAE was written or is used, the remedy, and the SAE and activations that undo each."""
    x = acts.counted
    centred = "not " if sae.apply_b_dec_to_input else ""
    toggled = copy.copy(sae)
    toggled.apply_b_dec_to_input = not sae.apply_b_dec_to_input
    yield (
        "b_dec subtracted from the input, or not",
        f"load it with apply_b_dec_to_input={toggled.apply_b_dec_to_input}: b_dec is {centred}subtracted",
        toggled,
        x,
    )
    scale = math.sqrt(sae.d_in) / float(torch.linalg.vector_norm(x, dim=1).mean())
    yield (
        "a scale of activations that is not folded into the weights",
        f"multiply activations by {scale:.4g}, or fold that into the weights",
        sae,
        x * scale,
    )
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True).clamp_min(1e-8)
    by_norm = {"encoder": sae.encoder * norms, "b_enc": sae.b_enc * norms[:, 0], "W_dec": sae.W_dec / norms}
    yield (
        "decoder norms left out of the choice of latents",
        "multiply encoder and b_enc by the decoder norms and divide the decoder by them",
        _with(sae, **by_norm),
        x,
    )
    yield (
        "a decoder that was not normalised",
        "divide decoder rows by their norms",
        _with(sae, W_dec=sae.W_dec / norms),
        x,
    )
    for name, weight in (("W_dec", sae.W_dec), ("encoder", sae.encoder)):
        yield (
            f"transposed weights ({name})",
            f"transpose {name} before loading",
            _with(sae, **{name: _transposed(weight)}),
            x,
        )
    yield "trained with first positions", "count first positions in: skip_first=False", sae, acts.all


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
    unexplained = _Unexplained()
    unexplained.add(sae, x)
    return unexplained.fvu
