"""What curvature will cost before anything runs: memory, bytes, seconds, and which form of refresh to take.

Arithmetic on the shapes of the parameters and the speeds of `dho2_optax.hardware`. Bytes of memory follow the buffers
that compiled programs were seen to hold, to 1% on CPU (`benchmarks/results/memory.json`). Seconds are sums of work,
memory traffic and communication, without overlap; `benchmarks/results/plan.json` has them beside measurements.
"""

# With it, `help` shows signatures as they are written here.
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dho2_optax import arguments, segments
from dho2_optax.curvature import BatchSize, auto_size
from dho2_optax.hardware import HARDWARE, NETWORKS, Hardware, exchange, of_this_machine

__all__ = ["Form", "Plan", "compile_seconds", "last_that_pays", "plan"]

PAYS = 1.5
"""Twice as many devices pay as long as steps become this many times faster."""

_RANKS = (64, 32, 16, 8, 4, 2, 1)  # from which one is recommended
_SHORTEST, _LONGEST = 10, 100  # intervals between refreshes from which one is recommended
_LEAST_PART = 128  # samples, over all devices, below which no smaller part of the batch is recommended
_TIE = 1.02  # forms whose mean steps differ by less are equally fast
_MOST_DEVICES = 1024

# Passes over memory, in vectors of which a device has its part. An update reads every eigenvector four times; a product
# of a Lanczos process reads the whole basis twice; a publication reads every old eigenvector for every vector of the
# basis, and the basis three times, though what writes a large leaf reads it once for each pair. The other numbers were
# fitted to measurements.
_UPDATE_VECTORS = 28.0
_UPDATE_READS = 4.0
_PRODUCT_VECTORS = 32.0
_PRODUCT_READS = 2.0
_WHOLE_VECTORS = 6.0  # whole ones, that are packed and unpacked where there are several devices

# What compilers for TPU keep more than on CPU, in whole vectors and in parts of one: from the programs of `dho2` for
# 8 and 64 chips of v5e in `benchmarks/results/memory.json`.
_TPU_WHOLE, _TPU_SPLIT = 0.5, 6.0

# Seconds of trace, lowering and compilation against leaves, a square fitted to `dho2` on Adam in
# `benchmarks/results/compile.json`. Other networks, and compilers for accelerators, were up to three times as slow.
_COMPILE = (2.0, 0.13, 0.00147)
COMPILE_FACTOR = 3.0
"""Compile times are known up to this factor."""

