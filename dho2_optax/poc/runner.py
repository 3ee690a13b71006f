"""All runs of a proof of concept, one after the other, saved after each."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import dho2_optax
from dho2_optax.poc import processes, report, system
from dho2_optax.poc.models import num_parameters
from dho2_optax.poc.optimizers import OPTIMIZERS, learning_rate
from dho2_optax.poc.recording import Record, Recorder, RecordError
from dho2_optax.poc.results import Results, Row, Tuning, count_devices
from dho2_optax.poc.saving import CheckpointError, Checkpoints
from dho2_optax.poc.tasks import Task
from dho2_optax.poc.training import Evaluator, Program, Spec, compile_program, train

__all__ = ["Settings", "run"]

_Result = TypeVar("_Result")

_GRID = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the learning rate that would be used without tuning
_CHECKPOINTS = "poc-checkpoints"  # of the runs that are not over, in the folder of the report
_WIDER = {"low": (0.01, 0.03), "high": (30.0, 100.0)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was asked for, checked and complete."""

    data: str
    optimizers: tuple[str, ...]  # in the order of the report
    chosen: Mapping[str, tuple[str, ...]]  # of these, by task
    devices: tuple[int, ...]  # trained
    compiled_devices: tuple[int, ...]  # only compiled, for memory and communication
    batch_size: Mapping[str, int]  # by task
    num_steps: Mapping[str, int]  # by task
    target: float | None
    learning_rates: Mapping[str, float]  # in place of the defaults
    tune: bool
    seeds: tuple[int, ...]
    rank: Mapping[str, int]  # by task
    refresh_interval: Mapping[str, int]  # by task
    command: str

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Settings":
        """Those that :class:`Results` hold, read from JSON, which has no tuples."""
        made: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
        made["chosen"] = {task: tuple(names) for task, names in fields["chosen"].items()}
        return cls(**made)


def run(
    settings: Settings,
    tasks: Sequence[Task],
    folder: Path,
    console: Console,
    *,
    earlier: Results | None = None,
    checkpoint_every: float = math.inf,
    recorder: Recorder | None = None,
) -> Results:
    """Train every optimizer on every task and device count, and write the report.

    `results.json` is replaced after every run. On an interrupt (Ctrl-C) what has finished is
    reported, with the status "interrupted", and the run that was under way saved. The tables are printed even if a file
    cannot be written.

    Args:
      settings: what to run.
      tasks: what to train.
      folder: an existing folder for the report.
      console: for progress and tables.
      earlier: results of these settings that are not complete: their runs are not made again, and the one that was cut
        off goes on from its last checkpoint. Where there are fewer devices now, it does so on those.
      checkpoint_every: seconds between two checkpoints of a run.
      recorder: writes what every update measures.

    Returns:
      The results; a run that diverged or failed is a row with that status.

    Raises:
      OSError: a file cannot be written.
    """
    machine = _machine()
    if earlier is None:
        if processes.is_first():  # the others look there when all have made a step together
            shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
        results = Results(machine, dataclasses.asdict(settings), [_describe(task) for task in tasks])
    else:
        results = earlier
        results.status = "running"
        results.move_to(machine)
        # What failed may go well now, and what was tuned without it otherwise.
        results.rows, results.tried = (
            [row for row in rows if row.status != "failed"] for rows in (results.rows, results.tried)
        )
        results.tuning = [search for search in results.tuning if not search.failed]
    session = _Session(settings, results, folder, console, checkpoint_every, recorder)
    try:
        try:
            session.save()
            with session.progress:
                for task in tasks:
                    session.run_task(task)
            results.status = "complete"
        except KeyboardInterrupt:
            results.status = "interrupted"
        with system.on_sigterm(signal.SIG_IGN):  # some senders repeat it at once
            session.save()
            if processes.is_first():
                report.write_html(results, folder)
        if processes.is_first() and not results.num_failed and results.status == "complete":
            shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    finally:
        report.print_tables(results, console)
    return results


