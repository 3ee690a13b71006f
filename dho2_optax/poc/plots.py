"""The pictures of the report."""

import io
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from dho2_optax import plots
from dho2_optax.poc import system
from dho2_optax.poc.results import Results, Row, count_devices, summarize

__all__ = ["draw"]

_MARKERS = "osD^vP*"
_PARTS = {  # of the time
    "ordinary steps": "#0072B2",
    "refreshes, probes": "#D55E00",
    "compilation": "#999999",
    "evaluation": "#E69F00",
}


def draw(results: Results, folder: Path) -> dict[str, list[Path]]:
    """Draw every picture for which there are measurements.

    Returns:
      The PNG files under "loss", "steps" and "memory" (one for each task) and "time" (one).
    """
    import matplotlib

    files: dict[str, list[Path]] = {"loss": [], "steps": [], "memory": [], "time": []}
    with matplotlib.rc_context(plots.STYLE):
        for task in (task["name"] for task in results.tasks):
            rows = [row for row in results.rows if row.task == task]
            if any(row.trained for row in rows):
                files["loss"].append(_save(_losses(results, task, rows), folder, f"loss-{task}"))
                files["steps"].append(_save(_step_times(results, task, rows), folder, f"steps-{task}"))
            if len({row.devices for row in rows if row.total_bytes}) > 1:
                files["memory"].append(_save(_memory(results, task, rows), folder, f"memory-{task}"))
        if any(row.trained for row in results.rows):
            files["time"].append(_save(_time(results), folder, "time"))
    return files


def _save(figure: Figure, folder: Path, name: str) -> Path:
    safe = "".join(char if (char.isascii() and char.isalnum()) or char in "-_" else "_" for char in name)
    path = folder / f"{safe}.png"
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, facecolor="white")
    system.replace(path, picture.getvalue())
    return path


def _escape(name: str) -> str:
    """Keep what a user named from being read as a formula."""
    return name.replace("$", r"\$")


def _look(results: Results, optimizer: str) -> dict[str, Any]:
    index = results.settings["optimizers"].index(optimizer) % len(plots.COLOURS)
    return {"color": plots.COLOURS[index], "label": optimizer}


def _losses(results: Results, task: str, rows: list[Row]) -> Figure:
    """Loss against steps and against seconds, on the most devices that were trained."""
    devices = max(row.devices for row in rows if row.trained)
    rows = [row for row in rows if row.trained and row.devices == devices]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    seen: set[str] = set()
    for row in rows:
        look = _look(results, row.optimizer)
        if row.optimizer in seen:
            look["label"] = None
        seen.add(row.optimizer)
        for axes, seconds in ((by_step, None), (by_time, row.seconds)):
            plots.loss(row.losses, axes, seconds=seconds, **look)
        if row.steps_to_target and row.seconds_to_target:
            at = plots.smoothed(row.losses)[row.steps_to_target - 1]
            dot = {"color": look["color"], "markeredgecolor": "white", "markersize": 8, "zorder": 5}
            by_step.plot(row.steps_to_target, at, "o", **dot)
            by_time.plot(row.seconds_to_target, at, "o", **dot)
    target = results.target(task)
    for axes in (by_step, by_time):
        if target is not None:
            axes.axhline(target.loss, color="#555555", linewidth=1, linestyle=(0, (4, 3)))
    shown = [loss for row in rows for loss in row.losses if np.isfinite(loss)]
    positive = all(loss > 0 for loss in (*shown, target.loss if target else 1.0))
    by_step.set_yscale("log" if positive else "linear")
    if target is not None:
        by_step.annotate(
            f"target {target.loss:.3g}",
            (0.01, target.loss),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=9,
            color="#555555",
        )
    by_step.set(xlabel="steps", ylabel="training loss", title=f"{_escape(task)}: loss against steps")
    by_time.set(xlabel="seconds of training", ylabel="", title=f"loss against time, {count_devices(devices)}")
    by_time.legend()
    return figure


