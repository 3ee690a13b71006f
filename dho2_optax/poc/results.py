"""What the runs measured, and what follows from it: targets, medians over seeds, findings."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dho2_optax.plots import megabytes, smoothed
from dho2_optax.poc import system
from dho2_optax.poc.optimizers import OPTIMIZERS

__all__ = [
    "TIE_SECONDS",
    "TIE_STEPS",
    "Results",
    "Row",
    "Summary",
    "Target",
    "Tuning",
    "count_devices",
    "findings",
    "median_to_target",
    "state_sizes",
    "summarize",
    "within",
]

# Ratios below these are called a tie.
TIE_STEPS = 1.05
TIE_SECONDS = 1.1  # clocks are noisy

_MACHINE = ("cpu", "cores", "device_kind", "device_count")  # what seconds depend on


@dataclasses.dataclass
class Row:
    """One run of one optimizer on one task, device count and seed."""

    task: str
    optimizer: str
    devices: int  # asked for; a run that goes on may have had fewer, see `devices_left` and `taken_up`
    seed: int | None  # None if the program was only compiled
    learning_rate: float
    status: str  # "ok", "diverged", "failed", "compiled", or what the optimizer needs and the run has not
    message: str = ""
    devices_left: int | None = None  # where there were fewer when the run, or the rest of it, was compiled
    # Of the devices. Those that find curvature and do not train are a group of their own, or there are none.
    train_devices: int | None = None
    curvature_devices: int | None = None
    compile_seconds: float | None = None
    # Bytes on one device that trains.
    parameter_bytes: int | None = None
    base_state_bytes: int | None = None
    curvature_state_bytes: int | None = None
    temporary_bytes: int | None = None
    total_bytes: int | None = None
    # Bytes of the Lanczos program on one device that finds curvature and does not train.
    curvature_device_bytes: int | None = None
    # Bytes that one device sends.
    traffic_per_step: float | None = None
    traffic_per_refresh: float | None = None
    # Of the training, compilation and warm-up apart.
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    refresh_steps: list[int] = dataclasses.field(default_factory=list)
    probe_steps: list[int] = dataclasses.field(default_factory=list)
    counters: dict[str, float] = dataclasses.field(default_factory=dict)
    # Steps before which a run that was cut off went on, and on how many devices.
    taken_up: list[list[int]] = dataclasses.field(default_factory=list)
    # Looks at the metrics of a hybrid, and by name what `dho2_optax.alarms` said: in how many ("count"), after how many
    # updates at last ("last"), and then in which words ("text").
    looks: int = 0
    alarms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    eval_seconds: float | None = None
    final_loss: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    test_error: float | None = None
    step_seconds_median: float | None = None
    step_seconds_p90: float | None = None
    step_seconds_p99: float | None = None
    step_seconds_max: float | None = None
    step_seconds_tail: float | None = None  # the 99th percentile, in medians
    # Beyond the median of the steps that do neither.
    probe_seconds: float | None = None
    refresh_seconds: float | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Row":
        """Read from JSON, which has null for a number that is not finite."""
        row = cls(**fields)
        row.losses = [math.nan if x is None else x for x in row.losses]
        row.counters = {name: math.nan if x is None else x for name, x in row.counters.items()}
        return row

    @property
    def trained(self) -> bool:
        """Whether steps were run, and not only compiled."""
        return bool(self.losses)

    @property
    def present_devices(self) -> int:
        """The devices that its program was compiled for."""
        return self.devices if self.devices_left is None else self.devices_left

    @property
    def optimizer_bytes(self) -> int | None:
        """Bytes of the optimizer's state on one device."""
        if self.base_state_bytes is None or self.curvature_state_bytes is None:
            return None
        return self.base_state_bytes + self.curvature_state_bytes

    def measure(self) -> None:
        """Fill in what follows from the losses and the step times."""
        if not self.losses:
            return
        median, p90, p99 = (float(np.percentile(self.seconds, q)) for q in (50, 90, 99))
        self.step_seconds_median, self.step_seconds_p90, self.step_seconds_p99 = median, p90, p99
        self.step_seconds_max = max(self.seconds)
        self.step_seconds_tail = p99 / median
        if self.status == "ok":
            self.final_loss = float(smoothed(self.losses)[-1])
        self.probe_seconds = self._beyond_ordinary(self.probe_steps)
        self.refresh_seconds = self._beyond_ordinary(self.refresh_steps)

    def _beyond_ordinary(self, steps: Sequence[int]) -> float | None:
        """Seconds that some steps take on average beyond those that neither probe nor refresh."""
        special = {*self.refresh_steps, *self.probe_steps}
        ordinary = [s for i, s in enumerate(self.seconds) if i not in special]
        if not (steps and ordinary):
            return None
        return max(0.0, statistics.fmean(self.seconds[i] for i in steps) - statistics.median(ordinary))

    def aim(self, target: float) -> None:
        """Find the first step at which the smoothed loss is at the target or below."""
        self.steps_to_target, self.seconds_to_target = self.reach(target)

    def reach(self, loss: float) -> tuple[int | None, float | None]:
        """Return the steps and seconds until the smoothed loss is at a loss or below, None if it never is."""
        reached = np.flatnonzero(smoothed(self.losses) <= loss)
        if self.status != "ok" or not len(reached):
            return None, None
        steps = int(reached[0]) + 1
        return steps, float(sum(self.seconds[:steps]))


