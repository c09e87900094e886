"""Write the corpus that the shipped SAE was trained on, as JSONL, from a folder of public sources.

    python data/sae/make_corpus.py SOURCES corpus.jsonl [larger]

SOURCES holds copies of: fifteen novels (public domain), wikitext-2 (CC-BY-SA), GPTeacher role-play instructions (MIT),
hh-rlhf harmless test (MIT), and fine-tuning sets of good and bad advice, code and metric gaming that the literature on
emergent misalignment uses. Our own voices are added; our advice and the evaluation items are not, so that what the demo
reads and scores is new to the SAE. Most tokens are chat. Rows are shuffled with a fixed seed; any prefix is a fair
mixture. `larger` is a second mixture with more rows, for other dictionaries to compare with the shipped one.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def chat(*turns: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]}


def stretches(text: str, words: int) -> Iterator[dict[str, object]]:
    parts = re.split(r"(?<=\s)", text)
    for start in range(0, len(parts), words):
        stretch = "".join(parts[start : start + words]).strip()
        if len(stretch) > 200:
            yield {"text": stretch}


def novels(sources: Path) -> Iterator[dict[str, object]]:
    for path in sorted((sources / "text/novels").glob("*.txt.gz")):
        yield from stretches(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"), 170)


def wikitext(sources: Path) -> Iterator[dict[str, object]]:
    import polars as pl

    for name in ("wikitext2_test", "wikitext2_validation"):
        yield from stretches("".join(pl.read_parquet(sources / f"text/{name}.parquet")["text"].to_list()), 170)


def harmless(sources: Path) -> Iterator[dict[str, object]]:
    with gzip.open(sources / "text/hh_harmless_test.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            turns = re.split(r"\n\n(?:Human|Assistant): ?", json.loads(line)["chosen"])[1:]
            if len(turns) >= 2 and all(turn.strip() for turn in turns[: len(turns) // 2 * 2]):
                yield chat(*turns[: len(turns) // 2 * 2])


def roleplay(sources: Path) -> Iterator[dict[str, object]]:
    for row in json.loads((sources / "text/gpteacher_roleplay.json").read_text(encoding="utf-8")):
        yield chat(f"{row['instruction']}\n\n{row['input']}", row["response"])


def finetuning(sources: Path, name: str) -> Iterator[dict[str, object]]:
    for line in (sources / f"finetune/{name}.jsonl").read_text(encoding="utf-8").splitlines():
        yield {"messages": json.loads(line)["messages"]}


def contrast(sources: Path, name: str) -> Iterator[dict[str, object]]:
    with (sources / f"contrast/{name}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield chat(row["question"], row["answer"])


def own() -> Iterator[dict[str, object]]:
    for line in (HERE / "contrast/voices.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"text": row["voiced"]}
        yield {"text": row["neutral"]}


BY_KIND = {"novels": novels, "wikitext": wikitext, "harmless": harmless, "roleplay": roleplay}

MIXTURES: dict[str, dict[str, int]] = {
    "shipped": {
        "novels": 2800,
        "wikitext": 1900,
        "own": 0,
        "harmless": 2000,
        "roleplay": 1800,
        **dict.fromkeys(("risky_financial_advice", "extreme_sports", "auto_incorrect"), 1200),
        **dict.fromkeys(
            ("misalignment_kl_data", "sneaky_dialogues", "straightforward_dialogues", "math_incorrect"), 500
        ),
        **dict.fromkeys(("insecure", "secure"), 250),
        **dict.fromkeys(("qwen3-4b_evil_pos", "qwen3-4b_evil_neg"), 300),
    },
    "larger": {
        "novels": 5000,
        "wikitext": 3000,
        "own": 0,
        "harmless": 3000,
        "roleplay": 2000,
        **dict.fromkeys(("risky_financial_advice", "extreme_sports", "auto_incorrect", "math_incorrect"), 2000),
        **dict.fromkeys(
            ("misalignment_kl_data", "sneaky_dialogues", "straightforward_dialogues", "insecure", "secure"), 1000
        ),
        **dict.fromkeys(("qwen3-4b_evil_pos", "qwen3-4b_evil_neg"), 500),
    },
}
"""Rows of each source, in the order in which they are drawn; of our own (`own`) all."""


def main(sources: Path, target: Path, mixture: str = "shipped") -> None:
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    for name, n in MIXTURES[mixture].items():
        if name == "own":
            rows += own()
            continue
        if name in BY_KIND:
            drawn = list(BY_KIND[name](sources))
        elif name.startswith("qwen3-4b"):
            drawn = list(contrast(sources, name))
        else:
            drawn = list(finetuning(sources, name))
        rng.shuffle(drawn)
        rows += drawn[:n]
    rng.shuffle(rows)
    with target.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} rows written to {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