def _step_times(results: Results, task: str, rows: list[Row]) -> Figure:
    """The share of the steps that take longer than a time, on the most devices that were trained."""
    devices = max(row.devices for row in rows if row.trained)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots()
    longest = 1
    for optimizer in results.settings["optimizers"]:
        runs = [row for row in rows if row.trained and (row.optimizer, row.devices) == (optimizer, devices)]
        times = np.sort([1e3 * second for row in runs for second in row.seconds])
        if len(times):
            # The step to zero is left out: a logarithm has none.
            axes.step(times, 1 - np.arange(len(times)) / len(times), linewidth=1.8, **_look(results, optimizer))
            longest = max(longest, len(times))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.8 / longest, 1.2)
    names = {1: "100%", 0.5: "50% (median)", 0.1: "10% (p90)", 0.01: "1% (p99)", 0.001: "0.1%"}
    shares = [share for share in names if share >= 1 / longest]
    axes.set_yticks(shares, [names[share] for share in shares])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(plots.minor(axes.get_xlim, lambda value: f"{value:g}")))
    axes.set(
        xlabel="milliseconds",
        ylabel="share of the steps",
        title=f"{_escape(task)}: share of the steps that take longer, {count_devices(devices)}",
    )
    axes.legend()
    return figure


def _memory(results: Results, task: str, rows: list[Row]) -> Figure:
    """Bytes on each device against the number of devices."""
    summaries = [s for s in summarize(rows) if s["total_bytes"]]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    fields = (
        ("optimizer_bytes", f"{_escape(task)}: optimizer state on each device"),
        ("total_bytes", "whole training step on each device"),
    )
    names = results.settings["optimizers"]
    looks = {name: {**_look(results, name), "marker": _MARKERS[i % len(_MARKERS)]} for i, name in enumerate(names)}
    for axes, (field, title) in zip(panels, fields, strict=True):
        sizes = {name: {s.devices: s[field] or 0 for s in summaries if s.optimizer == name} for name in names}
        plots.memory(sizes, axes, looks=looks)
        axes.set(title=title, ylabel="")
    panels[0].set_ylabel("bytes on each device")
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure


def _time(results: Results) -> Figure:
    """Where the time of each run went, on the most devices that were trained."""
    bars: list[tuple[str, dict[str, float]]] = []
    for task in (task["name"] for task in results.tasks):
        trained = [row for row in results.rows if row.task == task and row.trained]
        devices = max((row.devices for row in trained), default=0)
        for optimizer in results.settings["optimizers"]:
            runs = [r for r in trained if r.optimizer == optimizer and r.devices == devices]
            if runs:
                parts = [_time_parts(row) for row in runs]
                mean = {name: statistics.fmean(p[name] for p in parts) for name in _PARTS}
                bars.append((f"{_escape(task)}  {optimizer}", mean))
    figure = Figure(figsize=(10, 1.8 + 0.34 * len(bars)), layout="constrained")
    axes = figure.subplots()
    position = np.arange(len(bars))[::-1]
    left = np.zeros(len(bars))
    for name, colour in _PARTS.items():
        widths = np.array([parts[name] for _, parts in bars])
        axes.barh(position, widths, left=left, color=colour, label=name, height=0.66)
        left += widths
    axes.set_axisbelow(True)
    axes.set_yticks(position, [label for label, _ in bars])
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="seconds", title="Where the time of each run goes")
    figure.legend(ncols=len(_PARTS), loc="outside lower center")
    return figure


def _time_parts(row: Row) -> dict[str, float]:
    refreshes = (row.refresh_seconds or 0.0) * len(row.refresh_steps)
    refreshes += (row.probe_seconds or 0.0) * len(row.probe_steps)
    return {
        "ordinary steps": sum(row.seconds) - refreshes,
        "refreshes, probes": refreshes,
        "compilation": row.compile_seconds or 0.0,
        "evaluation": row.eval_seconds or 0.0,
    }
