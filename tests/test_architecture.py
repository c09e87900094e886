"""The shape of the package: imports point down, public names are documented, importing costs nothing."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import saetools

PACKAGE = Path(saetools.__file__).parent

# Layer of each module, by the longest prefix. Imports point to a lower layer, or to the same one without cycles.
LAYERS = {
    "errors": 0,
    "room": 0,
    "stats": 0,
    "histogram": 0,
    "loopback": 0,
    "significance": 0,
    "changes": 0,
    "onset": 0,
    "sae.model": 0,
    "__main__": 7,
    "sae.nonlinearity": 0,
    "sae.sparse": 0,
    "provenance": 1,
    "endpoint": 1,
    "saved_result": 1,
    "models": 1,
    "data": 1,
    "sae.io": 1,
    "sae.identity": 1,
    "sae.formats": 1,
    "sae.weights": 0,
    "team": 0,
    "activations": 2,
    "latents": 2,
    "generation": 2,
    "decoding": 2,
    "engine": 2,
    "row_edits": 2,
    "sae.train": 3,
    "sae.loss": 3,
    "sae.dense": 3,
    "sae.objective": 3,
    "sae.config": 3,
    "sae.checkpoint": 3,
    "sae.trainer": 3,
    "sae.crosscoder": 3,
    "sae.latent_scaling": 3,
    "directions": 3,
    "adequacy": 4,
    "attribution": 4,
    "tuned_only": 4,
    "latent_diff": 4,
    "latent_scatter": 4,
    "latent_trajectory": 4,
    "diff": 4,
    "readings": 4,
    "rankings": 4,
    "trajectory": 4,
    "consensus": 4,
    "matching": 4,
    "steer": 4,
    "steer_export": 4,
    "steered": 4,
    "evaluate": 5,
    "interpret": 5,
    "finetune": 6,
    "planted": 6,
    "persona": 6,
    "persona_stages": 6,
    "report": 7,
    "demo": 7,
    "cli": 7,
    "serve": 7,
    "chat": 7,
    "explore": 7,
}


def modules() -> dict[str, Path]:
    """Modules by dotted name; `__init__` files re-export and stand outside the table."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def layer(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in LAYERS:
            return LAYERS[".".join(parts[:length])]
    inside = [number for name, number in LAYERS.items() if name.startswith(module + ".")]
    if inside:  # a facade: as high as the highest that it re-exports
        return max(inside)
    raise AssertionError(f"{module} has no layer: add it to the table, to design and flow")


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("saetools"):
            continue
        base = (node.module or "").removeprefix("saetools").removeprefix(".")
        for alias in node.names:
            full = f"{base}.{alias.name}".strip(".")
            found.add(full if full in known else base)
    return found - {""}


def test_imports_point_down() -> None:
    known = modules()
    wrong = [
        f"{module} (layer {layer(module)}) imports {target} (layer {layer(target)})"
        for module, path in known.items()
        for target in imports(path, known)
        if layer(target) > layer(module)
    ]
    assert not wrong


def test_no_cycles() -> None:
    known = modules()
    graph = {module: imports(path, known) & set(known) for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_package_imports_its_own_facade() -> None:
    """Inside the package, modules import from modules, not through a re-exporting `__init__` of their own package."""
    for module, path in modules().items():
        own = module.rpartition(".")[0]
        assert not own or own == "cli" or own not in imports(path, modules()), module


@pytest.mark.parametrize(
    "package",
    ["", "activations", "data", "evaluate", "finetune", "interpret", "latents", "models", "planted", "report", "sae"],
)
def test_public_names_are_sorted_importable_and_documented(package: str) -> None:
    module = importlib.import_module(f"saetools.{package}".rstrip("."))
    names = list(module.__all__)
    # The linter's order: constants and acronyms, classes, the rest; each alphabetically.
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    submodules = {path.stem for path in Path(module.__file__ or "").parent.iterdir()}
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
            assert name not in submodules, f"{name} would be overwritten by the module of its name"


def test_dir_and_unknown_names() -> None:
    assert set(saetools.__all__) <= set(dir(saetools))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        saetools.nonsense  # noqa: B018


def test_importing_is_light() -> None:
    """Nothing heavy is imported, and beyond torch's own time `import saetools` takes under 0.3 s."""
    code = (
        "import sys, time, torch; start = time.perf_counter(); import saetools; spent = time.perf_counter() - start;"
        "heavy = {'transformers', 'peft', 'sae_lens', 'transformer_lens', 'plotly', 'polars', 'datasets', 'gguf'};"
        "print(spent, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent, loaded = done.stdout.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(spent) < 0.3


def test_version_is_one() -> None:
    from importlib.metadata import version

    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{version("saetools")}"' in text
