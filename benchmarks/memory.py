"""Bytes that an update holds on each device, by the number of devices, read off compiled programs.

    python -m benchmarks.memory               # prints tables, writes benchmarks/results/memory.json and docs/memory.png
    python -m benchmarks.memory --print       # prints the tables of results that are there

Nothing is allocated and nothing runs: programs are compiled for the shapes of published networks, on 1 to 256 virtual
CPU devices and, where the package `libtpu` is installed, for slices of TPU chips that nobody has to have. Measured is
the update ``(parameters, state, gradient, batch) -> (parameters, state)``, with parameters and state donated, the state
split over all devices and parameters and gradient whole on each. Compared are

* ``adam``, the base alone, whose state is split as that of the hybrids;
* ``product``, the same with sixteen Hessian products in a loop, but no Lanczos vectors: what any method needs that
  makes products in an update; and ``probe``, the same with one;
* ``dho2`` and ``mr_dho2`` on Adam; ``dho2_bf16`` and ``mr_dho2_bf16`` store eigenvectors and basis in bfloat16.

The loss is a stand-in, the sum of the cosines of all parameters, times the mean of the batch: its product is a product
leaf by leaf, with temporaries of the size of the parameters and without activations. ``gpt2_trained`` is there to check
it: the transformer with its own loss, on one sequence of 1024 tokens for each device.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dho2_optax as dho2
from benchmarks import machine, networks, shapes
from dho2_optax import curvature, parallel, plots, programs, segments
from dho2_optax.packing import Layout

RESULTS = Path(__file__).parent / "results" / "memory.json"
AXIS = "data"
PRODUCTS = 16  # in the loop of the program without Lanczos vectors
TOPOLOGIES = {
    "v5e": {1: "v5e:2x2", 8: "v5e:4x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"},
    "v5p": {64: "v5p:4x4x4"},
    "v6e": {64: "v6e:8x8"},
}
"""Of slices of a kind of TPU, by the number of chips."""

Loss = Callable[[Any, Any], jax.Array]


class Case(NamedTuple):
    """A program."""

    model: str
    platform: str  # "cpu", or a kind of TPU
    devices: int
    method: str
    rank: int


class Problem(NamedTuple):
    """What is trained."""

    params: Any  # shapes
    loss_fn: Loss
    batch: Callable[[int], Any]  # number of devices -> shapes


def stand_in(params: Any, batch: jax.Array) -> jax.Array:
    """A loss of any parameters, whose derivatives hold next to nothing."""
    return jnp.mean(batch) * sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(params))


def _gpt2_trained() -> Problem:
    network = networks.transformer(12, 768, 12, 50257, length=1024, batch_size=1, scanned=True)

    def tied(params: Any, tokens: jax.Array) -> jax.Array:
        return network.loss_fn({**params, "logits": params["tokens"].T}, tokens)

    return Problem(shapes.gpt2(), tied, lambda count: jax.ShapeDtypeStruct((count, 1024), jnp.int32))


def problem(model: str) -> Problem:
    """The problem of a name: that of a network's own loss, or a stand-in for it."""
    if model == "gpt2_trained":
        return _gpt2_trained()
    batch = lambda count: jax.ShapeDtypeStruct((4 * count,), jnp.float32)  # noqa: E731
    return Problem(shapes.MODELS[model](), stand_in, batch)


def _base_alone(loss_fn: Loss, products: int) -> optax.GradientTransformationExtraArgs:
    """Adam on segments, as the hybrids run it, and before it some Hessian products."""
    base = optax.adam(1e-3)

    def init(params: Any) -> Any:
        return base.init(segments.split(params, AXIS))

    def update(grads: Any, state: Any, params: Any = None, *, batch: Any = None) -> tuple[Any, Any]:
        layout = Layout(params, AXIS)
        gradient = layout.split(grads)
        if products:
            matvec = curvature.segmented_matvec(dho2.hessian(loss_fn), params, batch, AXIS)
            several = functools.partial(jax.lax.fori_loop, 0, products, lambda _, vector: matvec(vector))
            gradient = matvec(gradient) if products == 1 else several(gradient)
        updates, state = base.update(layout.unpack_segments(gradient), state)
        return layout.unpack(layout.gather(layout.pack_segments(updates))), state

    return optax.GradientTransformationExtraArgs(init, update)


