"""The report: tables in the terminal, one self-contained HTML page, pictures."""

import base64
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jinja2
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dho2_optax.poc import plots
from dho2_optax.poc.optimizers import OPTIMIZERS
from dho2_optax.poc.results import (
    Results,
    Summary,
    count_devices,
    findings,
    megabytes,
    summarize,
)

__all__ = ["print_tables", "write_html"]

_VIRTUAL_DEVICES = (
    "The devices of this run are virtual: they share the cores of one processor. Memory, "
    "communication and the losses are what they would be on as many real devices; seconds are "
    "not. More virtual devices do not make training faster."
)


class _Column(NamedTuple):
    """A column of the tables: its title, what it means, and how a summary fills it."""

    title: str
    meaning: str
    show: str  # the name of a field of the row, see `_cell`
    as_text: str  # a key of `_FORMATS`, or "text"


_FORMATS: dict[str, Callable[[float], str]] = {
    "bytes": lambda value: megabytes(value) if value else "0",
    "count": lambda value: f"{value:.0f}",
    "milliseconds": lambda value: f"{value * 1e3:.1f}",
    "number": lambda value: f"{value:.4g}",
    "seconds": lambda value: f"{value:.3g}",
    "share": lambda value: f"{value:.1%}",
}
_TRAINING = (
    _Column("task", "model or user's task", "task", "text"),
    _Column("optimizer", "", "optimizer", "text"),
    _Column("devices", "devices that the batch is split over", "devices", "text"),
    _Column("learning rate", "peak of the schedule", "learning_rate", "number"),
    _Column("steps to target", "until the smoothed training loss", "steps_to_target", "count"),
    _Column("s to target", "sum of the step times until then", "seconds_to_target", "seconds"),
    _Column("final loss", "smoothed training loss at the end", "final_loss", "number"),
    _Column("test loss", "at the last parameters", "test_loss", "number"),
    _Column("test accuracy", "at the last parameters", "test_accuracy", "share"),
    _Column("ms/step", "median over all steps", "step_seconds_median", "milliseconds"),
    _Column("ms/step p99", "99th percentile over all steps", "step_seconds_p99", "milliseconds"),
    _Column("s/refresh", "beyond an ordinary step", "refresh_seconds", "seconds"),
    _Column("status", "", "status", "text"),
)
_COSTS = (
    _Column("task", "", "task", "text"),
    _Column("optimizer", "", "optimizer", "text"),
    _Column("devices", "", "devices", "text"),
    _Column("parameters", "", "parameter_bytes", "bytes"),
    _Column("base state", "state of the first-order optimizer", "base_state_bytes", "bytes"),
    _Column("curvature state", "eigenvectors and the like", "curvature_state_bytes", "bytes"),
    _Column("temporaries", "scratch memory of the step", "temporary_bytes", "bytes"),
    _Column("total", "arguments, outputs and temporaries", "total_bytes", "bytes"),
    _Column("sent/step", "bytes a device sends each step", "traffic_per_step", "bytes"),
    _Column("sent/refresh", "bytes a device sends in a refresh", "traffic_per_refresh", "bytes"),
    _Column("compile s", "", "compile_seconds", "seconds"),
    _Column("run", "trained, or only compiled", "run", "text"),
)


def print_tables(results: Results, console: Console) -> None:
    """Print a table for each task and device count, then what follows from them.

    The optimizers are the columns, so that the tables fit a narrow terminal.
    """
    trained, costs = _sections(results)
    for task in (task["name"] for task in results.tasks):
        for devices in sorted({s.devices for s in trained if s.task == task}):
            group = [s for s in trained if (s.task, s.devices) == (task, devices)]
            console.print(_trained_table(f"{task}, {count_devices(devices)}", group))
        group = [s for s in costs if s.task == task]
        if len({s.devices for s in group}) > 1:
            console.print(_memory_table(task, group))
    for heading, sentences in _said(results):
        console.print(f"[bold]{heading}[/bold]")
        for sentence in sentences:
            line = Padding(Text(f"- {sentence}"), (0, 0, 0, 2))
            console.print(line)


