"""What `dho2_optax.plan` predicts beside what is measured, on CPU.

    python -m benchmarks.plan                 # prints tables, writes benchmarks/results/plan.json
    python -m benchmarks.plan --print         # prints the tables of results that are there

Takes about three minutes on an idle machine. Measured are an update of `dho2` on Adam, without a refresh and with one,
for dense networks of several sizes, ranks and numbers of virtual devices. Predicted are both from
`dho2_optax.hardware.measure` on the same shapes, loss and batch, which times a gradient, a product, collectives and
reads of a stack, but no update and no refresh. Calls are taken in turn, and the shortest time of each counts: other
programs on the machine make times longer, never shorter.

Earlier results in which there is all that a prediction needs are compared too: `overhead.json`, and what an H200 took.
Memory is compared with the programs of `benchmarks.memory` in `benchmarks/results/memory.json`, and with some that are
compiled here. `--parts` takes some of the three: times, memory, programs.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dho2_optax as dho2
from benchmarks import machine, memory, overhead
from dho2_optax import hardware, planner, programs
from dho2_optax.hardware import HARDWARE, Hardware

RESULTS = Path(__file__).parent / "results" / "plan.json"
AXIS = "data"
PARTS = ("times", "memory", "programs")


class Case(NamedTuple):
    """What is timed."""

    sizes: tuple[int, ...]  # of the layers
    batch_size: int
    rank: int
    order: int
    devices: int


CASES = (
    Case((256, 512, 256), 256, 8, 16, 1),
    Case((256, 512, 256), 256, 4, 8, 1),
    Case((512, 1024, 256), 512, 8, 16, 1),
    Case((256, 512, 256), 256, 16, 32, 1),
    Case((256, 512, 256), 256, 8, 16, 2),
    Case((512, 1024, 256), 512, 4, 8, 2),
    Case((256, 512, 256), 512, 8, 16, 4),
)


def loss_fn(params: list[dict[str, jax.Array]], batch: jax.Array) -> jax.Array:
    """The mean square of the outputs of a tanh network, so that no gradient is zero."""
    hidden = batch
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
    return jnp.mean((hidden @ params[-1]["w"] + params[-1]["b"] - 1) ** 2)


class Updater:
    """Calls a compiled, donated update over and over on its own state; every second one has a refresh."""

    def __init__(self, case: Case, params: Any, batch: jax.Array, clock: Callable[[], float]) -> None:
        self._clock = clock
        mesh = Mesh(np.array(jax.devices()[: case.devices]), (AXIS,))
        everywhere, by_sample = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(AXIS)))
        options = dho2.Eigensolver(order=case.order, tolerance=0.0, max_residual=jnp.inf)
        make = functools.partial(
            dho2.dho2, optax.adam(1e-3), loss_fn, rank=case.rank, refresh_interval=2, eigensolver=options
        )
        tx = make() if case.devices == 1 else make(split=dho2.Split(AXIS, mesh=mesh))
        self._params = jax.device_put(params, everywhere)
        self._batch = jax.device_put(batch, by_sample)
        self._grads = jax.device_put(jax.grad(loss_fn)(params, batch), everywhere)
        self._state = jax.jit(tx.init)(self._params)
        if case.devices > 1:
            specs = dho2.state_specs(make(split=dho2.Split(AXIS)).init, params, AXIS)
            self._state = jax.device_put(self._state, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))

        def update(grads: Any, state: Any, params: Any, batch: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params, batch=batch)
            return state, updates

        step = jax.jit(update, donate_argnums=1)
        self._compiled = step.lower(self._grads, self._state, self._params, self._batch).compile()

    def seconds(self) -> float:
        """Of one update."""
        start = self._clock()
        result = self._compiled(self._grads, self._state, self._params, self._batch)
        jax.block_until_ready(result)
        self._state = result[0]
        return self._clock() - start

    def refreshes(self) -> int:
        """How many there have been."""
        return int(self._state.refreshes)

    def best(self, repeats: int) -> dict[str, float]:
        """The shortest update without a refresh, and how much longer the shortest one with it is."""
        times: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(4):
            self.seconds()
        before = self.refreshes()
        for _ in range(2 * repeats):
            elapsed = self.seconds()
            now = self.refreshes()
            times[now - before].append(elapsed)
            before = now
        update = min(times[0])
        return {"update": update, "refresh": min(times[1]) - update}


def timed(case: Case, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """A row: what this machine does, and what an update and a refresh took."""
    params = overhead.init_params(jax.random.key(0), case.sizes)
    batch = jax.random.normal(jax.random.key(1), (case.batch_size, case.sizes[0]))
    updater = Updater(case, params, batch, clock)
    speeds = hardware.measure(
        params, loss_fn, batch, devices=case.devices, rank=case.rank, repeats=repeats, clock=clock
    )
    return {
        **case._asdict(),
        "speeds": {name: x for name, x in dataclasses.asdict(speeds).items() if x != math.inf},  # JSON has none
        "sample_flops": hardware.sample_flops(loss_fn, params, batch),
        "measured": updater.best(repeats),
    }


SHAPES = ((1024, 1024), (1024, 512), (1024,))
"""Of the programs whose memory is read here, since `benchmarks.memory` has none of them."""
PROGRAMS: tuple[tuple[planner.FormName, int, int, int], ...] = (
    ("synchronous", 1, 8, 16),
    ("streaming", 1, 8, 16),
    ("group", 2, 8, 16),
)
"""Form, devices, rank and order of these."""


def compiled(form: planner.FormName, devices: int, rank: int, order: int) -> dict[str, Any]:
    """A row of memory, of a program compiled here: an update on one device without a mesh, or a curvature group."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES]
    batch = jax.ShapeDtypeStruct((8 * devices,), jnp.float32)
    options: dict[str, Any] = {"rank": rank, "eigensolver": dho2.Eigensolver(order=order)}
    if form == "group":
        group = dho2.CurvatureGroup(memory.stand_in, devices=jax.devices()[:devices], **options)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, batch))
        total = group.memory(*zeros).total
    else:
        make = dho2.dho2 if form == "synchronous" else dho2.mr_dho2
        tx = make(optax.adam(1e-3), memory.stand_in, **options)

        def step(params: Any, state: Any, grads: Any, batch: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params, batch).compile()
        total = programs.memory(program).total
    row = {"form": form, "model": "two matrices", "platform": "cpu", "devices": devices, "rank": rank, "order": order}
    return {**row, "num_params": None, "measured": total}