def _over(
    local: optax.GradientTransformationExtraArgs, mesh: Mesh, params: Any
) -> optax.GradientTransformationExtraArgs:
    """A transformation written for one device of the axis, on global arrays."""
    whole, specs = PartitionSpec(), parallel.state_specs(local.init, params, AXIS)

    def update(grads: Any, state: Any, params: Any = None, *, batch: Any = None) -> tuple[Any, Any]:
        function = lambda g, s, p, b: local.update(g, s, p, batch=b)  # noqa: E731
        in_specs = (whole, specs, whole, PartitionSpec(AXIS))
        return parallel.over_axis(function, mesh, AXIS, in_specs, (whole, specs))(grads, state, params, batch)

    return optax.GradientTransformationExtraArgs(local.init, update)


Made = tuple[optax.GradientTransformationExtraArgs, optax.GradientTransformationExtraArgs]


def _made_base(products: int) -> Callable[[Problem, Mesh, int], Made]:
    def make(problem: Problem, mesh: Mesh, rank: int) -> Made:
        local = _base_alone(problem.loss_fn, products)
        return local, _over(local, mesh, problem.params)

    return make


def _dho2(problem: Problem) -> Callable[..., optax.GradientTransformationExtraArgs]:
    return functools.partial(dho2.dho2, optax.adam(1e-3), problem.loss_fn, batch_size=None)


def _mr_dho2(problem: Problem) -> Callable[..., optax.GradientTransformationExtraArgs]:
    return functools.partial(dho2.mr_dho2, optax.adam(1e-3), curvature=dho2.hessian(problem.loss_fn))


def _made_hybrid(
    constructor: Callable[[Problem], Callable[..., optax.GradientTransformationExtraArgs]], basis_dtype: Any = None
) -> Callable[[Problem, Mesh, int], Made]:
    def make(problem: Problem, mesh: Mesh, rank: int) -> Made:
        solver = dho2.Eigensolver(basis_dtype=basis_dtype)
        with_split = functools.partial(constructor(problem), rank=rank, eigensolver=solver)
        return with_split(split=dho2.Split(AXIS)), with_split(split=dho2.Split(AXIS, mesh=mesh))

    return make


METHODS: dict[str, Callable[[Problem, Mesh, int], Made]] = {
    "adam": _made_base(0),
    "product": _made_base(PRODUCTS),
    "probe": _made_base(1),
    "dho2": _made_hybrid(_dho2),
    "mr_dho2": _made_hybrid(_mr_dho2),
    "dho2_bf16": _made_hybrid(_dho2, jnp.bfloat16),
    "mr_dho2_bf16": _made_hybrid(_mr_dho2, jnp.bfloat16),
}
"""For one device of the axis, which says how the state is sharded, and on global arrays, which is compiled."""


@functools.cache
def mesh_of(platform: str, devices: int) -> Mesh:
    """Virtual CPU devices, or chips of which there is only a description."""
    if platform == "cpu":
        return Mesh(np.array(jax.devices("cpu")[:devices]), (AXIS,))
    from jax.experimental import topologies  # loads `libtpu`

    described = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[platform][devices])
    return Mesh(np.array(described.devices).reshape(-1)[:devices], (AXIS,))


