"""Tables and plots of the results.

python -m benchmarks.target.report     # writes docs/benchmarks.md and docs/benchmarks_<task>_<batch>.png
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.target import methods as registry
from benchmarks.target.store import RESULTS, TUNING_SEED, Store, best_rate, loss_of, tuning_runs
from benchmarks.target.tasks import TASKS

DOCS = Path(__file__).parents[2] / "docs"
_NAMED_TARGETS = {"sgd": "SGD's loss", "adam": "Adam's loss", "soap": "SOAP's loss"}
_MISSING = "-"


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one method."""

    method: str
    head: dict[str, Any]
    rate: float
    tuning: dict[float, float]  # final losses by rate, infinite where diverged
    finals: list[dict[str, Any]]  # runs of full length at the best rate, one for each seed
    shortened: dict[int, float]  # mean final losses by length of the schedule, infinite where a seed diverged
    seconds_per_step: float | None
    bytes: int | None = None  # that a step holds at once

    @property
    def ok(self) -> list[dict[str, Any]]:
        """The runs that did not diverge."""
        return [run for run in self.finals if run["status"] == "ok"]

    @property
    def reliable(self) -> bool:
        """There are runs, and none diverged."""
        return bool(self.finals) and len(self.ok) == len(self.finals)

    @property
    def at_edge(self) -> bool:
        """The best rate is the smallest or largest that was tried."""
        return self.rate in (min(self.tuning), max(self.tuning))

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """Steps and mean losses, of the runs that did not diverge."""
        if not self.ok:
            return [], []
        return self.ok[0]["steps"], np.mean([run["losses"] for run in self.ok], axis=0).tolist()

    @property
    def loss(self) -> float:
        """The mean final loss, infinite if there is none."""
        return self.curve[1][-1] if self.ok else float("inf")

    def mean(self, name: str) -> float | None:
        """The mean of a figure over the seeds that did not diverge."""
        values = [run[name] for run in self.ok if run[name] is not None]
        return statistics.fmean(values) if values else None

    def steps_to(self, target: float) -> float | None:
        """Steps to a loss, by the curve or by a shortened schedule that ends at it or below; None if a seed failed."""
        if not self.reliable:
            return None
        lengths = [length for length, loss in self.shortened.items() if loss <= target]
        return min((x for x in (crossing(*self.curve, target), *lengths) if x is not None), default=None)


class Summary(NamedTuple):
    """The results of a task and batch size."""

    name: str
    num_steps: int
    rows: list[Row]
    targets: dict[str, Row]  # by heading, the method whose mean final loss is the target


