"""One run: compile a training step, read its program, run it, time every step."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dho2_optax
from dho2_optax import programs
from dho2_optax.poc import processes, system
from dho2_optax.poc.optimizers import OPTIMIZERS, Context
from dho2_optax.poc.recording import Record
from dho2_optax.poc.saving import Checkpoints
from dho2_optax.poc.tasks import Task

__all__ = ["Evaluator", "Footprint", "Program", "Run", "Scores", "Spec", "compile_program", "train"]

_AXIS = "data"
_MAX_EVALUATION_BATCH = 2000
# Of LLVM: it takes half the time to compile.
_UNOPTIMIZED: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
_LOOKS = 50  # at least, at a hybrid's metrics in a run of so many steps, for what gives cause for concern
_COUNTERS = ("refreshes", "rejected_refreshes", "matvecs", "eigenvalue_max")
_OF_GROUP = ("launches", "installed", "rejected", "failures", "stalls", "wait_seconds", "busy_seconds")  # sums


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is run: everything that the compiled program depends on, besides the task, and the learning rate."""

    optimizer: str
    learning_rate: float
    num_devices: int
    batch_size: int
    num_steps: int
    rank: int
    refresh_interval: int
    recorded: bool = False  # every step returns all metrics, not just what the report shows


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a compiled step holds and communicates, per device, in bytes.

    The parts of the memory: parameters, base state, curvature state, the device's share of the
    batch, and temporaries add up to the total.
    """

    parameters: int
    base_state: int
    curvature_state: int
    temporaries: int
    total: int
    traffic_per_step: float  # sent by one device with ring collectives, on every step
    traffic_per_refresh: float  # besides, in a refresh outside its loop, or in a probe
    traffic_per_matvec: float  # the part of a refresh that each round of its loop repeats
    curvature_device: int | None  # all of the Lanczos program, on a device that does not train


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled training step and what is needed to start it."""

    spec: Spec
    context: Context
    step: Any  # compiled: (params, state, batch, learning rate) -> (params, state, loss, counters)
    init_state: Any  # compiled: params -> optimizer state
    state_shardings: Any
    compile_seconds: float
    footprint: Footprint


@dataclasses.dataclass
class Run:
    """What a run measured."""

    status: str  # "ok" or "diverged"
    losses: list[float]  # of each step, before its update
    seconds: list[float]  # of each step
    refresh_steps: list[int]  # the steps in which a new spectrum was put in use
    probe_steps: list[int]  # the other steps in which a curvature product was made
    counters: dict[str, float]  # the last values of the optimizer's own counters
    taken_up: list[list[int]]  # the steps before which it went on from a checkpoint, and on how many devices
    looks: int = 0  # at the metrics of a hybrid
    alarms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # what they found, see `Row.alarms`
    test_loss: float | None = None
    test_accuracy: float | None = None
    test_error: float | None = None
    eval_seconds: float = 0.0


class Scores(NamedTuple):
    """What parameters are worth on the test data."""

    loss: float
    accuracy: float | None  # None where the task has no such thing
    error: float | None
    seconds: float  # that it took, compilation apart