def compiled(case: Case, problem: Problem) -> tuple[Any, Any]:
    """The program of a case, and the shapes of its state with their shardings."""
    mesh = mesh_of(case.platform, case.devices)
    local, tx = METHODS[case.method](problem, mesh, case.rank)
    specs = parallel.state_specs(local.init, problem.params, AXIS)
    init = parallel.over_axis(local.init, mesh, AXIS, PartitionSpec(), specs)

    def placed(tree: Any, specs: Any) -> Any:
        place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
        return jax.tree.map(place, tree, specs)

    def everywhere(tree: Any, spec: PartitionSpec) -> Any:
        return placed(tree, jax.tree.map(lambda _: spec, tree))

    def step(params: Any, state: Any, grads: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    params = everywhere(problem.params, PartitionSpec())
    state = placed(jax.eval_shape(init, problem.params), specs)
    batch = everywhere(problem.batch(case.devices), PartitionSpec(AXIS))
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params, batch).compile(), state


def measure(case: Case, problem: Problem) -> dict[str, Any]:
    """A row of the results: bytes on one device, and the collectives on more numbers than a thousandth of a vector."""
    start = time.process_time()
    program, state = compiled(case, problem)
    num_params = shapes.num_params(problem.params)
    needed = programs.memory(program)
    vector = 4 * num_params / case.devices
    basis = getattr(getattr(state, "probing", None), "process", None)
    parts = {
        "eigenvectors": state.spectrum.eigenvectors if hasattr(state, "spectrum") else (),
        "basis": () if basis is None else basis.basis,
        "all": state,
    }
    text = program.as_text()
    cost = program.cost_analysis() or {}
    return {
        **case._asdict(),
        "num_params": num_params,
        "memory": {**needed._asdict(), "total": needed.total},
        "state": {name: programs.tree_bytes_per_device(part) for name, part in parts.items()},
        "stacks": _stacks(text, case, num_params),
        "collectives": _large(text, vector / 1000),
        "cost": {name: cost[name] for name in ("flops", "bytes accessed") if name in cost},
        "cpu_seconds": time.process_time() - start,
    }


def _large(text: str, least: float) -> list[dict[str, Any]]:
    """The collectives of at least so many bytes, and where: in every step, in a refresh or probe, in its loop."""
    found: dict[tuple[str, str, int, int], int] = {}
    for one in programs.collectives(text):
        if one.bytes >= least:
            where = "loop" if one.in_loop else "branch" if one.in_branch else "step"
            key = (one.op, where, one.bytes, one.group_size)
            found[key] = found.get(key, 0) + 1
    return [
        {"op": op, "where": where, "bytes": size, "group": group, "count": count}
        for (op, where, size, group), count in sorted(found.items())
    ]


_STACK = re.compile(r"\b(f32)\[(\d+(?:,\d+)+)\]\{([\d,]+)(?::T\((\d+),(\d+)\))?")