def memory_rows() -> list[dict[str, Any]]:
    """What the compiled programs of `benchmarks.memory` on several devices hold."""
    names = {"dho2": "synchronous", "mr_dho2": "streaming"}
    found = []
    for row in json.loads(memory.RESULTS.read_text())["rows"]:
        if row["method"] in names and row["devices"] > 1:
            found.append(
                {
                    "form": names[row["method"]],
                    "model": row["model"],
                    "platform": row["platform"],
                    "devices": row["devices"],
                    "rank": row["rank"],
                    "order": 2 * row["rank"],
                    "num_params": row["num_params"],
                    "measured": row["memory"]["total"],
                }
            )
    return found


def predicted_memory(row: dict[str, Any]) -> float:
    """Bytes that the planner says, for a row of memory."""
    group = row["form"] == "group"  # with as many devices that train, and no metric
    speeds = dataclasses.replace(HARDWARE["h100" if row["platform"] == "cpu" else row["platform"]], per_host=None)
    found = dho2.plan(
        list(SHAPES) if row["num_params"] is None else row["num_params"],
        batch_size=1024,
        devices=2 * row["devices"] if group else row["devices"],
        hardware=speeds,
        rank=row["rank"],
        order=row["order"],
        interval=50,
        base_vectors=0 if group else 2,
        curvature_devices=row["devices"] if group else None,
    )
    form = next(one for one in found.forms if one.name == row["form"])
    return form.curvature_memory if group else form.memory


def predicted(row: dict[str, Any]) -> dict[str, float]:
    """Seconds that the planner says, for a row of times."""
    sizes = row["sizes"]
    layers = isinstance(sizes, list | tuple)
    found = dho2.plan(
        [shape for pair in itertools.pairwise(sizes) for shape in (pair, pair[1:])] if layers else sizes,
        batch_size=row["batch_size"],
        devices=row["devices"],
        hardware=Hardware(**row["speeds"]),
        rank=row["rank"],
        order=row["order"],
        interval=50,
        curvature_batch=row.get("curvature_batch", "auto"),
        sample_flops=row["sample_flops"],
    ).forms[0]
    return {"update": found.update_seconds, "refresh": found.refresh_seconds}