class Evaluator:
    """Computes loss, accuracy and error of a task over its test data, on one device: means over parts of the data."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._compiled: dict[int, Any] = {}
        size = min(task.num_test, _MAX_EVALUATION_BATCH)
        self._starts = range(0, task.num_test, size)
        self._size = size

    def __call__(self, params: Any) -> Scores:
        """Return what the parameters are worth."""
        params = jax.tree.map(jnp.asarray, jax.device_get(params))
        totals, seconds = np.zeros(3), 0.0
        for start in self._starts:
            batch = jax.tree.map(lambda x, s=start: jnp.asarray(x[s : s + self._size]), self._task.test)
            size = len(jax.tree.leaves(batch)[0])
            if size not in self._compiled:
                self._compiled[size] = jax.jit(self._measure).lower(params, batch).compile()
            begin = time.perf_counter()
            values = jax.device_get(self._compiled[size](params, batch))
            seconds += time.perf_counter() - begin
            totals += np.asarray(values, np.float64) * size / self._task.num_test
        loss, accuracy, error = map(float, totals)
        task = self._task
        return Scores(loss, accuracy if task.accuracy else None, error if task.error else None, seconds)

    def _measure(self, params: Any, batch: Any) -> list[jax.Array]:
        measures = (self._task.loss_fn, self._task.accuracy, self._task.error)
        return [measure(params, batch) if measure else jnp.zeros(()) for measure in measures]


def compile_program(task: Task, spec: Spec, *, to_run: bool = True) -> Program:
    """Compile the training step of a task for some devices, and read its plan.

    Nothing runs: parameters, state and batch are abstract.

    Args:
      task: what to train.
      spec: with what, and on how many devices.
      to_run: whether the program will run. If not, its machine code need not be fast; its plan,
        made before any machine code, is the same.

    Returns:
      The program.
    """
    optimizer = OPTIMIZERS[spec.optimizer]
    num_train, num_curvature = spec.num_devices, 0
    if optimizer.group is not None:
        num_train, num_curvature = roles(spec.num_devices, spec.batch_size)
    devices = processes.devices(num_train + num_curvature)
    mesh = Mesh(np.array(devices[:num_train]), (_AXIS,))
    replicated = NamedSharding(mesh, PartitionSpec())
    context = Context(
        loss_fn=task.loss_fn,
        mesh=mesh,
        axis_name=_AXIS,
        num_steps=spec.num_steps,
        rank=spec.rank,
        refresh_interval=spec.refresh_interval,
        curvature_devices=tuple(devices[num_train : num_train + num_curvature]),
    )
    compute = optimizer.gradients(context)
    begin = time.perf_counter()
    tx = optimizer.build(spec.learning_rate, context)
    params = _abstract(jax.eval_shape(task.init, jax.random.key(0)), replicated)
    init_state = jax.jit(tx.init).lower(params).compile()
    state = jax.tree.map(
        # Zeros that depend on no argument are left on one device: replicate them.
        lambda x, s: _abstract(x, s if len(s.device_set) == mesh.size > 1 else replicated),
        jax.eval_shape(tx.init, params),
        init_state.output_shardings,
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((spec.batch_size, *x.shape[1:]), x.dtype, sharding=_batch_sharding(mesh)),
        task.train,
    )

    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)

    def train_step(params: Any, state: Any, batch: Any, rate: jax.Array) -> tuple[Any, Any, jax.Array, Any]:
        loss, grads, extra = compute(params, state, batch)
        update = optax.with_extra_args_support(optimizer.build(rate, context)).update
        updates, state = update(grads, state, params, **extra)
        counters = _counters(state, all_of_them=spec.recorded) if optimizer.hybrid else {}
        return optax.apply_updates(params, updates), state, loss, counters

    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step = (
        jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*shardings, None, None))
        .lower(params, state, batch, rate)
        .compile(None if to_run or jax.default_backend() != "cpu" else _UNOPTIMIZED)
    )
    curvature_device = None if optimizer.group is None else optimizer.group(context).memory(params, batch).total
    seconds = time.perf_counter() - begin
    footprint = _footprint(step, params, state, hybrid=optimizer.hybrid, curvature_device=curvature_device)
    return Program(spec, context, step, init_state, shardings[1], seconds, footprint)


def roles(num_devices: int, batch_size: int) -> tuple[int, int]:
    """Split devices in two groups: as many as can share a batch train, but not all; others find curvature.

    Each group must share the batch evenly, so a device may be left over.

    Returns:
      The number of devices that train, and that of those that find curvature.

    Example:
      >>> from dho2_optax.poc.training import roles
      >>> roles(2, batch_size=256), roles(8, batch_size=256), roles(7, batch_size=252)
      ((1, 1), (4, 4), (6, 1))
    """

    def largest(limit: int) -> int:
        return next(n for n in range(limit, 0, -1) if batch_size % n == 0)

    train = largest(num_devices - 1)
    return train, largest(num_devices - train)


def train(
    task: Task,
    program: Program,
    seed: int,
    evaluate: Evaluator,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    checkpoints: Checkpoints | None = None,
    record: Record | None = None,
) -> Run:
    """Train from a seed, waiting for every step so that its time is its own.

    Placing the batch on the devices is not part of a step's time: it is the same for all. What a step does for
    devices that find curvature is. Now and then there is a look at the metrics of a hybrid, between two steps, which is
    in the time of neither.

    Args:
      task: what to train.
      program: its compiled step.
      seed: for the parameters and the order of the samples.
      evaluate: measures the parameters at the end.
      on_step: called after every step with its number and loss.
      checkpoints: where to go on, and to save. On SIGINT or SIGTERM the step that runs is ended and saved first, and
        where one of several processes is told to stop, all do so after the same step.
      record: called after every step with its number, its loss and seconds, and, of a program that was compiled to be
        recorded, the optimizer's metrics.

    Returns:
      The measurements; on the first loss that is not finite the run stops as "diverged". Of a run that goes on from a
      checkpoint they are those of the whole run, without what was done after the checkpoint and lost.

    Raises:
      CheckpointError: a checkpoint cannot be read or written.
      ValueError: the checkpoint is of another task or optimizer.
    """
    spec = program.spec
    mesh = program.context.mesh
    rate = processes.put(jnp.float32(spec.learning_rate), NamedSharding(mesh, PartitionSpec()))
    # Warm-up: the first call of a program is slower. Its results are dropped.
    first = next(_batches(task, spec.batch_size, seed, mesh))
    jax.block_until_ready(program.step(*_start(task, program, seed), first, rate))
    params, state = _start(task, program, seed)
    run = Run("ok", [], [], [], [], {}, [])
    if checkpoints is not None:
        params, state, run = _take_up(checkpoints, params, state, run, spec.num_devices)
    make_group = OPTIMIZERS[spec.optimizer].group
    group = None if make_group is None else make_group(program.context)
    if group is not None:
        group.warm_up(state, params, first)
    batches = _batches(task, spec.batch_size, seed, mesh, skip=len(run.losses))
    of_group = functools.partial(_group_counters, group, run.counters)
    stopped = False
    seen = _metrics(state, group) if OPTIMIZERS[spec.optimizer].hybrid else None
    try:
        with system.postponed_signals() as interrupted:
            for step in range(len(run.losses), spec.num_steps):
                batch = next(batches)
                begin = time.perf_counter()
                if group is not None:
                    state = group.advance(state, params, batch)
                params, state, loss, counters = program.step(params, state, batch, rate)
                jax.block_until_ready((params, state, loss))
                run.seconds.append(time.perf_counter() - begin)
                run.losses.append(float(loss))
                values = {name: float(value) for name, value in counters.items()}
                before, run.counters = run.counters, {name: values[name] for name in _COUNTERS if name in values}
                if _grew("refreshes", before, run.counters):
                    run.refresh_steps.append(step)
                elif _grew("matvecs", before, run.counters):
                    run.probe_steps.append(step)
                on_step(step, run.losses[-1])
                if seen is not None and (step + 1) % max(1, spec.num_steps // _LOOKS) == 0:
                    before, seen = seen, _metrics(state, group)
                    _note(run, dho2_optax.alarms(seen, before, max_age=3 * spec.refresh_interval))
                if record is not None:
                    record(step, {"loss": run.losses[-1], "seconds": run.seconds[-1], **values})
                if not math.isfinite(run.losses[-1]):
                    run.status = "diverged"
                    return run
                stopped, due = processes.any_of(interrupted(), checkpoints is not None and checkpoints.is_due())
                if checkpoints is not None and (stopped or due):
                    measured = dataclasses.asdict(dataclasses.replace(run, counters=run.counters | of_group()))
                    checkpoints.save(step + 1, {"params": params, "state": state}, measured)
                if stopped:
                    break
    finally:
        if group is not None:
            run.counters |= of_group()
            group.close()
    if stopped:
        raise KeyboardInterrupt
    run.test_loss, run.test_accuracy, run.test_error, run.eval_seconds = evaluate(params)
    if not math.isfinite(run.test_loss):
        run.status = "diverged"
    return run


def _take_up(checkpoints: Checkpoints, params: Any, state: Any, run: Run, num_devices: int) -> tuple[Any, Any, Run]:
    """Go on from the last checkpoint, if there is one, whatever the number of its devices."""
    saved = checkpoints.latest()
    if saved is None:
        return params, state, run
    fresh = {"params": params, "state": state}
    arrays = dho2_optax.relayout(saved.arrays, fresh, params)
    run = Run(**saved.measured)
    run.taken_up.append([len(run.losses), num_devices])
    return arrays["params"], arrays["state"], run


def _group_counters(group: Any, before: dict[str, float]) -> dict[str, float]:
    """What a group counts, on top of what was counted before a checkpoint from which the run went on."""
    values = {} if group is None else group.metrics()
    return {name: value + (before.get(name, 0.0) if name in _OF_GROUP else 0.0) for name, value in values.items()}


def _metrics(state: Any, group: Any) -> dict[str, float]:
    """All that a hybrid's state says, and the group that finds its curvature, if there is one."""
    values = dho2_optax.metrics(state) | ({} if group is None else group.metrics())
    return {name: float(value) for name, value in values.items()}


