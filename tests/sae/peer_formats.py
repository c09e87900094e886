"""Compares our SAEs with those of sparsify and dictionary_learning, in both directions, in the peer's own environment.

The peers do not install beside saetools, so this is no test that pytest collects. Give it the interpreter of an
environment with the peer (`benchmarks/environments.py` makes them):

    python tests/sae/peer_formats.py sparsify PYTHON
    python tests/sae/peer_formats.py dictionary_learning PYTHON

The peer makes SAEs with random weights, saves them with its own code and writes down what it encodes and decodes; we
load them, compare, and save them again in its format; the peer loads what we saved and computes again. Each line is one
SAE and the largest errors over tokens, relative to the norm of what the peer computed first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

D, M, K, N, TOLERANCE = 24, 96, 6, 256, 1e-5


# In the peer's environment


def make_sparsify(root: Path, x: torch.Tensor) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    for dtype in (torch.float32, torch.float16):
        for transcode in (False, True):
            for skip in (False, True):
                config = SparseCoderConfig(num_latents=M, k=K, transcode=transcode, skip_connection=skip)
                sae = SparseCoder(D, config, dtype=dtype)
                for parameter in sae.parameters():
                    parameter.data.normal_()
                name = f"{str(dtype)[6:]} transcode={transcode} skip={skip}"
                sae.save_to_disk(root / name / "layers.3")
                answer_sparsify(sae.float(), x, root / name / "answer.pt")


def answer_sparsify(sae: object, x: torch.Tensor, file: Path) -> None:
    latents = sae.encode(x)  # type: ignore[attr-defined]
    dense = torch.zeros(len(x), M).scatter(1, latents.top_indices, latents.top_acts)
    torch.save({"latents": dense, "recon": sae(x).sae_out}, file)  # type: ignore[operator]


def read_sparsify(root: Path, x: torch.Tensor) -> None:
    from sparsify import SparseCoder

    for folder in sorted(root.iterdir()):
        answer_sparsify(SparseCoder.load_from_disk(folder / "ours").float(), x, folder / "answer to ours.pt")


def dictionaries() -> dict[str, torch.nn.Module]:
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    return {
        "AutoEncoder": AutoEncoder(D, M),
        "AutoEncoderNew": AutoEncoderNew(D, M),
        "GatedAutoEncoder": GatedAutoEncoder(D, M),
        "AutoEncoderTopK": AutoEncoderTopK(D, M, K),
        "BatchTopKSAE": BatchTopKSAE(D, M, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, M, K, [M // 4, M - M // 4]),
        "JumpReluAutoEncoder": JumpReluAutoEncoder(D, M),
    }


def make_dictionary_learning(root: Path, x: torch.Tensor) -> None:
    for name, sae in dictionaries().items():
        for parameter in sae.parameters():
            parameter.data.normal_()
        for key, tensor in sae.state_dict().items():
            if key == "threshold":
                tensor.copy_(tensor.normal_().abs() + 0.5)
        if name == "AutoEncoder":  # else its loader scales the latents
            sae.decoder.weight.data /= sae.decoder.weight.norm(dim=0)
        config = {"dict_class": name, "layer": 3, "lm_name": "tiny", **({"k": K} if "TopK" in name else {})}
        for state in ("final", "middle"):
            folder = root / f"{name} {state}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"trainer": config}))
            if state == "final":
                torch.save(sae.state_dict(), folder / "ae.pt")
            else:  # as its trainer saves in between; then what it does before it saves the final file
                factor = 3.5
                middle = {"step": 5, "ae": sae.state_dict(), "optimizer": {}, "config": config, "norm_factor": factor}
                torch.save(middle, folder / "ae.pt")
                if hasattr(sae, "scale_biases"):
                    sae.scale_biases(factor)
                else:
                    sae.encoder.bias.data *= factor
                    sae.decoder.bias.data *= factor
            answer_dictionary(sae, x, folder / "answer.pt")


def answer_dictionary(sae: torch.nn.Module, x: torch.Tensor, file: Path) -> None:
    latents = sae.encode(x)
    torch.save({"latents": latents, "recon": sae.decode(latents)}, file)


def read_dictionary_learning(root: Path, x: torch.Tensor) -> None:
    from dictionary_learning.utils import load_dictionary

    for folder in sorted(root.iterdir()):
        sae, _ = load_dictionary(str(folder / "ours"), device="cpu")
        answer_dictionary(sae, x, folder / "answer to ours.pt")


# In ours


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-3)).max())


def compare(peer: str, python: str) -> bool:
    from saetools.sae import load_sae, save_sae

    def run(step: str) -> None:
        subprocess.run([python, __file__, step, peer, str(root), str(root.parent / "x.pt")], check=True)

    good = True
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "saes"
        root.mkdir()
        x = 2 * torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 0.5
        torch.save(x, root.parent / "x.pt")
        run("make")
        pairs = {}
        for folder in sorted(root.iterdir()):
            sae = load_sae(folder / "layers.3" if peer == "sparsify" else folder)
            theirs = torch.load(folder / "answer.pt", weights_only=True)
            pairs[folder] = theirs, error(sae.encode(x).to_dense(), theirs["latents"]), error(sae(x), theirs["recon"])
            save_sae(sae, folder / "ours", format=peer)  # type: ignore[arg-type]
            again = load_sae(folder / "ours")
            assert all(torch.equal(again.state_dict()[key], value) for key, value in sae.state_dict().items())
        run("read")
        for folder, (theirs, latents, recon) in pairs.items():
            back = torch.load(folder / "answer to ours.pt", weights_only=True)
            errors = [latents, recon, error(back["latents"], theirs["latents"]), error(back["recon"], theirs["recon"])]
            good = good and max(errors) <= TOLERANCE
            shown = "  ".join(
                f"{word} {value:.1e}"
                for word, value in zip(
                    ("we load: latents", "recon", "they load ours: latents", "recon"), errors, strict=True
                )
            )
            print(f"{folder.name:40} {shown}  {'ok' if max(errors) <= TOLERANCE else 'DIFFERENT'}")
    return good


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    match sys.argv[1:]:
        case ["make" | "read" as step, peer, folder, inputs]:
            globals()[f"{step}_{peer}"](Path(folder), torch.load(inputs, weights_only=True))
        case ["sparsify" | "dictionary_learning" as peer, python]:
            sys.exit(0 if compare(peer, python) else 1)
        case _:
            sys.exit(__doc__)
