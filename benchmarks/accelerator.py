"""What the optimizers cost on the accelerator that is there, in a few minutes.

    python -m benchmarks.accelerator --minutes 8 --out DIR

The items are measured one after the other, the most important first; each is written to a file of its own in DIR as
soon as it is there. One that would not fit into what is left of the minutes is left out, and one that fails is written
with its error.

* ``steps_*``: the seconds of training steps, each waited for, on a transformer of 93 million parameters and on
  ResNet-50, in float32 and bfloat16; also the seconds it took to compile, the kernels of the program, and its memory.
* ``floors_*``: the update against the bytes that it must move, and the refresh against its products and the bytes of
  the recurrence, at the bandwidth of memory that is measured beside them.
* ``autoencoder``: the seconds to Adam's loss, tuned as in `benchmarks.target`; on random images where there are no
  others.
* ``profile_*``: the kernels that a profiler has seen.
* ``overlap``: how much of the refresh a `CurvatureGroup` hides, where there are two devices.
* ``compile_*``: rows of `benchmarks.compile`.
"""

import argparse
import fnmatch
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dho2_optax as dho2
from benchmarks import compile, machine, networks, overhead, overlap
from benchmarks.problems import FASHION_MNIST
from dho2_optax import programs
from dho2_optax.poc import data

RANK = 8
_AUTOENCODER_SECONDS = 150  # after which it begins no further run


class Scale(NamedTuple):
    """How large everything is."""

    networks: Mapping[str, Callable[..., networks.Network]]  # (dtype) -> network
    dtypes: Sequence[str]
    interval: int  # updates between refreshes
    steps: int  # that are timed
    repeats: int
    copied: int  # float32 numbers, to measure the bandwidth of memory
    images: int  # of the autoencoder where there are no others
    autoencoder_steps: int
    leaves: Sequence[int]  # of the networks of `benchmarks.compile`


SCALES = {
    "full": Scale(
        networks={
            "transformer": functools.partial(
                networks.transformer, num_layers=6, width=1024, num_heads=16, vocabulary=8192, length=512, batch_size=16
            ),
            "resnet": functools.partial(networks.resnet, blocks=(3, 4, 6, 3), width=64, image_size=128, batch_size=64),
        },
        dtypes=("float32", "bfloat16"),
        interval=50,
        steps=150,
        repeats=5,
        copied=2**28,
        images=20_000,
        autoencoder_steps=400,
        leaves=(29, 113),
    ),
    "small": Scale(
        networks={
            "transformer": functools.partial(
                networks.transformer, num_layers=1, width=16, num_heads=2, vocabulary=32, length=8, batch_size=8
            ),
            "resnet": functools.partial(
                networks.resnet, blocks=(1,), width=4, image_size=8, batch_size=8, num_classes=8
            ),
        },
        dtypes=("float32", "bfloat16"),
        interval=5,
        steps=10,
        repeats=1,
        copied=2**20,
        images=200,
        autoencoder_steps=4,
        leaves=(3,),
    ),
}


# The methods. A hybrid makes its products on an eighth of the batch.


def _hybrid(loss_fn: compile.Loss, products_on: int, interval: int | None) -> optax.GradientTransformationExtraArgs:
    """`dho2` on Adam; without an interval it is never refreshed."""
    operator = None if interval is None else dho2.hessian(loss_fn, batch_size=products_on)
    return dho2.dho2(optax.adam(1e-4), curvature=operator, rank=RANK, refresh_interval=interval)


def _method(name: str, loss_fn: compile.Loss, products_on: int, interval: int) -> compile.Method:
    if name == "adam":
        return compile.optimizer(optax.adam(1e-4), loss_fn)
    if name == "dho2_adam":
        return compile.optimizer(_hybrid(loss_fn, products_on, interval), loss_fn)
    return compile.streaming(dho2.mr_dho2(optax.adam(1e-4), rank=RANK), loss_fn, products_on)


METHODS = ("adam", "dho2_adam", "mr_dho2_adam")