def earlier() -> list[dict[str, Any]]:
    """Rows of times from other committed results, in which there is all that a prediction needs."""
    found = json.loads((RESULTS.parent / "overhead.json").read_text())
    seconds = {name: spread["median"] for name, spread in found["seconds"].items()}
    count, batch_size, rank, order = (found[name] for name in ("num_params", "batch_size", "rank", "order"))
    rate = 6.0 * count * batch_size / seconds["gradient"]
    read = seconds["read stack: dots"] + seconds["read stack: combine"]
    speeds = Hardware(
        name=found["machine"]["device"],
        flops=rate,
        bandwidth=2 * 4 * rank * count / read,
        product=seconds["products in a loop"] / order / seconds["gradient"],
    )
    row = {
        "sizes": (784, 1024, 256, 10),
        "batch_size": batch_size,
        "curvature_batch": batch_size,
        "rank": rank,
        "order": order,
        "devices": 1,
        "speeds": dataclasses.asdict(speeds),
        "sample_flops": 6.0 * count,
        "measured": {"update": found["update"]["dho2"], "refresh": found["refresh"]["seconds"]},
        "from": "overhead.json",
    }
    path = RESULTS.parent / "accelerator_h200" / "floors_transformer_float32.json"
    found = json.loads(path.read_text())
    gpu, samples = found["result"], found["result"]["refresh"]["products_on_samples"]
    order = round(gpu["refresh"]["products"])
    speeds = Hardware(
        name=found["machine"]["device"],
        flops=samples * order / gpu["seconds"]["products"],  # in units of a product on a sample
        bandwidth=gpu["bandwidth"],
        product=1.0,
    )
    return [
        row,
        {
            "sizes": gpu["num_params"],
            "batch_size": 8 * samples,
            "curvature_batch": samples,
            "rank": 8,
            "order": order,
            "devices": 1,
            "speeds": dataclasses.asdict(speeds),
            "sample_flops": 1.0,
            "measured": {"update": gpu["seconds"]["update"], "refresh": gpu["refresh"]["seconds"]},
            "from": f"accelerator_h200/{path.name}",
        },
    ]


def table(results: dict[str, Any]) -> str:
    """Times and bytes, measured and predicted, as Markdown."""
    head = ("parameters", "batch", "devices", "rank", "order")
    head = (*head, "update", "predicted", "error", "refresh", "predicted", "error")
    lines = [head, ("---",) * len(head)]
    for row in [*results["times"], *earlier()]:
        said, sizes = predicted(row), row["sizes"]
        name = f"{sizes:,}" if isinstance(sizes, int) else "-".join(map(str, sizes))
        cells = [
            f"{name} ({row['from']})" if "from" in row else name,
            *(str(row[x]) for x in ("batch_size", "devices", "rank", "order")),
        ]
        for name in ("update", "refresh"):
            measured = row["measured"][name]
            cells += [f"{1e3 * measured:.2f}", f"{1e3 * said[name]:.2f}", f"{said[name] / measured - 1:+.0%}"]
        lines.append(tuple(cells))
    parts = ["Milliseconds", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    head = ("form", "model", "platform", "devices", "rank", "MiB of the program", "predicted", "error")
    lines = [head, ("---",) * len(head)]
    for row in results["memory"]:
        said, measured = predicted_memory(row), row["measured"]
        cells = [str(row[x]) for x in ("form", "model", "platform", "devices", "rank")]
        lines.append((*cells, *(f"{x / 2**20:,.0f}" for x in (measured, said)), f"{said / measured - 1:+.1%}"))
    return "\n\n".join([*parts, "\n".join(f"| {' | '.join(line)} |" for line in lines)])


def main() -> None:
    """Measures, and writes the results after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time what this program computes, and not what it waits for, on one thread: for a machine in use",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), default=range(len(CASES)))
    arguments = machine.parse(parser, RESULTS, table)
    if arguments is None:
        return
    machine.keep_memory("benchmarks.plan")
    os.environ["PJRT_NPROC"] = "32"  # more threads than devices, or programs with collectives wait for ever
    if arguments.cpu_time:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    jax.config.update("jax_num_cpu_devices", max(case.devices for case in CASES))
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    head = {**machine.describe(sys.argv), "clock": "CPU time" if arguments.cpu_time else "wall clock"}
    results = {**head, "repeats": arguments.repeats, "times": [], "memory": []}
    if "memory" in arguments.parts:
        results["memory"] = memory_rows()
    if "programs" in arguments.parts:
        results["memory"] += [compiled(*one) for one in PROGRAMS]
    for case in (CASES[i] for i in arguments.cases if "times" in arguments.parts):
        row = timed(case, arguments.repeats, clock)
        row["predicted"] = predicted(row)
        results["times"].append(row)
        print(case, row["measured"], row["predicted"], flush=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        jax.clear_caches()
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
