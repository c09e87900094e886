"""A conversation with several voices at once: the base, the fine-tune, and one of them under edits that may change.

Every voice keeps a history of its own, so that after a few turns they talk about different things; `retry` asks the
last question again. Answers come from one engine, side by side.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saetools.data.conversation import Conversation, Message
from saetools.engine import Engine, Request, Stream
from saetools.errors import InputError, SaetoolsError
from saetools.generation import check_sampling
from saetools.models.site import Site
from saetools.provenance import write_text
from saetools.report.markdown import escape_markdown
from saetools.sae.model import SAE
from saetools.steer.edits import SteeringEdit
from saetools.steer.text import parse_edits

STEERED = "steered"


@dataclass(frozen=True)
class ChatConfig:
    """How answers are drawn."""

    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 0.7
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with so much probability."""
    seed: int = 0
    """Of the first answer; the next turn has the next."""
    system: str | None = None
    """A system prompt for all voices."""

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_p)


@dataclass(frozen=True)
class Turn:
    """One question and what each voice said to it.

    Args:
        question: what was asked.
        answers: by voice.
        edits: of the steered voice, as they are written.
        config: how answers were drawn.
    """

    question: str
    answers: Mapping[str, str]
    edits: tuple[str, ...]
    config: ChatConfig


@dataclass
class Chat:
    """A conversation in the making.

    Args:
        engine: answers; each of its models is a voice.
        steered: the model of the steered voice, which is added to them.
        sources: what edits may name, as `parse_edits` takes it.
        config: how answers are drawn.
        texts: edits of the steered voice, in their order.

    Raises:
        InputError: for a model called `steered`, or text that is no edit.
    """

    engine: Engine
    steered: str
    sources: Mapping[str, SAE | Site | Mapping[str, Any] | None]
    config: ChatConfig = field(default_factory=ChatConfig)
    texts: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    """What was said, also before a reset."""
    _histories: dict[str, list[Message]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if STEERED in self.engine.models:
            raise InputError("adapter", expected=f"another name than {STEERED!r}", received=STEERED, remedy="rename it")
        self.voices = {**{name: name for name in self.engine.models}, STEERED: self.steered}
        self._parsed(self.texts)
        self.reset()

    def add_edit(self, text: str) -> str:
        """Give the steered voice another edit; as it is written from now on.

        Raises:
            InputError: for text that is no edit, naming the word.
        """
        ((site, edits),) = self._parsed([text]).items()
        written = repr(edits[0]) if site == self.sources.get("site") else f"{site}: {edits[0]!r}"
        self.texts.append(written)
        return written

    def drop_edit(self, number: int) -> str:
        """Take an edit away again, by its number from 1.

        Raises:
            InputError: if there is no such edit.
        """
        if not 1 <= number <= len(self.texts):
            raise InputError(
                "number", expected=f"1 to {len(self.texts)}", received=number, remedy="see the list of edits"
            )
        return self.texts.pop(number - 1)

    def reset(self) -> None:
        """Forget what was said; edits stay."""
        system = [] if self.config.system is None else [Message("system", self.config.system)]
        self._histories = {voice: list(system) for voice in self.voices}

    def change(self, name: str, value: str) -> ChatConfig:
        """Set how answers are drawn from now on.

        Raises:
            InputError: for an unknown setting, or a value of another kind.
        """
        kinds: dict[str, type] = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
        if name not in kinds:
            raise InputError("name", expected="one of " + ", ".join(kinds), received=repr(name), remedy="pick one")
        try:
            number = kinds[name](value)
        except ValueError as error:
            raise InputError(name, expected="a number", received=repr(value), remedy="mend it") from error
        self.config = dataclasses.replace(self.config, **{name: number})
        return self.config

    def ask(self, question: str) -> Iterator[dict[str, str]]:
        """Ask all voices; hands out what each has said so far, until all are done.

        If the iteration is given up, or a voice fails, what was said by then is its answer; a voice that said nothing
        forgets the question.

        Raises:
            InputError: if question and history do not fit the context any more; then nobody is asked.
            NonFiniteError: after the others are done, if edits are too strong for the steered voice.
        """
        return self._ask(question, self._histories, self.config.seed + len(self.turns))

    def retry(self) -> Iterator[dict[str, str]]:
        """Ask the last question again, as if it had not been asked: with the same random numbers.

        Raises:
            InputError: if nothing was asked, and as `ask`.
        """
        if not any(message.role == "user" for turns in self._histories.values() for message in turns):
            raise InputError("retry", expected="a question before it", received="none", remedy="ask something")
        last = self.turns[-1]
        before = {
            voice: turns[:-2] if turns[-1].role == "assistant" else turns for voice, turns in self._histories.items()
        }
        return self._ask(last.question, before, last.config.seed)

    def _ask(self, question: str, histories: Mapping[str, list[Message]], seed: int) -> Iterator[dict[str, str]]:
        asked = {voice: [*history, Message("user", question)] for voice, history in histories.items()}
        config = dataclasses.replace(self.config, seed=seed)
        streams: dict[str, Stream] = {}
        try:
            for voice, model in self.voices.items():
                edits = self._parsed(self.texts) if voice == STEERED else None
                request = Request(Conversation(tuple(asked[voice])), model, edits, **_drawing(config))
                streams[voice] = self.engine.submit(request)
        except SaetoolsError:
            for stream in streams.values():
                stream.cancel()
            raise
        return self._said(question, histories, streams, config)

    def _said(
        self, question: str, histories: Mapping[str, list[Message]], streams: Mapping[str, Stream], config: ChatConfig
    ) -> Iterator[dict[str, str]]:
        said = dict.fromkeys(streams, "")
        pieces = {voice: iter(stream) for voice, stream in streams.items()}
        failures: list[SaetoolsError] = []
        try:
            while pieces:
                for voice in list(pieces):
                    try:
                        piece = next(pieces[voice], None)
                    except SaetoolsError as error:
                        failures.append(error)
                        piece = None
                    if piece is None:
                        del pieces[voice]
                    else:
                        said[voice] += piece.text
                yield dict(said)
        finally:
            for stream in streams.values():
                stream.cancel()
            for voice, history in histories.items():
                answered = [Message("user", question), Message("assistant", said[voice])] if said[voice] else []
                self._histories[voice] = [*history, *answered]
            self.turns.append(Turn(question, dict(said), tuple(self.texts), config))
        if failures:
            raise failures[0]

    def _parsed(self, texts: Sequence[str]) -> dict[Site, list[SteeringEdit]]:
        sources: Any = self.sources
        return parse_edits(texts, **sources)


def save_transcript(turns: Sequence[Turn], path: str | Path) -> Path:
    """Write what was said: as Markdown to a name that ends in `.md`, else a JSON line for every turn."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        text = "".join(_markdown(turn) for turn in turns)
    else:
        text = "".join(json.dumps(dataclasses.asdict(turn), ensure_ascii=False) + "\n" for turn in turns)
    write_text(path, text)
    return path


def _markdown(turn: Turn) -> str:
    lines = [f"## {escape_markdown(_quoted(turn.question))}", ""]
    lines += [f"Edits: `{'`, `'.join(turn.edits)}`" if turn.edits else "No edits.", ""]
    for voice, answer in turn.answers.items():
        lines += [f"**{voice}**", "", *(f"> {escape_markdown(line)}" for line in answer.splitlines() or [""]), ""]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return " ".join(text.split())


def _drawing(config: ChatConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
