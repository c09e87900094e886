"""Time and peak memory of a training step over widths and batch sizes, saetools beside its peers, with plots.

    python benchmarks/sweep_train_sae.py --json sweep.json --plot sweep.png

Contestants and their fairness are those of train_sae.py; see README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import results
from activations import harvested
from interleave import Record, interleave
from machine import describe_machine
from train_sae import LR, contestants

WIDTHS = (2048, 4096, 8192, 16384, 32768, 65536)
BATCHES = (512, 1024, 2048, 4096, 8192, 16384)
COLOURS = {"saetools": "#1a6fb5", "SAELens": "#c4661f", "dictionary_learning": "#5b8c3e", "sparsify": "#8a4fa0"}
FIELD = (  # the fastest of each library in train_sae.py, and ours without the 8-bit product
    "saetools, bf16 encoder",
    "saetools, int8 encoder",
    "SAELens, fp32, sparse activations",
    "dictionary_learning, bf16 autocast",
    "sparsify, bf16 autocast",
)


def main() -> None:
    parser = results.parser("sweep_train_sae.py", __doc__.splitlines()[0], rounds=7)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of both sweeps (needs matplotlib)")
    arguments = results.parse(parser)
    widths, batches = ((1024, 2048), (256, 512)) if arguments.quick else (WIDTHS, BATCHES)
    width, batch = (1024, 512) if arguments.quick else (8192, 4096)
    path = harvested(5 * batch)  # the largest batches go through fewer tokens more often
    machine = describe_machine()
    points = [("d_sae", d_sae, {"d_sae": d_sae, "batch": batch}) for d_sae in widths]
    points += [("batch", size, {"d_sae": width, "batch": size}) for size in batches]
    records: list[Record] = []
    series: dict[str, dict[str, dict[str, list[float]]]] = {"d_sae": {}, "batch": {}}
    for axis, value, shape in points:
        print(f"{axis} {value}", flush=True)
        n_batches = max(1, 4 * batch // shape["batch"])
        task = {**shape, "k": 32, "activations": str(path.resolve()), "lr": LR, "n_batches": n_batches}
        field = [one for one in contestants(task) if one.name in FIELD]
        if (axis, value) == ("batch", batch):
            done = records  # both axes go through this point
        else:
            done = interleave(field, rounds=arguments.rounds, items_per_turn=1, threads=arguments.threads)
        for record in done:
            if record.error is None:
                line = series[axis].setdefault(record.contestant.name, {axis: [], "seconds": [], "mib": []})
                memory = record.facts["memory_mib"]
                line[axis].append(value)
                line["seconds"].append(results.median_seconds(record))
                line["mib"].append(memory["peak"] - memory["before"])
        if (axis, value) == ("d_sae", width):
            records = done
    results.write(
        arguments,
        "sweep_train_sae.py",
        records,
        results.ratios(records),
        series=series,
        method={"rounds": arguments.rounds, "seconds": "of one step, medians", "mib": "peak above the start"},
        machine=machine,
    )
    if arguments.plot is not None:
        _plot(series, arguments.plot)


def _plot(series: dict[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    titles = {"d_sae": "latents (batch 4096)", "batch": "tokens a step (8192 latents)"}
    for column, axis in enumerate(series):
        for name, line in series[axis].items():
            library = name.split(",")[0]
            dashed = "--" if "bf16" in name else "-"
            for row, figure_name in enumerate(("seconds", "mib")):
                axes[row][column].plot(
                    line[axis], line[figure_name], dashed, marker="o", label=name, c=COLOURS[library]
                )
        for row, label in enumerate(("seconds a step", "MiB above the start")):
            axes[row][column].set(xscale="log", yscale="log", xlabel=titles[axis], ylabel=label)
            axes[row][column].set_xticks(line[axis], [f"{value:,}" for value in line[axis]])
            axes[row][column].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes[row][column].yaxis.set_major_formatter("{x:,g}")
            axes[row][column].minorticks_off()
            axes[row][column].grid(alpha=0.3)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
