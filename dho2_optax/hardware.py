"""What devices and the links between them can do: published figures, or measured on the spot.

`dho2_optax.planner` divides work by these speeds. Nothing here knows of an optimizer.
"""

# With it, `help` shows signatures as they are written here.
from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dho2_optax import arguments, curvature, vectors
from dho2_optax.curvature import BatchSize, LossFn

__all__ = ["HARDWARE", "NETWORKS", "Hardware", "exchange", "measure", "of_this_machine"]

_AXIS = "devices"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of device, as it is seen by one program on several of them.

    Args:
      name: of the kind.
      flops: operations a second that a gradient reaches in float32, by JAX's default precision.
      bandwidth: bytes a second in which a stack of vectors is read.
      memory: bytes that a device has; infinity, the default, where that is not known.
      links: bytes a second of a device's links, in both directions together; infinity for a single one.
      network: bytes a second that a host sends to others, or None where the links reach every device.
      per_host: devices that `links` join; beyond them `network` counts.
      axes: of a torus that the links make, or 0 for a switch.
      ring: an axis of the torus is a ring if its length is a multiple of this.
      most: devices that the links can join; None where any number.
      latency: seconds of a collective beside those of its bytes.
      launch: seconds of a program that does nothing.
      product: seconds of a curvature product, in those of a gradient on as many samples.
      sharing: None for devices of their own; or of virtual devices, which share one processor, the number at which
        the speeds were measured. With twice as many each has half of them.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float = math.inf
    links: float = math.inf
    network: float | None = None
    per_host: int | None = None
    axes: int = 0
    ring: int = 1
    most: int | None = None
    latency: float = 0.0
    launch: float = 0.0
    product: float = 2.0
    sharing: int | None = None

    def __post_init__(self) -> None:
        numbers = ("flops", "bandwidth", "memory", "links", "product")
        arguments.check_numbers("positive", infinite=True, **{name: getattr(self, name) for name in numbers})
        arguments.check_numbers("positive", infinite=True, optional=True, network=self.network)
        arguments.check_numbers("non-negative", latency=self.latency, launch=self.launch)
        arguments.check_sizes(per_host=self.per_host, most=self.most, sharing=self.sharing, ring=self.ring)

    def at(self, devices: int) -> Hardware:
        """The same as each of so many devices sees it: virtual ones share what there is."""
        if self.sharing is None or self.sharing == devices:
            return self
        part = self.sharing / devices
        return replace(
            self,
            flops=part * self.flops,
            bandwidth=part * self.bandwidth,
            links=part * self.links,
            latency=self.latency / part,
            launch=self.launch / part,
            sharing=devices,
        )

    def can_join(self, devices: int) -> bool:
        """Whether there is such a number of them: of TPU chips, powers of two up to a pod."""
        if self.axes and devices & (devices - 1):
            return False
        return self.most is None or devices <= self.most


UTILIZATION = 0.4
"""The part of the published speed of matrix units that a gradient is taken to reach."""


def _published(name: str, flops: float, bandwidth: float, memory: float, links: float, **more: Any) -> Hardware:
    return Hardware(name=name, flops=UTILIZATION * flops, bandwidth=bandwidth, memory=memory, links=links, **more)


NETWORKS = {"10gbit": 1.25e9, "25gbit": 3.125e9, "100gbit": 12.5e9}
"""Bytes a second that a host sends over Ethernet of that speed (IEEE 802.3), in one direction."""

