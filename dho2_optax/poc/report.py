"""The report: tables in the terminal, one self-contained HTML page, pictures."""

import base64
import math
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

from dho2_optax.plots import megabytes
from dho2_optax.poc import plots, system
from dho2_optax.poc.optimizers import OPTIMIZERS
from dho2_optax.poc.results import (
    Results,
    Summary,
    count_devices,
    findings,
    summarize,
)
from dho2_optax.poc.verdict import against_bases, verdicts

__all__ = ["print_tables", "write_html"]

_VIRTUAL_DEVICES = (
    "The devices of this run are virtual: they share the cores of one processor. Memory, "
    "communication and the losses are what they would be on as many real devices; seconds are "
    "not, and show no parallel speed: more virtual devices do not make training faster."
)
_VIRTUAL_PROCESSES = (
    "Several processes shared the work, each with virtual devices of its own. What they sent to each other went "
    "through sockets, not over a link between accelerators: the seconds of a step are no measure of either."
)
_MOST_COLUMNS = 5  # of a table in a terminal of 80 characters


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
    _Column("devices", "those that train + those that find curvature", "devices", "text"),
    _Column("learning rate", "peak of the schedule", "learning_rate", "number"),
    _Column("steps to target", "until the smoothed training loss", "steps_to_target", "count"),
    _Column("s to target", "sum of the step times until then", "seconds_to_target", "seconds"),
    _Column("final loss", "smoothed training loss at the end", "final_loss", "number"),
    _Column("test loss", "at the last parameters", "test_loss", "number"),
    _Column("test accuracy", "at the last parameters", "test_accuracy", "share"),
    _Column("test error", "of the solution, at the last parameters", "test_error", "share"),
    _Column("ms/step", "median over all steps", "step_seconds_median", "milliseconds"),
    _Column("status", "", "status", "text"),
)
_STEP_TIMES = (
    _Column("task", "", "task", "text"),
    _Column("optimizer", "", "optimizer", "text"),
    _Column("devices", "", "devices", "text"),
    _Column("ms/step", "median over all steps", "step_seconds_median", "milliseconds"),
    _Column("ms/step p90", "90th percentile", "step_seconds_p90", "milliseconds"),
    _Column("ms/step p99", "99th percentile", "step_seconds_p99", "milliseconds"),
    _Column("ms/step max", "the slowest step", "step_seconds_max", "milliseconds"),
    _Column("p99/median", "how much slower the slow steps are", "step_seconds_tail", "number"),
    _Column("ms/probe", "of a step that makes one product, beyond an ordinary step", "probe_seconds", "milliseconds"),
    _Column("ms/refresh", "of a step with a new spectrum, beyond an ordinary step", "refresh_seconds", "milliseconds"),
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
    _Column("curvature device", "all of one that does not train", "curvature_device_bytes", "bytes"),
    _Column("sent per step", "bytes a device sends each step", "traffic_per_step", "bytes"),
    _Column("sent per refresh", "besides, in a refresh or all its probes", "traffic_per_refresh", "bytes"),
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
            for part in _parts(group, _MOST_COLUMNS):
                console.print(_trained_table(f"{task}, {count_devices(devices)}", part))
        group = [s for s in costs if s.task == task]
        if len({s.devices for s in group}) > 1:
            console.print(_memory_table(task, group))
    verdict, *rest = _said(results, brief=True)
    for heading, sentences in (*rest, verdict):  # the last is what is seen
        console.print(f"[bold]{heading}[/bold]")
        for sentence in sentences:
            line = Padding(Text(f"- {sentence}"), (0, 0, 0, 2))
            console.print(line)


def _parts(group: Sequence[Summary], most: int) -> list[Sequence[Summary]]:
    """Cut a list in the fewest parts of at most so many, all about as long."""
    size = math.ceil(len(group) / math.ceil(len(group) / most))
    return [group[start : start + size] for start in range(0, len(group), size)]


def _trained_table(title: str, group: Sequence[Summary]) -> Table:
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for summary in group:
        table.add_column(summary.optimizer, justify="right", overflow="fold")
    roles = any(summary.curvature_devices for summary in group)
    seen = {"task", "optimizer", "run"} | ({"devices"} if not roles else set())
    for columns in (_TRAINING, _STEP_TIMES, _COSTS):
        table.add_section()
        for column in _filled(columns, group):
            if column.show not in seen:
                seen.add(column.show)
                cells = [_cell(summary, column) for summary in group]
                style = "red" if column.show == "status" and set(cells) != {"ok"} else None
                table.add_row(column.title, *cells, style=style)
    return table


def _filled(columns: Sequence[_Column], group: Sequence[Summary]) -> list[_Column]:
    """Return the columns that have something to show."""
    return [column for column in columns if any(_cell(summary, column) != "-" for summary in group)]


def _memory_table(task: str, group: Sequence[Summary]) -> Table:
    title = f"{task}, optimizer state on each device (* compiled only, not trained)"
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
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
    timed = [summary for summary in trained if summary.trained]
    template = (resources.files("dho2_optax.poc") / "assets" / "report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(template).render(
        results=results,
        optimizers={name: OPTIMIZERS[name] for name in results.settings["optimizers"]},
        tables=[
            ("training", "Training", _filled(_TRAINING, trained), trained),
            ("steps", "Step times", _filled(_STEP_TIMES, timed), timed),
            ("costs", "Memory, communication and compilation", _filled(_COSTS, costs), costs),
        ],
        cell=_cell,
        said=_said(results),
        sizes=_by_task(results.settings["batch_size"], "batch"),
        steps=_by_task(results.settings["num_steps"], "steps"),
        curvature=[
            _by_task(results.settings[name], what)
            for name, what in (("rank", "rank"), ("refresh_interval", "refresh every"))
        ],
        pictures=pictures,
    )
    path = folder / "report.html"
    system.replace(path, page.encode(errors="backslashreplace"))  # the command may hold bytes that are no text
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
    if column.show == "devices" and summary.curvature_devices:
        return f"{summary.train_devices} + {summary.curvature_devices}"
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


def _said(results: Results, *, brief: bool = False) -> list[tuple[str, Sequence[str]]]:
    """Return headings with their sentences, generated from the rows; the first are the verdicts.

    In brief, alarms are named and not explained.
    """
    found = findings(results)
    sections: list[tuple[str, Sequence[str]]] = [("Verdict", verdicts(results))]
    if results.status == "interrupted":
        text = "Interrupted: this report covers the runs that had finished, and nothing else."
        sections.append(("Not complete", [text]))
    hybrids = [name for name in results.settings["optimizers"] if OPTIMIZERS[name].hybrid]
    if hybrids:
        none = "Nowhere: no hybrid beat the best first-order baseline in these runs."
        sections.append(("Where the hybrid wins", found["wins"] or [none]))
        none = "Nothing that these runs show."
        sections.append(("Where it does not win", found["does_not_win"] or [none]))
    if pairs := against_bases(results):
        sections.append(("Each hybrid and its base", pairs))
    if found["failures"]:
        sections.append(("Runs that did not finish", found["failures"]))
    if found["memory"]:
        sections.append(("Memory", found["memory"]))
    if raised := _alarms(results):
        sections.append(("Alarms", [_named(results)] if brief else raised))
    reading = [
        f"{target.task}: the target is a training loss of {target.loss:.4g}, {target.origin}."
        for target in results.targets
    ]
    reading += [*_roles(results), *_elsewhere(results), *_taken_up(results), _rates(results), _seconds(results)]
    if results.machine["virtual_devices"]:
        reading.append(_VIRTUAL_DEVICES)
        if results.machine.get("process_count", 1) > 1:
            reading.append(_VIRTUAL_PROCESSES)
    sections.append(("How to read this", reading))
    return sections


def _alarms(results: Results) -> list[str]:
    """Say what of each run gave cause for concern, how often, and what to do."""
    return [
        f"{row.task}, {row.optimizer} on {count_devices(row.devices)}, seed {row.seed}: {name}, in {alarm['count']} of "
        f"{row.looks} looks at the metrics, the last after {alarm['last']} updates: {alarm['text']}."
        for row in results.rows
        for name, alarm in row.alarms.items()
    ]


def _named(results: Results) -> str:
    """Name the alarms of each optimizer in one line."""
    names: dict[str, dict[str, None]] = {}
    for row in results.rows:
        if row.alarms:
            names.setdefault(f"{row.optimizer} on {row.task}", {}).update(dict.fromkeys(row.alarms))
    raised = "; ".join(f"{run}: {', '.join(found)}" for run, found in names.items())
    return f"{raised}. What to do is in report.html."


def _by_task(counts: dict[str, int], what: str) -> str:
    """Write one number for all tasks where they agree, and by task where they do not."""
    same = len(set(counts.values())) == 1
    return f"{what} {next(iter(counts.values())) if same else ', '.join(f'{n} ({task})' for task, n in counts.items())}"


def _roles(results: Results) -> list[str]:
    """Say which devices find curvature and do not train, and what came of it."""
    summaries = [s for s in summarize(results.rows) if s.curvature_devices]
    said = []
    for name in dict.fromkeys(s.optimizer for s in summaries):
        splits = sorted(
            {(s.devices, s.train_devices or 0, s.curvature_devices or 0) for s in summaries if s.optimizer == name}
        )
        words = "; ".join(
            f"of {count_devices(devices)} {train} train, {curvature} curvature"
            + (f", {idle} idle" if (idle := devices - train - curvature) else "")
            for devices, train, curvature in splits
        )
        said.append(
            f"{name}: {words}. Memory and bytes sent are those of a device that trains; a curvature device holds a "
            "copy of the parameters, its share of the batch, and its part of the Lanczos basis."
        )
    if results.machine["virtual_devices"] and any(
        min(s.train_devices or 0, s.curvature_devices or 0) > 1 for s in summaries
    ):
        said.append(
            "On a CPU, a training step on several virtual devices waits for a Lanczos process on several others. "
            "Groups on real devices, or of one device, run at the same time."
        )
    for row in results.rows:
        if row.curvature_devices and row.trained:
            counted = row.counters
            dropped = sum(counted[name] for name in ("rejected", "failures", "stalls"))
            age = f"; the last was {counted['staleness']:.0f} steps old when put in use" if counted["installed"] else ""
            said.append(
                f"{row.task}, {row.optimizer} on {count_devices(row.devices)}, seed {row.seed}: "
                f"{counted['launches']:.0f} Lanczos processes launched, {counted['installed']:.0f} put in use, "
                f"{dropped:.0f} without a result{age}."
            )
    return said


def _seconds(results: Results) -> str:
    """Say what the seconds are worth."""
    seeds = len(results.settings["seeds"])
    of = "of one seed" if seeds == 1 else f"medians over {seeds} seeds"
    return (
        f"Seconds are {of}, on this machine as idle or busy as it was: where a verdict hangs on them, run it again "
        "with nothing beside it, and more seeds."
    )


def _elsewhere(results: Results) -> list[str]:
    """Say which results are of other machines, or of fewer devices than were asked for."""
    machines = [
        f"The runs before it went on were begun at {machine['date']} on {machine['cpu']}, {machine['cores']} cores, "
        f"{count_devices(machine['device_count'])} of the kind {machine['device_kind']}: their seconds are of there."
        for machine in results.earlier_machines
    ]
    fewer = dict.fromkeys(
        f"{row.task}, {row.optimizer}: {count_devices(row.devices)} were asked for, but there were no more than "
        f"{row.present_devices} that can share a batch, and memory and communication are of these."
        for row in results.rows
        if row.present_devices < row.devices
    )
    return [*machines, *fewer]


def _taken_up(results: Results) -> list[str]:
    """Say which runs were cut off and went on."""
    return [
        f"{row.task}, {row.optimizer}, seed {row.seed}: went on from a checkpoint after {steps} steps, on "
        f"{count_devices(devices)}; the time of a step is that of the devices at the time."
        for row in results.rows
        for steps, devices in row.taken_up
    ]


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
            " None was tuned in this run: a default or a given learning rate may favour one optimizer. (The defaults "
            "of pinn, mlp, cnn and autoencoder are the best of --tune for each base alone, on the digits with all "
            "other settings at their defaults; a hybrid has that of its base, but on pinn its own.) Run with --tune "
            "before deciding."
        )
    else:
        seed = results.settings["seeds"][0]
        text += (
            " Each tuned rate was the first of its grid at the target where that is given, and ended lowest where not, "
            f"with seed {seed}."
        )
    if edge:
        text += (
            f" The best value of {', '.join(edge)} lies at the edge of the grid even after it was "
            "widened: that optimizer is not fully tuned."
        )
    return text
