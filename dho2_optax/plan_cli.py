"""The command `dho2-optax plan`: its options, and how it prints a plan.

What the proof of concept needs is imported only for `--model`, and devices are not touched before they are needed.
"""

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dho2_optax import hardware, planner
from dho2_optax.poc import system

_EXTRA = ("flax", "rich")


class PlanError(ValueError):
    """Options that cannot be used; the message becomes one line for the user."""


class _Work(NamedTuple):
    """What is to be planned for."""

    params: Any
    loss_fn: Callable[..., Any] | None = None
    batch: Any = None
    batch_size: int | None = None
    rank: int | None = None
    interval: int | None = None


def add_options(plan: argparse.ArgumentParser) -> None:
    """Adds the options of the command to its parser."""
    what = plan.add_argument_group("what is trained (one of the three)").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        metavar="NAME",
        help="of the proof of concept: pinn, mlp, cnn, resnet, autoencoder, on the built-in digits; with the work of "
        "its gradient, and its own batch, rank and interval",
    )
    what.add_argument("--params", type=_count, metavar="N", help="how many numbers the parameters are: 125e6, say")
    what.add_argument("--shapes", type=_shapes, metavar="SHAPES", help="of the parameters: 784x1024,1024,1024x10,10")
    where = plan.add_argument_group("where")
    where.add_argument("--devices", type=int, default=1, metavar="N", help="over which the state is split (default 1)")
    where.add_argument(
        "--hardware",
        metavar="NAME",
        help=f"published speeds: {', '.join(hardware.HARDWARE)} (default: those of this machine's devices)",
    )
    where.add_argument(
        "--network",
        type=_network,
        metavar="SPEED",
        help=f"between hosts of eight GPUs: {', '.join(hardware.NETWORKS)}, or bytes a second",
    )
    where.add_argument(
        "--measure",
        action="store_true",
        help="in place of published speeds, those of this machine, from a few small runs; the memory of --hardware",
    )
    how = plan.add_argument_group("how; what is left out is recommended")
    how.add_argument("--batch-size", type=int, metavar="N", help="over all devices (default 256, or the model's)")
    how.add_argument("--rank", type=int, metavar="K", help="eigenpairs")
    how.add_argument("--order", type=int, metavar="M", help="products in a refresh (default twice the rank)")
    how.add_argument("--interval", type=int, metavar="STEPS", help="updates between two refreshes")
    how.add_argument(
        "--curvature-batch", type=int, metavar="N", help="samples of products, over all devices (default an eighth)"
    )
    how.add_argument(
        "--curvature-devices", type=int, metavar="N", help="of a CurvatureGroup (default: as many as keep up)"
    )
    how.add_argument(
        "--budget", type=float, default=0.1, metavar="SHARE", help="of the time, that curvature may take (default 0.1)"
    )
    how.add_argument(
        "--sample-flops",
        type=float,
        metavar="N",
        help="operations of the gradient of a sample (default 6 for each parameter, or what XLA counts for --model)",
    )
    how.add_argument(
        "--sample-bytes", type=float, default=0.0, metavar="N", help="of a sample's activations (default 0)"
    )
    how.add_argument(
        "--base-vectors", type=int, default=2, metavar="N", help="vectors in the state of the base (default 2, Adam)"
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(options: argparse.Namespace, start_devices: Callable[[int], int]) -> int:
    """Makes a plan and prints it.

    Args:
      options: of the command line.
      start_devices: makes as many virtual devices, where there are no others, and says how many there are.

    Raises:
      PlanError: for options that cannot be used.
    """
    try:
        found = _made(options, start_devices)
    except ValueError as error:
        raise PlanError(str(error)) from error
    except AssertionError as error:  # of jax, where the platform that is asked for is not there
        raise PlanError(system.no_device(error)) from error
    except (MemoryError, OverflowError, RuntimeError) as error:
        raise PlanError(system.describe(error)) from error
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    elif importlib.util.find_spec("rich") is None:
        print(found)
    else:
        _show(found)
    return 0


def _made(options: argparse.Namespace, start_devices: Callable[[int], int]) -> planner.Plan:
    if options.devices < 1:
        raise PlanError(f"`devices` must be positive, got {options.devices}.")
    if options.hardware is not None and options.hardware not in hardware.HARDWARE:
        raise PlanError(f"--hardware {options.hardware}: choose from {', '.join(hardware.HARDWARE)}")
    if options.measure:
        available = start_devices(options.devices)
        if options.devices > available:
            raise PlanError(f"--devices {options.devices}: there are only {available} devices to measure")
    work = _work(options)
    batch_size = 256 if work.batch_size is None else work.batch_size
    batch_size = batch_size // options.devices * options.devices if options.batch_size is None else options.batch_size
    flops = options.sample_flops
    if flops is None and work.loss_fn is not None:
        flops = hardware.sample_flops(work.loss_fn, work.params, work.batch) or None
    kind: hardware.Hardware | str | None = options.hardware
    if options.measure:
        kind = _measured(options, work, batch_size)
    return planner.plan(
        work.params,
        batch_size=batch_size,
        devices=options.devices,
        hardware=kind,
        network=options.network,
        rank=work.rank if options.rank is None else options.rank,
        order=options.order,
        interval=work.interval if options.interval is None else options.interval,
        curvature_batch="auto" if options.curvature_batch is None else options.curvature_batch,
        curvature_devices=options.curvature_devices,
        budget=options.budget,
        sample_flops=flops,
        sample_bytes=options.sample_bytes,
        base_vectors=options.base_vectors,
    )


def _measured(options: argparse.Namespace, work: _Work, batch_size: int) -> hardware.Hardware:
    """This machine, with the batch that is asked for."""
    if batch_size < options.devices or batch_size % options.devices:
        raise PlanError(f"`batch_size` must be a multiple of the {options.devices} devices, got {batch_size}.")
    params, loss_fn, batch = work.params, work.loss_fn, work.batch
    if isinstance(params, int):
        side = max(round(params**0.5), 1)
        params = {"w": jax.ShapeDtypeStruct((side, side), "float32")}
    elif isinstance(params, list):
        params = [jax.ShapeDtypeStruct(shape, "float32") for shape in params]
    if loss_fn is None:
        loss_fn, batch = hardware.stand_in, jax.numpy.linspace(-1, 1, batch_size)
    else:
        batch = jax.tree.map(lambda x: jax.numpy.resize(x, (batch_size, *x.shape[1:])), batch)
    found = hardware.measure(params, loss_fn, batch, devices=options.devices, rank=options.rank or 8)
    if options.hardware is not None:
        found = dataclasses.replace(found, memory=hardware.HARDWARE[options.hardware].memory)
    return found


def _work(options: argparse.Namespace) -> _Work:
    if options.model is None:
        return _Work(options.params if options.shapes is None else options.shapes)
    if (said := system.missing("poc", *_EXTRA)) is not None:
        raise PlanError(said)
    from dho2_optax.poc import data, models, tasks

    tasks.check_model(options.model)
    task = tasks.pinn() if options.model == models.PINN else tasks.from_dataset(options.model, data.load("digits"))
    params = task.init(jax.random.key(0)) if options.measure else jax.eval_shape(task.init, jax.random.key(0))
    size = min(task.batch_size, task.num_train)
    batch = {name: jax.numpy.asarray(x[:size]) for name, x in task.train.items()}
    return _Work(params, task.loss_fn, batch, size, task.rank, task.refresh_interval)


def _show(found: planner.Plan) -> None:
    """Two tables: the plan, and the forms that were compared."""
    from rich.console import Console
    from rich.table import Table

    console = Console(emoji=False, highlight=False, markup=False)
    table = Table(show_header=False, box=None)
    for name, text in planner.summary(found):
        table.add_row(name, text)
    console.print(table)
    forms = Table(title="forms of refresh", title_justify="left")
    for name in ("form", "training + curvature", "mean step", "longest step", "share", "memory", "fits"):
        forms.add_column(name)
    for cells in planner.compared(found):
        forms.add_row(*cells)
    console.print(forms)


def _count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (1 <= number < 1e15 and number == int(number)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(number)


def _shapes(text: str) -> list[tuple[int, ...]]:
    shapes = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise argparse.ArgumentTypeError(f"expected shapes such as 784x1024,1024, got {part!r}")
        shapes.append(tuple(map(int, numbers)))
    return shapes


def _network(text: str) -> float | str:
    if text in hardware.NETWORKS:
        return text
    try:
        return float(text)
    except ValueError:
        names = ", ".join(hardware.NETWORKS)
        raise argparse.ArgumentTypeError(f"expected {names} or bytes a second, got {text!r}") from None