def _stacks(text: str, case: Case, num_params: int) -> list[dict[str, Any]]:
    """How the compiler stores stacks of segments: the layouts of arrays with an axis of rank or order.

    Bytes are those of whole tiles, of as many rows and columns as the layout says.
    """
    found: dict[str, dict[str, Any]] = {}
    for match in _STACK.finditer(text):
        sizes = [int(n) for n in match.group(2).split(",")]
        is_stack = len(sizes) == 3 and sizes[0] in (case.rank, 2 * case.rank)
        if not is_stack or math.prod(sizes[1:]) * case.devices < num_params or match.group(0) in found:
            continue
        order = [int(n) for n in match.group(3).split(",")]
        stored = list(sizes)
        if match.group(4):
            for axis, tile in zip(order, (int(match.group(5)), int(match.group(4))), strict=False):
                stored[axis] = -(-stored[axis] // tile) * tile
        found[match.group(0)] = {"layout": match.group(0) + "}", "padded": math.prod(stored) / math.prod(sizes)}
    return list(found.values())


TPU = ("v5e", "v5p", "v6e")


def cases(models: Sequence[str], platforms: Sequence[str], methods: Sequence[str]) -> list[Case]:
    """What is measured by default, the most telling first."""
    found: list[Case] = []

    def add(model: str, platform: str, devices: Iterable[int], names: Iterable[str], rank: int = 8) -> None:
        found.extend(Case(model, platform, count, name, rank) for count in devices for name in names)

    every, some = ("dho2", "product", "adam", "mr_dho2", "probe"), ("dho2", "product", "adam")
    short = ("dho2_bf16", "mr_dho2_bf16")
    add("resnet50", "v5e", (64, 8), some)
    add("resnet50", "v5e", (1, 256), ("dho2", "product"))
    add("resnet50", "v5e", (8,), (*short, "mr_dho2", "probe"))
    add("resnet50", "v5e", (1,), ("adam", "mr_dho2", "probe"))
    add("resnet50", "v5e", (64,), ("mr_dho2", "probe"))
    add("gpt2", "v5e", (64,), ("dho2", "product"))
    add("gpt2", "v5e", (64,), ("dho2",), rank=16)
    add("resnet50", "v6e", (64,), ("dho2", "product"))
    add("resnet50", "v5p", (64,), ("dho2", "product"))
    add("resnet50", "v5e", (16,), ("dho2", "product"))
    add("gpt2_trained", "v5e", (64,), ("dho2", "product"))
    add("pythia_1b", "v5p", (64,), some)  # on chips with 16 GB there is no room for it
    add("gpt2", "v5e", (64,), ("adam", "mr_dho2", "probe"))
    add("resnet50", "v5e", (256,), ("adam", "mr_dho2", "probe"))
    add("resnet50", "v5e", (16,), ("adam", "mr_dho2", "probe"))
    add("gpt2", "v5e", (64,), ("mr_dho2",), rank=16)
    add("gpt2_trained", "v5e", (64,), ("dho2",), rank=16)
    add("resnet50", "v6e", (64,), ("adam",))
    add("resnet50", "v5p", (64,), ("adam",))
    for model in ("vgg16", "gpt2", "pythia_1b"):
        add(model, "cpu", (1, 8), every)
    add("gpt2", "cpu", (64,), every)
    add("gpt2", "cpu", (1, 8, 64), ("dho2", "mr_dho2"), rank=16)
    add("gpt2", "cpu", (16, 2, 4, 256), every)
    add("pythia_1b", "cpu", (64,), some)
    add("resnet50", "cpu", (1, 8, 64), some)
    add("vgg16", "cpu", (64, 2, 4), some)
    add("resnet152", "cpu", (1, 8), some)
    return [one for one in found if one.model in models and one.platform in platforms and one.method in methods]


def main() -> None:
    """Measures, and writes the results after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = (*shapes.MODELS, "gpt2_trained")
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL")
    parser.add_argument("--platforms", nargs="+", choices=("cpu", *TPU), default=("cpu", *TPU), metavar="PLATFORM")
    parser.add_argument("--devices", nargs="+", type=int, help="of those that are measured, these numbers alone")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS), metavar="METHOD")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "docs" / "memory.png")
    parser.add_argument("--keep", action="store_true", help="keep the rows that are there, and measure what is missing")
    arguments = machine.parse(parser, RESULTS, table)
    if arguments is None:
        return
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 256)
    jax.config.update("jax_enable_compilation_cache", False)
    wanted = cases(arguments.models, arguments.platforms, arguments.methods)
    if arguments.devices:
        wanted = [case for case in wanted if case.devices in arguments.devices]
    has_tpu = importlib.util.find_spec("libtpu") is not None
    left_out = [] if has_tpu else [case for case in wanted if case.platform != "cpu"]
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.keep and arguments.out.exists() else []
    there = {key(row) for row in rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    head = machine.describe(sys.argv)
    if has_tpu:
        head["versions"]["libtpu"] = importlib.metadata.version("libtpu")
    for case in (case for case in wanted if case not in left_out and case not in there):
        rows.append({**measure(case, problem(case.model)), "commit": head["commit"]})
        print(_line(rows[-1]), flush=True)
        arguments.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
        jax.clear_caches()
    print(table({"rows": rows}))
    if importlib.util.find_spec("matplotlib"):
        plot(rows, arguments.plot)
    if left_out:
        print(f"{len(left_out)} programs for TPU were left out: the package libtpu is not installed.")


def key(row: dict[str, Any]) -> Case:
    """Which case a row is of."""
    return Case(*(row[name] for name in Case._fields))


def _line(row: dict[str, Any]) -> str:
    vector = 4 * row["num_params"]
    sizes = {name: row["memory"][name] / vector for name in ("argument", "temp", "total")}
    counts = ", ".join(f"{name} {size:.3f}" for name, size in sizes.items())
    return f"{' '.join(map(str, key(row)))}: {counts} vectors, {row['cpu_seconds']:.0f} CPU s"


WITHOUT = {"dho2": "product", "mr_dho2": "probe"}
"""What the hybrids are without vectors of their own."""


def curvature_share(rows: Sequence[dict[str, Any]], case: Case) -> int | None:
    """Bytes of a hybrid on one device, less those of Adam with its products; None where one of them is not there."""
    found = {key(row): row["memory"]["total"] for row in rows}
    without = case._replace(method=WITHOUT[case.method], rank=8)
    return found[case] - found[without] if case in found and without in found else None


def vectors_held(method: str, rank: int) -> int:
    """How many vectors, split over the devices, a hybrid holds at its peak, as its design says.

    Eigenvectors, Krylov basis of twice as many, the factors of the metric, in `mr_dho2` those of the running cycle too,
    and some vectors to work with: beside the basis of a refresh four, for a probe two.
    """
    return rank + 2 * rank + (2 + 2 if method == "mr_dho2" else 1 + 4)


_HEAD = (
    "devices",
    "Adam",
    "`dho2`",
    "less Adam",
    "curvature",
    "part of one device",
    "by design",
    "`mr_dho2`",
    "less Adam",
    "curvature",
    "part of one device",
    "by design",
    "eigenvectors as published",
)


def table(results: dict[str, Any]) -> str:
    """MiB on one device as Markdown, a table for each model and platform, at rank 8; and what one more pair costs."""
    rows = results["rows"]
    parts = []
    for model, platform in dict.fromkeys((row["model"], row["platform"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["platform"]) == (model, platform)]
        devices = sorted({row["devices"] for row in chosen})
        lines = [_HEAD, ["---"] * len(_HEAD)]
        lines += [_cells(rows, Case(model, platform, count, "adam", 8), chosen[0]["num_params"]) for count in devices]
        title = f"{model}, {chosen[0]['num_params']:,} parameters, {platform}, MiB"
        parts.append("\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join([*parts, *_pairs(rows), *_short(rows)])


def _cells(rows: Sequence[dict[str, Any]], case: Case, num_params: int) -> list[str]:
    found = {key(row): row["memory"]["total"] for row in rows}
    adam = found.get(case)
    cells = [str(case.devices), _mib(adam)]
    for method in ("dho2", "mr_dho2"):
        hybrid = case._replace(method=method)
        total = found.get(hybrid)
        share, one = (curvature_share(rows, x) for x in (hybrid, hybrid._replace(devices=1)))
        cells += [_mib(total), _mib(total - adam if total and adam else None), _mib(share)]
        cells.append(f"1/{one / share:.1f}" if share and share > 0 and one else "-")
        cells.append(_mib(vectors_held(method, case.rank) * 4 * num_params / case.devices))
    return [*cells, _mib(case.rank * 4 * num_params)]


def _pairs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What one more eigenpair costs on a device, in vectors of the whole model divided by the number of devices."""
    found = {key(row): row for row in rows}
    lines = []
    for case, row in found.items():
        less = case._replace(rank=case.rank // 2)
        if case.rank == 16 and less in found:
            vector = 4 * row["num_params"] / case.devices
            more = (row["memory"]["total"] - found[less]["memory"]["total"]) / (case.rank - less.rank) / vector
            lines.append(f"{case.model}, {case.platform}, {case.devices} devices, {case.method}: {more:.3f} vectors")
    return lines


def _short(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is held where eigenvectors and basis are stored in bfloat16, and by Adam whose state is not split."""
    found = {key(row): _mib(row["memory"]["total"]) for row in rows}
    lines = []
    for case, total in found.items():
        if case.method.endswith("_bf16"):
            long = case._replace(method=case.method.removesuffix("_bf16"))
            adam = case._replace(devices=1, method="adam")
            where = f"{case.model}, {case.platform}, {case.devices} devices, {long.method}"
            sizes = f"in float32 {found.get(long, '-')}, Adam alone, not split {found.get(adam, '-')}"
            lines.append(f"{where} in bfloat16: {total} MiB, {sizes}")
    return lines


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f}" if size < 2**24 else f"{size / 2**20:,.0f}"


PANELS = (("gpt2", "cpu"), ("resnet50", "v5e"))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """MiB on one device against the number of devices, as in the tables, and the line along which they would fall."""
    from matplotlib.figure import Figure  # of the extra `poc`

    there = {key(row)[:2] for row in rows if curvature_share(rows, key(row)._replace(method="dho2"))}
    panels = [panel for panel in PANELS if panel in there]
    if not panels:
        return
    figure = Figure(figsize=(5.2 * len(panels), 5.0), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for one, panel in zip(axes, panels, strict=True):
        _panel(one, rows, *panel)
    axes[0].set_ylabel("MiB on each device")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def _panel(axes: Any, rows: Sequence[dict[str, Any]], model: str, platform: str) -> None:
    chosen = [row for row in rows if (row["model"], row["platform"], row["rank"]) == (model, platform, 8)]
    devices = sorted({row["devices"] for row in chosen})
    vector = 4 * shapes.num_params(shapes.MODELS[model]())
    sizes: dict[str, dict[int, float]] = {}
    looks: dict[str, dict[str, Any]] = {}
    for method, colour in (("dho2", "C0"), ("mr_dho2", "C1")):
        sizes[f"update with {method}"] = {r["devices"]: r["memory"]["total"] for r in chosen if r["method"] == method}
        shares = {n: curvature_share(rows, Case(model, platform, n, method, 8)) for n in devices}
        sizes[f"curvature in {method}"] = {n: share for n, share in shares.items() if share and share > 0}
        looks[f"update with {method}"] = {"marker": "s", "linestyle": "--", "color": colour, "markersize": 4}
        looks[f"curvature in {method}"] = {"color": colour}
    held = vectors_held("dho2", 8)
    design, products = f"{held} vectors, divided by the devices", "update with Adam and Hessian products"
    sizes[design] = {n: held * vector / n for n in devices}
    looks[design] = {"marker": "", "linestyle": ":", "color": "black"}
    sizes[products] = {r["devices"]: r["memory"]["total"] for r in chosen if r["method"] == "product"}
    looks[products] = {"marker": "s", "linestyle": "--", "color": "0.5", "markersize": 4}
    in_mib = {name: {count: size / 2**20 for count, size in points.items()} for name, points in sizes.items()}
    plots.memory(in_mib, axes, looks=looks, ideal=False)
    axes.yaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
    axes.yaxis.set_minor_formatter(plots.minor(axes.get_ylim, "{:,.0f}".format))
    axes.axhline(8 * vector / 2**20, color="C3", linestyle="-.", label="eigenvectors, whole on each device")
    axes.set(xlabel="devices", ylabel="")
    where = "virtual CPU devices" if platform == "cpu" else f"TPU {platform}"
    axes.set_title(f"{model}, rank 8, order 16, {where}", fontsize=10)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