@dataclasses.dataclass
class Tuning:
    """The search for the learning rate of one optimizer on one task."""

    task: str
    optimizer: str
    learning_rates: list[float]
    final_losses: list[float | None]  # None where the run diverged or failed
    steps_to_target: list[int | None]  # None where it is not reached, or not known before the runs
    chosen: float | None
    widened: bool
    at_edge: bool  # the best value is still at the edge of the widened grid
    failed: int = 0  # number of runs that failed
    message: str = ""  # of the first of them


@dataclasses.dataclass
class Target:
    """The training loss that counts as done, and where it comes from."""

    task: str
    loss: float
    origin: str
    fixed: bool = True  # it is not what one of the runs ends at


@dataclasses.dataclass
class Results:
    """Everything that a proof of concept found; `results.json` holds the same."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    tasks: list[dict[str, Any]]
    status: str = "running"  # then "complete" or "interrupted"
    seconds: float = 0.0
    rows: list[Row] = dataclasses.field(default_factory=list)
    tuning: list[Tuning] = dataclasses.field(default_factory=list)
    targets: list[Target] = dataclasses.field(default_factory=list)
    tried: list[Row] = dataclasses.field(default_factory=list)  # the runs of the tuning
    earlier_machines: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # where a part was made before

    def move_to(self, machine: dict[str, Any]) -> None:
        """Go on here; where the results so far come from is kept if that is another machine, or has other devices."""
        if any(self.machine.get(name) != machine.get(name) for name in _MACHINE):
            self.earlier_machines.append(self.machine)
        self.machine = machine

    @property
    def num_failed(self) -> int:
        """Number of runs that failed, those of the tuning included."""
        return sum(row.status == "failed" for row in self.rows) + sum(search.failed for search in self.tuning)

    def aim(self, given: float | None) -> None:
        """Set the targets from the rows that exist, and measure every row against them."""
        self.targets = []
        for task in self.tasks:
            rows = [row for row in self.rows if row.task == task["name"]]
            target = _target(task, rows, given)
            if target is not None:
                self.targets.append(target)
                for row in rows:
                    row.aim(target.loss)

    def target(self, task: str) -> Target | None:
        """Return the target of a task, if there is one."""
        return next((target for target in self.targets if target.task == task), None)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what :meth:`save` has written.

        Raises:
          OSError: the file cannot be read.
          ValueError: it holds something else.
        """
        try:
            fields = json.loads(path.read_bytes())
            parts = {
                "rows": Row.of,
                "tried": Row.of,
                "tuning": lambda x: Tuning(**x),
                "targets": lambda x: Target(**x),
            }
            made = {name: [part(x) for x in fields.get(name, [])] for name, part in parts.items()}
            return cls(**(fields | made))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no results of this version: {system.describe(error)}") from error

    def save(self, path: Path) -> None:
        """Write JSON, replacing the file at once."""
        text = json.dumps(_plain(dataclasses.asdict(self)), indent=1, allow_nan=False)
        system.replace(path, text.encode())


@dataclasses.dataclass
class Summary:
    """The rows of one task, optimizer and device count: medians over the seeds."""

    task: str
    optimizer: str
    devices: int
    learning_rate: float
    status: str  # as that of the rows, or "diverged in 1 of 3"
    message: str
    train_devices: int | None
    curvature_devices: int | None
    trained: bool
    reached: int  # number of seeds that reached the target
    seeds: int
    values: dict[str, float | None]  # medians of the numeric fields of the rows

    def __getitem__(self, field: str) -> float | None:
        """Return the median of a field of the rows, None if no row has it."""
        return self.values[field]


_NUMERIC = (
    "compile_seconds",
    "parameter_bytes",
    "base_state_bytes",
    "curvature_state_bytes",
    "optimizer_bytes",
    "temporary_bytes",
    "total_bytes",
    "curvature_device_bytes",
    "traffic_per_step",
    "traffic_per_refresh",
    "eval_seconds",
    "final_loss",
    "test_loss",
    "test_accuracy",
    "test_error",
    "step_seconds_median",
    "step_seconds_p90",
    "step_seconds_p99",
    "step_seconds_max",
    "step_seconds_tail",
    "probe_seconds",
    "refresh_seconds",
    "steps_to_target",
    "seconds_to_target",
)


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Combine the seeds of each task, optimizer and device count."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.optimizer, row.devices), []).append(row)
    return [_summary(*key, group) for key, group in groups.items()]