class _Session:
    """The state of a proof of concept while it runs."""

    def __init__(
        self,
        settings: Settings,
        results: Results,
        folder: Path,
        console: Console,
        checkpoint_every: float,
        recorder: Recorder | None,
    ) -> None:
        self._begin = time.perf_counter() - results.seconds
        self._checkpoint_every = checkpoint_every
        self._recorder = recorder
        self._settings = settings
        self._results = results
        self._programs: dict[tuple[str, Spec], Program] = {}  # of the tuning, by task and what was compiled
        self._folder = folder
        self._console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            refresh_per_second=4,
            transient=True,
        )
        counts = len(settings.devices) * len(settings.seeds) + len(settings.compiled_devices)
        counts += len(_GRID) if settings.tune else 0
        runs = sum(map(len, settings.chosen.values())) * counts
        done = len(results.rows) + len(results.tried)
        self._all = self.progress.add_task("all runs", total=runs, completed=done, note="")
        self._one = self.progress.add_task("this run", total=max(settings.num_steps.values()), note="")

    def save(self) -> None:
        """Measure every row against the targets so far, and write `results.json`."""
        self._results.aim(self._settings.target)
        self._results.seconds = time.perf_counter() - self._begin
        if processes.is_first():
            self._results.save(self._folder / "results.json")

    def run_task(self, task: Task) -> None:
        """Train every optimizer on a task; then compile what is only compiled."""
        settings, evaluate = self._settings, Evaluator(task)
        self._programs.clear()
        rates = {name: self._learning_rate(task, name, evaluate) for name in settings.chosen[task.name]}
        rows = self._results.rows
        # Runs at a rate that is no longer the best one, once what had failed was tried again.
        rows[:] = [row for row in rows if row.task != task.name or row.learning_rate == rates[row.optimizer]]
        for devices in settings.devices:
            for name, rate in rates.items():
                for row in self._train(task, self._spec(task, name, rate, devices), settings.seeds, evaluate, rows):
                    self._log(row, "")
        specs = [
            self._spec(task, name, rate, devices)
            for devices in settings.compiled_devices
            for name, rate in rates.items()
            if devices <= jax.device_count()
        ]
        specs = [spec for spec in specs if _missing(rows, task, spec, [None])]
        # Nothing is timed any more, so these may share the cores.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            try:
                for row in pool.map(lambda spec: self._plan(task, spec), specs):
                    self._add(row, rows)
                    self._log(row, "")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _learning_rate(self, task: Task, name: str, evaluate: Evaluator) -> float:
        default = learning_rate(name, task.name)
        start = self._settings.learning_rates.get(name, default)
        if not self._settings.tune:
            return start
        for search in self._results.tuning:
            if (search.task, search.optimizer) == (task.name, name):
                return start if search.chosen is None else search.chosen
        return self._tune(task, name, start, evaluate)

    def _tune(self, task: Task, name: str, start: float, evaluate: Evaluator) -> float:
        """Try a grid of learning rates; widen it once if the best is at its edge.

        The best is the first at the target, where that is known before the runs, or else ends lowest.
        """
        rows: dict[float, Row] = {}
        tried = self._results.tried
        target = task.target if self._settings.target is None else self._settings.target

        def search(factors: Sequence[float]) -> None:
            for factor in factors:
                spec = self._spec(task, name, _round(start * factor), max(self._settings.devices))
                for row in self._train(task, spec, self._settings.seeds[:1], evaluate, tried):
                    self._log(row, "tuning")
            rows.update({row.learning_rate: row for row in tried if (row.task, row.optimizer) == (task.name, name)})

        def steps(rate: float) -> int | None:
            return None if target is None else rows[rate].reach(target)[0]

        def rank(rate: float) -> tuple[float, float]:
            reached, final = steps(rate), rows[rate].final_loss
            return math.inf if reached is None else reached, math.inf if final is None else final

        def best() -> float:
            return min(rows, key=rank)

        def found() -> bool:
            return rows[best()].final_loss is not None

        search(_GRID)
        # At the edge of the grid itself: beyond it there may be runs of an earlier search, which was not over.
        grid = [_round(start * factor) for factor in _GRID]
        edge = min(grid, key=rank)
        if edge in (grid[0], grid[-1]) and rows[edge].final_loss is not None:
            self.progress.update(self._all, total=self._total() + len(_WIDER["low"]))
            search(_WIDER["low" if edge == grid[0] else "high"])
        rates = sorted(rows)
        failures = [row.message for row in rows.values() if row.status == "failed"]
        self._results.tuning.append(
            Tuning(
                task=task.name,
                optimizer=name,
                learning_rates=rates,
                final_losses=[rows[rate].final_loss for rate in rates],
                steps_to_target=[steps(rate) for rate in rates],
                chosen=best() if found() else None,
                widened=len(rates) > len(grid),
                at_edge=found() and best() in (rates[0], rates[-1]),
                failed=len(failures),
                message=failures[0] if failures else "",
            )
        )
        self.save()
        return best() if found() else start

    def _spec(self, task: Task, name: str, learning_rate: float, devices: int) -> Spec:
        return Spec(
            optimizer=name,
            learning_rate=learning_rate,
            num_devices=devices,
            batch_size=self._settings.batch_size[task.name],
            num_steps=self._settings.num_steps[task.name],
            rank=self._settings.rank[task.name],
            refresh_interval=self._settings.refresh_interval[task.name],
            recorded=self._recorder is not None,
        )

    def _compile(self, task: Task, spec: Spec, *, to_run: bool = True) -> tuple[Row, Program | None]:
        """Compile a program; a failure becomes the row's status."""
        name, devices = spec.optimizer, spec.num_devices
        row = Row(task.name, name, devices, None, spec.learning_rate, "compiled")
        left = _devices_left(devices, spec.batch_size)
        if left < OPTIMIZERS[name].min_devices:
            row.status = f"needs {count_devices(OPTIMIZERS[name].min_devices)}"
            return row, None
        if OPTIMIZERS[name].group is not None and processes.count() > 1:
            row.status = "needs one process"
            return row, None
        note = f"{task.name} {name}, {count_devices(devices)}: compiling"
        self.progress.update(self._one, completed=0, total=spec.num_steps, note=note)
        row.devices_left = None if left == devices else left
        spec = dataclasses.replace(spec, num_devices=left)
        program = _attempt(row, lambda: self._program(task, spec, to_run=to_run))
        if program is not None:
            row.compile_seconds = program.compile_seconds
            row.curvature_devices = len(program.context.curvature_devices)
            row.train_devices = program.context.mesh.size
            footprint = program.footprint
            row.parameter_bytes = footprint.parameters
            row.base_state_bytes = footprint.base_state
            row.curvature_state_bytes = footprint.curvature_state
            row.temporary_bytes = footprint.temporaries
            row.total_bytes = footprint.total
            row.traffic_per_step = footprint.traffic_per_step
            row.curvature_device_bytes = footprint.curvature_device
        return row, program

    def _program(self, task: Task, spec: Spec, *, to_run: bool) -> Program:
        """Compile a program; those of a tuning are kept, since they serve every learning rate."""
        key = (task.name, dataclasses.replace(spec, learning_rate=0.0))
        if to_run and self._settings.tune:
            if key not in self._programs:
                self._programs[key] = compile_program(task, spec)
            return dataclasses.replace(self._programs[key], spec=spec)
        return compile_program(task, spec, to_run=to_run)

    def _plan(self, task: Task, spec: Spec) -> Row:
        """Compile a program for its memory and communication alone."""
        row, _ = self._compile(task, spec, to_run=False)
        row.compile_seconds = None  # it says nothing about a program that runs
        return row

    def _train(
        self, task: Task, spec: Spec, seeds: Sequence[int], evaluate: Evaluator, rows: list[Row]
    ) -> Iterator[Row]:
        """Compile once, train from every seed that `rows` lacks, and yield each new row once it is saved."""
        missing = _missing(rows, task, spec, seeds)
        if not missing:
            return
        compiled, program = self._compile(task, spec)
        for seed in missing:
            row = dataclasses.replace(compiled, seed=seed)
            if program is None or seed is None:
                self._add(row, rows)
            else:
                tuning = rows is self._results.tried
                name = self._name(task, row, tuning=tuning)
                checkpoints = Checkpoints(self._folder / _CHECKPOINTS / name, self._checkpoint_every)
                recorder = self._recorder
                recording = recorder.of(row, name, tuning=tuning) if recorder else contextlib.nullcontext()
                try:
                    with recording as record:
                        self._train_seed(task, program, row, seed, evaluate, checkpoints, record)
                finally:
                    checkpoints.close()
                self._add(row, rows)
                if row.status != "failed":
                    checkpoints.discard()
            yield row

    def _name(self, task: Task, row: Row, *, tuning: bool) -> str:
        """Of the folder of a run: of a task its place, since its name may hold any character."""
        place = [known["name"] for known in self._results.tasks].index(task.name)
        what = "tuning" if tuning else "run"
        return f"{place}-{row.optimizer}-{row.devices}-{row.learning_rate:g}-{row.seed}-{what}"

    def _train_seed(
        self,
        task: Task,
        program: Program,
        row: Row,
        seed: int,
        evaluate: Evaluator,
        checkpoints: Checkpoints,
        record: Record | None,
    ) -> None:
        """Train from one seed and fill in the row."""
        label = f"{task.name} {row.optimizer}, {count_devices(row.devices)}"

        def show(step: int, loss: float) -> None:
            note = f"{label}: loss {loss:.4g}"
            self.progress.update(self._one, completed=step + 1, note=note)

        measured = _attempt(row, lambda: train(task, program, seed, evaluate, show, checkpoints, record))
        if measured is None:
            return
        row.status = measured.status
        row.losses, row.seconds = measured.losses, measured.seconds
        row.refresh_steps, row.probe_steps = measured.refresh_steps, measured.probe_steps
        row.counters, row.taken_up = measured.counters, measured.taken_up
        row.looks, row.alarms = measured.looks, measured.alarms
        row.test_loss, row.test_accuracy = measured.test_loss, measured.test_accuracy
        row.test_error = measured.test_error
        row.eval_seconds = measured.eval_seconds
        if row.status == "diverged":
            row.message = f"loss not finite after {len(row.losses)} steps"
        # What goes from one group of devices to another is in no program.
        if row.refresh_steps and not row.curvature_devices:
            count, footprint = len(row.refresh_steps), program.footprint
            # Where steps of their own make the products, what branches send is theirs, but for a few numbers.
            parts = (len(row.probe_steps) or count) / count
            matvecs = row.counters["matvecs"] / count
            row.traffic_per_refresh = parts * footprint.traffic_per_refresh + matvecs * footprint.traffic_per_matvec
        row.measure()

    def _add(self, row: Row, rows: list[Row]) -> None:
        rows.append(row)
        self.save()

    def _log(self, row: Row, prefix: str) -> None:
        """Print one line for a finished run."""
        self.progress.advance(self._all)
        seed = f", seed {row.seed}" if row.seed is not None else ""
        where = f"{prefix} {row.task} {row.optimizer}, {count_devices(row.devices)}{seed}".strip()
        rate = f"lr {row.learning_rate:g}"
        if row.status == "ok":
            milliseconds = 1e3 * (row.step_seconds_median or 0.0)
            text = f"{where}: {rate}, loss {row.final_loss:.4g}, {milliseconds:.1f} ms/step"
        elif row.status == "compiled":
            text = f"{where}: compiled only"
        else:
            text = f"{where}: {rate}, {row.status}" + (f" ({row.message})" if row.message else "")
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _total(self) -> float:
        return self.progress.tasks[0].total or 0.0


