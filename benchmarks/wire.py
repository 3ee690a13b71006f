"""What really goes over the wire: bytes that each of several processes sends, beside what the formula says.

    python -m benchmarks.wire              # prints a table, writes benchmarks/results/wire.json
    python -m benchmarks.wire --print      # prints the table of results that are there

Two and four processes with a CPU device each share one update over gloo, on this machine. Linux counts, for every TCP
connection, the bytes that it has sent and the segments that they went in (``TCP_INFO``). Counted are the connections
between the processes that train. Those to the coordinator, with its heartbeats, are left out.

Measured are an update of Adam, with the averaging of the gradient, one of `dho2` on Adam without a refresh, and what a
refresh adds to that; and the three collectives that they are made of, by themselves. Each is the mean of calls. The
formula is that of `dho2_optax.plan`: what is sent by rings. Bytes are payload. Headers come on top, 52 bytes a segment.
"""

import argparse
import functools
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine

RESULTS = Path(__file__).parent / "results" / "wire.json"
PROCESSES = (2, 4)
SIZES = ((512, 1024, 512), (1024, 2048, 1024))  # of the layers: 1.05 and 4.2 million parameters
RANK = 4
ORDER = 8
BATCH_SIZE = 16
HEADERS = 20 + 20 + 12  # of a segment: IPv4, TCP, and its time stamps
_ESTABLISHED = 1
# In `struct tcp_info` of linux/tcp.h: since 4.19 the last two, bytes sent and bytes sent once more.
_STATE, _SEGMENTS, _BYTES, _AGAIN = (0, "=B"), (136, "=I"), (200, "=Q"), (208, "=Q")
_QUIET = 0.2  # seconds until what has been handed to the system has been sent


class Sent(NamedTuple):
    """What connections have sent."""

    bytes: float
    segments: float

    def since(self, before: "Sent") -> "Sent":
        """The difference."""
        return Sent(self.bytes - before.bytes, self.segments - before.segments)


def mean(counts: Sequence[Sent]) -> Sent:
    """Of some calls."""
    return Sent(*(sum(x) / len(counts) for x in zip(*counts, strict=True)))


def whole_rows(numbers: int) -> int:
    """So many numbers or fewer, such that every number of processes divides them."""
    return numbers // 256 * 256


def sent_by(info: bytes) -> Sent | None:
    """What one connection has sent, each byte once, of its `struct tcp_info`; None where it is not established."""
    fields = (_STATE, _SEGMENTS, _BYTES, _AGAIN)
    state, segments, sent, again = (struct.unpack_from(form, info, place)[0] for place, form in fields)
    return Sent(sent - again, segments) if state == _ESTABLISHED else None


def sent(coordinator: int) -> Sent:
    """What the connections of this process have sent, those from or to a port left out."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(path).startswith("socket:"):
                continue
            duplicate = os.dup(int(path.name))
        except OSError:  # closed meanwhile
            continue
        with socket.socket(fileno=duplicate) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                continue
            counted = sent_by(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
            if counted and coordinator not in (connection.getsockname()[1], connection.getpeername()[1]):
                found.append(counted)
    return Sent(sum(x.bytes for x in found), sum(x.segments for x in found))


def formula(what: str, size: float, processes: int, products: int = ORDER) -> float:
    """Bytes that one of several processes sends, of arrays of `size` bytes, if all goes round a ring.

    Args:
      what: a collective, of which `size` is the larger of what goes in and what comes out; or ``"adam"``, ``"update"``
        or ``"refresh"``, of parameters of that size.
      size: bytes.
      processes: how many.
      products: in a refresh.
    """
    once = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "adam": 2, "update": 3, "refresh": 2 * products}
    return once[what] * size * (processes - 1) / processes


def collectives(numbers: int) -> dict[str, Callable[[], Any]]:
    """A call of each collective, of so many float32 numbers."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(jax.devices()), ("data",))
    kinds = {
        "all-gather": (lambda x: jax.lax.all_gather(x, "data", tiled=True), P("data"), P()),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), P("data")),
        "all-reduce": (lambda x: jax.lax.psum(x, "data"), P(), P()),
    }
    calls: dict[str, Callable[[], Any]] = {}
    for name, (operation, before, after) in kinds.items():
        x = jax.jit(lambda: jax.numpy.ones(numbers), out_shardings=NamedSharding(mesh, before))()
        call = jax.jit(jax.shard_map(operation, mesh=mesh, in_specs=before, out_specs=after, check_vma=False))
        calls[name] = functools.partial(call, x)
    return calls


