"""The pages of the API reference and of the command line, made from the package while mkdocs builds the site.

A page for each public module: those that `saetools.__all__` takes names from, packages with an `__all__` of their own,
and the errors. What a module makes public has an entry, under the shortest path that it can be imported from; so has,
below that, every type of saetools that the signatures on the page name.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

Entry = griffe.Object | griffe.Alias

# In the order of the data flow; a public module that is not named here comes last.
SUBJECTS = {
    "Models and data": ["models", "data", "activations", "generation"],
    "SAEs": ["sae"],
    "Latents": ["latents", "interpret", "endpoint"],
    "What a fine-tune changed": [
        *("diff", "readings", "rankings", "attribution", "directions"),
        *("trajectory", "consensus", "matching", "tuned_only", "persona"),
    ],
    "Steering": ["steer", "steered", "steer_export"],
    "Judging": ["evaluate", "planted"],
    "Fine-tuning": ["finetune"],
    "Reports and explorer": ["report", "explore"],
    "Errors": ["errors"],
}


@dataclass(frozen=True)
class Module:
    """A page: the paths of a module's public names, and of the types that these and other types name."""

    names: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)


class ExampleSections(griffe.Extension):
    """Reads `Example:` as griffe reads `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for each object of the package."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


@cache
def load() -> griffe.Module:
    """The package, read but not imported."""
    package = griffe.load("saetools", search_paths=[Path(__file__).parent.parent], docstring_parser="google")
    assert isinstance(package, griffe.Module)
    return package


@cache
def modules() -> dict[str, Module]:
    """The pages by their module's name."""
    pages: dict[str, Module] = {}
    page_of: dict[str, str] = {}  # by canonical path, in the order of discovery
    for path in public_names():
        entry = at(path)
        if entry.is_module or entry.canonical_path in page_of:
            continue
        name = (path if path.count(".") > 1 else entry.target_path).split(".")[1]
        page_of[entry.canonical_path] = name
        pages.setdefault(name, Module()).names.append(path)
    waiting = list(page_of)
    for path in waiting:
        for entry in named_types(at(path)):
            if entry.path not in page_of:
                own = entry.path.split(".")[1]
                page_of[entry.path] = own if own in pages else page_of[path]
                pages[page_of[entry.path]].types.append(entry.path)
                waiting.append(entry.path)
    return pages


def public_names() -> list[str]:
    """Paths of everything public, shortest first: what `saetools` exports, then what its packages and the errors do."""
    package = load()
    inner = [module for module in package.modules.values() if module.is_init_module and module.name != "cli"]
    exported = [f"{module.path}.{name}" for module in (package, *inner) for name in module.exports or ()]
    return exported + [error.path for error in package.modules["errors"].classes.values()]


def at(path: str) -> Entry:
    """What is at a path."""
    return load().modules_collection[path]


def named_types(entry: Entry) -> Iterator[Entry]:
    """Types of saetools in the signatures of an entry and of its members, and the errors it raises."""
    for expression in expressions(entry):
        for name in expression.iterate() if isinstance(expression, griffe.Expr) else ():
            if isinstance(name, griffe.ExprName) and name.canonical_path.startswith("saetools."):
                found = at(at(name.canonical_path).canonical_path)
                is_variable = found.is_attribute and str(found.value).startswith("TypeVar")
                if not (found.is_module or found.is_private or is_variable):
                    yield found


def expressions(entry: Entry) -> Iterator[griffe.Expr | str | None]:
    """Annotations, bases, and what is in the place of a type in a docstring."""
    if entry.is_function:
        yield from (parameter.annotation for parameter in entry.parameters)
        yield entry.returns
    elif entry.is_attribute:
        yield entry.annotation
        yield None if entry.parent.is_class else entry.value  # of a type alias
    elif entry.is_class:
        yield from entry.bases
        for name, member in entry.all_members.items():
            if name == "__init__" or not name.startswith("_"):
                yield from expressions(member)
    for section in entry.docstring.parsed if entry.docstring else ():
        if section.kind is griffe.DocstringSectionKind.raises:
            yield from (raised.annotation for raised in section.value)


