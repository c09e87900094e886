"""The playground: a prompt answered by base, fine-tune and steered model side by side, while it is being written.

What runs belongs to the tab that asked: answers are found by a name that only it knows.
"""

from __future__ import annotations

import base64
import json
import secrets
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dash import dcc, html

from saetools.data.conversation import Conversation
from saetools.engine import Engine, Piece, Request
from saetools.errors import InputError
from saetools.explore.page import Component, aria, choice, failed, heading, marked
from saetools.explore.workspace import Workspace
from saetools.interpret.text_search import acts_on
from saetools.models.editing import Edits
from saetools.models.site import Site
from saetools.report.latent_html import level_of
from saetools.report.wording import visible
from saetools.steer.edits import SteeringEdit
from saetools.steer.text import latents_in, parse_edits
from saetools.steer_export import export_control_vector

STEERED = "steered"
_OPERATIONS = ("clamp", "add", "scale", "ablate", "clamp_max", "clamp_min")
_ON_DIRECTIONS = ("add_direction", "project_out", "project_to")
_SCOPES = {"all tokens": "", "the answer": " on response", "the prompt": " on prompt", "new tokens": " on generated"}
_UNITS = {"activation": "", "99th percentile": "*p99", "median norm": "*norm"}
_DIRECTION_UNITS = {"direction": "", "median norm": "*norm"}
_KEPT_SECONDS = 3600.0  # after which answers that nobody asked for are forgotten


def layout(workspace: Workspace, latent: int | None = None) -> list[Component]:
    """The page.

    Args:
        workspace: the run.
        latent: to begin with.
    """
    if not workspace.models:
        told = "There are no models to ask: start the explorer with --adapter or --model."
        return [*heading("Playground"), html.P(told)]
    first = "" if latent is None else f"clamp {latent}=0 on response"
    return [
        *heading("Playground", "Edits are one a line and run in their order."),
        html.Div(
            [
                _field("Prompt", dcc.Textarea(id="prompt", value="What should I do with my life?", maxLength=20_000)),
                choice("steered-model", "Steered model", list(workspace.models), [*workspace.models][-1]),
                _builder(workspace, latent),
                *([_direction_builder(workspace)] if workspace.directions else []),
                _field("Edits", dcc.Textarea(id="edits", value=first, spellCheck=False, className="code")),
                _field("Strengths to compare", dcc.Input(id="strengths", type="text", value="1")),
                _field("Tokens", _number("n-tokens", 48, 1, 512, 1)),
                _field("Temperature", _number("temperature", 0, 0, 2, 0.1)),
                html.Div(
                    [
                        html.Button("Answer", id="answer", n_clicks=0, className="main"),
                        html.Button("Stop", id="stop", n_clicks=0),
                    ],
                    className="bar",
                ),
            ],
            className="controls",
        ),
        dcc.Store(id="asked"),
        dcc.Interval(id="tick", interval=250, disabled=True),
        html.Div(id="answers", className="answers", **aria(live="polite")),
        html.Div(
            [
                html.Button("Edits as JSON", id="save-json", n_clicks=0),
                html.Button("Python", id="save-python", n_clicks=0),
                html.Button("Control vector", id="save-vector", n_clicks=0),
                dcc.Download(id="saved"),
                html.Span(id="save-error", role="status"),
            ],
            className="bar",
        ),
    ]


def _builder(workspace: Workspace, latent: int | None) -> Component:
    """What an edit is put together with."""
    return html.Fieldset(
        [
            html.Legend("Edit a latent"),
            _field("Latent", _number("edit-latent", latent or 0, 0, workspace.d_sae - 1, 1)),
            choice("edit-what", "What", _OPERATIONS, "clamp"),
            choice("edit-unit", "Unit", list(_UNITS), "activation"),
            choice("edit-scope", "Where", list(_SCOPES), "the answer"),
            _slider("edit-value"),
            html.Button("Add", id="add-edit", n_clicks=0),
        ]
    )


def _direction_builder(workspace: Workspace) -> Component:
    """The same for directions."""
    return html.Fieldset(
        [
            html.Legend("Edit a direction"),
            choice("direction-name", "Direction", list(workspace.directions), next(iter(workspace.directions))),
            choice("direction-what", "What to do", _ON_DIRECTIONS, "add_direction"),
            choice("direction-unit", "In units of", list(_DIRECTION_UNITS), "direction"),
            choice("direction-scope", "On", list(_SCOPES), "the answer"),
            _slider("direction-value"),
            html.Button("Add", id="add-direction", n_clicks=0),
        ]
    )