def _problem(network: networks.Network) -> tuple[Any, Any, int]:
    """Parameters, a batch, and the samples that products are made on."""
    params, batch = jax.jit(network.init)(jax.random.key(0)), jax.jit(network.batch)(jax.random.key(1))
    return params, batch, max(len(jax.tree.leaves(batch)[0]) // 8, 1)


# The items.


def steps(network: networks.Network, name: str, scale: Scale) -> dict[str, Any]:
    """Times training steps, and says what their program is made of."""
    params, batch, products_on = _problem(network)
    method = _method(name, network.loss_fn, products_on, scale.interval)
    # A buffer that is twice in the state cannot be donated.
    state = jax.tree.map(jnp.copy, jax.jit(method.init)(params))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    begin = time.perf_counter()
    lowered = jax.jit(method.step, donate_argnums=(0, 1)).lower(params, state, batch)
    lowering = time.perf_counter() - begin
    begin = time.perf_counter()
    compiled = lowered.compile()
    compiling = time.perf_counter() - begin

    def train(count: int, waits: bool) -> list[float]:
        nonlocal params, state
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            params, state = compiled(params, state, batch)
            if waits:
                jax.block_until_ready(params)
            seconds.append(time.perf_counter() - begin)
        return seconds

    # The first refreshes belong to the warm-up.
    train(2 * scale.interval, waits=True)
    before = _products(state)
    seconds = train(scale.steps, waits=True)
    products = (_products(state) - before) / scale.steps
    begin = time.perf_counter()
    train(scale.steps, waits=False)
    jax.block_until_ready(params)
    together = (time.perf_counter() - begin) / scale.steps
    return {
        "num_params": num_params,
        "leaves": len(jax.tree.leaves(params)),
        "products_on_samples": products_on,
        "refresh_interval": scale.interval,
        "products_per_step": products,
        "steps": scale.steps,
        "seconds": {
            "mean": statistics.fmean(seconds),
            "median": statistics.median(seconds),
            "p99": float(np.quantile(seconds, 0.99)),
            "max": max(seconds),
            "mean, not waiting for each": together,
        },
        "compilation": {"trace and lower": lowering, "compile": compiling},
        "kernels": kernels(compiled.as_text()),
        "bytes": programs.memory(compiled)._asdict(),
    }


def _products(state: Any) -> int:
    return int(dho2.metrics(state)["matvecs"]) if isinstance(state, dho2.DHO2State) else 0


def bandwidth(scale: Scale) -> float:
    """Bytes a second of ``y <- a x + y``, which reads two arrays and writes one."""
    axpy = jax.jit(lambda x, y: 0.5 * x + y, donate_argnums=1)
    x = jnp.ones(scale.copied)
    y = axpy(x, jnp.ones(scale.copied))
    seconds = []
    for _ in range(10):
        jax.block_until_ready(y)
        begin = time.perf_counter()
        y = jax.block_until_ready(axpy(x, y))
        seconds.append(time.perf_counter() - begin)
    return 3 * x.nbytes / statistics.median(seconds)


def floors(network: networks.Network, scale: Scale) -> dict[str, Any]:
    """Update and refresh of `dho2` on Adam against what no implementation can avoid.

    An update reads the eigenvectors four times. Adam reads the gradient and two moments, and writes moments and update.
    A refresh of m products reads the basis twice for each, as far as it has got, and once for the new eigenvectors.
    """
    params, batch, products_on = _problem(network)
    grads = jax.jit(jax.grad(network.loss_fn))(params, batch)
    adam = overhead.Updater(optax.with_extra_args_support(optax.adam(1e-4)), params, grads, batch)
    always = overhead.Updater(_hybrid(network.loss_fn, products_on, 1), params, grads, batch)
    never = overhead.Updater(_hybrid(network.loss_fn, products_on, None), params, grads, batch)
    for _ in range(2 * scale.interval):
        always()
    never.state = jax.tree.map(jnp.copy, always.state)
    made = int(dho2.metrics(always.state)["matvecs"]) / int(dho2.metrics(always.state)["refreshes"])
    operator = dho2.hessian(network.loss_fn, batch_size=products_on)

    @jax.jit
    def products(params: Any, vector: Any, batch: Any) -> Any:
        return jax.lax.fori_loop(0, round(made), lambda _, v: operator(params, v, batch), vector)

    times = overhead.seconds(
        {
            "adam": adam,
            "update": never,
            "products": lambda: products(params, grads, batch),
            "update with refresh": always,
        },
        scale.repeats,
    )
    median = {name: statistics.median(values) for name, values in times.items()}
    speed = bandwidth(scale)
    stack = programs.tree_bytes_per_device(always.state.spectrum.eigenvectors)
    vector = stack // RANK
    moved = 4 * stack + 6 * programs.tree_bytes_per_device(params)
    recurrence = made * (made + 1) * vector + made * vector + stack
    refresh = median["update with refresh"] - median["update"]
    return {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "bandwidth": speed,
        "seconds": median,
        "update": {
            "bytes": moved,
            "floor": moved / speed,
            "ratio": median["update"] / (moved / speed),
            "ratio without Adam": (median["update"] - median["adam"]) / (4 * stack / speed),
        },
        "refresh": {
            "seconds": refresh,
            "products": made,
            "products_on_samples": products_on,
            "bytes": recurrence,
            "floor": median["products"] + recurrence / speed,
            "ratio": refresh / (median["products"] + recurrence / speed),
        },
        "kernels": {"adam": kernels(adam.compiled.as_text()), "update": kernels(never.compiled.as_text())},
    }


_NOT_STARTED = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "call"}
_CONTROL = ("while", "conditional", "call")