def page(name: str) -> str:
    """Markdown of a module's page."""
    module = modules()[name]
    head = f"::: saetools.{name}\n    options: {{ heading_level: 1, members: false }}\n"
    entries = "".join(f"\n::: {path}\n" for path in module.names)
    if not module.types:
        return head + entries
    types = "".join(f"\n::: {path}\n    options: {{ heading_level: 3 }}\n" for path in module.types)
    return f"{head}{entries}\n## Types named above\n{types}"


def overview() -> str:
    """Markdown of the first page: every public name with its first sentence, by subject."""
    lines = ["# API reference", "", "Names without a dot are in `saetools` itself, the others in its modules."]
    for subject, names in subjects().items():
        lines += ["", f"## {subject}"]
        for name in names:
            lines += ["", f"### [saetools.{name}]({name}.md)", "", "| name | |", "|---|---|"]
            lines += [f"| [`{short(path)}`][{path}] | {summary(path)} |" for path in modules()[name].names]
    return "\n".join(lines) + "\n"


def subjects() -> dict[str, list[str]]:
    """Modules by subject, all of them."""
    listed = {subject: [name for name in names if name in modules()] for subject, names in SUBJECTS.items()}
    others = sorted(set(modules()) - {name for names in listed.values() for name in names})
    return {subject: names for subject, names in (listed | {"Other": others}).items() if names}


def short(path: str) -> str:
    """A path as seen from `saetools`."""
    return path.removeprefix("saetools.")


def summary(path: str) -> str:
    """The first sentence of a docstring, or else the value, fit for a table."""
    entry = at(path)
    first = entry.docstring.value.partition("\n\n")[0] if entry.docstring else f"`{getattr(entry, 'value', '')}`"
    return " ".join(first.split()).replace("|", "\\|")


def command_line() -> str:
    """Markdown of every command's help."""
    lines = ["# Command line"]
    for words, text in helps():
        lines += ["", f"{'#' * (len(words) + 1)} {' '.join(('saetools', *words))}"] if words else []
        lines += ["", "```text", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def helps(words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The help of a command, then of the commands that it lists."""
    from saetools.cli import main

    out = io.StringIO()
    with (
        warnings.catch_warnings(),  # `main` decides how they are shown
        mock.patch.dict(os.environ, COLUMNS="80", NO_COLOR="1"),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        main([*words, "--help"])
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    yield words, text
    for word in re.findall(r"^ +• ([\w-]+)(?= |$)", text, flags=re.MULTILINE):
        yield from helps((*words, word))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages in order."""
    tree = [{subject: [{name: f"reference/{name}.md"} for name in names]} for subject, names in subjects().items()]
    config.nav = [
        {"saetools": "index.md"},
        {"How do I ...": "recipes.md"},
        {"Command line": "reference/command_line.md"},
        {"API reference": ["reference/index.md", *tree]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    made = {"index": overview(), "command_line": command_line()} | {name: page(name) for name in modules()}
    for name, content in made.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


@cache
def named() -> dict[str, str]:
    """Paths of public names by what a text may call them: `evaluate.verify_sae`, or `verify_sae` alone."""
    public = [path for module in modules().values() for path in module.names]
    last = Counter(path.rpartition(".")[2] for path in public)
    whole = {f"{name}.{path.rpartition('.')[2]}": path for name, module in modules().items() for path in module.names}
    bare = {path.rpartition(".")[2]: path for path in public if last[path.rpartition(".")[2]] == 1}
    return whole | {name: path for name, path in bare.items() if not name.islower() or "_" in name}


def on_page_content(html: str, **_: object) -> str:
    """Link public names in running text to their entries; `read` and its like are words, too, and stay."""

    def link(found: re.Match[str]) -> str:
        path = named().get(found[1])
        return f'<autoref identifier="{path}">{found[0]}</autoref>' if path else found[0]

    return re.sub(r'(?<!<b>)(?<!">)<code>([\w.]+)</code>', link, html)