FormName = Literal["synchronous", "streaming", "group"]
CONSTRUCTORS: Mapping[FormName, str] = {
    "synchronous": "dho2",
    "streaming": "mr_dho2",
    "group": "dho2 with a CurvatureGroup",
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """What one form of refresh costs. Seconds and bytes; bytes are those of one device.

    Args:
      name: ``"synchronous"`` (:func:`dho2_optax.dho2`), ``"streaming"`` (:func:`dho2_optax.mr_dho2`) or ``"group"``
        (:class:`dho2_optax.CurvatureGroup`).
      training_devices: devices that train.
      curvature_devices: devices that do curvature and nothing else.
      memory: held by a training device.
      curvature_memory: held by a curvature device, 0 without.
      step_bytes: sent by a training device in a step without curvature products.
      refresh_bytes: sent in all of a refresh by a device that takes part in it.
      update_seconds: of an update without curvature products, apart from the gradient and its average.
      step_seconds: of a step with such an update.
      refresh_seconds: of all of a refresh.
      mean_seconds: of a step with its part of the refreshes.
      longest_seconds: of the longest step.
      share: the part of the mean step that it would not take with the base alone.
      fits: whether the devices have that memory.
    """

    name: FormName
    training_devices: int
    curvature_devices: int
    memory: float
    curvature_memory: float
    step_bytes: float
    refresh_bytes: float
    update_seconds: float
    step_seconds: float
    refresh_seconds: float
    mean_seconds: float
    longest_seconds: float
    share: float
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What :func:`plan` returns. Its ``str`` is a table.

    Args:
      hardware: name of the kind of device.
      devices: how many, training and curvature together.
      num_params: numbers in the parameters.
      num_leaves: arrays in the parameters; None where only the number of parameters was given.
      batch_size: over all devices.
      rank: eigenpairs.
      order: products in a refresh.
      interval: updates between two refreshes.
      curvature_batch: samples that products are made on, over all devices.
      budget: the part of the time that curvature may take.
      within_budget: whether the chosen form stays within it.
      base_seconds: of a step of the base alone on all devices.
      base_memory: held by a device with the base alone, whole on each.
      compile_seconds: of a step with a refresh, up to a factor of `COMPILE_FACTOR`; None where leaves are not known.
      useful_devices: twice as many no longer make the mean step `PAYS` times faster; None where a network between hosts
        was needed to say.
      chosen: the form that is recommended.
      forms: all that were compared.
    """

    hardware: str
    devices: int
    num_params: int
    num_leaves: int | None
    batch_size: int
    rank: int
    order: int
    interval: int
    curvature_batch: int
    budget: float
    within_budget: bool
    base_seconds: float
    base_memory: float
    compile_seconds: float | None
    useful_devices: int | None
    chosen: Form
    forms: tuple[Form, ...]

    def __str__(self) -> str:
        """A table of a few lines."""
        rows = summary(self)
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def summary(plan: Plan) -> list[tuple[str, str]]:
    """The lines of a plan: a name, and what is said of it."""
    best = plan.chosen
    split = f"{best.training_devices} training and {best.curvature_devices} curvature"
    compiled = "not known without the shapes of the parameters"
    if plan.compile_seconds is not None:
        compiled = f"{plan.compile_seconds:.0f} s, up to a factor of {COMPILE_FACTOR:g}"
    within = "within" if plan.within_budget else "ABOVE"
    rows = [
        ("devices", f"{plan.devices} of {plan.hardware}" + (f": {split}" if best.curvature_devices else "")),
        ("parameters", f"{plan.num_params:,}" + (f" in {plan.num_leaves} arrays" if plan.num_leaves else "")),
        ("form", f"{best.name}: {CONSTRUCTORS[best.name]}"),
        ("rank, order, interval", f"{plan.rank}, {plan.order}, {plan.interval}"),
        ("products on", f"{plan.curvature_batch} of {plan.batch_size} samples"),
        ("memory", f"{_bytes(best.memory)} on a device" + ("" if best.fits else ", MORE than it has")),
        ("memory of the base", _bytes(plan.base_memory)),
    ]
    if best.curvature_devices:
        rows.append(("memory for curvature", f"{_bytes(best.curvature_memory)} on a device of the group"))
    return [
        *rows,
        ("sent in a step", f"{_bytes(best.step_bytes)} by a device"),
        ("sent in a refresh", f"{_bytes(best.refresh_bytes)} by a device"),
        ("step of the base", _seconds(plan.base_seconds)),
        ("step", _seconds(best.step_seconds)),
        ("refresh", _seconds(best.refresh_seconds)),
        ("mean step", f"{_seconds(best.mean_seconds)}, at most {_seconds(best.longest_seconds)}"),
        ("share of curvature", f"{best.share:.1%}, {within} the budget of {plan.budget:.1%}"),
        ("compilation", compiled),
        ("more devices pay", _paying(plan.useful_devices)),
    ]


def compared(plan: Plan) -> list[tuple[str, ...]]:
    """The forms of a plan: name, devices, mean step, longest step, share, memory, and whether it fits."""
    return [
        (
            one.name,
            f"{one.training_devices} + {one.curvature_devices}",
            _seconds(one.mean_seconds),
            _seconds(one.longest_seconds),
            f"{one.share:.1%}",
            _bytes(max(one.memory, one.curvature_memory)),
            "yes" if one.fits else "no",
        )
        for one in plan.forms
    ]


def _paying(useful: int | None) -> str:
    return "not known without a network between hosts" if useful is None else f"up to {useful}"


def plan(
    params: Any,
    *,
    batch_size: int,
    devices: int = 1,
    hardware: Hardware | str | None = None,
    network: float | str | None = None,
    rank: int | None = None,
    order: int | None = None,
    interval: int | None = None,
    curvature_batch: BatchSize = "auto",
    curvature_devices: int | None = None,
    budget: float = 0.1,
    sample_flops: float | None = None,
    sample_bytes: float = 0.0,
    base_vectors: int = 2,
) -> Plan:
    r"""What curvature costs on some devices, and which rank, interval and form of refresh keep within a budget.

    With :math:`n` bytes of parameters, :math:`P` devices, rank :math:`k` and order :math:`m`, a device of
    :func:`dho2_optax.dho2` on Adam holds at most

    .. math::
        2n + (k + 3) \frac nP + 3n + (m + 4) \frac nP

    bytes: parameters, gradient and state, and the temporaries of a product. To send it has :math:`3 n (P - 1) / P` a
    step, two of which average the gradient, and :math:`2 m n (P - 1) / P` a refresh, on TPU half as much again. Work,
    memory traffic and communication are divided by the speeds of `hardware` and added up.

    What is not given is recommended: the largest rank, then the largest part of the batch, with which the form chosen
    takes no more than `budget` of the time at an interval of at most 100; and of such intervals the shortest, from 10.
    That is a statement about cost. How much curvature helps depends on the problem.

    Of the forms that fit in memory the one with the shortest mean step is chosen; where they differ by less than 2%,
    the first of ``"synchronous"``, ``"streaming"``, ``"group"``.

    Args:
      params: the parameters or their shapes (a pytree of anything with ``shape`` and ``dtype``), a list of shapes, all
        float32, or how many numbers.
      batch_size: samples in a batch, over all devices.
      devices: how many, over which the state is split.
      hardware: their kind, by a name in ``dho2_optax.hardware.HARDWARE``, or speeds, from
        ``dho2_optax.hardware.measure`` say. Default: the published kind of this machine's devices.
      network: between hosts of several devices: bytes a second that a host sends, or ``"10gbit"``, ``"25gbit"`` or
        ``"100gbit"`` Ethernet.
      rank: eigenpairs.
      order: products in a refresh. Default: ``2 * rank``.
      interval: updates between two refreshes.
      curvature_batch: samples that products are made on, over all devices; ``"auto"`` as ``batch_size="auto"`` in
        :func:`dho2_optax.dho2`, or fewer if the budget asks for it; None for all.
      curvature_devices: devices of a :class:`dho2_optax.CurvatureGroup`. Default: a power of two, such that the group
        is as fast as the interval asks for and steps are the shortest.
      budget: the part of the time that curvature may take, above 0 and below 1.
      sample_flops: operations of the gradient of a sample. Default: 6 for each parameter, which is right for dense
        layers and transformers (Kaplan et al., arXiv 2001.08361), and too few for convolutions.
      sample_bytes: of the activations of a sample, while its gradient is made; twice as much counts for a product.
      base_vectors: vectors in the state of the base; 2 is Adam, with its metric.

    Returns:
      A :class:`dho2_optax.planner.Plan`.

    Raises:
      ValueError: for an argument out of range, a kind of hardware that is not known, or a network that is missing.

    Example:
      >>> import dho2_optax as dho2
      >>> found = dho2.plan([(784, 1024), (1024,)], batch_size=1024, devices=8, hardware="h100", rank=8, interval=50)
      >>> found.order, found.curvature_batch, found.num_params, found.chosen.fits
      (16, 128, 803840, True)

    References:
      Gu et al., "Accelerating Deep Neural Network Training via Distributed Hybrid Order Optimization",
      arXiv 2505.00982, for what is split.
    """
    sizes = _sizes(params)
    speeds = _hardware(hardware, network)
    arguments.check_sizes(batch_size=batch_size, devices=devices, rank=rank, order=order, interval=interval)
    arguments.check_sizes(curvature_devices=curvature_devices)
    for name, value in (("batch_size", batch_size), ("devices", devices)):
        if value is None:
            raise ValueError(f"`{name}` must be a Python int, got None.")
    arguments.check_sizes(auto=True, curvature_batch=curvature_batch)
    arguments.check_numbers("positive", optional=True, sample_flops=sample_flops)
    arguments.check_numbers("non-negative", sample_bytes=sample_bytes)
    arguments.check_numbers("non-negative", whole=True, base_vectors=base_vectors)
    arguments.check_numbers("positive", budget=budget)
    if budget >= 1:
        raise ValueError(f"`budget` must be below 1, got {budget!r}.")
    if batch_size % devices:
        raise ValueError(f"`batch_size` must be a multiple of the {devices} devices, got {batch_size}.")
    if isinstance(curvature_batch, int) and curvature_batch > batch_size:
        raise ValueError(f"`curvature_batch` must be at most the batch of {batch_size}, got {curvature_batch}.")
    if curvature_devices is not None and curvature_devices >= devices:
        raise ValueError(f"`curvature_devices` must be fewer than the {devices} devices, got {curvature_devices}.")
    if not speeds.can_join(devices):
        raise ValueError(f"`devices` must be a power of two up to {speeds.most} of {speeds.name}, got {devices}.")
    if order is not None and rank is not None and order < rank:
        raise ValueError(f"`order` must be at least the rank of {rank}, got {order}.")
    flops = 6.0 * sizes.number if sample_flops is None else float(sample_flops)
    job = _Job(sizes, speeds, batch_size, devices, flops, float(sample_bytes), int(base_vectors))
    return _recommend(job, _Wanted(rank, order, interval, curvature_batch, curvature_devices), float(budget))


def last_that_pays(means: Mapping[int, float]) -> int:
    """The most devices up to which every doubling makes a step `PAYS` times faster.

    Args:
      means: seconds by the number of devices.

    Example:
      >>> last_that_pays({8: 8.0, 16: 4.5, 32: 3.5})
      16
    """
    counts = sorted(means)
    for few, many in itertools.pairwise(counts):
        if means[few] < PAYS * means[many]:
            return few
    return counts[-1]


def compile_seconds(num_leaves: int) -> float:
    """Seconds to trace, lower and compile a step of `dho2` on two cores, up to a factor of `COMPILE_FACTOR`.

    Example:
      >>> round(compile_seconds(29), 1)
      7.0
    """
    constant, linear, square = _COMPILE
    return constant + linear * num_leaves + square * num_leaves**2


class _Sizes(NamedTuple):
    """Of the parameters: how many numbers each array has, and bytes of a number."""

    leaves: tuple[tuple[int, int], ...]
    known: bool  # whether these are the arrays, and not only how many numbers there are

    @property
    def number(self) -> int:
        return sum(size for size, _ in self.leaves)

    @property
    def whole(self) -> float:
        """Bytes of a vector."""
        return float(sum(size * itemsize for size, itemsize in self.leaves))

    def split(self, devices: int) -> float:
        """Bytes of a device's part of a vector, with its padding, in float32 or better."""
        if devices == 1:
            return float(sum(size * max(4, itemsize) for size, itemsize in self.leaves))
        padded = (segments.padded_size(size, devices) * max(4, itemsize) for size, itemsize in self.leaves)
        return sum(padded) / devices


class _Wanted(NamedTuple):
    """What the user has said; None where it is to be recommended."""

    rank: int | None
    order: int | None
    interval: int | None
    curvature_batch: BatchSize
    curvature_devices: int | None


class _Choice(NamedTuple):
    rank: int
    order: int
    interval: int
    part: int  # samples, over all devices


class _Job(NamedTuple):
    """What is trained, on what."""

    sizes: _Sizes
    hardware: Hardware
    batch_size: int
    devices: int
    flops: float  # of the gradient of a sample
    sample_bytes: float
    base_vectors: int

    @property
    def has_metric(self) -> bool:
        """Adam and its kin have one."""
        return self.base_vectors >= 2

    def gradient(self, samples: float, devices: int) -> float:
        """Seconds of the gradient of so many samples over so many devices."""
        speeds = self.hardware.at(self.devices)
        return speeds.launch + math.ceil(samples / devices) * self.flops / speeds.flops

    def averaged(self, devices: int) -> float:
        """Seconds of the average of the gradient: an all-reduce."""
        return exchange(self.hardware.at(self.devices), devices, 2 * self.sizes.whole)

    def base(self) -> float:
        """Seconds of a step with the base alone, whose state every device has whole."""
        touched = (3 + 2 * self.base_vectors) * self.sizes.whole
        gradient = self.gradient(self.batch_size, self.devices) + self.averaged(self.devices)
        return gradient + touched / self.hardware.at(self.devices).bandwidth

    def update(self, rank: int, devices: int) -> float:
        """Seconds of an update without its gradient and without a refresh."""
        speeds = self.hardware.at(self.devices)
        touched = (_UPDATE_VECTORS + _UPDATE_READS * rank) * self.sizes.split(devices)
        touched += _WHOLE_VECTORS * self.sizes.whole * (devices > 1)
        gathered = exchange(speeds, devices, self.sizes.whole)
        return speeds.launch + touched / speeds.bandwidth + gathered

    def product(self, part: int, order: int, devices: int) -> float:
        """Seconds of a product and of what the Lanczos process makes of it."""
        speeds = self.hardware.at(self.devices)
        work = speeds.product * math.ceil(part / devices) * self.flops / speeds.flops
        touched = (_PRODUCT_VECTORS + _PRODUCT_READS * order) * self.sizes.split(devices)
        touched += _WHOLE_VECTORS * self.sizes.whole * (devices > 1)
        return work + touched / speeds.bandwidth + exchange(speeds, devices, self.exchanged())

    def step(self, rank: int, devices: int) -> float:
        """Seconds of a step without curvature products, on so many of the devices."""
        return self.gradient(self.batch_size, devices) + self.averaged(devices) + self.update(rank, devices)

    def refresh(self, choice: _Choice, devices: int) -> float:
        """Seconds of all of a refresh, on so many of the devices."""
        products = choice.order * self.product(choice.part, choice.order, devices)
        return products + self.publication(choice.rank, choice.order, devices)

    def exchanged(self) -> float:
        """Bytes of the collectives of a product: on TPU the compiler makes an all-reduce of its reduce-scatter."""
        return (3 if self.hardware.axes else 2) * self.sizes.whole

    def publication(self, rank: int, order: int, devices: int) -> float:
        """Seconds in which new eigenvectors are compared with the old ones and written over them."""
        touched = (order * (rank + 3) + 3 * rank) * self.sizes.split(devices)
        return touched / self.hardware.at(self.devices).bandwidth

    def activations(self, samples: float, devices: int) -> float:
        """Bytes on a device."""
        return self.sample_bytes * math.ceil(samples / devices)

    def memory_of_base(self) -> float:
        """Parameters, gradient and the update, and the base's state, whole on each device."""
        return (3 + self.base_vectors) * self.sizes.whole + self.activations(self.batch_size, self.devices)

    def memory(self, name: FormName, choice: _Choice, devices: int) -> float:
        """Bytes that a training device holds at most."""
        whole, split = self.sizes.whole, self.sizes.split(devices)
        rank, order, factors = choice.rank, choice.order, int(self.has_metric)
        product = 2 * self.activations(choice.part, devices)
        if name == "synchronous":
            state = rank + factors + self.base_vectors
            temporaries = 3 * whole + (order + 4) * split + product
        elif name == "streaming":
            state = rank + order + 2 * factors + self.base_vectors
            temporaries = 2 * whole + 2 * split + product
        else:
            state = rank + factors + self.base_vectors
            temporaries = whole + 2 * split
        if self.hardware.axes:
            temporaries += _TPU_WHOLE * whole + _TPU_SPLIT * split
        held = 2 * whole + state * split
        return held + max(temporaries, self.activations(self.batch_size, devices))

    def memory_of_group(self, choice: _Choice, devices: int) -> float:
        """Bytes that a curvature device holds at most: the old eigenvectors are an argument, the new ones a result."""
        whole, split = self.sizes.whole, self.sizes.split(devices)
        product = 2 * self.activations(choice.part, devices)
        factors = 2 * int(self.has_metric) * whole
        temporaries = max(2 * whole + (choice.order + 1) * split + product, (choice.order + 4) * split)
        return whole + factors + 2 * choice.rank * split + temporaries


def _sent(size: float, devices: int) -> float:
    """Bytes that a device sends so that all have `size` bytes of which each has a part."""
    return size * (devices - 1) / devices


def _synchronous(job: _Job, choice: _Choice) -> Form:
    step, refresh = job.step(choice.rank, job.devices), job.refresh(choice, job.devices)
    return _form(
        job,
        choice,
        "synchronous",
        step_seconds=step,
        refresh_seconds=refresh,
        mean_seconds=step + refresh / choice.interval,
        longest_seconds=step + refresh,
    )


def _streaming(job: _Job, choice: _Choice) -> Form:
    """As many products, one every few updates."""
    devices = job.devices
    step, product = job.step(choice.rank, devices), job.product(choice.part, choice.order, devices)
    publication = job.publication(choice.rank, choice.order, devices)
    every = max(choice.interval / choice.order, 1.0)
    return _form(
        job,
        choice,
        "streaming",
        step_seconds=step,
        refresh_seconds=job.refresh(choice, devices),
        mean_seconds=step + product / every + publication / (every * choice.order),
        longest_seconds=step + product + publication,
    )


def _group(job: _Job, choice: _Choice, curvature_devices: int) -> Form:
    """A process of its own takes whole refreshes on some of the devices; others wait for none of it."""
    training = job.devices - curvature_devices
    speeds = job.hardware.at(job.devices)
    step, refresh = job.step(choice.rank, training), job.refresh(choice, curvature_devices)
    installed = job.publication(choice.rank, 0, training)
    installed += (choice.rank + 1) * job.sizes.split(training) / (speeds.links / 2)
    every = max(choice.interval, math.ceil(refresh / step))
    return _form(
        job,
        choice,
        "group",
        curvature_devices=curvature_devices,
        step_seconds=step,
        refresh_seconds=refresh,
        mean_seconds=step + installed / every,
        longest_seconds=step + installed,
    )


def _form(
    job: _Job,
    choice: _Choice,
    name: FormName,
    *,
    step_seconds: float,
    refresh_seconds: float,
    mean_seconds: float,
    longest_seconds: float,
    curvature_devices: int = 0,
) -> Form:
    training = job.devices - curvature_devices
    memory = job.memory(name, choice, training)
    of_group = job.memory_of_group(choice, curvature_devices) if curvature_devices else 0.0
    return Form(
        name=name,
        training_devices=training,
        curvature_devices=curvature_devices,
        memory=memory,
        curvature_memory=of_group,
        step_bytes=_sent(3 * job.sizes.whole, training),
        refresh_bytes=choice.order * _sent(job.exchanged(), curvature_devices or job.devices),
        update_seconds=job.update(choice.rank, training),
        step_seconds=step_seconds,
        refresh_seconds=refresh_seconds,
        mean_seconds=mean_seconds,
        longest_seconds=longest_seconds,
        share=max(0.0, 1 - job.base() / mean_seconds),
        fits=max(memory, of_group) <= job.hardware.memory,
    )


def _forms(job: _Job, choice: _Choice, curvature_devices: int | None) -> tuple[Form, ...]:
    """One of each kind; of groups the one with the shortest mean step of those that keep up with the interval."""
    found = [_synchronous(job, choice), _streaming(job, choice)]
    if curvature_devices is not None:
        return (*found, _group(job, choice, curvature_devices))
    sizes = [2**i for i in range(job.devices.bit_length()) if 2**i < job.devices]
    groups = [_group(job, choice, size) for size in sizes if job.hardware.can_join(job.devices - size)]
    keeping_up = [one for one in groups if one.refresh_seconds <= choice.interval * one.step_seconds]
    if keeping_up:
        found.append(min(keeping_up, key=lambda one: (not one.fits, one.mean_seconds)))
    return tuple(found)


def _best(forms: Sequence[Form]) -> Form:
    fitting = [one for one in forms if one.fits] or forms
    fastest = min(one.mean_seconds for one in fitting)
    return next(one for one in fitting if one.mean_seconds <= _TIE * fastest)


def _parts(job: _Job, wanted: BatchSize) -> Iterator[int]:
    """On how many samples products may be made, the most first."""
    if wanted is None:
        yield job.batch_size
    elif wanted == "auto":
        local = job.batch_size // job.devices
        part = job.devices * min(local, auto_size(local, job.devices))
        yield part
        while part // 2 >= max(_LEAST_PART, job.devices):
            part //= 2
            yield part
    else:
        yield int(wanted)


def _recommend(job: _Job, wanted: _Wanted, budget: float) -> Plan:
    """The first that keeps within the budget, or else the last that was tried."""
    ranks = [rank for rank in _RANKS if rank <= job.sizes.number] if wanted.rank is None else [wanted.rank]
    tried: list[tuple[_Choice, tuple[Form, ...]]] = []
    for rank, part in itertools.product(ranks, _parts(job, wanted.curvature_batch)):
        order = 2 * rank if wanted.order is None else wanted.order
        if order < rank:
            continue
        for interval in _intervals(wanted):
            choice = _Choice(rank, order, interval, part)
            forms = _forms(job, choice, wanted.curvature_devices)
            tried.append((choice, forms))
            if _best(forms).fits and _best(forms).share <= budget:
                return _made(job, choice, forms, budget)
    cheapest = min(tried, key=lambda one: (not _best(one[1]).fits, _best(one[1]).share))
    return _made(job, *cheapest, budget)


def _intervals(wanted: _Wanted) -> Sequence[int]:
    return range(_SHORTEST, _LONGEST + 1, 5) if wanted.interval is None else [wanted.interval]


def _made(job: _Job, choice: _Choice, forms: tuple[Form, ...], budget: float) -> Plan:
    best = _best(forms)
    known = len(job.sizes.leaves) if job.sizes.known else None
    return Plan(
        hardware=job.hardware.name,
        devices=job.devices,
        num_params=job.sizes.number,
        num_leaves=known,
        batch_size=job.batch_size,
        rank=choice.rank,
        order=choice.order,
        interval=choice.interval,
        curvature_batch=choice.part,
        budget=budget,
        within_budget=best.share <= budget,
        base_seconds=job.base(),
        base_memory=job.memory_of_base(),
        compile_seconds=None if known is None else compile_seconds(known),
        useful_devices=_useful(job, choice),
        chosen=best,
        forms=forms,
    )


def _useful(job: _Job, choice: _Choice) -> int | None:
    """Up to how many devices more of them pay, with the batch as it is and a synchronous refresh."""
    means: dict[int, float] = {}
    for doublings in range(_MOST_DEVICES.bit_length()):
        devices = 2**doublings
        if not job.hardware.can_join(devices) or job.batch_size % devices:
            break
        try:
            means[devices] = _synchronous(job._replace(devices=devices), choice).mean_seconds
        except ValueError:  # no network
            last = last_that_pays(means)
            return last if last < max(means) else None
    return last_that_pays(means)


def _sizes(params: Any) -> _Sizes:
    """Of parameters in any of the ways in which they may be given."""
    if isinstance(params, bool | float | str) or params is None:
        raise ValueError(f"`params` must be a pytree of arrays, a list of shapes or a whole number, got {params!r}.")
    if arguments.is_int(params):
        arguments.check_sizes(params=params)
        return _Sizes(((int(params), 4),), known=False)
    if _is_shapes(params):
        arrays = [jax.ShapeDtypeStruct(tuple(shape), np.float32) for shape in params]
    else:
        arguments.check_params(params)
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(params)]
    leaves = tuple((math.prod(x.shape), np.dtype(x.dtype).itemsize) for x in arrays)
    number = sum(size for size, _ in leaves)
    if not number:
        raise ValueError(f"`params` must have at least one number, got {params!r}.")
    return _Sizes(leaves, known=True)


