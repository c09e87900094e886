"""From a latent store and what else is known of its latents to one value a latent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saetools.errors import InputError
from saetools.evaluate.certificate import Certification
from saetools.histogram import Histogram
from saetools.interpret.explanation import Explanation
from saetools.interpret.promoted import LatentTokens, promoted_tokens
from saetools.latent_diff import LatentDiff
from saetools.latents.record import LatentRecord
from saetools.latents.store import LatentStore
from saetools.models.language_model import LanguageModel
from saetools.report.latent_report import LatentReport
from saetools.sae.identity import sae_sha256
from saetools.sae.model import SAE

_AT_ONCE = 64  # latents whose promoted tokens are looked up together


def report_latents(
    store: LatentStore,
    latents: Sequence[int],
    *,
    lm: LanguageModel | None = None,
    sae: SAE | None = None,
    diff: LatentDiff | None = None,
    certification: Certification | None = None,
    explanations: Sequence[Explanation] = (),
    model: str | None = None,
    n_top: int = 20,
    n_bins: int = 4,
    n_per_bin: int = 5,
    context: int = 24,
    n_tokens: int = 10,
    seed: int = 0,
) -> Iterator[LatentReport]:
    """All that is known of some latents, one after the other.

    Args:
        store: where they fire.
        latents: which, in this order.
        lm: the base model, for the tokens that they promote; needs `sae`.
        sae: the SAE of the store.
        diff: base against tuned with the same SAE.
        certification: of its candidates those that are one latent.
        explanations: by a language model.
        model: by whose activations passages are chosen; by default the last one of the store.
        n_top: passages around the largest activations.
        n_bins: equal parts of the active tokens.
        n_per_bin: random passages from each.
        context: tokens of a passage before and after the one it was chosen by.
        n_tokens: promoted and suppressed tokens.
        seed: of the random passages.

    Raises:
        InputError: for latents or a model that the store does not have, no latents, a model without its SAE, or an SAE,
            a diff or a certification of another SAE than the store's.

    Example:
        >>> import tempfile
        >>> from saetools.latents import index_latents
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> voices = [Conversation(text=pair.voiced, id=pair.id) for pair in load_voices()[:3]]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = index_latents({"base": lm}, sae, {"voices": voices}, folder)
        ...     (found,) = report_latents(store, [int(store.latents_at(torch.tensor([5])).latents[0])])
        ...     found.models, found.record.n_active == sum(found.histograms["base"].counts)
        (('base',), True)
    """
    sources = LatentReporter(store, lm, sae, diff, certification, explanations)
    return sources.report(
        latents,
        model=model,
        n_top=n_top,
        n_bins=n_bins,
        n_per_bin=n_per_bin,
        context=context,
        n_tokens=n_tokens,
        seed=seed,
    )


@dataclass(frozen=True)
class LatentReporter:
    """The sources of reports, checked once, for latents that are asked for one after the other.

    Args:
        store: as of `report_latents`, and the others; `None` leaves open where latents fire.

    Raises:
        InputError: for neither store nor diff, a model without its SAE, or an SAE, a diff or a certification of another
            SAE than the store's.
    """

    store: LatentStore | None
    lm: LanguageModel | None = None
    sae: SAE | None = None
    diff: LatentDiff | None = None
    certification: Certification | None = None
    explanations: Sequence[Explanation] = ()

    def __post_init__(self) -> None:
        if (self.lm is None) != (self.sae is None):
            raise InputError("lm and sae", expected="both or neither", received="one", remedy="pass the other, too")
        if self.store is not None:
            _check_same_sae(self.store, self.sae, self.diff, self.certification)
        elif self.diff is None:
            raise InputError("store", expected="a store or a diff", received="neither", remedy="pass one")

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        if self.store is not None:
            return self.store.d_sae
        assert self.diff is not None
        return len(self.diff.at(self.diff.positions[0]).table)

    def report(
        self, latents: Sequence[int], *, model: str | None = None, n_tokens: int = 10, **opening: int
    ) -> Iterator[LatentReport]:
        """All that is known of some latents, one after the other.

        Args:
            latents: which, in this order.
            model: by whose activations passages are chosen; by default the last one of the store.
            n_tokens: promoted and suppressed tokens.
            opening: settings of `LatentStore.open_latent`.

        Raises:
            InputError: for latents or a model that the store does not have, or no latents.
        """
        if not latents:
            raise InputError("latents", expected="one or more", received="none", remedy="name latents of the store")
        last, store = self.d_sae - 1, self.store
        if bad := [latent for latent in latents if not 0 <= latent <= last]:
            raise InputError("latents", expected=f"0 to {last}", received=bad[:10], remedy="name latents of the store")
        changes = _changes(self.diff, latents)
        certificates = certificates_of(self.certification)
        explained = {one.latent: one for one in self.explanations}
        return (
            LatentReport(
                LatentRecord(latent) if store is None else store.open_latent(latent, model=model, **opening),
                {} if store is None else _histograms(store, latent),
                tokens,
                changes.get(latent, ()),
                certificates.get(latent),
                explained.get(latent),
            )
            for latent, tokens in _with_tokens(self.lm, self.sae, latents, n_tokens)
        )


def _check_same_sae(
    store: LatentStore, sae: SAE | None, diff: LatentDiff | None, certification: Certification | None
) -> None:
    made_with = store.manifest["provenance"].get("sae")
    if made_with is None:  # a store that was written from pairs alone
        return
    expected = made_with["sha256"]
    seen = {
        "sae": None if sae is None else sae_sha256(sae),
        "diff": None if diff is None else diff.provenance["sae"],
        "certification": None if certification is None else certification.provenance["sae"],
    }
    for argument, received in seen.items():
        if received is not None and received != expected:
            raise InputError(
                argument,
                expected=f"the SAE that the store was made with ({expected[:12]})",
                received=received[:12],
                remedy="index again with this SAE, or pass what was made with the store's",
            )


def _histograms(store: LatentStore, latent: int) -> dict[str, Histogram]:
    """Activations on active tokens by model, in bins that they share and that reach to 0."""
    acts = {model: store.activations(latent, model=model) for model in store.models}
    ends = [float(end) for each in acts.values() if len(each) for end in each.aminmax()]
    return {model: Histogram.of(each, low=min([0.0, *ends]), high=max([0.0, *ends])) for model, each in acts.items()}


def _with_tokens(
    lm: LanguageModel | None, sae: SAE | None, latents: Sequence[int], n_tokens: int
) -> Iterator[tuple[int, LatentTokens | None]]:
    if lm is None or sae is None:
        yield from ((latent, None) for latent in latents)
        return
    for start in range(0, len(latents), _AT_ONCE):
        some = latents[start : start + _AT_ONCE]
        yield from zip(some, promoted_tokens(lm, sae, some, n_tokens=n_tokens), strict=True)


def _changes(diff: LatentDiff | None, latents: Sequence[int]) -> dict[int, tuple[dict[str, Any], ...]]:
    import polars as pl

    if diff is None:
        return {}
    found: dict[int, tuple[dict[str, Any], ...]] = {}
    for row in diff.table.filter(pl.col("latent").is_in(list(latents))).iter_rows(named=True):
        found[row["latent"]] = (*found.get(row["latent"], ()), row)
    return found


def certificates_of(certification: Certification | None) -> dict[int, dict[str, Any]]:
    """Rows of the table of certificates, by latent; of candidates that are one latent."""
    if certification is None:
        return {}
    rows = certification.table().iter_rows(named=True)
    return {row["latents"][0]: row for row in rows if len(row["latents"]) == 1}
