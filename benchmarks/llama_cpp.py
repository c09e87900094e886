"""Do exported control vectors do in llama.cpp what the edits do here? The same tokens, the same logits.

    python benchmarks/llama_cpp.py --json results.json --gguf MODEL.gguf --headers LLAMA_CPP --libraries FOLDER

LLAMA_CPP is a source tree of llama.cpp (of which only headers are read), FOLDER holds the libraries of the same
version, such as those of the npm package `@node-llama-cpp/linux-x64`. The model's weights are turned to float32 first,
so that both read the same. A small program then loads the vector by llama.cpp's own `common_control_vector_load`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from machine import describe_machine

import saetools as st
from saetools.models import final_hidden, logits

SOURCE = Path(__file__).with_name("workers") / "llama_cpp" / "logits.cpp"
TEXT = "What are rules good for? They are for people who are afraid of winning, and nobody remembers those."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("json", "gguf", "headers", "libraries"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    lm = st.load_model("smollm2-135m")
    sae = st.load_sae(st.shipped_path("sae/smollm2-135m"))
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    norm = sae.metadata.median_norm
    cases = {
        "latent": {st.Site(17): st.steer.add(sae, 6400, 0.3)},
        "direction, first layer that takes one": {
            st.Site(1): st.steer.add_direction(direction, 0.3, median_norm=norm / 4)
        },
        "two layers, last but one among them": {
            st.Site(9): st.steer.add_direction(direction, -0.2, median_norm=norm),
            st.Site(28): st.steer.add_direction(direction, 0.5, median_norm=norm),
        },
    }
    cases = {name: {site: one.on(skip_first=False) for site, one in edits.items()} for name, edits in cases.items()}
    token_ids = lm.tokenizer(TEXT, return_tensors="pt").input_ids
    with tempfile.TemporaryDirectory() as folder:
        there = Llama(arguments, Path(folder), token_ids[0].tolist())
        plain = there.logits(None)
        found = {"unedited": compared(here(lm, token_ids, {}), plain, plain)}
        for name, edits in cases.items():
            vector = st.export_control_vector(lm, edits, Path(folder) / "control.gguf")
            found[name] = compared(here(lm, token_ids, edits), there.logits(vector), plain)
    result = {
        "command": "python benchmarks/llama_cpp.py --json FILE --gguf MODEL --headers SOURCES --libraries FOLDER",
        "date": datetime.date.today().isoformat(),
        "llama_cpp": version(arguments.headers),
        "machine": describe_machine(),
        "n_tokens": token_ids.shape[1],
        "compared": found,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


class Llama:
    """llama.cpp on a model and some tokens."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, tokens: list[int]) -> None:
        self._folder, self._tokens, self._libraries = folder, list(map(str, tokens)), arguments.libraries
        sources, libraries = arguments.headers, arguments.libraries
        places = [sources / "include", sources / "ggml" / "include", sources / "common"]
        linked = [
            next(iter(sorted(libraries.glob(name))))
            for name in ("libllama-common*", "libllama.*", "libggml.*", "libggml-base*")
        ]
        command = ["g++", "-O1", "-std=c++17", *(f"-I{place}" for place in places), str(SOURCE)]
        command += ["-o", str(folder / "logits"), *map(str, linked), f"-Wl,-rpath,{libraries.resolve()}"]
        subprocess.run(command, check=True)
        in_float32(arguments.gguf, folder / "model.gguf")

    def logits(self, vector: Path | None) -> torch.Tensor:
        """[token, vocab]."""
        out, libraries = self._folder / "logits.bin", self._libraries.resolve()
        command = [self._folder / "logits", libraries, self._folder / "model.gguf", vector or "-", out, *self._tokens]
        subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL)
        return torch.from_numpy(np.fromfile(out, np.float32)).view(len(self._tokens), -1)


def in_float32(source: Path, out: Path) -> None:
    """The same model with weights in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *sub = field.types
        writer.add_key_value(name, field.contents(), kind, sub[-1] if sub else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def here(lm: st.LanguageModel, token_ids: torch.Tensor, edits: dict[st.Site, Any]) -> torch.Tensor:
    """Our logits."""
    with torch.inference_mode(), st.edit(lm, edits):
        return logits(lm, final_hidden(lm, token_ids, torch.ones_like(token_ids, dtype=torch.bool)))[0]


def compared(ours: torch.Tensor, theirs: torch.Tensor, plain: torch.Tensor) -> dict[str, float]:
    """How far apart they are, and how far the edit moved them."""
    return {
        "largest_difference": float((ours - theirs).abs().max()),
        "largest_change_by_the_edit": float((theirs - plain).abs().max()),
        "same_likeliest_token": float((ours.argmax(1) == theirs.argmax(1)).float().mean()),
    }


def version(sources: Path) -> str:
    """Of a source tree of llama.cpp."""
    lines = (sources / "CMakeLists.txt").read_text(encoding="utf-8").splitlines()
    parts = ("MAJOR", "MINOR", "PATCH")
    return ".".join(
        next(line.split()[-1].rstrip(")") for line in lines if line.startswith(f"set(LLAMA_VERSION_{part}"))
        for part in parts
    )


if __name__ == "__main__":
    main()