HARDWARE: dict[str, Hardware] = {
    "v5e": _published("v5e", 197e12, 819e9, 16e9, 400e9, axes=2, ring=16, most=256),
    "v5p": _published("v5p", 459e12, 2765e9, 95e9, 1200e9, axes=3, ring=4, most=256),
    "v6e": _published("v6e", 918e12, 1600e9, 32e9, 800e9, axes=2, ring=16, most=256),
    "a100": _published("a100", 156e12, 2039e9, 80e9, 600e9, per_host=8),
    "h100": _published("h100", 494e12, 3350e9, 80e9, 900e9, per_host=8),
    "h200": _published("h200", 494e12, 4800e9, 141e9, 900e9, per_host=8),
}
"""Published figures by the name of a kind.

Matrix units: on TPU those of bf16, in which JAX multiplies float32 by default, on GPU those of TF32, for the same
reason, without sparsity. `UTILIZATION` of it is what `flops` says. Memory and links are taken at their published speed.

* TPU: https://cloud.google.com/tpu/docs/v5e, https://cloud.google.com/tpu/docs/v5p,
  https://cloud.google.com/tpu/docs/v6e. Which axes of a slice are rings, and how long collectives take on them:
  https://jax-ml.github.io/scaling-book/tpus, https://jax-ml.github.io/scaling-book/sharding. Slices of more than 256
  chips are left out.
* NVIDIA, SXM modules, A100 with 80 GB, eight of them joined by NVLink in a host:
  https://www.nvidia.com/en-us/data-center/a100, https://www.nvidia.com/en-us/data-center/h100,
  https://www.nvidia.com/en-us/data-center/h200. Between hosts a network must be given.
"""

_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}


def of_this_machine() -> Hardware | None:
    """The published figures of this machine's devices; None where there are none, as for processors.

    Example:
      >>> of_this_machine() is None or of_this_machine().name in HARDWARE
      True
    """
    kind = jax.devices()[0].device_kind
    names = [name for prefix, name in sorted(_KINDS.items()) if kind.startswith(prefix)]
    return HARDWARE[names[-1]] if names else None