def _trained_table(title: str, group: Sequence[Summary]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for summary in group:
        table.add_column(summary.optimizer, justify="right")
    for column in (*_TRAINING, *_COSTS):
        if column.show in ("task", "optimizer", "devices", "run"):
            continue
        if column is _COSTS[3]:
            table.add_section()
        cells = [_cell(summary, column) for summary in group]
        style = "red" if column.show == "status" and set(cells) != {"ok"} else None
        table.add_row(column.title, *cells, style=style)
    return table


def _memory_table(task: str, group: Sequence[Summary]) -> Table:
    title = f"{task}, optimizer state on each device (* compiled only, not trained)"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("devices", justify="right")
    names = list(dict.fromkeys(summary.optimizer for summary in group))
    for name in names:
        table.add_column(name, justify="right")
    for devices in sorted({summary.devices for summary in group}):
        here = {s.optimizer: s for s in group if s.devices == devices}
        sizes = [megabytes(here[name]["optimizer_bytes"] or 0) if name in here else "-" for name in names]
        mark = " " if any(summary.trained for summary in here.values()) else "*"
        table.add_row(f"{devices}{mark}", *sizes)
    return table


def write_html(results: Results, folder: Path) -> Path:
    """Draw the pictures and write `report.html`, which needs no other file.

    Returns:
      The path of the page.
    """
    pictures = {
        kind: [base64.b64encode(file.read_bytes()).decode() for file in files]
        for kind, files in plots.draw(results, folder).items()
    }
    trained, costs = _sections(results)
    template = (resources.files("dho2_optax.poc") / "assets" / "report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(template).render(
        results=results,
        optimizers={name: OPTIMIZERS[name] for name in results.settings["optimizers"]},
        tables=[
            ("Training", _TRAINING, trained),
            ("Memory, communication and compilation", _COSTS, costs),
        ],
        cell=_cell,
        said=_said(results),
        pictures=pictures,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _sections(results: Results) -> tuple[list[Summary], list[Summary]]:
    """Return the summaries that belong in the two tables, in the order of the request."""
    tasks = [task["name"] for task in results.tasks]
    optimizers = results.settings["optimizers"]
    summaries = sorted(
        summarize(results.rows),
        key=lambda s: (tasks.index(s.task), optimizers.index(s.optimizer), s.devices),
    )
    counts = results.settings["devices"]
    trained = [s for s in summaries if s.devices in counts and s.status != "compiled"]
    return trained, [s for s in summaries if s["total_bytes"] is not None]


def _cell(summary: Summary, column: _Column) -> str:
    """Write one cell: a dash for what does not exist, words for what did not happen."""
    if column.show == "run":
        return "trained" if summary.trained else summary.status.replace("compiled", "compiled only")
    if column.show in ("task", "optimizer", "devices", "status"):
        return str(getattr(summary, column.show))
    if column.show == "learning_rate":
        return f"{summary.learning_rate:g}"
    value = summary[column.show]
    if value is None:
        missed = column.show == "steps_to_target" and summary["final_loss"] is not None
        return "not reached" if missed else "-"
    text = _FORMATS[column.as_text](value)
    if column.show == "steps_to_target" and summary.reached < summary.seeds:
        text += f" ({summary.reached} of {summary.seeds})"
    return text


def _said(results: Results) -> list[tuple[str, Sequence[str]]]:
    """Return headings with their sentences, generated from the rows."""
    found = findings(results)
    sections: list[tuple[str, Sequence[str]]] = []
    if results.status == "interrupted":
        text = "Interrupted: this report covers the runs that had finished, and nothing else."
        sections.append(("Not complete", [text]))
    hybrids = [name for name in results.settings["optimizers"] if OPTIMIZERS[name].hybrid]
    if hybrids:
        none = "Nowhere: no hybrid beat the best first-order baseline in these runs."
        sections.append(("Where the hybrid wins", found["wins"] or [none]))
        none = "Nothing that these runs show."
        sections.append(("Where it does not win", found["does_not_win"] or [none]))
    if found["failures"]:
        sections.append(("Runs that did not finish", found["failures"]))
    if found["memory"]:
        sections.append(("Memory", found["memory"]))
    reading = [
        f"{target.task}: the target is a training loss of {target.loss:.4g}, {target.origin}."
        for target in results.targets
    ]
    reading += [_rates(results)]
    if results.machine["virtual_devices"]:
        reading.append(_VIRTUAL_DEVICES)
    sections.append(("How to read this", reading))
    return sections


def _rates(results: Results) -> str:
    """Say which learning rates were used and whether they were tuned."""
    tuned = {(t.task, t.optimizer) for t in results.tuning if t.chosen is not None}
    edge = [f"{t.optimizer} on {t.task}" for t in results.tuning if t.at_edge]
    rates = dict.fromkeys(
        f"{row.task} {row.optimizer} {row.learning_rate:g}"
        + ("" if (row.task, row.optimizer) in tuned else " (not tuned)")
        for row in results.rows
    )
    text = f"Learning rates: {', '.join(rates) or 'none used'}."
    if not results.settings["tune"]:
        text += (
            " None was tuned in this run: a default or a given learning rate may favour one "
            "optimizer. (The defaults of mlp, cnn and autoencoder are the best of --tune on the digits with all other "
            "settings at their defaults.) Run with --tune before deciding."
        )
    else:
        seed = results.settings["seeds"][0]
        text += f" Each tuned rate had the lowest final training loss of its grid, with seed {seed}."
    if edge:
        text += (
            f" The best value of {', '.join(edge)} lies at the edge of the grid even after it was "
            "widened: that optimizer is not fully tuned."
        )
    return text
