"""The examples in docstrings run, on the real model where they need one."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import saetools
from saetools.models import LanguageModel

NAMES = sorted(
    info.name for info in pkgutil.walk_packages(saetools.__path__, "saetools.") if "shipped." not in info.name
)


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, smollm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    shared = {key: getattr(saetools, key) for key in saetools.__all__} | {"torch": torch, "lm": smollm}
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=shared)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    monkeypatch.chdir(saetools.shipped_path("sae").parent.parent)
    for test in tests:
        output: list[str] = []
        runner.run(test, out=output.append)
        assert not output, "".join(output)
