"""How much of the refresh is hidden behind training: `CurvatureGroup` and `mr_dho2` against the synchronous `dho2`.

    python -m benchmarks.overlap        # prints a table, writes benchmarks/results/overlap.json

Measured are the seconds of N training steps without any refresh, of the refreshes alone, and of both together; the
fraction hidden is what the total falls short of the sum, relative to the refreshes. Each form runs in a process of its
own, with virtual CPU devices that compute with one thread each, so that two of them can work at the same time on two
cores. Such devices show that the forms overlap; how fast they are on an accelerator they do not show.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

FORMS = {
    "separate devices, 1 training + 1 curvature": ("roles", 1, 1),
    "separate devices, 7 training + 1 curvature": ("roles", 7, 1),
    "separate devices, 4 training + 4 curvature": ("roles", 4, 4),
    "streaming, 1 device": ("streaming", 1, 0),
}
NUM_STEPS = 128
INTERVAL = 64
RANK = 8
ORDER = 16


def measure(form: str, num_training: int, num_curvature: int, repeats: int) -> dict[str, Any]:
    """The times of one form, in this process."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import dho2_optax as dho2
    from benchmarks.overhead import init_params, loss_fn

    devices = jax.devices()
    mesh = Mesh(np.array(devices[:num_training]), ("data",))
    rng = np.random.default_rng(0)
    host_batch = (rng.normal(size=(280, 784)).astype(np.float32), (np.arange(280) % 10).astype(np.int32))
    batch = jax.device_put(host_batch, NamedSharding(mesh, P("data")))
    start = jax.device_put(init_params(jax.random.key(0)), NamedSharding(mesh, P()))
    common: dict[str, Any] = {"rank": RANK, "eigensolver": dho2.Eigensolver(order=ORDER, tolerance=0.0)}
    split = dho2.Split("data", mesh=mesh) if num_training > 1 else None

    def compiled(tx: Any, streaming: bool) -> tuple[Any, Any]:
        probing = dho2.value_grad_and_hvp(loss_fn, batch_size=None)

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            if streaming:
                _, grads, hvp = probing(params, state, batch)
                updates, state = tx.update(grads, state, params, hvp=hvp)
            else:
                updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init)(start)
        return jax.jit(step).lower(start, state, batch).compile(), state

    def train(program: tuple[Any, Any] | None, group: Any = None, num_steps: int = NUM_STEPS) -> float:
        """Seconds of the steps, each waited for, until both groups have done their work; no steps without program."""
        step, state = program or (None, never[1])
        params = start
        begin = time.perf_counter()
        for _ in range(num_steps):
            if step is not None:
                params, state = jax.block_until_ready(step(params, state, batch))
            if group is not None:
                state = group.advance(state, params, host_batch)
        if group is not None:
            group.close()
        return time.perf_counter() - begin

    base = optax.adam(1e-3)
    never = compiled(dho2.dho2(base, refresh_interval=None, split=split, **common), streaming=False)
    if form == "roles":
        group = dho2.CurvatureGroup(
            loss_fn,
            devices=devices[num_training : num_training + num_curvature],
            interval=INTERVAL,
            deterministic=True,
            batch_size=None,
            **common,
        )
        kinds = {
            "steps alone": lambda: train(never),
            "refreshes alone": lambda: train(None, group),
            "together": lambda: train(never, group),
        }
    else:
        streamed = compiled(dho2.mr_dho2(base, probe_interval=INTERVAL // ORDER, split=split, **common), streaming=True)
        always = compiled(
            dho2.dho2(base, loss_fn, refresh_interval=1, batch_size=None, split=split, **common), streaming=False
        )
        num_refreshes = NUM_STEPS // INTERVAL
        kinds = {
            "steps alone": lambda: train(never),
            "refreshes alone": lambda: train(always, None, num_refreshes) - train(never, None, num_refreshes),
            "together": lambda: train(streamed),
        }
    for run in kinds.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, run in kinds.items():
            times[name].append(run())
    median = {name: statistics.median(values) for name, values in times.items()}
    hidden = (median["steps alone"] + median["refreshes alone"] - median["together"]) / median["refreshes alone"]
    return {"seconds": times, "median": median, "fraction_hidden": hidden}


def main() -> None:
    """Runs every form in a process of its own and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overlap.json")
    parser.add_argument("--form", choices=FORMS, help="only this one, as JSON on standard output")
    arguments = parser.parse_args()
    machine.keep_memory("benchmarks.overlap")
    if arguments.form:
        print(json.dumps(measure(*FORMS[arguments.form], arguments.repeats)))
        return
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    environment = {**os.environ, "XLA_FLAGS": flags, "PJRT_NPROC": "32", "JAX_PLATFORMS": "cpu"}
    forms = {}
    for name in FORMS:
        command = [sys.executable, "-m", "benchmarks.overlap", "--form", name, "--repeats", str(arguments.repeats)]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        forms[name] = json.loads(printed.splitlines()[-1])
        print(f"{name}: {forms[name]['median']}, hidden {forms[name]['fraction_hidden']:.2f}", flush=True)

    results = {
        **machine.describe(sys.argv),
        "problem": "MLP 784-1024-256-10 (1.07 M parameters), batch 280, base Adam",
        "num_steps": NUM_STEPS,
        "updates_between_refreshes": INTERVAL,
        "rank": RANK,
        "order": ORDER,
        "flags": flags,
        "forms": forms,
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
