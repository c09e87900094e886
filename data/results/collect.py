"""Put a run of `saetools persona`, and the planted truth beside it, into one file that is small enough to ship.

    python data/results/collect.py RUN data/results/persona-smollm2.json

RUN is the folder of the run. Numbers are kept to five significant digits. Prints the tables of the README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def interval(one: dict[str, float] | None) -> str:
    return "" if one is None else f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def organisms_table(found: dict[str, Any]) -> list[str]:
    heads = ("organism", "shift of the score", "of its change, the SAE reproduces", "latents changed (FDR 5 %)")
    lines = header(*heads, "representation")
    for name, one in found["organisms"].items():
        share = found["representation"].get(name)
        cells = [name + (" (held out)" if one["held_out"] else ""), interval(one["shift"])]
        cells += [percent(one["adequacy"][found["role"]]["reproduced"]), str(one["n_changed"][found["role"]])]
        cells.append(percent(share) if share else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def latents_table(found: dict[str, Any]) -> list[str]:
    names = list(found["organisms"])
    lines = header("latent", "chosen by", "promotes", "suppresses", *(f"delta, {name}" for name in names))
    rows = {row["latent"]: row for row in found["latents"]}
    for one in found["candidates"]:
        row = rows[one["latent"]]
        cells = [str(one["latent"]), one["by"]]
        cells += [" ".join(map(code, row[end][:5])) for end in ("promoted", "suppressed")]
        deltas = (row["organisms"][name]["diff"] for name in names)
        cells += [f"{each['delta']:+.2f} [{each['low']:+.2f}, {each['high']:+.2f}]" for each in deltas]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def certificates_table(found: dict[str, Any]) -> list[str]:
    base, tuned = (("base, steered to it", "chance", "carried"), ("tuned, steered away", "chance", "carried"))
    lines = header("candidate", "organism", *base, *tuned, "verdict")
    for place in range(len(found["candidates"]) + 1):
        for name, certification in found["certifications"].items():
            one = certification["certificates"][place]
            cells = [one["candidate"]["name"], name]
            for side in ("induces", "suppresses"):
                effect = one[side]
                steered = f" at {effect['strength']:.2g}" if effect["share"] else "not coherent"
                cells.append((percent(effect["share"]) if effect["share"] else "") + steered)
                cells.append(f"{max(effect['chance'].values()):.2g}" if effect["chance"] else "")
                cells.append(percent(effect["carried"]))
            lines.append(f"| {' | '.join([*cells, one['verdict']])} |")
    return lines


def header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def code(token: str) -> str:
    """As code in a cell, whatever is in it."""
    text = (token.strip() or repr(token)[1:-1]).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def percent(one: dict[str, float] | None) -> str:
    return "" if one is None else f"{one['mean']:.0%} [{one['low']:.0%}, {one['high']:.0%}]"


def main(run: Path, out: Path) -> None:
    found = json.loads((run / "persona.json").read_text(encoding="utf-8"))
    planted = json.loads((HERE / "planted.json").read_text(encoding="utf-8"))
    result = rounded({**found, "planted": planted})
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(*organisms_table(result), "", *latents_table(result), "", *certificates_table(result), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