def _attempt(row: Row, action: Callable[[], _Result]) -> _Result | None:
    """Run one part of a run; an exception marks its row and nothing else, unless it is the disk that failed."""
    try:
        return action()
    except (CheckpointError, RecordError):
        raise
    except Exception as error:
        processes.check(error)
        row.status, row.message = "failed", system.describe(error)
        return None


def _missing(rows: list[Row], task: Task, spec: Spec, seeds: Sequence[int | None]) -> list[int | None]:
    """Those of some seeds of which there is no row yet."""
    run = (task.name, spec.optimizer, spec.num_devices, spec.learning_rate)
    known = {row.seed for row in rows if (row.task, row.optimizer, row.devices, row.learning_rate) == run}
    return [seed for seed in seeds if seed not in known]


def _devices_left(wanted: int, batch_size: int) -> int:
    """As many devices as are wanted or, where there are fewer, as can share a batch; as many of each process."""
    each = processes.count()
    counts = range(min(wanted, jax.device_count()) // each * each, 0, -each)
    return next(n for n in counts if n == wanted or batch_size % n == 0)


def _round(rate: float) -> float:
    """Round to three significant digits, for a grid that can be read."""
    return float(f"{rate:.3g}")


def _describe(task: Task) -> dict[str, Any]:
    params = jax.eval_shape(task.init, jax.random.key(0))
    return {
        "name": task.name,
        "num_parameters": num_parameters(params),
        "num_train": task.num_train,
        "num_test": task.num_test,
        "target": task.target,
        "target_reason": task.target_reason,
    }


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": processes.count(),
        "virtual_devices": device.platform == "cpu" and jax.device_count() > 1,
        "versions": {
            "dho2_optax": dho2_optax.__version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "optax", "flax", "numpy")},
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the git commit of the package, None if it is installed without one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