def _note(run: Run, lines: list[str]) -> None:
    """Count the alarms of a look at the last step, and keep what each said."""
    run.looks += 1
    for name, text in dict(line.split(": ", 1) for line in lines).items():
        count = run.alarms.get(name, {"count": 0})["count"]
        run.alarms[name] = {"count": count + 1, "last": len(run.losses), "text": text}


def _grew(name: str, before: dict[str, float], after: dict[str, float]) -> bool:
    return after.get(name, 0.0) > before.get(name, 0.0)


def _batches(task: Task, batch_size: int, seed: int, mesh: Mesh, skip: int = 0) -> Iterator[Any]:
    """Yield shuffled batches for ever, but the first `skip`; the remainder of each epoch is dropped."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(task.num_train)
        for start in range(0, task.num_train - batch_size + 1, batch_size):
            if skip:
                skip -= 1
                continue
            rows = order[start : start + batch_size]
            batch = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], task.train)
            yield jax.block_until_ready(processes.put(batch, _batch_sharding(mesh)))


def _start(task: Task, program: Program, seed: int) -> tuple[Any, Any]:
    replicated = NamedSharding(program.context.mesh, PartitionSpec())
    params = processes.put(jax.jit(task.init)(jax.random.key(seed)), replicated)
    state = processes.put(program.init_state(params), program.state_shardings)
    return params, state


def _batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(_AXIS))


def _abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _counters(state: Any, *, all_of_them: bool) -> dict[str, jax.Array]:
    values = dho2_optax.metrics(state)
    return values if all_of_them else {name: values[name] for name in _COUNTERS if name in values}


def _footprint(step: Any, params: Any, state: Any, *, hybrid: bool, curvature_device: int | None) -> Footprint:
    memory = programs.memory(step)
    state_bytes = programs.tree_bytes_per_device(state)
    base_bytes = programs.tree_bytes_per_device(state.base_state) if hybrid else state_bytes
    per_step = per_matvec = 0.0
    in_branches: dict[str, float] = {}
    for operation in programs.collectives(step):
        traffic = operation.traffic * (1 if operation.trips is None else operation.trips)
        if not operation.in_branch:
            per_step += traffic
        elif operation.trips is None:
            per_matvec += traffic
        else:
            in_branches[operation.computation] = in_branches.get(operation.computation, 0.0) + traffic
    # What all branches of a conditional send, such as the gradient with and without a product, every step sends.
    for branches in _conditionals(step.as_text()):
        least = min(in_branches.get(name, 0.0) for name in branches)
        per_step += least
        in_branches |= {name: in_branches[name] - least for name in branches if least}
    return Footprint(
        parameters=programs.tree_bytes_per_device(params),
        base_state=base_bytes,
        curvature_state=state_bytes - base_bytes,
        temporaries=memory.temp,
        total=memory.total,
        traffic_per_step=per_step,
        traffic_per_refresh=sum(in_branches.values()),
        traffic_per_matvec=per_matvec,
        curvature_device=curvature_device,
    )


def _conditionals(text: str) -> Iterator[list[str]]:
    """Yield the branches of each conditional of an HLO module, by the names of their computations."""
    for line in text.splitlines():
        if " conditional(" in line:
            several = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = (
                several.group(1).split(",") if several else re.findall(r"(?:true|false)_computation=([^\s,]+)", line)
            )
            yield [name.strip().lstrip("%") for name in names]
