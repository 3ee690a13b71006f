"""Ten thousand updates of `mr_dho2` on eight devices, on batches of which some are hostile.

    python -m benchmarks.soak --out benchmarks/results/soak.json      # about ten minutes on two cores
    python -m benchmarks.soak --print

A small network learns a function. One batch in fifty is spoilt: a sample that is not finite, numbers near the end of
float32, zeros, dim or bright. The base drops what is not finite and clips, as any training that meets such batches has
to. Looked at are what must not grow (live arrays, memory of the process, compiled programs), what must not drift (the
orthogonality of the eigenvectors in use), and what is counted: whenever a batch that nothing can be learnt from comes
when a probe is due, `rejected_refreshes` of ``dho2_optax.metrics`` grows by one.
"""

import argparse
import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("PJRT_NPROC", "32")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from benchmarks import machine
from dho2_optax.state import find_state
from dho2_optax.streaming import is_due

RESULTS = Path(__file__).parent / "results" / "soak.json"
DEVICES, BATCH, RANK = 8, 256, 4
WARMUP = 500  # updates, after which nothing may grow
EVERY = 100  # updates between two looks
PART = 0.02  # of the batches are spoilt
ORTHOGONALITY = 1e-5  # the goal for |VV' - I|, of each number
COMPILATION = "/jax/core/compile/backend_compile_duration"  # the event that JAX records

#: What is done to inputs and targets, and whether curvature must not be learnt from it.
HOSTILE = {
    "nan": (lambda x: np.where(np.arange(len(x)) == 0, np.nan, x.T).T, True),
    "inf": (lambda x: np.where(np.arange(len(x)) == 0, np.inf, x.T).T, True),
    "1e30": (lambda x: 1e30 * x, True),
    "bright": (lambda x: 1e3 * x, True),
    "zeros": (lambda x: 0 * x, False),
    "dim": (lambda x: 1e-3 * x, False),
}


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Mean squared error of a network with one layer."""
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y) ** 2)


def draw(rng: np.random.Generator, kind: str | None) -> Any:
    """A batch on the host."""
    x = rng.normal(size=(BATCH, 20)) * np.logspace(0, -1, 20)
    y = np.sin(x @ np.ones(20)) + 0.1 * rng.normal(size=BATCH)
    spoil = HOSTILE[kind][0] if kind else lambda x: x
    with np.errstate(over="ignore", invalid="ignore"):
        return np.float32(spoil(x)), np.float32(spoil(y))


def start() -> Any:
    """Parameters on the host."""
    rng = np.random.default_rng(0)
    return {
        "w1": np.float32(rng.normal(size=(20, 32)) / 4),
        "b1": np.zeros(32, np.float32),
        "w2": np.zeros(32, np.float32),
    }


def optimizer(mesh: Mesh) -> Any:
    """`mr_dho2` on an Adam that survives any gradient; element by element, so that it may see segments."""
    survive = optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.clip(jnp.nan_to_num(x), -1, 1), g))
    base = optax.chain(survive, optax.adam(3e-3))
    return dho2.mr_dho2(base, rank=RANK, probe_interval=1, split=dho2.Split("data", mesh=mesh))


@jax.jit
def defect(state: Any) -> jax.Array:
    """The largest number of |VV' - I| among the active pairs."""
    pairs = dho2.spectrum(state)
    gram = sum(jnp.einsum("i...,j...->ij", x, x, precision="highest") for x in pairs.eigenvectors)
    both = pairs.mask[:, None] & pairs.mask
    return jnp.max(jnp.where(both, jnp.abs(gram - jnp.eye(len(gram))), 0))