def _slider(name: str) -> Component:
    slider = dcc.Input(id=name, type="range", min=-10, max=10, value=0, step=0.1)
    return html.Div(
        [html.Label("Value", htmlFor=name), slider, html.Output(id=f"{name}-shown")], className="wide field"
    )


def _number(name: str, value: float, least: float, most: float, step: float) -> Component:
    return dcc.Input(id=name, type="number", value=value, min=least, max=most, step=step)


def _field(name: str, control: Any) -> Component:
    return html.Div([html.Label(name, htmlFor=control.id), control], className="field")


def edit_text(latent: int, what: str, value: float, unit: str, scope: str) -> str:
    """An edit as it is written, from what is picked in the page."""
    if what == "ablate":
        return f"ablate {latent}{_SCOPES[scope]}"
    return f"{what} {latent}={value:g}{'' if what == 'scale' else _UNITS[unit]}{_SCOPES[scope]}"


def direction_text(workspace: Workspace, name: str, what: str, value: float, unit: str, scope: str) -> list[str]:
    """The same for a direction, at each of its sites."""
    number = {"project_out": "", "project_to": f"={value:g}"}.get(what, f"={value:g}{_DIRECTION_UNITS[unit]}")
    return [f"{site}: {what} {name}{number}{_SCOPES[scope]}" for site in workspace.vectors[name]]


def lines(text: str | None) -> list[str]:
    """The edits of a text, one a line."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def parsed(workspace: Workspace, text: str | None) -> dict[Site, list[SteeringEdit]]:
    """The edits of a text.

    Raises:
        InputError: for a line that is no edit.
    """
    return parse_edits(lines(text), sae=workspace.sae, site=workspace.site, directions=workspace.vectors)


def strengths(text: str | None) -> list[float]:
    """Numbers between commas; 1 if there are none.

    Raises:
        InputError: for anything else, or more than 8.
    """
    words = [word for word in (text or "").replace(",", " ").split() if word]
    try:
        found = [float(word) for word in words] or [1.0]
    except ValueError:
        found = []
    if not 1 <= len(found) <= 8 or not all(abs(one) < 1e6 for one in found):
        raise InputError("strengths", expected="up to 8 numbers", received=repr(text), remedy="write them as 0.5, 1, 2")
    return found


@dataclass
class Answer:
    """What one voice says, as it grows on the engine's thread."""

    voice: str
    model: str
    edits: Edits = field(default_factory=dict)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    done: bool = False
    error: str | None = None

    def take(self, piece: Piece | BaseException | None) -> None:
        """Take what comes."""
        if isinstance(piece, Piece):
            self.text += piece.text
            self.token_ids += piece.token_ids
        else:
            self.error, self.done = None if piece is None else str(piece), True


@dataclass
class Asked:
    """One question of one tab."""

    prompt: str
    latents: tuple[int, ...]
    answers: list[Answer]
    streams: list[Any]
    at: float
    reading: Future[dict[str, list[tuple[str, float]]]] | None = None
    """Of the finished answers' activations; begun once."""

    @property
    def answered(self) -> bool:
        """Whether all voices have come to an end."""
        return all(answer.done for answer in self.answers)

    @property
    def done(self) -> bool:
        """Whether nothing more will be shown."""
        return self.answered and (not self.latents or (self.reading is not None and self.reading.done()))