def kernels(text: str) -> dict[str, dict[str, int]]:
    """How often each operation that is started by itself stands in an optimized program, by where it stands.

    "always" is what runs at every call, "loops" what a loop repeats, and "branches" what may be left out.
    """
    instructions = list(programs._instructions(text))
    # What an operation other than control flow calls is a part of its kernel.
    inside, calls = set(), {}
    for computation, _, _, opcode, rest in instructions:
        for callee, call in programs._calls(computation, opcode, rest):
            calls.setdefault(callee, []).append(call)
            if opcode not in _CONTROL:
                inside.add(callee)
    found: dict[str, Counter[str]] = {"always": Counter(), "loops": Counter(), "branches": Counter()}
    for computation, _, _, opcode, _ in instructions:
        if computation not in inside and opcode not in _NOT_STARTED and not opcode.endswith("-done"):
            in_loop, in_branch, _ = programs._context(computation, calls)
            found["branches" if in_branch else "loops" if in_loop else "always"][opcode] += 1
    return {where: {"total": sum(counts.values()), **counts} for where, counts in found.items()}


def profile(network: networks.Network, scale: Scale) -> dict[str, Any]:
    """Events for each update on every line of every device that a profiler has seen; empty where it sees none."""
    params, batch, products_on = _problem(network)
    grads = jax.jit(jax.grad(network.loss_fn))(params, batch)
    updaters = {
        "adam": overhead.Updater(optax.with_extra_args_support(optax.adam(1e-4)), params, grads, batch),
        "dho2_adam": overhead.Updater(_hybrid(network.loss_fn, products_on, None), params, grads, batch),
    }
    found: dict[str, Any] = {}
    for name, updater in updaters.items():
        jax.block_until_ready(updater())
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(scale.steps):
                    jax.block_until_ready(updater())
            [path] = Path(folder).rglob("*.xplane.pb")
            traced = jax.profiler.ProfileData.from_file(str(path))
            found[name] = {
                f"{plane.name} {line.name}": sum(1 for _ in line.events) / scale.steps
                for plane in traced.planes
                if plane.name.startswith("/device:")
                for line in plane.lines
            }
    return found


