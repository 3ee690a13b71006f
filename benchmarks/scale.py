"""Predicted seconds of a training step by the number of TPU chips: arithmetic, nothing is measured.

    python -m benchmarks.scale                # prints tables, writes docs/scale.png

Reads what `benchmarks.memory` has found in the programs of an update on 64 chips (bytes of their collectives, and the
compiler's count of the bytes that they read and write), and divides by published speeds. What is assumed:

* Data parallelism with a batch that stays the same, float32 parameters and gradients, products on an eighth of the
  batch, a refresh of 16 products every 50 updates.
* Matrix units at 40 percent of their peak; a Hessian product costs twice a gradient on as many samples.
* Memory and links at their published speed, and nothing overlaps: work, memory and communication add up. Of a link's
  published speed, which counts both directions, a chip sends half. Along an axis of a slice that is no ring half of
  that is lost.
* Adam alone averages the gradient by one all-reduce and steps with its whole state on every chip, without a split.

Speeds, and where they come from, are those of `dho2_optax.hardware`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import memory
from dho2_optax.hardware import HARDWARE, Hardware, exchange
from dho2_optax.planner import last_that_pays

PRODUCT = 2.0  # gradients on as many samples
PART = 8  # products are made on one of so many parts of the batch
INTERVAL = 50  # updates between two refreshes
RANK = 8
ORDER = 16
DEVICES = (8, 16, 32, 64, 128, 256)
CHIPS = {name: HARDWARE[name] for name in ("v5e", "v5p", "v6e")}


class Work(NamedTuple):
    """What one gradient of a batch costs."""

    flops: float
    text: str


WORK = {
    # 3.8e9 multiplications and additions forward (He et al., CVPR 2016, table 1), twice that backward.
    "resnet50": Work(3 * 2 * 3.8e9 * 4096, "4096 images of 224 x 224"),
    # Six operations for each parameter and token (Kaplan et al., arXiv 2001.08361, section 2.1).
    "pythia_1b": Work(6 * 1_011_781_632 * 1024 * 2048, "1024 sequences of 2048 tokens"),
}


class Prediction(NamedTuple):
    """Seconds."""

    adam: float  # a step of Adam alone
    step: float  # of `dho2`, without a refresh
    refresh: float

    @property
    def mean(self) -> float:
        """A step of `dho2`, with its part of the refreshes."""
        return self.step + self.refresh / INTERVAL


class Programs(NamedTuple):
    """What the compiler says of the programs on 64 chips, in bytes."""

    vector: float  # all parameters
    update: float  # read and written by the update of Adam with its state split
    product: float  # by a product, apart from the network's own work
    gathered: float  # by the all-gather of an update
    exchanged: float  # by the collectives of a product, an all-reduce counted twice


def programs(rows: Sequence[dict[str, Any]], model: str) -> Programs | None:
    """The programs of a model, if they have been compiled."""
    found = {row["method"]: row for row in rows if memory.key(row)[:3] == (model, "v5e", 64) and row["rank"] == RANK}
    if not {"adam", "product", "dho2"} <= set(found):
        return None
    touched = {method: row["cost"]["bytes accessed"] for method, row in found.items()}
    there = found["dho2"]["collectives"]
    times = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 64}  # of the bytes of the result
    return Programs(
        vector=4 * found["dho2"]["num_params"],
        update=touched["adam"],
        product=touched["product"] - touched["adam"],
        gathered=sum(one["bytes"] * one["count"] for one in there if one["where"] == "step"),
        exchanged=sum(times[one["op"]] * one["bytes"] * one["count"] for one in there if one["where"] == "loop"),
    )


def predict(programs: Programs, flops: float, chip: Hardware, devices: int) -> Prediction:
    """Seconds on a slice of so many chips."""
    gradient = flops / devices / chip.flops
    averaged = exchange(chip, devices, 2 * programs.vector)
    share = programs.vector / devices
    # Adam reads parameters, gradient and two averages, and writes three of them.
    adam = gradient + averaged + 7 * programs.vector / chip.bandwidth
    split = 7 * (share - programs.vector / 64)  # what the programs of 64 chips would touch more, or less
    step = gradient + averaged + (programs.update + split + 4 * RANK * share) / chip.bandwidth
    step += exchange(chip, devices, programs.gathered)
    product = PRODUCT * gradient / PART + exchange(chip, devices, programs.exchanged)
    product += (programs.product + 2 * ORDER * share) / chip.bandwidth
    return Prediction(adam, step, ORDER * product)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds as Markdown, and up to how many chips more of them pay."""
    parts = []
    for model, work in WORK.items():
        found = programs(rows, model)
        if found is None:
            continue
        parts.append(f"{model}, {work.text}, milliseconds")
        head = ("chips", "", "Adam", "`dho2`", "refresh", "mean step of `dho2`", "times Adam")
        lines = [head, ("---",) * len(head)]
        for name, chip in CHIPS.items():
            for devices in DEVICES:
                each = predict(found, work.flops, chip, devices)
                numbers = [f"{1e3 * x:.1f}" for x in (each.adam, each.step, each.refresh, each.mean)]
                lines.append((name, str(devices), *numbers, f"{each.mean / each.adam:.2f}"))
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        for name, chip in CHIPS.items():
            made = {devices: predict(found, work.flops, chip, devices) for devices in DEVICES}
            last = {kind: last_that_pays({n: getattr(x, kind) for n, x in made.items()}) for kind in ("adam", "mean")}
            parts.append(f"{name}: more chips pay up to {last['adam']} with Adam, {last['mean']} with `dho2`")
    return "\n\n".join(parts)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Predicted milliseconds against chips, a panel for each model."""
    from matplotlib.figure import Figure  # of the extra `poc`

    models = [(model, found) for model in WORK if (found := programs(rows, model))]
    figure = Figure(figsize=(5.2 * len(models), 4.2), layout="constrained")
    for axes, (model, found) in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for colour, (name, chip) in zip(("C0", "C1", "C2"), CHIPS.items(), strict=True):
            made = [predict(found, WORK[model].flops, chip, devices) for devices in DEVICES]
            axes.plot(DEVICES, [1e3 * x.adam for x in made], "--", color=colour, label=f"{name}, Adam")
            axes.plot(DEVICES, [1e3 * x.mean for x in made], "o-", color=colour, label=f"{name}, dho2 on Adam")
        axes.set(xscale="log", yscale="log", xlabel="chips", ylabel="predicted ms for a mean step")
        axes.set_xticks(DEVICES, [str(n) for n in DEVICES])
        axes.minorticks_off()
        axes.set_title(f"{model}, {WORK[model].text}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=memory.RESULTS, help="what benchmarks.memory has written")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "docs" / "scale.png")
    arguments = parser.parse_args()
    if not arguments.results.exists():
        parser.error(f"there is no {arguments.results}: run `python -m benchmarks.memory` first")
    rows = json.loads(arguments.results.read_text())["rows"]
    if not any(programs(rows, model) for model in WORK):
        parser.error(
            f"{arguments.results} has no programs of 64 chips: install libtpu, run `python -m benchmarks.memory`"
        )
    print(table(rows))
    plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