class Playground:
    """Questions that are being answered, by names that only those know who asked.

    Args:
        workspace: whose models answer.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._asked, self._lock = workspace, dict[str, Asked](), threading.Lock()
        self._readers = ThreadPoolExecutor(1)

    def ask(
        self,
        prompt: str | None,
        model: str,
        edits: str | None,
        factors: str | None,
        n_tokens: int | None,
        temperature: float | None,
    ) -> str:
        """Begin to answer; gives the name of the question.

        Raises:
            InputError: for an empty prompt, text that is no edit, or settings that are out of bounds.
            BusyError: if too many wait.
        """
        if not (prompt or "").strip():
            raise InputError("prompt", expected="a question", received="nothing", remedy="write one")
        workspace = self._workspace
        steered = parsed(workspace, edits)
        found = [Answer("base", "base"), *(Answer(name, name) for name in workspace.models if name not in ("base",))]
        for factor in strengths(factors) if steered else []:
            name = f"{model}, {STEERED}" + ("" if factor == 1 else f" x {factor:g}")
            found.append(Answer(name, model, _times(steered, factor)))
        question = Conversation.chat(str(prompt))
        n, heat = min(int(n_tokens or 48), 512), float(temperature or 0.0)
        requests = [
            Request(question, one.model, one.edits or None, max_new_tokens=n, temperature=heat) for one in found
        ]
        engine: Engine = workspace.engine
        streams = [engine.submit(request, sink=one.take) for request, one in zip(requests, found, strict=True)]
        latents = tuple(dict.fromkeys(latent for line in lines(edits) for latent in latents_in(line)))
        name, now = secrets.token_urlsafe(16), time.monotonic()
        with self._lock:
            self._asked = {key: one for key, one in self._asked.items() if now - one.at < _KEPT_SECONDS}
            self._asked[name] = Asked(str(prompt), latents, found, streams, now)
        return name

    def of(self, name: str | None) -> Asked | None:
        """A question by its name."""
        return self._asked.get(name or "")

    def stop(self, name: str | None) -> None:
        """Have no more of a question's answers."""
        if (asked := self.of(name)) is not None:
            for answer, stream in zip(asked.answers, asked.streams, strict=True):
                stream.cancel()
                answer.done = True

    def shown(self, name: str | None) -> list[Component]:
        """The answers so far; when all are there, with the activations of the edited latents on every token."""
        asked = self.of(name)
        if asked is None:
            return []
        if asked.answered and asked.latents:
            with self._lock:
                if asked.reading is None:
                    asked.reading = self._readers.submit(self._activations, asked)
        tokens = asked.reading.result() if asked.reading is not None and asked.reading.done() else {}
        return [_answer(one, tokens.get(one.voice), asked.latents) for one in asked.answers]

    def _activations(self, asked: Asked) -> dict[str, list[tuple[str, float]]]:
        """By voice, tokens and the sum of the edited latents' activations on each, as the model has them unedited."""
        workspace = self._workspace
        sae = workspace.sae
        assert sae is not None
        found = {}
        for one in asked.answers:
            if one.error is None and one.text:
                lm = workspace.models[one.model]
                talk = Conversation.chat(asked.prompt, one.text)
                read = partial(acts_on, lm, sae, talk, asked.latents, site=workspace.site)
                found[one.voice] = workspace.engine.between(read)
        return found


def _times(edits: Mapping[Site, Sequence[SteeringEdit]], factor: float) -> Edits:
    """Edits at a multiple of their strength."""
    if factor == 1:
        return {site: list(each) for site, each in edits.items()}
    return {site: [one.over({0: factor}) for one in each] for site, each in edits.items()}


def _answer(one: Answer, tokens: list[tuple[str, float]] | None, latents: Sequence[int]) -> Component:
    if one.error is not None:
        body: Any = failed(RuntimeError(one.error))
    elif tokens:
        most = max((abs(act) for _, act in tokens), default=0.0)
        body = html.Blockquote(
            marked([(token, act, level_of(act, most)) for token, act in tokens]), dir="auto", tabIndex=0
        )
    else:
        body = html.Blockquote(visible(one.text) or "\u2026", dir="auto", tabIndex=0)
    about = f"shaded: latent {', '.join(map(str, latents))}, as it is before the edits" if tokens else ""
    return html.Div([html.H3(one.voice), body, html.P(about, className="note")], className="answer")


def _written_source(source: str | None) -> str:
    return 'st.shipped_path("sae/smollm2-135m")' if source is None else repr(source)


def saved(workspace: Workspace, kind: str, text: str | None, model: str) -> dict[str, Any]:
    """A file to download: the edits as JSON, as Python, or as a control vector of llama.cpp.

    Raises:
        InputError: without edits, or for a control vector of edits that are none.
    """
    edits = parsed(workspace, text)
    at = {site: "" if site == workspace.site else f"{site}: " for site in edits}
    written = [f"{at[site]}{one!r}" for site, each in edits.items() for one in each]
    if not written:
        raise InputError("edits", expected="at least one", received="none", remedy="add one")
    if kind == "save-json":
        return {"content": json.dumps({"model": model, "edits": written}, indent=2), "filename": "edits.json"}
    if kind == "save-python":
        given = [f"{name!r}: st.Direction.load({folder!r}).vectors" for name, folder in workspace.directions.items()]
        code = [
            "import saetools as st",
            "",
            f"sae = st.load_sae({_written_source(workspace.sae_source)})",
            f"directions = {{{', '.join(given)}}}",
            f"edits = st.steer.parse_edits({written!r}, sae=sae, directions=directions)",
            "# with st.edit(lm, edits): ...   or   st.generate(lm, prompts, variants={'steered': edits})",
        ]
        return {"content": "\n".join(code) + "\n", "filename": "edits.py"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "control.gguf"
        lm = workspace.models[model]
        workspace.engine.between(lambda: export_control_vector(lm, edits, path))
        content = base64.b64encode(path.read_bytes()).decode()
    return {"content": content, "filename": "control.gguf", "base64": True, "type": "application/octet-stream"}