def autoencoder(folder: Path, scale: Scale, deadline: float) -> dict[str, Any]:
    """The seconds to Adam's mean loss of three seeds, at each method's best rate; as far as the time goes."""
    # Here, since they need flax and matplotlib, which may be missing.
    from benchmarks.target import report, tasks
    from benchmarks.target.methods import select
    from benchmarks.target.store import Store
    from benchmarks.target.study import Study

    there = Path(FASHION_MNIST).is_dir()
    images = data.load(FASHION_MNIST) if there else random_images(scale.images)
    store = Store(folder / f"autoencoder_{len(images.train_images)}")
    methods = select(["adam", "mr_dho2_adam", "dho2_adam_often"])

    def log(line: str) -> None:
        print(f"  {line}", flush=True)
        if time.monotonic() > deadline:
            raise TimeoutError

    task = tasks.of_images("autoencoder", images)
    batch_size = min(1000, task.num_train // 2)
    study = Study(task, methods, batch_size, scale.autoencoder_steps, store, seeds=3, shortened=(), log=log)
    complete = True
    try:
        study.time(chunk=2 * scale.interval, repeats=scale.repeats)
        study.final()
    except TimeoutError:
        complete = False
    summary = report.summarize(store)
    target = next((row.loss for row in summary.rows if row.method == "adam"), float("-inf"))
    rows = {}
    for row in summary.rows:
        count = row.steps_to(target)
        rows[row.method] = {
            "rate": row.rate,
            "final_losses": [run["final_loss"] for run in row.finals],
            "seconds_per_step": row.seconds_per_step,
            "steps to Adam's loss": count,
            "seconds to Adam's loss": count and row.seconds_per_step and count * row.seconds_per_step,
        }
    return {
        "data": "Fashion-MNIST" if there else f"{scale.images} random images",
        "batch_size": batch_size,
        "steps": scale.autoencoder_steps,
        "complete": complete,
        "methods": rows,
    }


def random_images(count: int) -> data.Dataset:
    """Images of 28 by 28 pixels that a random network draws from sixteen numbers each."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(a, b)) * gain / np.sqrt(a) for a, b, gain in ((16, 64, 1.5), (64, 784, 4.0))]
    drawn = 1 / (1 + np.exp(-np.tanh(rng.normal(size=(count, 16)) @ layers[0]) @ layers[1]))
    images = drawn.reshape(count, 28, 28, 1).astype(np.float32)
    labels = np.arange(count, dtype=np.int32) % 10
    split = count - count // 10
    return data.Dataset("random", images[:split], labels[:split], images[split:], labels[split:])


class Item(NamedTuple):
    """Something to measure."""

    name: str
    needs: float  # seconds that it may take on an accelerator
    measure: Callable[[], dict[str, Any]]


def items(scale: Scale, folder: Path, deadline: float) -> list[Item]:
    """All items, the most important first."""

    def network(name: str, dtype: str) -> networks.Network:
        return scale.networks[name](dtype=jnp.dtype(dtype))

    def of_steps(name: str, dtype: str) -> list[Item]:
        return [
            Item(
                f"steps_{name}_{dtype}_{method}",
                30 if method == "adam" else 90,
                lambda m=method: steps(network(name, dtype), m, scale),
            )
            for method in METHODS
        ]

    def of_floors(name: str) -> Item:
        dtype = scale.dtypes[0]
        return Item(f"floors_{name}_{dtype}", 120, lambda: floors(network(name, dtype), scale))

    first, *others = scale.networks
    wide, *narrow = scale.dtypes
    found = [
        *of_steps(first, wide),
        of_floors(first),
        Item(
            "autoencoder",
            60,
            lambda: autoencoder(folder, scale, min(deadline, time.monotonic() + _AUTOENCODER_SECONDS)),
        ),
        *itertools.chain.from_iterable(of_steps(name, wide) for name in others),
        Item(f"profile_{first}", 60, lambda: profile(network(first, wide), scale)),
        *itertools.chain.from_iterable(of_steps(name, dtype) for dtype in narrow for name in scale.networks),
        *map(of_floors, others),
    ]
    if jax.device_count() > 1:
        found.append(Item("overlap", 60, lambda: overlap.measure("roles", 1, 1, scale.repeats)))
    for leaves in scale.leaves:
        for name in ("floor_adam", "dho2_adam", "mr_dho2_adam"):
            found.append(
                Item(f"compile_{leaves}_{name}", leaves, lambda a=(leaves, name): compile.measure(*a, repeats=1))
            )
    return found


def measure(wanted: Iterable[Item], folder: Path, head: Mapping[str, Any], deadline: float) -> dict[str, str]:
    """Measures what there is time for, and writes a file for each; returns their states: ok, failed or left out."""
    folder.mkdir(parents=True, exist_ok=True)
    states = {}
    for item in wanted:
        begin = time.monotonic()
        found: dict[str, Any]
        if begin + item.needs > deadline:
            found = {"status": "left out"}
        else:
            try:
                found = {"status": "ok", "result": item.measure()}
            except Exception as error:
                found = {"status": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        found["took"] = time.monotonic() - begin
        states[item.name] = found["status"]
        (folder / f"{item.name}.json").write_text(json.dumps({**head, "item": item.name, **found}, indent=2) + "\n")
        print(f"{item.name}: {found['status']} {found.get('error', '')}, {found['took']:.1f} s", flush=True)
    return states


def main() -> None:
    """Measures within the minutes."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--scale", choices=SCALES, help="by default full, and small on CPU")
    parser.add_argument("--items", nargs="+", default=["*"], help="only these; * stands for anything")
    arguments = parser.parse_args()
    machine.keep_memory("benchmarks.accelerator")
    scale = SCALES[arguments.scale or ("small" if jax.default_backend() == "cpu" else "full")]
    deadline = begin + 60 * arguments.minutes
    wanted = [
        item
        for item in items(scale, arguments.out, deadline)
        if any(fnmatch.fnmatch(item.name, pattern) for pattern in arguments.items)
    ]
    measure(wanted, arguments.out, machine.describe(sys.argv), deadline)


if __name__ == "__main__":
    main()
