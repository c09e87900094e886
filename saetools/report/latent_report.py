"""All that is known of one latent, as one value: reports write it and the explorer shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saetools.errors import InputError, IntegrityError
from saetools.histogram import Histogram
from saetools.interpret.explanation import Explanation
from saetools.interpret.promoted import LatentTokens
from saetools.latents.passage import Passage
from saetools.latents.record import (
    ActiveDocument,
    Activity,
    CoactiveLatent,
    DecoderNeighbour,
    LatentRecord,
    QuantileBin,
)
from saetools.provenance import plain


@dataclass(frozen=True)
class LatentReport:
    """One latent.

    Args:
        record: where it fires in a corpus, how much, and with what.
        histograms: of its activations where it is active, by model, in the same bins.
        tokens: what its decoder row promotes and suppresses; `None` without a model.
        changes: base against tuned, one row of `LatentDiff.table` for each role; none without a diff.
        certificate: its row of `Certification.table`; `None` if it was no candidate of its own.
        explanation: what a language model says of it; `None` if it was not asked.
    """

    record: LatentRecord
    histograms: Mapping[str, Histogram]
    tokens: LatentTokens | None = None
    changes: tuple[Mapping[str, Any], ...] = ()
    certificate: Mapping[str, Any] | None = None
    explanation: Explanation | None = None

    @property
    def latent(self) -> int:
        """Its number."""
        return self.record.latent

    @property
    def models(self) -> tuple[str, ...]:
        """The models that read the corpus."""
        return tuple(self.histograms)

    def rate(self, model: str) -> float:
        """Share of all counted tokens of the corpus on which it is active in a model."""
        rows = [row for row in self.record.activity if row.model == model and row.positions == "all"]
        n_tokens = sum(row.n_tokens for row in rows)
        return sum(row.rate * row.n_tokens for row in rows) / n_tokens if n_tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not a finite number is null."""
        record = vars(self.record)
        bins = [{**vars(one), "passages": [vars(passage) for passage in one.passages]} for one in self.record.bins]
        lists = ("top", "activity", "documents", "coactive", "neighbours")
        explanation = self.explanation
        scores = ("detection", "fuzzing")
        value: dict[str, Any] = plain(
            {
                "record": {**record, **{name: [vars(one) for one in record[name]] for name in lists}, "bins": bins},
                "histograms": {model: vars(one) for model, one in self.histograms.items()},
                "tokens": self.tokens and {**vars(self.tokens), "logits": vars(self.tokens.logits)},
                "changes": list(self.changes),
                "certificate": self.certificate,
                "explanation": explanation
                and {
                    **vars(explanation),
                    **{name: (score := getattr(explanation, name)) and vars(score) for name in scores},
                    "failures": [vars(one) for one in explanation.failures],
                },
            }
        )
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LatentReport:
        """From what `to_json` gave.

        Raises:
            KeyError, TypeError: if some of it is missing, or there is more.
        """
        record, tokens, explanation = value["record"], value["tokens"], value["explanation"]
        return cls(
            LatentRecord(
                **{
                    **record,
                    "top": tuple(map(_passage, record["top"])),
                    "bins": tuple(
                        QuantileBin(**{**one, "passages": tuple(map(_passage, one["passages"]))})
                        for one in record["bins"]
                    ),
                    "activity": tuple(Activity(**one) for one in record["activity"]),
                    "documents": tuple(ActiveDocument(**one) for one in record["documents"]),
                    "coactive": tuple(CoactiveLatent(**one) for one in record["coactive"]),
                    "neighbours": tuple(DecoderNeighbour(**one) for one in record["neighbours"]),
                }
            ),
            {model: _histogram(one) for model, one in value["histograms"].items()},
            tokens and _tokens(tokens),
            tuple(value["changes"]),
            value["certificate"],
            explanation and Explanation.from_json(explanation),
        )


def read_latent_reports(path: str | Path) -> Iterator[LatentReport]:
    """The latents of a `latents.jsonl`, one after the other.

    Raises:
        InputError: if there is no such file.
        IntegrityError: if a line is no latent.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("path", expected="a latents.jsonl", received=str(path), remedy="run `saetools report` first")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield LatentReport.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise IntegrityError(f"{path}:{number} is no latent ({error!r}); report again") from error


def json_line(report: LatentReport) -> str:
    """A latent as one line of JSON; lone surrogates, which UTF-8 cannot hold, stand as escapes."""
    text = json.dumps(report.to_json(), ensure_ascii=False, separators=(",", ":"))
    return re.sub(r"[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def _passage(value: Mapping[str, Any]) -> Passage:
    lists = {name: tuple(value[name]) for name in ("token_ids", "tokens", "roles")}
    acts = {model: tuple(each) for model, each in value["acts"].items()}
    return Passage(**{**value, **lists, "acts": acts})


def _tokens(value: Mapping[str, Any]) -> LatentTokens:
    promoted, suppressed, promoted_logits, suppressed_logits = (
        tuple(value[name]) for name in ("promoted", "suppressed", "promoted_logits", "suppressed_logits")
    )
    logits = _histogram(value["logits"])
    return LatentTokens(value["latent"], promoted, suppressed, promoted_logits, suppressed_logits, logits)


def _histogram(value: Mapping[str, Any]) -> Histogram:
    return Histogram(tuple(value["edges"]), tuple(value["counts"]))