def exchange(hardware: Hardware, devices: int, size: float) -> float:
    """Seconds in which every device gets `size` bytes of which all hold equal parts: an all-gather.

    A reduce-scatter takes as long, an all-reduce as both. Of a link's speed, which counts both directions, a device
    sends half. Along an axis of a torus that is no ring half of that is lost. Beyond one host the bytes of all other
    hosts come through the host's network too.

    Args:
      hardware: speeds, of :meth:`Hardware.at` so many devices.
      devices: how many.
      size: in bytes.

    Example:
      >>> exchange(HARDWARE["v5p"], 64, 600e9), exchange(HARDWARE["h100"], 8, 450e9)
      (0.984375, 0.875)
    """
    if devices == 1:
        return 0.0
    speed = hardware.links / 2
    if hardware.axes:
        lengths = _slice(devices, hardware.axes)
        open_ended = sum(1 for length in lengths if length % hardware.ring)
        speed *= 1 - open_ended / (2 * len(lengths))
    within = devices if hardware.per_host is None else min(devices, hardware.per_host)
    seconds = hardware.latency + size * (within - 1) / within / speed
    hosts = -(-devices // within)
    if hosts > 1:
        if hardware.network is None:
            raise ValueError(f"`network` must be given for {devices} devices of {hardware.name}, got None.")
        seconds += size * (hosts - 1) / hosts / hardware.network
    return seconds


def _slice(devices: int, axes: int) -> list[int]:
    """The axes of a slice of so many chips, as equal as they can be."""
    doublings = devices.bit_length() - 1
    return [2 ** (doublings // axes + (i < doublings % axes)) for i in range(axes)]


def stand_in(params: Any, batch: jax.Array) -> jax.Array:
    r"""A loss with the work of a dense network: every leaf multiplies a batch of its own, and nothing else.

    :math:`\sum_l \langle \tanh^2(X_l W_l) \rangle`, with :math:`X_l` the numbers of the batch repeated over as many
    columns as the leaf has rows.

    Args:
      params: floating-point arrays.
      batch: shape=(samples,).
    """

    def of_leaf(leaf: jax.Array) -> jax.Array:
        matrix = leaf.reshape(-1, leaf.shape[-1]) if leaf.ndim else leaf.reshape(1, 1)
        inputs = batch[:, None] * jnp.cos(jnp.arange(len(matrix), dtype=matrix.dtype))
        return jnp.mean(jnp.tanh(inputs @ matrix) ** 2)

    return sum((of_leaf(leaf) for leaf in jax.tree.leaves(params)), jnp.zeros(()))


def sample_flops(loss_fn: LossFn, params: Any, batch: Any) -> float:
    """Operations of a gradient for each sample, as XLA counts them in the program before it is optimized.

    Args:
      loss_fn: ``(params, batch) -> loss``.
      params: arrays, or their shapes.
      batch: arrays or shapes, with the samples along the leading axis.

    Example:
      >>> w, x = jnp.ones((8, 4)), jnp.ones((16, 8))
      >>> 2 * 2 * 32 <= sample_flops(lambda w, x: jnp.mean((x @ w) ** 2), w, x) <= 200
      True
    """
    cost = jax.jit(jax.grad(loss_fn)).lower(params, batch).cost_analysis()
    if isinstance(cost, Sequence):  # of some versions, one for each device
        cost = cost[0] if cost else None
    samples = max((x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "shape", ())), default=1)
    return float((cost or {}).get("flops", 0.0)) / samples


def best_seconds(
    functions: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The shortest time of each function: in turn, two calls in a row of which the second counts.

    A machine that is shared slows some of the calls down, and speeds none of them up.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            jax.block_until_ready(function())
            start = clock()
            jax.block_until_ready(function())
            times[name].append(clock() - start)
    return {name: min(values) for name, values in times.items()}


def measure(
    params: Any,
    loss_fn: LossFn = stand_in,
    batch: Any = None,
    *,
    devices: int = 1,
    rank: int = 8,
    batch_size: BatchSize = "auto",
    repeats: int = 8,
    clock: Callable[[], float] = time.perf_counter,
) -> Hardware:
    """The speeds of this machine, from a few small runs: a gradient, a product, an all-gather, a sum, a stack read.

    Takes some seconds, most of them to compile. Everything runs on `devices` at once, as in training; virtual devices
    share the processor, and their speeds are what is left for each.

    Args:
      params: arrays, whose values are used, or their shapes.
      loss_fn: ``(params, batch) -> loss``. Default: :func:`stand_in`.
      batch: what it is called with, arrays with a leading axis that `devices` divides. Default: 256 numbers for each
        device.
      devices: how many of this machine's devices.
      rank: vectors in the stack that is read.
      batch_size: as in :func:`dho2_optax.dho2`: on how many samples of a device the product is made.
      repeats: of every run; the shortest counts.
      clock: what says the time in seconds. ``time.process_time`` counts only what this program computes, on a processor
        that others use too, and so the work of all virtual devices together.

    Returns:
      A :class:`Hardware`, named after the device.

    Raises:
      ValueError: for more devices than there are, or sizes that are not positive.

    Example:
      >>> found = measure({"w": jnp.ones((64, 32))}, repeats=2)
      >>> found.flops > 0 and found.bandwidth > 0 and found.links == float("inf")
      True
    """
    arguments.check_sizes(devices=devices, rank=rank, repeats=repeats)
    if devices > jax.device_count():
        raise ValueError(f"`devices` must be at most the {jax.device_count()} of this machine, got {devices}.")
    params = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.full(x.shape, 0.01, x.dtype), params)
    batch = jnp.linspace(-1, 1, 256 * devices) if batch is None else batch
    runs = _Runs(params, loss_fn, batch, devices, rank, batch_size)
    best = best_seconds(runs.functions(), repeats, clock)
    first = jax.devices()[0]
    gradient = max(best["gradient"] - best["launch"], 1e-9)
    product = max(best["products"] - best["launch"], 1e-9) / _PRODUCTS
    moved = max((best["gather"] + best["scatter"]) / 2 - best["small"], 1e-9)
    return Hardware(
        name=first.device_kind,
        flops=sample_flops(loss_fn, params, batch) * runs.samples / devices / gradient,
        bandwidth=2 * runs.stack_bytes / max(best["dots"] + best["combine"] - 2 * best["launch"], 1e-9),
        memory=float((first.memory_stats() or {}).get("bytes_limit", math.inf)),
        links=math.inf if devices == 1 else 2 * runs.vector_bytes * (devices - 1) / devices / moved,
        latency=0.0 if devices == 1 else max(best["small"] - best["launch"], 0.0),
        launch=best["launch"],
        product=product / gradient * runs.samples / runs.samples_of_product,
        sharing=devices if first.platform == "cpu" else None,
    )


_PRODUCTS = 4  # in a loop


class _Runs:
    """The programs that are measured, on all devices at once."""

    def __init__(
        self, params: Any, loss_fn: LossFn, batch: Any, devices: int, rank: int, batch_size: BatchSize
    ) -> None:
        self._devices = devices
        self._mesh = Mesh(np.array(jax.devices()[:devices]), (_AXIS,))
        self._params, self._loss_fn = params, loss_fn
        self._batch = batch
        number = -(-sum(x.size for x in jax.tree.leaves(params)) // devices)
        self._stack = jnp.ones((devices * rank, number))
        self._vector = jnp.ones(devices * number)
        self.vector_bytes = 4 * devices * number
        self.stack_bytes = 4 * rank * number
        self.samples = max((x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)), default=1)
        local = self.samples // devices
        part = curvature.auto_size(local, devices) if batch_size == "auto" else batch_size
        self._part = min(part or local, local)
        self.samples_of_product = self._part * devices

    def functions(self) -> dict[str, Callable[[], Any]]:
        """By name; each waits for nothing."""
        whole, split = PartitionSpec(), PartitionSpec(_AXIS)
        operator = curvature.hessian(self._loss_fn)

        def products(params: Any, batch: Any) -> Any:
            part = curvature.part(batch, self._part, None)
            step = lambda _, vector: operator(params, vector, part)  # noqa: E731
            return lax.fori_loop(0, _PRODUCTS, step, jax.tree.map(jnp.ones_like, params))

        scatter = functools.partial(lax.psum_scatter, axis_name=_AXIS, tiled=True)
        gather = functools.partial(lax.all_gather, axis_name=_AXIS, tiled=True)
        batch = jax.tree.map(lambda x: split if jnp.ndim(x) else whole, self._batch)
        params = jax.tree.map(lambda _: whole, self._params)
        tiny = jnp.ones(self._devices)
        stack, row, vector = self._stack, jnp.ones(self._stack.shape[1]), self._vector
        weights = jnp.ones(len(stack) // self._devices)
        runs: dict[str, tuple[Callable[..., Any], Any, tuple[Any, ...]]] = {
            "launch": (lambda x: x + 1, (split,), (tiny,)),
            "gradient": (jax.grad(self._loss_fn), (params, batch), (self._params, self._batch)),
            "products": (products, (params, batch), (self._params, self._batch)),
            "dots": (lambda s, v: vectors.dots((s,), (v,)), (split, whole), (stack, row)),
            "combine": (lambda c, s: vectors.combine(c, (s,)), (whole, split), (weights, stack)),
        }
        if self._devices > 1:
            runs |= {
                "gather": (gather, (split,), (vector,)),
                "scatter": (scatter, (whole,), (vector,)),
                "small": (gather, (split,), (tiny,)),
            }
        made = {name: self._compiled(*run) for name, run in runs.items()}
        return made if self._devices > 1 else made | dict.fromkeys(("gather", "scatter", "small"), made["launch"])

    def _compiled(
        self, function: Callable[..., Any], specs: tuple[Any, ...], values: tuple[Any, ...]
    ) -> Callable[[], Any]:
        """The function of what each device has; of its results nothing is made that is global."""
        outputs = lambda *local: jax.tree.map(lambda x: x[None], function(*local))  # noqa: E731
        split = PartitionSpec(_AXIS)
        mapped = jax.shard_map(outputs, mesh=self._mesh, in_specs=specs, out_specs=split, check_vma=False)
        placed = [
            jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(self._mesh, s)), value, spec)
            for value, spec in zip(values, specs, strict=True)
        ]
        return functools.partial(jax.jit(mapped), *placed)