def crossing(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Where a curve first is at a target or below, by linear interpolation between its points; None if nowhere."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            part = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))
    return None


def lengths(store: Store) -> list[int]:
    """The lengths of runs for which methods were tuned, the longest first."""
    runs = [run for name in store.methods for run in store.runs(name).values()]
    return sorted({run["num_steps"] for run in runs if run["seed"] == TUNING_SEED}, reverse=True)


def summarize(store: Store, num_steps: int | None = None) -> Summary:
    """Reads the results of runs of a length, by default the longest, at the rates that were tuned for it."""
    times = store.times()
    runs = {name: store.runs(name) for name in store.methods}
    num_steps = max(lengths(store), default=0) if num_steps is None else num_steps
    order = [*registry.METHODS, *sorted(set(runs) - set(registry.METHODS))]
    rows = []
    for name in (name for name in order if name in runs):
        tuning = tuning_runs(runs[name], num_steps)
        if not tuning:
            continue
        rate = best_rate(tuning)
        by_length: dict[int, list[dict[str, Any]]] = {}
        for run in runs[name].values():
            if run["rate"] == rate and run["seed"] != TUNING_SEED:
                by_length.setdefault(run["num_steps"], []).append(run)
        finals = by_length.pop(num_steps, [])
        # A mean over fewer seeds than the full length has is of a length that is not finished.
        shortened = {
            length: statistics.fmean(float("inf") if run["final_loss"] is None else run["final_loss"] for run in found)
            for length, found in sorted(by_length.items())
            if length < num_steps and len(found) == len(finals)
        }
        head, timed = store.head(name), times.get(name, {})
        seconds = timed.get("seconds_per_step") if timed.get("options") == head["options"] else None
        rows.append(Row(name, head, rate, tuning, finals, shortened, seconds, timed.get("bytes")))
    targets = {_NAMED_TARGETS[row.method]: row for row in rows if row.method in _NAMED_TARGETS and row.reliable}
    baselines = [row for row in rows if row.head["kind"] == "baseline" and row.reliable]
    if baselines:
        best = min(baselines, key=lambda row: row.loss)
        targets[f"best baseline's loss ({best.method})"] = best
    return Summary(store.folder.name, num_steps, rows, targets)


def table(summary: Summary) -> str:
    """A Markdown table."""
    heads = ["method", "rate", "tried", "training loss", "test loss", "test accuracy", "ms per step", "MiB", "products"]
    heads += [f"to {name}" for name in summary.targets] + ["diverged"]
    lines = [heads, ["---"] * len(heads)]
    for row in summary.rows:
        losses = [run["final_loss"] for run in row.ok]
        spread = f" ± {statistics.stdev(losses):.2g}" if len(losses) > 1 else ""
        accuracy = row.mean("test_accuracy")
        tuning_failed = sum(loss == float("inf") for loss in row.tuning.values())
        lines.append(
            [
                row.method,
                f"{row.rate:g}{' (edge)' if row.at_edge else ''}",
                f"{len(row.tuning)}: {min(row.tuning):g} to {max(row.tuning):g}",
                f"{row.loss:.4g}{spread}" if losses else _MISSING,
                _number(row.mean("test_loss"), ".4g"),
                _number(accuracy and 100 * accuracy, ".2f", "%"),
                _number(row.seconds_per_step and 1e3 * row.seconds_per_step, ".3g"),
                _number(row.bytes and row.bytes / 2**20, ".3g"),
                _number(row.mean("products"), ".0f"),
                *(_reached(row, target) for target in summary.targets.values()),
                f"{len(row.finals) - len(row.ok)} of {len(row.finals)}; tuning {tuning_failed} of {len(row.tuning)}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _MISSING if value is None else f"{value:{form}}{unit}"


def _reached(row: Row, target: Row) -> str:
    """Steps, seconds and speed-up over the method that set the target."""
    steps = row.steps_to(target.loss)
    if steps is None:
        return _MISSING
    if row.seconds_per_step is None:
        return f"{steps:.0f} steps"
    seconds = steps * row.seconds_per_step
    cell = f"{steps:.0f} steps, {seconds:.3g} s"
    own = target.steps_to(target.loss)
    if own and seconds and target.seconds_per_step is not None:
        cell += f", {own * target.seconds_per_step / seconds:.2f}x"
    return cell


def by_batch_size(summaries: Sequence[Summary]) -> str:
    """A Markdown table of one task at several batch sizes: what the hybrids gain on Adam's way to its own loss."""
    name = _NAMED_TARGETS["adam"]
    found = [x for x in summaries if name in x.targets]
    methods = [row.method for row in found[0].rows if row.head["kind"] == "hybrid"] if found else []
    lines = [["batch size", "Adam's loss", *(f"{method}: {what}" for method in methods for what in ("loss", "gain"))]]
    lines.append(["---"] * len(lines[0]))
    for summary in found:
        target = summary.targets[name]
        rows = {row.method: row for row in summary.rows}
        cells = [f"{target.head['batch_size']}", f"{target.loss:.4g}"]
        for method in methods:
            row = rows.get(method)
            cells += [f"{row.loss:.4g}", _gain(row, target)] if row and row.ok else [_MISSING, _MISSING]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _gain(row: Row, target: Row) -> str:
    """How many times fewer steps, and less time, a method needs to the loss of another."""
    own, steps = target.steps_to(target.loss), row.steps_to(target.loss)
    if not own or not steps:
        return "not reached"
    gain = f"{own / steps:.2f}x in steps"
    if row.seconds_per_step is None or target.seconds_per_step is None:
        return gain
    return f"{gain}, {own * target.seconds_per_step / (steps * row.seconds_per_step):.2f}x in time"


def robustness(folders: Sequence[Path]) -> str:
    """A Markdown table: what becomes of hybrids at up to twice the best rate of the base, and of the base there.

    All runs of full length count, those that tuned a method too. A pair is a run of the hybrid and one of its base at
    the same rate, with the same seed.
    """
    lines = [
        [
            "task and batch",
            "steps",
            "method",
            "best rate of the base",
            "runs at up to twice that",
            "diverged",
            "base alone",
            "pairs at up to the best rate",
            "hybrid higher by more than a tenth",
            "pairs at up to twice that",
            "hybrid more than three times as high",
        ]
    ]
    lines.append(["---"] * len(lines[0]))
    for folder in folders:
        store = Store(folder)
        for num_steps in lengths(store):
            for method in (name for name in registry.METHODS if name in store.methods):
                found = _beside_its_base(store, method, num_steps)
                if found is not None:
                    lines.append([folder.name, f"{num_steps}", method, *found])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _beside_its_base(store: Store, method: str, num_steps: int) -> list[str] | None:
    """The cells of `robustness` for a method, or None if it has no base, or one that was not tuned."""
    head = store.head(method)
    base = head["options"].get("base")
    tuning = tuning_runs(store.runs(base), num_steps) if base else {}
    if head["kind"] != "hybrid" or not tuning:
        return None
    best = best_rate(tuning)
    runs, of_base = (
        {
            (run["rate"], run["seed"]): run
            for run in store.runs(name).values()
            if run["rate"] <= 2 * best and run["num_steps"] == num_steps
        }
        for name in (method, base)
    )
    if not runs:
        return None
    failed, base_failed = (sum(run["status"] != "ok" for run in found.values()) for found in (runs, of_base))
    pairs = [(key[0], loss_of(runs[key]), loss_of(of_base[key])) for key in runs if key in of_base]
    usual = [(loss, beside) for rate, loss, beside in pairs if rate <= best]
    higher = sum(loss > 1.1 * beside for loss, beside in usual)
    far_higher = sum(loss > 3 * beside for _, loss, beside in pairs)
    counts = [len(usual), higher, len(pairs), far_higher]
    return [f"{best:g}", f"{len(runs)}", f"{failed}", f"{base_failed} of {len(of_base)}", *map(str, counts)]


def plot(summary: Summary, path: Path) -> None:
    """Training loss against seconds, or against steps where no method was timed.

    A dot is the end of a run with a shorter schedule.
    Where the solution is known, loss and relative error, against steps and against seconds.
    """
    rows = [row for row in summary.rows if row.head["kind"] != "ablation"]
    timed = any(row.seconds_per_step is not None for row in summary.rows)
    units = ["seconds"] if timed else ["steps"]
    curves = {"training loss": "losses"}
    if any("errors" in run for row in rows for run in row.ok):
        units = ["steps", "seconds"] if timed else ["steps"]
        curves["relative error"] = "errors"
    figure = Figure(figsize=(8 * len(units), 5 * len(curves)), layout="constrained")
    for places, (label, field) in zip(
        figure.subplots(len(curves), len(units), squeeze=False), curves.items(), strict=True
    ):
        for axes, unit in zip(places, units, strict=True):
            for i, row in enumerate(rows):
                runs = [run for run in row.ok if field in run]
                scale = row.seconds_per_step if unit == "seconds" else 1.0
                if runs and scale is not None:
                    style = "--" if row.head["kind"] == "baseline" else "-"
                    x, y = np.multiply(runs[0]["steps"], scale), np.mean([run[field] for run in runs], axis=0)
                    axes.plot(x[1:], y[1:], style, color=f"C{i % 10}", label=row.method)
                    if field == "losses":
                        ends = np.multiply(list(row.shortened), scale), list(row.shortened.values())
                        axes.plot(*ends, "o", color=f"C{i % 10}")
            axes.set(xlabel=unit, ylabel=label, yscale="log", title=summary.name)
            if axes.lines:
                axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=100)


_HEAD = """# Time to a target loss

Written by `python -m benchmarks.target.report` from the files in `benchmarks/results/target`; do not edit.

Every method has the same schedule (5% linear warm-up, cosine to zero) and the same rule for its peak learning rate:
five values, each twice the one before, on a seed of its own; while the best is at the edge the grid gets one more value
beyond it, up to four times. "tried" is what came of that; a best value that is still at the edge is marked. `lbfgs` has
a line search instead of a learning rate; how many pairs it remembers is tuned. `nys_newton_cg` is tuned in its damping.
Methods named `adam_...` give Adam half of the updates; its rate is tuned, and the other half has none. Their time of a
step is the mean over both halves. What a line search evaluates is in the time of a step.

Losses are means over the seeds, with their standard deviation, on a fixed part of the training data. "To a loss" is the
steps to the mean final loss of another method, the seconds they take, and how many times faster that is than the method
that set the target: the first crossing of the mean curve or, where it is sooner, the shortest schedule of 1/3, 1/2
or 2/3 of the length that ends at the target or below, for methods that were trained with such (or one of another length
that has a table of its own, if its best rate is the same). A method of which a seed
diverged counts as not reaching. Step times were taken alone, several methods of a task in turns in one process (which
ones, `_timing.json` of the task says), compilation excluded. The test loss of differential equations and
of `image_field` is the relative error in the L2 norm. "MiB" is what a step holds at once, by the compiler: parameters,
optimizer state, batch and temporaries; it was not measured for older results. In the plots a dot is the end of a run
with a shorter schedule.

Hybrids refresh every 100 updates, which was the default before `dho2_adam_interval50` and `dho2_adam_often` were made;
it is 50 since, as in these two.
"""


def write(results: Path, docs: Path) -> Path:
    """Writes the page and the plots of all results, and returns the path of the page."""
    folders = [path for path in results.iterdir() if Store(path).methods]
    parts = [_HEAD]
    by_task: dict[str, list[Summary]] = {}
    for folder in sorted(folders, key=_place):
        store = Store(folder)
        summaries = [summarize(store, num_steps) for num_steps in lengths(store)]
        if not summaries:
            continue
        head = summaries[0].rows[0].head
        by_task.setdefault(head["task"], []).append(summaries[0])
        device = f"{head['machine']['processor']}, {head['machine']['cores']} cores" if "machine" in head else _MISSING
        parts.append(f"## {head['task']}, batch {head['batch_size']}\n")
        for i, summary in enumerate(summaries):
            image = f"benchmarks_{summary.name}{f'_{summary.num_steps}' if i else ''}.png"
            plot(summary, docs / image)
            parts.append(f"{summary.num_steps} steps; {device}.\n")
            parts.append(table(summary))
            parts.append(f"![Training loss against time]({image})\n")
    for task, summaries in by_task.items():
        if len(summaries) > 1:
            parts += [f"## {task}, gain on Adam by batch size\n", by_batch_size(summaries)]
    parts += ["## Up to twice the best rate of the base\n", robustness(sorted(folders, key=_place))]
    page = docs / "benchmarks.md"
    page.write_text("\n".join(parts))
    return page


def _place(folder: Path) -> tuple[int, int, str]:
    """Orders the folders by task, as they are registered, and by batch size."""
    task, _, batch_size = folder.name.rpartition("_")
    names = list(TASKS)
    known = names.index(task) if task in names else len(names)
    return known, int(batch_size) if batch_size.isdigit() else 0, folder.name


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.target.report", description="Writes tables and plots.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    arguments = parser.parse_args()
    print(write(arguments.results, arguments.docs))


if __name__ == "__main__":
    main()
