"""The command line: `dho2-optax poc` and `dho2-optax plan`.

What needs the extra packages is imported only after the arguments have been read, and nothing
touches a device before the number of virtual devices has been set.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import jax

from dho2_optax import plan_cli
from dho2_optax._version import __version__
from dho2_optax.poc import processes, system
from dho2_optax.poc.optimizers import OPTIMIZERS, default_optimizers

if TYPE_CHECKING:
    from dho2_optax.poc.recording import Recorder
    from dho2_optax.poc.results import Results
    from dho2_optax.poc.runner import Settings
    from dho2_optax.poc.tasks import Task

__all__ = ["main"]

_EXTRA = ("flax", "jinja2", "matplotlib", "orbax", "rich")
_CHECKPOINT_SECONDS = 60.0
_DEFAULT_VIRTUAL_DEVICES = 8  # made, and planned for; trained are fewer where cores are
_MAX_VIRTUAL_DEVICES = 64
_MAX_INTEGER = 2**31 - 1  # steps are counted in 32 bits
_DEFAULT_MODELS = ("pinn", "autoencoder", "cnn")
_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130
_EXIT_TERMINATED = 143
_EXIT_CODES = (
    "Exit codes: 0, all runs ended; 1, a run failed (one that diverged has ended) or a file could not be written; "
    "2, the arguments cannot be used, or the folder holds a report already; 130 after Ctrl-C and 143 after SIGTERM: "
    "the report has what had ended, and --resume goes on."
)


class _UsageError(Exception):
    """Input that cannot be used; the message becomes one line for the user."""


class _Plan(NamedTuple):
    """What is to be run."""

    settings: "Settings"
    tasks: "list[Task]"
    checkpoint_every: float | None
    metrics: Path | None
    tensorboard: Path | None


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments; those of the process by default.

    Returns:
      The exit code: 0 if all runs ended, also those that diverged; 1 if a run failed or a file could not be written;
      2 for arguments that cannot be used, a folder that holds a report among them; 130 after an interrupt (Ctrl-C) and
      143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may have characters that it cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    terminated = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    with system.on_sigterm(interrupt):
        try:
            try:
                options = _parser().parse_args(arguments)
                if options.command == "plan":
                    code = plan_cli.run(options, _start_devices)
                else:
                    code = _poc(options, shlex.join(["dho2-optax", *arguments]))
            finally:
                sys.stdout.flush()
        except (_UsageError, plan_cli.PlanError) as error:
            _complain(str(error))
            return _left(_EXIT_USAGE)
        except OSError as error:
            dropped = _drop_output()
            _complain(f"standard output cannot be written: {system.reason(error)}" if dropped else str(error))
            return _left(_EXIT_FAILED)
        except KeyboardInterrupt:
            print("dho2-optax: interrupted", file=sys.stderr)
            code = _EXIT_INTERRUPTED
    return _left(_EXIT_TERMINATED if terminated and code == _EXIT_INTERRUPTED else code)


def _left(code: int) -> int:
    """The exit code; where something has gone wrong, one of several processes ends here and waits for no other."""
    if code and processes.count() > 1:
        processes.end(code)
    return code


def _complain(message: str) -> None:
    print(f"dho2-optax: error: {system.one_line(message, most=1000)}", file=sys.stderr)


def _drop_output() -> bool:
    """If standard output cannot be written, drop what it holds: Python would try again at its exit.

    It is tried with a line of its own: of a long text that was refused nothing may be held any more.
    """
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dho2-optax", description="Hybrid-order optimization for optax.", epilog=_EXIT_CODES, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"dho2-optax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    poc = commands.add_parser(
        "poc",
        help="train real models with every optimizer and say where a hybrid wins",
        description="Train models with first-order optimizers and hybrids on them, and report updates, seconds, "
        "memory and communication, with a verdict for each model. The defaults take some minutes on two cores.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    what = poc.add_argument_group("what to train")
    what.add_argument(
        "--data",
        metavar="digits|DIR",
        help="the built-in digits (default), or a folder of IDX files or CIFAR-10 binaries",
    )
    what.add_argument(
        "--model",
        type=_names,
        metavar="NAMES",
        help="comma-separated: pinn, mlp, cnn, resnet, autoencoder (default pinn,autoencoder,cnn); "
        "pinn solves a differential equation and needs no data",
    )
    what.add_argument(
        "--task",
        metavar="MODULE:FUNCTION",
        help="in place of these, your own: a function that returns a dho2_optax.poc.tasks.Task",
    )
    _add_training_options(poc)
    _add_process_options(poc)
    _add_report_options(poc)
    plan = commands.add_parser(
        "plan",
        help="say what curvature will cost: memory, bytes, seconds, and which form of refresh to take",
        description="Predict what curvature costs on some devices, from shapes and speeds, and recommend rank, "
        "interval and form of refresh for a budget of time. Trains nothing.",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    plan_cli.add_options(plan)
    return parser


def _add_process_options(poc: argparse.ArgumentParser) -> None:
    several = poc.add_argument_group(
        "several processes", "Not needed where JAX finds them by itself: under Slurm, Open MPI, on Cloud TPU and GKE."
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, which listens there")
    several.add_argument("--num-processes", type=_integer(1), metavar="N", help="started with this command")
    several.add_argument("--process-id", type=_integer(0), metavar="I", help="which this is, from 0")


def _add_report_options(poc: argparse.ArgumentParser) -> None:
    report = poc.add_argument_group("report")
    report.add_argument(
        "--target",
        type=_finite,
        metavar="LOSS",
        help="training loss that counts as done (default: the task's own, or what the best first-order optimizer "
        "ends at)",
    )
    report.add_argument(
        "--out",
        type=Path,
        default=Path("poc-report"),
        metavar="DIR",
        help="default poc-report; of several processes a folder that all see",
    )
    held = report.add_mutually_exclusive_group()
    held.add_argument("--overwrite", action="store_true", help="replace the report that --out holds")
    held.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, with its options, on the devices and in the processes that are left: what "
        "had ended stays, what was cut off goes on from its last checkpoint",
    )
    report.add_argument(
        "--checkpoint-every",
        type=_seconds,
        metavar="SECONDS",
        help=f"default {_CHECKPOINT_SECONDS:g}; Ctrl-C and SIGTERM leave a checkpoint too",
    )
    report.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="write loss, seconds and curvature of every update there as JSON lines, while it runs",
    )
    report.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write them there for TensorBoard, a folder for each run"
    )
    report.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_training_options(poc: argparse.ArgumentParser) -> None:
    how = poc.add_argument_group("how to train it")
    how.add_argument(
        "--optimizers",
        type=_optimizers,
        metavar="NAMES",
        help=f"comma-separated: {', '.join(OPTIMIZERS)} (default {','.join(default_optimizers('pinn'))} for pinn, "
        f"{','.join(default_optimizers('default'))} for others)",
    )
    how.add_argument(
        "--devices",
        type=_integers(1),
        metavar="COUNTS",
        help="comma-separated; every count is trained (default: all accelerators, or virtual devices, one for each "
        f"core; {_DEFAULT_VIRTUAL_DEVICES} are compiled for their memory)",
    )
    how.add_argument(
        "--batch-size",
        type=_integer(1),
        metavar="N",
        help="over all devices (default 1024 for pinn, all its points, and 256 for others, or less if data are few)",
    )
    length = how.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_integer(1), metavar="N", help="default 1000 for pinn, 300 for others")
    length.add_argument("--epochs", type=_integer(1), metavar="N")
    how.add_argument(
        "--lr",
        type=_learning_rates,
        default={},
        metavar="NAME=VALUE,...",
        help="learning rates by optimizer, in place of the defaults",
    )
    how.add_argument(
        "--tune",
        action="store_true",
        help="search a small grid of learning rates first, the same for every optimizer",
    )
    how.add_argument("--seeds", type=_integers(0), default=(0,), metavar="SEEDS", help="default 0")
    how.add_argument("--rank", type=_integer(1), metavar="K", help="default 30 for pinn, 8 for others")
    how.add_argument(
        "--refresh-interval",
        type=_integer(1),
        metavar="STEPS",
        help="steps between refreshes of the curvature (default 100 for pinn, 50 for others)",
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return tuple(dict.fromkeys(names))


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"unknown optimizer {name!r}: choose from {', '.join(OPTIMIZERS)}")
    return name


def _optimizers(text: str) -> tuple[str, ...]:
    return tuple(map(_optimizer, _names(text)))


def _integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        if value > _MAX_INTEGER:
            raise argparse.ArgumentTypeError(f"expected a whole number of at most {_MAX_INTEGER}, got {text!r}")
        return value

    return parse


def _integers(minimum: int) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(_integer(minimum)(part.strip()) for part in text.split(",")))

    return parse


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def _seconds(text: str) -> float:
    value = _finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _learning_rates(text: str) -> dict[str, float]:
    rates = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals):
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {part!r}")
        rate = _finite(value)
        if rate <= 0:
            raise argparse.ArgumentTypeError(f"a learning rate must be positive, got {part!r}")
        rates[_optimizer(name.strip())] = rate
    return rates


def _poc(options: argparse.Namespace, command: str) -> int:
    """Check everything that can be checked, then run."""
    if (said := system.missing("poc", *_EXTRA)) is not None:
        raise _UsageError(said)
    if options.resume:
        _check_resume(options)
    plan = _resumed(options) if options.resume else _plan(options, command)
    from rich.console import Console

    from dho2_optax.poc import runner

    first = processes.is_first()
    console = Console(quiet=options.quiet or not first, emoji=False)
    out = contextlib.nullcontext(options.out)
    if first:
        out = _output_folder(options.out, overwrite=options.overwrite, resume=options.resume)
    with out as folder, contextlib.ExitStack() as stack:
        earlier = _earlier(folder) if options.resume else None  # again: another run may have had the folder till now
        processes.any_of()  # all have read it before the first writes, and that one has made the folder
        if not folder.is_dir():
            raise _UsageError(f"--out {folder}: not the folder of the first process; give one that all processes see")
        given = (options.checkpoint_every, plan.checkpoint_every, _CHECKPOINT_SECONDS)
        every = next(seconds for seconds in given if seconds is not None)
        recorder = _recorder(plan, options, first=first)
        if recorder is not None:
            stack.callback(recorder.close)
        results = runner.run(
            plan.settings, plan.tasks, folder, console, earlier=earlier, checkpoint_every=every, recorder=recorder
        )
    console.print(f"\nReport: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    failed = results.num_failed
    if failed and first:
        sys.stdout.flush()
        _complain(f"{failed} run{'s' * (failed > 1)} failed: {folder / 'report.html'} says why")
    if results.status == "interrupted":
        return _EXIT_INTERRUPTED
    return _EXIT_FAILED if failed else 0


def _plan(options: argparse.Namespace, command: str) -> "_Plan":
    """Check what can be checked before anything is written."""
    available, num_processes = _join(options)
    trained = options.devices or (num_processes * _default_devices(available // num_processes),)
    if max(trained) > available:
        raise _UsageError(f"--devices {max(trained)}: there are only {available} devices")
    tasks = _tasks(options)
    chosen = {task.name: options.optimizers or default_optimizers(task.name) for task in tasks}
    optimizers = options.optimizers or tuple(name for name in OPTIMIZERS if any(name in c for c in chosen.values()))
    for name in options.lr:
        if name not in optimizers:
            raise _UsageError(f"--lr {name}: that optimizer is not among --optimizers")
    batch_size = {task.name: _batch_size(options, task, trained) for task in tasks}
    steps = {task.name: options.steps or task.num_steps for task in tasks}
    if options.epochs:
        steps = {task.name: options.epochs * (task.num_train // batch_size[task.name]) for task in tasks}

    from dho2_optax.poc import runner

    settings = runner.Settings(
        data=next(name for name in (options.task, options.data, "digits") if name is not None),
        optimizers=optimizers,
        chosen=chosen,
        devices=trained,
        compiled_devices=()
        if options.devices or num_processes > 1
        else _planned(trained[0], available, batch_size.values()),
        batch_size=batch_size,
        num_steps=steps,
        target=options.target,
        learning_rates=options.lr,
        tune=options.tune,
        seeds=options.seeds,
        rank={task.name: options.rank or task.rank for task in tasks},
        refresh_interval={task.name: options.refresh_interval or task.refresh_interval for task in tasks},
        command=command,
    )
    return _Plan(settings, tasks, options.checkpoint_every, options.metrics, options.tensorboard)


def _recorder(plan: "_Plan", options: argparse.Namespace, *, first: bool) -> "Recorder | None":
    """What writes every update; in all processes but the first, for the same program, to nowhere."""
    if plan.metrics is None and plan.tensorboard is None:
        return None
    from dho2_optax.poc.recording import Recorder

    if not first:
        return Recorder(None, None)
    if plan.tensorboard is not None and (said := system.missing("monitor", "tensorboardX")) is not None:
        raise _UsageError(said)
    for name, path in (("metrics", plan.metrics), ("tensorboard", plan.tensorboard)):
        if path is None:
            continue
        try:
            held = path.exists() and (path.is_file() or any(path.iterdir()))
            if name == "tensorboard":
                path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise _UsageError(f"--{name} {path} cannot be written: {system.reason(error)}") from error
        if held and not (options.overwrite or options.resume):
            raise _UsageError(f"--{name} {path} is there already: give --overwrite to replace it, or another --{name}")
    try:
        return Recorder(plan.metrics, plan.tensorboard, resume=options.resume)
    except (OSError, ValueError) as error:
        raise _UsageError(f"--metrics {plan.metrics} cannot be written: {system.reason(error)}") from error


def _check_resume(options: argparse.Namespace) -> None:
    """Refuse what is no run, and options of the run that goes on: it has its own."""
    if not (options.out / "results.json").exists():
        raise _UsageError(f"--resume: there is no run in {options.out}")
    free = ("command", "out", "resume", "quiet", "checkpoint_every", "coordinator", "num_processes", "process_id")
    defaults = _parser().parse_args(["poc"])
    for name, value in vars(options).items():
        if name not in free and value != getattr(defaults, name):
            raise _UsageError(f"--resume goes on with the options of the run in --out: drop --{name.replace('_', '-')}")


def _earlier(folder: Path) -> "Results":
    """The results of the run that is to go on."""
    from dho2_optax.poc.results import Results

    try:
        return Results.load(folder / "results.json")
    except (OSError, ValueError) as error:
        raise _UsageError(f"--resume: {system.reason(error)}") from error


def _resumed(options: argparse.Namespace) -> "_Plan":
    """What the run was to do, on the devices and in the processes that there are."""
    from dho2_optax.poc import runner

    earlier = _earlier(options.out)
    try:
        settings = runner.Settings.of(earlier.settings)
        _, *arguments = shlex.split(settings.command)
    except (TypeError, ValueError, KeyError) as error:
        raise _UsageError(f"--resume: the settings are not of this version: {system.describe(error)}") from error
    _, num_processes = _join(options, max((*settings.devices, *settings.compiled_devices)))
    if num_processes > 1:
        settings = dataclasses.replace(settings, compiled_devices=())
        for size in settings.batch_size.values():
            if num_processes > min(settings.devices) or size % num_processes:
                raise _UsageError(
                    f"--resume: {num_processes} processes cannot share {min(settings.devices)} devices and batches of "
                    f"{size}: start no more than the first, and as many as divide the second"
                )
    options = _parser().parse_args(arguments)
    tasks = _tasks(options)
    for name in settings.optimizers:
        if name not in OPTIMIZERS:
            raise _UsageError(f"--resume: unknown optimizer {name!r}")
    if [task.name for task in tasks] != [task["name"] for task in earlier.tasks]:
        raise _UsageError("--resume: the tasks are not those of the run")
    return _Plan(settings, tasks, options.checkpoint_every, options.metrics, options.tensorboard)


def _join(options: argparse.Namespace, most: int = _DEFAULT_VIRTUAL_DEVICES) -> tuple[int, int]:
    """Join the other processes, if there are any; return the device count and that of the processes.

    Of CPU there will be as many devices as `options` says, or else `most`, rounded up to as many in each process.
    """
    where = (options.coordinator, options.num_processes, options.process_id)
    try:
        number = processes.number(*where)
        wanted = options.devices or (number * -(-most // number),)
        local = processes.local_devices(wanted, number)
        if number > 1:
            processes.join(*where)
    except processes.ProcessError as error:
        raise _UsageError(str(error)) from error
    return _start_devices(local), number


def _start_devices(wanted: int) -> int:
    """Make enough virtual CPU devices, unless there are accelerators; return the device count."""
    with _no_device_is_one_line():
        if wanted > _MAX_VIRTUAL_DEVICES and jax.default_backend() == "cpu":
            raise _UsageError(f"--devices {wanted}: at most {_MAX_VIRTUAL_DEVICES} virtual CPU devices")
    # With fewer threads than this, programs with collectives can wait for each other for ever.
    os.environ.setdefault("PJRT_NPROC", str(max(32, 2 * wanted)))
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and "JAX_NUM_CPU_DEVICES" not in os.environ:
        # If the backend has started, its devices are what there is.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
    with _no_device_is_one_line():
        return jax.device_count()


@contextlib.contextmanager
def _no_device_is_one_line() -> Iterator[None]:
    try:
        yield
    except (AssertionError, RuntimeError) as error:  # jax asserts that a platform that is asked for is there
        raise _UsageError(system.no_device(error)) from error


def _default_devices(available: int) -> int:
    """All accelerators; or virtual devices, as many as there are cores, so that each has one, and a power of two."""
    if jax.default_backend() != "cpu":
        return available
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 ** (min(cores, available).bit_length() - 1)


def _tasks(options: argparse.Namespace) -> list["Task"]:
    from dho2_optax.poc import data, models, tasks

    names = options.model or tuple(n for n in _DEFAULT_MODELS if options.data is None or n != models.PINN)
    try:
        if options.task is not None:
            if options.model is not None or options.data is not None:
                raise _UsageError("--task brings its own model and data: drop --model and --data")
            return [tasks.from_function(options.task)]
        for name in names:
            tasks.check_model(name)
    except tasks.TaskError as error:
        raise _UsageError(str(error)) from error
    if models.PINN in names and options.data is not None:
        raise _UsageError("--model pinn solves an equation and reads no data: drop it or --data")
    try:
        dataset = None if names == (models.PINN,) else data.load("digits" if options.data is None else options.data)
    except data.DataError as error:
        raise _UsageError(str(error)) from error
    return [
        tasks.pinn(*([options.batch_size] if options.batch_size else []))
        if dataset is None or name == models.PINN
        else tasks.from_dataset(name, dataset)
        for name in names
    ]


def _batch_size(options: argparse.Namespace, task: "Task", devices: Sequence[int]) -> int:
    """Return a batch size that every device count divides."""
    if options.batch_size is None:
        multiple, most = math.lcm(*devices), min(task.batch_size, task.num_train)
        size = most // multiple * multiple
        if not size:
            raise _UsageError(
                f"no batch of at most {most} of the {task.num_train} training samples of {task.name} divides over "
                f"{', '.join(map(str, devices))} devices: give --batch-size"
            )
        return size
    size = options.batch_size
    if size > task.num_train:
        raise _UsageError(f"--batch-size {size}: there are only {task.num_train} training samples")
    for count in devices:
        if size % count:
            raise _UsageError(f"--batch-size {size} does not divide over {count} devices")
    return size


def _planned(trained: int, available: int, batch_sizes: Iterable[int]) -> tuple[int, ...]:
    """Return another device count whose memory and communication are shown: all devices, or one if all are trained."""
    other = available if trained < available else 1
    return (other,) if other != trained and not any(size % other for size in batch_sizes) else ()


@contextlib.contextmanager
def _output_folder(folder: Path, *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """Make the folder of the report and keep it to this run."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(tempfile.TemporaryFile(dir=folder))  # shows that files can be made there
            stack.enter_context(system.locked(folder))
            held = [name for name in ("results.json", "report.html") if (folder / name).exists()]
        except BlockingIOError as error:
            raise _UsageError(f"--out {folder}: another run writes there; give another --out") from error
        except (OSError, ValueError) as error:
            raise _UsageError(f"--out {folder} cannot be written: {system.reason(error)}") from error
        if held and not (overwrite or resume):
            raise _UsageError(
                f"--out {folder} holds {held[0]} of an earlier run: give --overwrite to replace it, or another --out"
            )
        yield folder
