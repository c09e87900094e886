"""The command that chats with a model, its fine-tune and a steered voice side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saetools.chat import Chat, ChatConfig, save_transcript
from saetools.cli.options import EditOptions, PairOptions
from saetools.cli.output import check_file, printable
from saetools.errors import InputError, SaetoolsError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_HELP = """\
/edit TEXT       give the steered voice an edit, such as /edit clamp 6400=0 on response
/edits           list its edits
/drop N          take edit N away
/clear           take all away
/retry           ask the last question again
/reset           forget what was said
/set NAME VALUE  temperature, top_p, max_new_tokens, seed
/save FILE       write the transcript: .md, or JSON lines
/quit            leave (also Ctrl-D); Ctrl-C cuts an answer short"""


@dataclass(frozen=True)
class ChatCommand:
    """Chat in the terminal with base, fine-tune and a steered voice side by side; edits may change on the way."""

    edit: EditOptions = field(default_factory=EditOptions)
    models: PairOptions = field(default_factory=PairOptions)
    steer: Literal["base", "tuned"] | None = None
    """Which voice is steered; by default the fine-tune, if there is one."""
    config: ChatConfig = field(default_factory=ChatConfig)
    transcript: str | None = None
    """File that is written after every turn: Markdown if it ends in .md, else JSON lines."""

    def __post_init__(self) -> None:
        if self.steer == "tuned" and not self.models.model.adapter and self.models.tuned is None:
            raise InputError(
                "--steer", expected="base, without a fine-tune", received="tuned", remedy="give an adapter"
            )

    def run(self) -> None:
        """Load, then ask until there is no more."""
        from rich.console import Console

        from saetools.engine import Engine

        if self.transcript is not None:
            check_file(Path(self.transcript), option="--transcript")
        voices = self.models.voices()
        base = next(iter(voices.values()))
        steered = "base" if self.steer == "base" else list(voices)[min(1, len(voices) - 1)]
        console = Console()
        with Engine(voices) as engine:
            chat = Chat(engine, steered, self.edit.sources.load(base), self.config, texts=list(self.edit.edit))
            console.print(f"{', '.join(chat.voices)}; /help for help", markup=False)
            for line in _lines(console):
                try:
                    if not self._answered(chat, line.strip(), console):
                        break
                except SaetoolsError as error:
                    console.print(printable(str(error)), markup=False, style="red")

    def _answered(self, chat: Chat, line: str, console: Console) -> bool:
        """Do what a line says; whether to go on."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "":
                return True
            case "/quit" | "/exit":
                return False
            case "/help":
                console.print(_HELP, markup=False)
            case "/edit":
                console.print(printable(chat.add_edit(rest)), markup=False)
            case "/edits":
                listed = [f"{number}  {text}" for number, text in enumerate(chat.texts, 1)]
                console.print(printable("\n".join(listed) or "no edits"), markup=False)
            case "/drop":
                console.print("dropped " + printable(chat.drop_edit(_whole(rest))), markup=False)
            case "/clear":
                chat.texts.clear()
                console.print("no edits")
            case "/reset":
                chat.reset()
                console.print("forgotten")
            case "/set":
                name, _, value = rest.partition(" ")
                console.print(str(chat.change(name, value.strip())), markup=False)
            case "/save":
                if not rest:
                    raise InputError("/save", expected="a file", received="none", remedy="name it")
                check_file(Path(rest), option="/save")
                console.print(f"{len(chat.turns)} turns in {save_transcript(chat.turns, rest)}", markup=False)
            case "/retry":
                self._show(chat, chat.retry(), console)
            case _ if command.startswith("/"):
                raise InputError("command", expected="one of /help", received=repr(command), remedy="see /help")
            case _:
                self._show(chat, chat.ask(line), console)
        return True

    def _show(self, chat: Chat, answers: Iterator[dict[str, str]], console: Console) -> None:
        """Draw answers as they come; where there is no terminal, when they are whole."""
        from rich.live import Live

        said: Mapping[str, str] = {}
        try:
            if console.is_terminal:
                with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
                    for said in answers:
                        live.update(_side_by_side(said, chat))
            else:
                *_, said = answers
                for voice, text in said.items():
                    console.print(f"{voice}: {printable(text)}", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            answers.close()  # type: ignore[attr-defined]
            console.print("cut short")
        if self.transcript is not None:
            save_transcript(chat.turns, self.transcript)


def _side_by_side(said: Mapping[str, str], chat: Chat) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(expand=True)
    panels = []
    for voice, text in said.items():
        table.add_column(ratio=1)
        subtitle = "; ".join(chat.texts) if voice == "steered" else ""
        panels.append(
            Panel(Text(printable(text)), title=Text(voice), subtitle=Text(printable(subtitle), overflow="ellipsis"))
        )
    table.add_row(*panels)
    return table


def _lines(console: Console) -> Iterator[str]:
    """What is typed, until the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` its history and editing
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else _read()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def _read() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise InputError("/drop", expected="the number of an edit", received=repr(text), remedy="see /edits")
    return int(text)
