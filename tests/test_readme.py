"""The Python snippets of README and recipes run, each file's in order, in one namespace and on the shipped assets."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md"])
def test_snippets_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert snippets
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), namespace)


@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md"])
def test_named_commands_exist(name: str) -> None:
    from saetools.cli.commands import COMMANDS

    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"^saetools (\w+)|`saetools (\w+)", text, flags=re.MULTILINE))
    named = {word for pair in named for word in pair if word}
    assert named
    assert named <= set(COMMANDS)