def _summary(task: str, optimizer: str, devices: int, rows: list[Row]) -> Summary:
    bad = [row for row in rows if row.status in ("diverged", "failed")]
    status = bad[0].status if bad else rows[0].status
    if bad and len(rows) > 1:
        status = f"{status} in {len(bad)} of {len(rows)}"
    values: dict[str, float | None] = {}
    for field in _NUMERIC:
        present = [x for row in rows if (x := getattr(row, field)) is not None]
        values[field] = float(statistics.median(present)) if present else None
    for field in ("steps_to_target", "seconds_to_target"):
        values[field] = median_to_target([getattr(row, field) for row in rows])
    return Summary(
        task=task,
        optimizer=optimizer,
        devices=devices,
        learning_rate=rows[0].learning_rate,
        status=status,
        message=bad[0].message if bad else "",
        train_devices=rows[0].train_devices,
        curvature_devices=rows[0].curvature_devices,
        trained=any(row.trained for row in rows),
        reached=sum(row.steps_to_target is not None for row in rows),
        seeds=len(rows),
        values=values,
    )


def median_to_target(values: Sequence[float | None]) -> float | None:
    """The median of what seeds need to a target; one that never gets there needs infinitely much.

    Example:
      >>> from dho2_optax.poc.results import median_to_target
      >>> median_to_target([6, 20, None]), median_to_target([6, None, None])
      (20.0, None)
    """
    median = statistics.median(math.inf if value is None else float(value) for value in values)
    return median if math.isfinite(median) else None


def _target(task: dict[str, Any], rows: list[Row], given: float | None) -> Target | None:
    name = task["name"]
    if given is not None:
        return Target(name, given, "given with --target")
    if task["target"] is not None:
        return Target(name, task["target"], task["target_reason"])
    done = [s for s in summarize(rows) if s.trained and s["final_loss"] is not None]
    baselines = [s for s in done if not OPTIMIZERS[s.optimizer].hybrid]
    if not done:
        return None
    best = min(baselines or done, key=lambda s: s["final_loss"] or 0.0)  # a number, of all that are done
    kind = "first-order optimizer" if baselines else "optimizer (there is no first-order one)"
    error, accuracy = best["test_error"], best["test_accuracy"]
    worth = [] if error is None else [f"a relative error of {error:.2%}"]
    worth += [] if accuracy is None else [f"a test accuracy of {accuracy:.1%}"]
    origin = (
        f"within 1% of what the best {kind} ends at, {best.optimizer} on {count_devices(best.devices)}"
        + (f", with {' and '.join(worth)}" if worth else "")
        + ": who is there sooner may stop sooner"
    )
    return Target(name, within(best["final_loss"] or 0.0), origin, fixed=False)


def within(loss: float) -> float:
    """Add 1% of slack, for the last digits, which depend on the number of devices."""
    return loss + 0.01 * abs(loss)


def findings(results: Results) -> dict[str, list[str]]:
    """Say in words where each hybrid wins, where it does not, and what memory it needs.

    Returns:
      Sentences under "wins", "does_not_win", "failures" and "memory".
    """
    said: dict[str, list[str]] = {
        "wins": [],
        "does_not_win": [],
        "failures": [],
        "memory": [],
    }
    summaries = summarize(results.rows)
    for task in results.tasks:
        name = task["name"]
        group = [s for s in summaries if s.task == name]
        hybrids = list(dict.fromkeys(s.optimizer for s in group if OPTIMIZERS[s.optimizer].hybrid))
        for optimizer in hybrids:
            for summary in _most_devices(s for s in group if s.optimizer == optimizer and s.trained):
                _compare(task, summary, group, said)
            _memory_finding(name, optimizer, results.rows, said["memory"])
        for summary in group:
            if summary.status.startswith(("diverged", "failed")):
                said["failures"].append(
                    f"{name}: {summary.optimizer} on {count_devices(summary.devices)} "
                    f"{summary.status} at learning rate {summary.learning_rate:g}: "
                    f"{summary.message}."
                )
        said["failures"] += [
            f"{name}: {t.failed} of the {len(t.learning_rates)} runs that tune {t.optimizer} failed: {t.message}."
            for t in results.tuning
            if t.failed and t.task == name
        ]
    return said


def _most_devices(summaries: Iterable[Summary]) -> list[Summary]:
    """Return, as a list of one or none, the summary with the most devices."""
    return sorted(summaries, key=lambda s: s.devices)[-1:]