class Training:
    """Calls a compiled, donated update over and over on its own parameters and state."""

    def __init__(self, sizes: tuple[int, ...], refresh_interval: int | None = None) -> None:
        """Of `dho2` on Adam, or of Adam alone if no interval is given."""
        import jax
        import numpy as np
        import optax
        from jax.sharding import Mesh, NamedSharding
        from jax.sharding import PartitionSpec as P

        import dho2_optax as dho2
        from benchmarks.overhead import init_params
        from benchmarks.plan import loss_fn

        mesh = Mesh(np.array(jax.devices()), ("data",))
        whole = NamedSharding(mesh, P())
        tx = optax.with_extra_args_support(optax.adam(1e-3))
        if refresh_interval is not None:
            solver = dho2.Eigensolver(order=ORDER, tolerance=0.0)
            split = dho2.Split("data", mesh=mesh)
            tx = dho2.dho2(
                optax.adam(1e-3), loss_fn, rank=RANK, refresh_interval=refresh_interval, eigensolver=solver, split=split
            )
        params = jax.jit(lambda: init_params(jax.random.key(0), sizes), out_shardings=whole)()
        samples = np.random.default_rng(0).normal(size=(BATCH_SIZE, sizes[0])).astype(np.float32)
        by_sample = NamedSharding(mesh, P("data"))
        self._batch = jax.make_array_from_callback(samples.shape, by_sample, lambda index: samples[index])

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        state = tx.init(params) if refresh_interval is not None else jax.jit(tx.init, out_shardings=whole)(params)
        self._now = params, state
        self._step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        """One update."""
        self._now = self._step(*self._now, self._batch)
        return self._now

    def made(self) -> tuple[int, int]:
        """Refreshes and products so far."""
        state = self._now[1]
        return int(state.refreshes), int(state.matvecs)


def measure(sizes: tuple[int, ...], calls: int, coordinator: int) -> dict[str, Any]:
    """What this process sends, in every case."""
    import jax

    def count(call: Callable[[], Any], calls: int = calls) -> list[Sent]:
        for _ in range(2):  # connections are made
            jax.block_until_ready(call())
        time.sleep(_QUIET)
        counts = [sent(coordinator)]
        for _ in range(calls):
            jax.block_until_ready(call())
            time.sleep(_QUIET)
            counts.append(sent(coordinator))
        return [after.since(before) for before, after in itertools.pairwise(counts)]

    numbers = sum(m * n + n for m, n in itertools.pairwise(sizes))
    hybrid, adam = Training(sizes, refresh_interval=2), Training(sizes)
    made = [(0, 0)]

    def update() -> None:
        hybrid()
        made.append(hybrid.made())

    counts = count(update, 2 * calls)
    refreshed = [after[0] > before[0] for before, after in itertools.pairwise(made[-1 - 2 * calls :])]
    without, together = (mean([x for x, y in zip(counts, refreshed, strict=True) if y is z]) for z in (False, True))
    rows = {"adam": mean(count(adam)), "update": without, "refresh": together.since(without)}
    rows |= {name: mean(count(call)) for name, call in collectives(whole_rows(numbers)).items()}
    return {"parameters": numbers, "products": made[-1][1] // made[-1][0], "rows": rows}


def run(processes: int, sizes: tuple[int, ...], calls: int) -> list[dict[str, Any]]:
    """Rows of one model, measured by so many processes that this one starts."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    case = json.dumps({"processes": processes, "sizes": sizes, "calls": calls, "port": port})
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.wire", "--case", case, "--process", str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return summed([json.loads(text.splitlines()[-1]) for text in printed])


def summed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each case, over the processes that measured it."""
    first, processes = found[0], len(found)
    rows: list[dict[str, Any]] = []
    for what in first["rows"]:
        numbers = first["parameters"]
        size = 4 * (numbers if what in ("adam", "update", "refresh") else whole_rows(numbers))
        each = [Sent(*x["rows"][what]) for x in found]
        rows.append(
            {
                "processes": processes,
                "parameters": numbers,
                "what": what,
                "bytes": sum(x.bytes for x in each) / processes,
                "least": min(x.bytes for x in each),
                "most": max(x.bytes for x in each),
                "formula": formula(what, size, processes, first["products"]),
                "headers": HEADERS * sum(x.segments for x in each) / processes,
            }
        )
    return rows


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown, in MB."""
    lines = [
        "| processes | parameters | | sent, MB | formula, MB | ratio | least, most | headers |",
        "|" + " --- |" * 8,
    ]
    for row in results["rows"]:
        sent, ratios = row["bytes"] / 1e6, [row[name] / row["formula"] for name in ("bytes", "least", "most")]
        lines.append(
            f"| {row['processes']} | {row['parameters']:,} | {row['what']} | {sent:.3f} | {row['formula'] / 1e6:.3f} "
            f"| {ratios[0]:.4f} | {ratios[1]:.3f}, {ratios[2]:.3f} | {row['headers'] / row['bytes']:.2%} |"
        )
    return "\n".join(lines)


def _process(case: dict[str, Any], process: int) -> None:
    """One of the processes: measures and prints a line of JSON."""
    import jax

    jax.distributed.initialize(f"localhost:{case['port']}", case["processes"], process)
    print(json.dumps(measure(tuple(case["sizes"]), case["calls"], case["port"])), flush=True)


def main() -> None:
    """Starts the processes of every case, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5, help="of each program (default 5)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    arguments = machine.parse(parser, RESULTS, table)
    if arguments is None:
        return
    if arguments.case:
        _process(json.loads(arguments.case), arguments.process)
        return
    rows = [row for processes in PROCESSES for sizes in SIZES for row in run(processes, sizes, arguments.calls)]
    about = {"calls": arguments.calls, "rank": RANK, "order": ORDER, "batch_size": BATCH_SIZE}
    results = {**machine.describe(sys.argv), **about, "rows": rows}
    print(table(results))
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
