"""Curvature on devices of its own: the training devices go on while others run the Lanczos process.

The roles of MR-DHO2 (Gu et al., arXiv 2505.00982). One Python process drives both groups of devices: a thread launches
a Lanczos process on a copy of the parameters and waits for it, while the caller goes on launching training steps and
looks now and then whether the spectrum is there.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dho2_optax import arguments, counters, eigensolver, plan, segments
from dho2_optax import curvature as curvature_lib
from dho2_optax.curvature import LossFn, Operator
from dho2_optax.eigensolver import Select, Spectrum
from dho2_optax.metric import Factors, Geometry, Metric, geometry
from dho2_optax.parallel import batch_specs
from dho2_optax.refresh import Solver, carrier, in_metric, install, is_sound, warm_start
from dho2_optax.state import DHO2State, find_state, replace_state
from dho2_optax.subspace import Damping

_POLL_SECONDS = 0.1

_Found = tuple[Spectrum, bool, int]  # in segments over the group; whether all numbers were finite; products made
_Factors = tuple[Factors | None, Factors | None]  # of the optimizer, in its own form, and whole on the group


class _Flight:
    """A Lanczos process that has been launched, in a thread of its own."""

    def __init__(
        self, launched_at: int, factors: _Factors, compile_program: Callable[[], Any], arguments: Sequence[Any]
    ) -> None:
        self.launched_at = launched_at  # updates before
        self.factors = factors
        self.begin: float | None = None  # on the clock, once the program is compiled
        self.end: float | None = None
        self.found: _Found | None = None
        self.error: Exception | None = None
        self._done = threading.Event()
        # A daemon: a device that hangs must not keep the program from ending.
        threading.Thread(target=self._run, args=(compile_program, arguments), daemon=True).start()

    def _run(self, compile_program: Callable[[], Any], arguments: Sequence[Any]) -> None:
        try:
            program = compile_program()
            self.begin = time.perf_counter()
            spectrum, finite, matvecs = jax.block_until_ready(program(*arguments))
            self.found = (spectrum, bool(finite), int(matvecs))
        except Exception as error:
            self.error = error
        self.end = time.perf_counter()
        self._done.set()

    def is_done(self) -> bool:
        return self._done.is_set()

    def seconds(self) -> float:
        """How long it has been running, or ran."""
        if self.begin is None:
            return 0.0
        return (time.perf_counter() if self.end is None else self.end) - self.begin

    def wait(self, timeout: float) -> None:
        """Returns when it is done, or has been running for `timeout` seconds."""
        while not self._done.wait(_POLL_SECONDS) and self.seconds() < timeout:
            pass


class CurvatureGroup:
    r"""A group of devices that finds eigenpairs for a `dho2` that trains on others.

    The optimizer is a ``dho2(base, refresh_interval=None, ...)`` of the same `rank`, whose ``update`` needs no batch.
    After every update, :meth:`advance` looks whether the Lanczos process in flight has ended, puts its eigenpairs in
    use, and launches the next one on a copy of the parameters. It waits for nothing, except in deterministic mode.

    A process that fails, takes longer than `timeout` or meets a number that is not finite changes nothing: training
    goes on with the last good spectrum, and :meth:`metrics` counts the event.

    The eigenvectors and the Krylov basis are split over the devices of the group. The devices must be of this process.
    On GPU and TPU the groups run at the same time. On CPU two programs that both have several devices take turns;
    a group of one device runs beside the training.

    Args:
      loss_fn: ``(params, batch) -> loss``, a scalar mean over samples; with `has_aux` ``(loss, aux)``.
      devices: the devices of the group.
      curvature: an operator in place of `loss_fn`'s Hessian, as in :func:`dho2`.
      has_aux: whether `loss_fn` returns a pair.
      rank: as in :func:`dho2`, and the same as there; so are the following.
      num_smallest: as in :func:`dho2`.
      order: as in :func:`dho2`.
      tolerance: as in :func:`dho2`.
      max_residual: as in :func:`dho2`.
      select: as in :func:`dho2`.
      floor: as in :func:`dho2`.
      damping: as in :func:`dho2`.
      basis_dtype: as in :func:`dho2`.
      metric: the optimizer's, if that is a :class:`dho2_optax.Metric`; one that is read from the base is known.
      interval: updates between two launches, at least.
      deterministic: use the spectrum launched after update ``t`` from update ``t + interval`` on, neither earlier nor
        later, waiting for it if need be. Then two runs give the same parameters bit for bit.
      timeout: seconds after which a process counts as stalled and is given up, compilation apart. No other is
        launched before it has ended after all.
      axis_name: what the axis of the group's devices is called, for a `loss_fn` that averages over them, as one with
        BatchNorm does.

    Raises:
      ValueError: for options out of range, and in :meth:`advance` for an optimizer of another rank, or a batch that the
        devices cannot share evenly.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> loss_fn = lambda params, batch: jnp.mean(batch * params**2)
      >>> tx = dho2.dho2(optax.sgd(0.1), rank=2, refresh_interval=None)
      >>> group = dho2.CurvatureGroup(loss_fn, devices=jax.devices()[-1:], rank=2, interval=5, deterministic=True)
      >>> params, batch = jnp.ones(4), jnp.asarray([4.0, 1.0, 0.1, 0.01])
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     grads = jax.grad(loss_fn)(params, batch)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     state = group.advance(state, params, batch[None])
      >>> group.metrics()["installed"], int(dho2.metrics(state)["active_pairs"])
      (3.0, 2)

    References:
      Gu et al., "Accelerating Deep Neural Network Training via Distributed Hybrid Order Optimization",
      arXiv 2505.00982, MR-DHO2.
    """

    def __init__(
        self,
        loss_fn: LossFn | None = None,
        *,
        devices: Sequence[Any],
        curvature: Operator | None = None,
        has_aux: bool = False,
        rank: int = 8,
        num_smallest: int = 0,
        order: int | None = None,
        tolerance: float = 1e-2,
        max_residual: float = 0.1,
        select: Select = "magnitude",
        floor: float = 1e-3,
        damping: float = 0.0,
        basis_dtype: Any = None,
        metric: Metric | None = None,
        interval: int = 50,
        deterministic: bool = False,
        timeout: float = 60.0,
        axis_name: str = "curvature",
    ) -> None:
        """See the class."""
        eigensolver.check_selection(rank, num_smallest, order, select)
        arguments.check_functions(optional=True, loss_fn=loss_fn, curvature=curvature)
        operator = curvature if loss_fn is None else curvature_lib.hessian(loss_fn, has_aux=has_aux)
        if operator is None or (loss_fn is not None and curvature is not None):
            raise ValueError("give either `loss_fn` or `curvature`.")
        if not devices or not all(isinstance(device, jax.Device) for device in devices):
            raise ValueError(f"`devices` must be a non-empty list of jax devices, got {devices!r}.")
        if len(set(devices)) != len(devices):
            raise ValueError(f"`devices` must all be different, got {devices!r}.")
        if not isinstance(axis_name, str):
            raise ValueError(f"`axis_name` must be a string, got {axis_name!r}.")
        if not (metric is None or isinstance(metric, Metric)):
            raise ValueError(f"`metric` must be None or a dho2_optax.Metric, got {metric!r}.")
        arguments.check_numbers("positive", whole=True, interval=interval)
        arguments.check_numbers("positive", infinite=True, timeout=timeout)
        arguments.check_numbers("non-negative", tolerance=tolerance, floor=floor, damping=damping)
        arguments.check_numbers("non-negative", infinite=True, max_residual=max_residual)
        pairs = rank + num_smallest
        self._solver = Solver(
            rank=rank,
            num_smallest=num_smallest,
            order=2 * pairs if order is None else order,
            select=select,
            tolerance=tolerance,
            max_residual=max_residual,
            damping=Damping(floor, damping),
            basis_dtype=basis_dtype,
            axis_name=axis_name,
            start=warm_start,
        )
        self._operator = operator
        self._axis_name = axis_name
        self._metric = metric
        self._mesh = Mesh(np.array(devices), (axis_name,))
        self._interval = int(interval)
        self._deterministic = deterministic
        self._timeout = timeout
        # Compiled: (params, batch, old spectrum, its factors, new ones, count) -> `_Found`; by structure of factors.
        self._solve: dict[Any, Any] = {}
        self._read: Any = None  # compiled: (state, params) -> see `_Factors`
        self._convert: Any = None  # compiled: eigenvectors in segments of the group -> in the optimizer's shapes
        self._deliver: Any = None  # compiled: (optimizer state, spectrum, count, matvecs) -> optimizer state
        self._spectrum: Spectrum | None = None  # the last good one
        self._factors: Factors | None = None  # of its metric, whole
        self._flight: _Flight | None = None
        self._stalled: _Flight | None = None
        self._count: int | None = None  # of updates
        self._next_launch = 0
        self._events = dict.fromkeys(("launches", "installed", "rejected", "failures", "stalls"), 0)
        self._staleness = 0
        self._wait_seconds = 0.0
        self._busy_seconds = 0.0
        self._last_error: str | None = None

    @property
    def devices(self) -> list[Any]:
        """The devices of the group."""
        return list(self._mesh.devices.flat)

    @property
    def last_error(self) -> str | None:
        """What the last process that failed raised."""
        return self._last_error

    def metrics(self) -> dict[str, float]:
        """Numbers about the group so far, of the host: reading them waits for no device.

        Returns:
          A dict: ``launches``, ``installed``; ``rejected`` (a number was not finite), ``failures`` (an error on a
          device), ``stalls``; ``staleness`` (updates between the snapshot and the use of the last spectrum);
          ``wait_seconds`` (that :meth:`advance` waited for processes) and ``busy_seconds`` (that processes ran).
        """
        return {
            **{name: float(value) for name, value in self._events.items()},
            "staleness": float(self._staleness),
            "wait_seconds": self._wait_seconds,
            "busy_seconds": self._busy_seconds,
        }

    def memory(self, params: Any, batch: Any) -> plan.Memory:
        """What the Lanczos program needs on each device of the group, for parameters and a batch like these.

        A metric adds its factors, old and new, as they are on every device.
        """
        return plan.memory(self._compile(params, batch, None))

    def warm_up(self, state: Any, params: Any, batch: Any) -> None:
        """Compiles everything ahead of its use, for arguments like those of :meth:`advance`; changes nothing."""
        factors = self._read_factors(state, params)
        self._compile(params, batch, factors[1])
        self._install(state, params, self._empty(self._snapshot(params)), factors[0], 0, 0)

    def advance(self, state: Any, params: Any, batch: Any) -> Any:
        """Installs the spectrum if one is there, and launches the next process; to be called after every update.

        Args:
          state: of an optimizer that contains one ``dho2(..., refresh_interval=None)``.
          params: the parameters after the update.
          batch: what `loss_fn` is called with; its leading axes are split over the group.

        Returns:
          The state, to be used in place of `state`.
        """
        if self._count is None:
            self._count = int(find_state(state).count)
            self._next_launch = self._count
        else:
            self._count += 1
        state = self._collect(state, params)
        if self._stalled is not None and self._stalled.is_done():
            self._stalled = None
        if self._flight is None and self._stalled is None and self._count >= self._next_launch:
            self._launch(state, params, batch)
        return state

    def close(self) -> None:
        """Waits for what is in flight, and drops it."""
        for flight in (self._flight, self._stalled):
            if flight is not None:
                flight.wait(self._timeout)
        self._flight = self._stalled = None

    def _collect(self, state: Any, params: Any) -> Any:
        """Installs the spectrum of the process in flight if it is due and there."""
        flight, count = self._flight, self._count or 0
        if flight is None or (self._deterministic and count < flight.launched_at + self._interval):
            return state
        if self._deterministic:
            begin = time.perf_counter()
            flight.wait(self._timeout)
            self._wait_seconds += time.perf_counter() - begin
        if not flight.is_done():
            if flight.seconds() >= self._timeout:
                self._events["stalls"] += 1
                self._flight, self._stalled = None, flight
            return state
        self._flight = None
        self._busy_seconds += flight.seconds()
        if flight.found is None:
            if not isinstance(flight.error, jax.errors.JaxRuntimeError):
                raise flight.error or RuntimeError("the Lanczos process ended without a result.")
            self._events["failures"] += 1
            self._last_error = str(flight.error)
            return state
        spectrum, finite, matvecs = flight.found
        if not finite:
            self._events["rejected"] += 1
            return state
        self._spectrum, self._factors = spectrum, flight.factors[1]
        self._events["installed"] += 1
        self._staleness = count - flight.launched_at
        return self._install(state, params, spectrum, flight.factors[0], flight.launched_at, matvecs)

    def _launch(self, state: Any, params: Any, batch: Any) -> None:
        count = self._count or 0
        self._next_launch = count + self._interval
        try:
            factors = self._read_factors(state, params)
            params, batch = self._snapshot(params), self._place(batch)
            if self._spectrum is None:
                self._spectrum, self._factors = self._empty(params), factors[1]
            number = jax.device_put(np.int32(min(count, counters.LARGEST)), NamedSharding(self._mesh, PartitionSpec()))
        except jax.errors.JaxRuntimeError as error:
            self._events["failures"] += 1
            self._last_error = str(error)
            return
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch, factors[1]))
        arguments = (params, batch, self._spectrum, self._factors, factors[1], number)
        self._flight = _Flight(count, factors, lambda: self._compile(*abstract), arguments)
        self._events["launches"] += 1

    def _read_factors(self, state: Any, params: Any) -> _Factors:
        """The factors of the optimizer's metric as they are now."""
        ours = find_state(state)
        if ours.factors is None:
            return None, None
        if self._read is None:
            metric, axis_name = self._metric, self._optimizers_axis(ours, params)
            elementwise = ours.factors.metric(metric).elementwise

            def read(factors: Factors, base_state: Any, params: Any) -> tuple[Factors, Any]:
                new = factors.renewed(base_state, params, axis_name=axis_name, metric=metric)
                return new, segments.whole(new.values, params, axis_name) if elementwise else new.values

            shardings = jax.tree.map(lambda x: x.sharding, ours.factors)
            self._read = jax.jit(read, out_shardings=(shardings, ours.spectrum.eigenvalues.sharding))
        new, whole = self._read(ours.factors, ours.base_state, params)
        return new, new._replace(values=self._snapshot(whole))

    def _optimizers_axis(self, ours: DHO2State, params: Any) -> str | None:
        """A name, bound nowhere, for the axis over which the optimizer splits vectors; None if it does not."""
        shapes = jax.tree.map(lambda rows, x: rows.shape[1:] == np.shape(x), ours.spectrum.eigenvectors, params)
        return None if all(jax.tree.leaves(shapes)) else self._axis_name

    def _snapshot(self, params: Any) -> Any:
        """A copy of the parameters on every device of the group; waits for nothing if they are replicated."""
        everywhere = NamedSharding(self._mesh, PartitionSpec())

        def copy(x: jax.Array) -> jax.Array:
            if not x.is_fully_replicated:
                return jax.device_put(x, everywhere, may_alias=False)
            # From one device to one device: a transfer between groups of different sizes would wait for its source.
            one = x.addressable_shards[0].data
            copies = [jax.device_put(one, device, may_alias=False) for device in self.devices]
            return jax.make_array_from_single_device_arrays(x.shape, everywhere, copies)

        return jax.tree.map(lambda x: copy(jnp.asarray(x)), params)

    def _place(self, batch: Any) -> Any:
        specs = batch_specs(batch, self._mesh, self._axis_name)
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(self._mesh, spec)), batch, specs)

    def _shard_map(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _spectrum_specs(self, params: Any) -> Spectrum:
        whole: Any = PartitionSpec()
        split = PartitionSpec(None, self._axis_name)
        return Spectrum(whole, jax.tree.map(lambda _: split, params), whole, whole)

    def _empty(self, params: Any) -> Spectrum:
        solver = self._solver

        def empty(params: Any) -> Spectrum:
            like = segments.split(params, self._axis_name)
            return eigensolver.zero_spectrum(solver.num_pairs, like, solver.basis_dtype)

        return jax.jit(self._shard_map(empty, PartitionSpec(), self._spectrum_specs(params)))(params)

    def _compile(self, params: Any, batch: Any, factors: Factors | None) -> Any:
        """The Lanczos process on the group, compiled once for parameters, batch and factors of one shape."""
        kind = jax.tree.structure(factors)
        if kind in self._solve:
            return self._solve[kind]
        solver, operator, axis_name, metric = self._solver, self._operator, self._axis_name, self._metric

        def on_segments(factors: Factors | None, params: Any) -> Geometry:
            kept = None if factors is None else factors.split(axis_name, metric)
            return geometry(kept, params, axis_name=axis_name, metric=metric)

        def solve(
            params: Any, batch: Any, old: Spectrum, old_factors: Any, factors: Any, count: jax.Array
        ) -> tuple[Spectrum, jax.Array, jax.Array]:
            before, now = (on_segments(x, params) for x in (old_factors, factors))
            matvec = in_metric(curvature_lib.segmented_matvec(operator, params, batch, axis_name), now)
            process = solver.run(matvec, old, count, params, carrier(before, now))
            new = solver.publish(process)
            return new, is_sound(process, new), process.count

        whole, spectrum = PartitionSpec(), self._spectrum_specs(params)
        in_specs = (whole, batch_specs(batch, self._mesh, self._axis_name), spectrum, whole, whole, whole)
        mapped = jax.jit(self._shard_map(solve, in_specs, (spectrum, whole, whole)))

        def abstract(tree: Any, specs: Any) -> Any:
            return jax.tree.map(
                lambda x, spec: jax.ShapeDtypeStruct(
                    np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype), sharding=NamedSharding(self._mesh, spec)
                ),
                tree,
                specs,
            )

        everywhere, all_factors = (jax.tree.map(lambda _: whole, tree) for tree in (params, factors))
        old = jax.eval_shape(lambda p: self._empty(p), abstract(params, everywhere))
        self._solve[kind] = mapped.lower(
            abstract(params, everywhere),
            abstract(batch, in_specs[1]),
            abstract(old, spectrum),
            abstract(factors, all_factors),
            abstract(factors, all_factors),
            abstract(np.int32(0), whole),
        ).compile()
        return self._solve[kind]

    def _install(
        self, state: Any, params: Any, found: Spectrum, factors: Factors | None, launched_at: int, matvecs: int
    ) -> Any:
        """`state` with a spectrum in use that was found by the group, moved to the devices of the state."""
        ours = find_state(state)
        base_state = ours.base_state
        ours = ours._replace(base_state=())
        target = ours.spectrum.eigenvectors
        if found.eigenvalues.shape != ours.spectrum.eigenvalues.shape:
            raise ValueError(
                f"`rank` + `num_smallest` must be those of the optimizer, {ours.spectrum.eigenvalues.size}, got "
                f"{found.eigenvalues.size}."
            )
        replicated: Any = ours.spectrum.eigenvalues.sharding
        eigenvectors = self._relayout(found.eigenvectors, target)
        moved = jax.device_put(
            found._replace(eigenvectors=eigenvectors),
            Spectrum(replicated, jax.tree.map(lambda x: x.sharding, target), replicated, replicated),
        )
        if self._deliver is None:
            damping, metric, axis_name = self._solver.damping, self._metric, self._optimizers_axis(ours, params)

            def deliver(
                state: DHO2State, new: Spectrum, factors: Any, like: Any, found_at: jax.Array, matvecs: jax.Array
            ) -> DHO2State:
                both = (state.factors, factors)
                before, now = (geometry(x, like, axis_name=axis_name, metric=metric) for x in both)
                carry = carrier(before, now)
                state = install(state, new, factors, carry=carry, found_at=found_at, damping=damping, axis_name=None)
                return state._replace(matvecs=counters.add(state.matvecs, matvecs))

            self._deliver = jax.jit(deliver, out_shardings=jax.tree.map(lambda x: x.sharding, ours))
        ours = self._deliver(
            ours, moved, factors, params, jnp.int32(min(launched_at, counters.LARGEST)), jnp.int32(matvecs)
        )
        return replace_state(state, ours._replace(base_state=base_state))

    def _relayout(self, found: Any, target: Any) -> Any:
        """Eigenvectors in segments of the group, in the shapes in which the optimizer keeps them."""

        def convert(x: jax.Array, like: jax.Array) -> jax.Array:
            size = int(np.prod(like.shape[1:]))
            flat = x[:, :size]
            return jnp.pad(flat, ((0, 0), (0, size - flat.shape[1]))).reshape(like.shape)

        if all(jax.tree.leaves(jax.tree.map(lambda x, like: x.shape == like.shape, found, target))):
            return found
        if self._convert is None:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target)
            self._convert = jax.jit(
                lambda found: jax.tree.map(convert, found, like),
                out_shardings=NamedSharding(self._mesh, PartitionSpec()),
            )
        return self._convert(found)