def _compare(task: dict[str, Any], hybrid: Summary, group: list[Summary], said: dict[str, list[str]]) -> None:
    """Compare a hybrid with the best baseline on the same devices, one quantity at a time."""
    baselines = [s for s in group if s.trained and s.devices == hybrid.devices and not OPTIMIZERS[s.optimizer].hybrid]
    who = f"{task['name']}: {hybrid.optimizer}"

    def best(field: str) -> Summary | None:
        present = [s for s in baselines if s[field] is not None]
        return min(present, key=lambda s: s[field] or 0.0) if present else None

    def lower_is_better(field: str, unit: str, show: Callable[[float], str]) -> None:
        rival = best(field)
        if rival is None or hybrid.status == "failed":
            return
        ours, theirs = hybrid[field], rival[field] or 0.0
        if ours is None:
            if field == "steps_to_target":
                said["does_not_win"].append(
                    f"{who} never reaches the target loss that {rival.optimizer} reaches after {show(theirs)} {unit}."
                )
            return
        tie = TIE_STEPS if unit == "steps" else TIE_SECONDS
        text = f"{show(ours)} against {show(theirs)} {unit} of {rival.optimizer}"
        if ours * tie < theirs:
            gain = f"{theirs / ours:.2f} times " + ("fewer" if unit == "steps" else "less")
            said["wins"].append(f"{who} needs {text} to the target, {gain}.")
        elif theirs * tie < ours:
            loss = f"{ours / theirs:.2f} times " + ("as many" if unit == "steps" else "as much")
            said["does_not_win"].append(f"{who} needs {text} to the target, {loss}.")
        else:
            said["does_not_win"].append(f"{who} needs {text} to the target, a tie.")

    lower_is_better("steps_to_target", "steps", lambda x: f"{x:.0f}")
    lower_is_better("seconds_to_target", "seconds", lambda x: f"{x:.2f}")
    accuracies = [(x, s.optimizer) for s in baselines if (x := s["test_accuracy"]) is not None]
    ours = hybrid["test_accuracy"]
    if accuracies and ours is not None:
        theirs, rival = max(accuracies)
        text = f"{who} ends at {ours:.1%} test accuracy, {rival} at {theirs:.1%}"
        # Two standard errors of the difference between two shares of so many samples.
        noise = 2 * math.sqrt(2 * theirs * (1 - theirs) / task["num_test"])
        if ours > theirs + noise:
            said["wins"].append(f"{text}.")
        elif theirs > ours + noise:
            said["does_not_win"].append(f"{text}.")
        else:
            said["does_not_win"].append(f"{text}: no difference that {task['num_test']:,} samples can show.")
    rival = best("step_seconds_median")
    ours = hybrid["step_seconds_median"]
    if rival is not None and ours is not None:
        ratio = ours / (rival["step_seconds_median"] or math.inf)
        if ratio > TIE_SECONDS:
            extra = {"probe": hybrid["probe_seconds"], "refresh": hybrid["refresh_seconds"]}
            more = [f"{seconds:.2g} s more for each {name}" for name, seconds in extra.items() if seconds]
            pause = f", and {' and '.join(more)}" if more else ""
            said["does_not_win"].append(
                f"{who}'s median step takes {ratio:.1f} times as long as {rival.optimizer}'s{pause}."
            )


def state_sizes(rows: Iterable[Row], task: str, optimizer: str) -> dict[int, int]:
    """Bytes of an optimizer's state on one device, by the number of devices that there were."""
    chosen = (row for row in rows if (row.task, row.optimizer) == (task, optimizer))
    return {row.present_devices: size for row in chosen if (size := row.optimizer_bytes)}


def _memory_finding(task: str, optimizer: str, rows: list[Row], said: list[str]) -> None:
    sizes = state_sizes(rows, task, optimizer)
    if len(sizes) < 2:
        return
    few, many = min(sizes), max(sizes)
    before, after = sizes[few], sizes[many]
    text = (
        f"{task}: {optimizer}'s state takes {megabytes(before)} on {count_devices(few)} and "
        f"{megabytes(after)} on each of {many}: "
    )
    ratio = before / after
    if ratio < 1.05:
        said.append(f"{text}more devices do not shrink it.")
    else:
        said.append(f"{text}{ratio:.2f} times less (the ideal is {many / few:g}).")


def count_devices(count: int) -> str:
    """Write a number of devices.

    Example:
      >>> from dho2_optax.poc.results import count_devices
      >>> count_devices(1), count_devices(8)
      ('1 device', '8 devices')
    """
    return f"{count} device" if count == 1 else f"{count} devices"


def _plain(value: Any) -> Any:
    """Replace what JSON has no word for: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