def resident() -> float:
    """MiB of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(num_steps: int, warmup: int = WARMUP, every: int = EVERY, seed: int = 0) -> dict[str, Any]:
    """Trains, and returns what was seen."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    whole, by_sample = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    tx = optimizer(mesh)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        due = is_due(find_state(state))
        loss, grads, hvp = dho2.value_grad_and_hvp(loss_fn)(params, state, batch)
        updates, state = tx.update(grads, state, params, hvp=hvp)
        params = optax.apply_updates(params, updates)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
        return params, state, (loss, finite, due, dho2.metrics(state)["rejected_refreshes"])

    compilations = Counter()
    count = lambda event, duration, **_: compilations.update([event])  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(count)
    rng = np.random.default_rng(seed)
    params = jax.device_put(start(), whole)
    state = tx.init(params)
    kinds = rng.choice([None, *HOSTILE], size=num_steps, p=[1 - PART, *[PART / len(HOSTILE)] * len(HOSTILE)])
    events, due_events, counted, clean_rejected = Counter(), Counter(), Counter(), 0
    looks, losses, before, all_finite = [], [], 0, True
    for i, kind in enumerate(kinds):
        batch = jax.device_put(draw(rng, kind), by_sample)
        params, state, seen = step(params, state, batch)
        loss, finite, due, rejected = jax.device_get(seen)
        all_finite &= bool(finite)
        if kind is None:
            losses.append(float(loss))
            clean_rejected += int(rejected - before)
        else:
            events[kind] += 1
            due_events[kind] += bool(due)
            counted[kind] += int(rejected - before)
        before = rejected
        if i + 1 == warmup or (i + 1 > warmup and (i + 1) % every == 0):
            look = {"step": i + 1, "defect": float(defect(state)), "compilations": compilations[COMPILATION]}
            looks.append({**look, "live_arrays": len(jax.live_arrays()), "resident_mib": round(resident(), 1)})
    jax.monitoring.unregister_event_duration_listener(count)
    metrics = {name: float(value) for name, value in dho2.metrics(state).items()}
    names = ("refreshes", "rejected_refreshes", "matvecs", "active_pairs", "skipped_probes")
    return {
        "steps": num_steps,
        "parameters_finite": all_finite,
        "events": {
            kind: {"batches": events[kind], "probe_due": due_events[kind], "counted": counted[kind]} for kind in HOSTILE
        },
        "clean_batches_rejected": clean_rejected,
        "loss_first": float(np.mean(losses[:50])),
        "loss_last": float(np.mean(losses[-50:])),
        "metrics": {name: metrics[name] for name in names},
        "looks": looks,
    }


def problems(found: dict[str, Any]) -> list[str]:
    """What a run has shown that must not be, in words."""
    first, last = found["looks"][0], found["looks"][-1]
    wrong = [] if found["parameters_finite"] else ["parameters that are not finite"]
    wrong += [f"{name} grew" for name in ("compilations", "live_arrays") if last[name] > first[name]]
    if last["resident_mib"] > 1.05 * first["resident_mib"] + 16:
        wrong.append("memory of the process grew")
    if max(look["defect"] for look in found["looks"]) > ORTHOGONALITY:
        wrong.append("eigenvectors are not orthonormal")
    for kind, seen in found["events"].items():
        if seen["counted"] != (seen["probe_due"] if HOSTILE[kind][1] else 0):
            wrong.append(f"events of {kind} are not counted")
    return wrong


def table(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    rows = [f"| {kind} | {x['batches']} | {x['probe_due']} | {x['counted']} |" for kind, x in result["events"].items()]
    first, last = result["looks"][0], result["looks"][-1]
    worst = max(look["defect"] for look in result["looks"])
    facts = [f"{name}: {first[name]}, {last[name]}" for name in ("compilations", "live_arrays", "resident_mib")]
    head = "| batch | how many | when a probe was due | counted |\n|---|---|---|---|\n"
    return head + "\n".join(
        [*rows, "", f"largest |VV' - I|: {worst:.1e}", *facts, f"wrong: {problems(result) or 'nothing'}"]
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description="A long run on hostile batches.")
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = machine.parse(parser, RESULTS, table)
    if arguments is None:
        return
    jax.config.update("jax_num_cpu_devices", DEVICES)
    result = {**machine.describe(sys.argv), **run(arguments.steps)}
    head = json.dumps({**result, "looks": []}, indent=1).removesuffix("[]\n}")
    arguments.out.write_text(head + "[\n" + ",\n".join(f"  {json.dumps(x)}" for x in result["looks"]) + "\n ]\n}\n")
    print(table(result))


if __name__ == "__main__":
    main()