def _is_shapes(params: Any) -> bool:
    """Whether it is a list of shapes, and if so, whether they are any."""
    if not (isinstance(params, list | tuple) and params and all(isinstance(x, list | tuple) for x in params)):
        return False
    numbers = [n for shape in params for n in shape]
    if any(hasattr(n, "dtype") and not arguments.is_int(n) for n in numbers):
        return False
    for number in numbers:
        if not arguments.is_int(number) or number < 1:
            raise ValueError(f"`params` must have shapes of positive whole numbers, got {number!r}.")
    return True


def _hardware(hardware: Hardware | str | None, network: float | str | None) -> Hardware:
    """The speeds that are meant."""
    found = hardware
    if hardware is None:
        found = of_this_machine()
        if found is None:
            raise ValueError(
                f"`hardware` must be given on {jax.devices()[0].device_kind}, of which no speeds are published: "
                f"one of {', '.join(HARDWARE)}, or what dho2_optax.hardware.measure returns."
            )
    elif isinstance(hardware, str):
        found = HARDWARE.get(hardware)
    if not isinstance(found, Hardware):
        raise ValueError(
            f"`hardware` must be one of {', '.join(HARDWARE)}, a dho2_optax.hardware.Hardware or None, "
            f"got {hardware!r}."
        )
    if network is None:
        return found
    speed = NETWORKS.get(network) if isinstance(network, str) else network
    if speed is None:
        raise ValueError(f"`network` must be one of {', '.join(NETWORKS)}, or bytes a second, got {network!r}.")
    arguments.check_numbers("positive", network=speed)
    return replace(found, network=float(speed))


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 100 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} us"
