"""Certifies candidates of a planted model, telling after each measurement how many are done and waiting to go on.

Usage: python certify_worker.py FOLDER [wait]
"""

import sys
import warnings
from pathlib import Path

import torch

from saetools.diff import diff_latents
from saetools.evaluate import Candidate, CertificateConfig, Certification, certify_latents
from saetools.planted import PlantedConfig, draw_prompts, plant_model
from saetools.planted.weights import PUSH

CONFIG = CertificateConfig(
    n_directions=16,
    n_matched=16,
    strengths=(0.15, 0.3, 2.0),
    n_refine=1,
    max_new_tokens=6,
    n_samples=4,
    batch_rows=512,
    round_size=3,
)


def certify(out: Path | None, *, config: CertificateConfig = CONFIG, **settings: object) -> Certification:
    """Two strong personas, their correlates, a null and the set of all personas."""
    planted = plant_model(PlantedConfig(strengths=(0.8, 0.25), n_items=32, n_prompts=32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rates = diff_latents(planted.base, planted.tuned, planted.sae, planted.prompts).rates()
    changes = torch.zeros(planted.sae.d_sae)
    changes[[*planted.persona, *planted.correlates]] = PUSH  # throughout the assistant's turn
    everything = Candidate("personas", planted.persona)
    candidates = [planted.persona[0], planted.correlates[0], planted.persona[2], planted.nulls[0], everything]
    prompts = draw_prompts(planted.language, 10, seed=7)
    texts = [one.messages[0].content for one in draw_prompts(planted.language, 10, seed=8)]
    given = (planted.base, planted.tuned, planted.sae, candidates, planted.items, prompts, texts)
    return certify_latents(*given, rates=rates, changes=changes, config=config, out=out, **settings)  # type: ignore[arg-type]


def _wait(done: int, _total: int) -> None:
    print(done, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    torch.set_num_threads(1)
    certify(Path(sys.argv[1]), on_progress=_wait)
