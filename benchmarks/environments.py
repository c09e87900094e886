"""Virtual environments for libraries that do not install beside saetools, one each, with versions of ours."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What is to be of our version, the peer, and the module that has to load for an environment to be complete.
PEERS = {
    "dictionary-learning": (("torch",), "dictionary-learning==0.1.0", "dictionary_learning"),
    "eai-sparsify": (("torch",), "eai-sparsify==1.3.3", "sparsify"),
    "nnsight": (("torch", "transformers"), "nnsight==0.8.1", "nnsight"),
    "repeng": (("torch",), "repeng==0.4.0 transformers==4.57.6 accelerate", "repeng"),
    "sae-dashboard": (("torch",), "sae-dashboard==0.8.0 pyarrow==20.0.0", "sae_dashboard.sae_vis_runner"),
    "steering-vectors": (("torch",), "steering-vectors==0.12.2 transformers==4.57.6", "steering_vectors"),
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made or completed first if need be; ours if that has the peer.

    A marker is written last and holds what was installed: an environment without it, or with another one, is not used
    as it is.
    """
    folder = HERE / ".envs" / peer
    ours, requirement, module = PEERS[peer]
    if importlib.util.find_spec(module.partition(".")[0]):
        return Path(sys.executable)
    wanted = "\n".join([*map(_pinned, ours), requirement, ""])
    marker, python = folder / "complete.txt", folder / "bin" / "python"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != wanted:
        print(f"preparing an environment with {requirement}", file=sys.stderr)
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(python), "-m", "pip", "install", "--quiet", *wanted.split())
        # Dependencies bring torchvision, which loads only beside the build of torch it was made for; nothing here
        # needs it, and transformers does without it where it is missing.
        _run(str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")
        _run(str(python), "-c", f"import {module}")
        marker.write_text(wanted, encoding="utf-8")
    return python


def for_older_transformers(model: Path, folder: Path) -> Path:
    """A copy of a model that transformers 4 reads too: config and tokenizer config say the same in older words.

    Args:
        model: folder of a Llama in the format of transformers 5.
        folder: where to; there must be none yet.
    """
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta", config.get("rope_theta"))
    config["torch_dtype"] = config.get("dtype", "float32")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def _pinned(package: str) -> str:
    constraints = (HERE.parent / "constraints.txt").read_text(encoding="utf-8")
    return next(line for line in constraints.splitlines() if line.startswith(f"{package}=="))


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"benchmarks: {' '.join(command[1:])} ended with {error.returncode}; see above") from None
