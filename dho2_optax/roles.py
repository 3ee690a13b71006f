"""Curvature on devices of its own: the training devices go on while others run the Lanczos process.

The roles of MR-DHO2 (Gu et al., arXiv 2505.00982). One Python process drives both groups of devices: a thread launches
a Lanczos process on a copy of the parameters and waits for it, while the caller goes on launching training steps and
looks now and then whether the spectrum is there.
"""

# With it, `help` shows signatures as they are written here.
from __future__ import annotations

import atexit
import contextlib
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dho2_optax import arguments, counters, programs, segments, vectors
from dho2_optax import curvature as curvature_lib
from dho2_optax import metric as metric_lib
from dho2_optax.curvature import BatchSize, LossFn, Operator
from dho2_optax.eigensolver import Spectrum, zero_spectrum
from dho2_optax.learning import check_objective
from dho2_optax.metric import Factors, Geometry, Metric, OnSegments, geometry
from dho2_optax.options import Eigensolver, Newton, check_options
from dho2_optax.packing import Layout, Packed, of_stack
from dho2_optax.parallel import batch_specs, over_axis, specs_of
from dho2_optax.refresh import carrier, in_metric, install, is_sound, make_solver
from dho2_optax.state import DHO2State, find_state, replace_state
from dho2_optax.subspace import Bounds

_POLL_SECONDS = 0.002
_LEAVE_SECONDS = 1.0  # within which a thread notices that it is to leave

_Found = tuple[Spectrum, bool, int]  # in segments over the group; whether all numbers were finite; products made
_Factors = tuple[Factors | None, Factors | None]  # of the optimizer, in its own form, and whole on the group


class _Flight:
    """A Lanczos process that has been launched, in a thread of its own."""

    def __init__(
        self,
        launched_at: int,
        factors: _Factors,
        bounds: Bounds | None,
        compile_program: Callable[[], Any],
        arguments: Sequence[Any],
    ) -> None:
        self.launched_at = launched_at  # updates before
        self.factors = factors
        self._bounds = bounds  # after the update on this batch
        self.begin: float | None = None  # on the clock, once the program is compiled
        self.over: float | None = None
        self.found: _Found | None = None
        self.error: Exception | None = None
        self._done = threading.Event()
        self._leave = threading.Event()
        # A daemon: a device that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, args=(compile_program, arguments), daemon=True)
        self._thread.start()

    def _run(self, compile_program: Callable[[], Any], arguments: Sequence[Any]) -> None:
        try:
            program = compile_program()
            self.begin = time.perf_counter()
            if not self._leave.is_set():
                self.found = self._await(program(*arguments))
        except Exception as error:
            self.error = error
        self.over = time.perf_counter()
        self._done.set()

    def _await(self, result: Any) -> _Found | None:
        """The result, once the devices are done with it; None if the thread is told to leave before.

        It looks again and again: a thread that waits inside of JAX while the interpreter ends aborts the process.
        """
        while not all(x.is_ready() for x in jax.tree.leaves(result)):
            if self._leave.wait(_POLL_SECONDS):
                return None
        spectrum, finite, matvecs = jax.block_until_ready(result)
        return spectrum, bool(finite), int(matvecs)

    def is_done(self) -> bool:
        return self._done.is_set()

    def is_trusted(self) -> bool:
        """Whether the batch was no outlier."""
        return self._bounds is None or bool(self._bounds.is_usual())

    def seconds(self) -> float:
        """How long it has been running, or ran."""
        if self.begin is None:
            return 0.0
        return (time.perf_counter() if self.over is None else self.over) - self.begin

    def wait(self, timeout: float) -> None:
        """Returns when it is done, or has been running for `timeout` seconds."""
        while not self._done.wait(_POLL_SECONDS) and self.seconds() < timeout:
            pass

    def end(self, timeout: float) -> None:
        """Waits as :meth:`wait` does, and has the thread leave a device that is not done by then to itself."""
        self.wait(timeout)
        self._leave.set()
        while self.begin is None and self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)  # compiles, which always ends
        self._thread.join(_LEAVE_SECONDS)


class _Log:
    """What a group has launched and what came of it; kept apart, since a group may be forgotten without `close`."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.flight: _Flight | None = None
        self.stalled: _Flight | None = None
        self.events = dict.fromkeys(("launches", "installed", "rejected", "failures", "stalls"), 0)
        self.last_error: str | None = None
        self.has_raised = False

    def failed(self, error: Exception) -> None:
        """Counts the failure of a device; what is no failure of a device, but of the user's function, is raised."""
        if not isinstance(error, jax.errors.JaxRuntimeError):
            self.has_raised = True
            raise error
        self.events["failures"] += 1
        self.last_error = str(error)

    def end(self, timeout: float) -> None:
        """Ends the threads, waiting `timeout` seconds for their devices."""
        for flight in (self.flight, self.stalled):
            if flight is not None:
                flight.end(timeout)

    def report(self) -> None:
        """Says what nobody has been told of what was launched since the last report.

        Raises:
          Exception: that of the user's function, if the process in flight ended with it.
        """
        try:
            _unreported.remove(self)
        except KeyError:
            return
        flight, self.flight, self.stalled = self.flight, None, None
        if flight is not None and flight.error is not None:
            self.failed(flight.error)
        elif flight is not None and flight.found is None:
            self.events["stalls"] += 1
        was_tried = self.events["launches"] or self.events["failures"]
        if not was_tried or self.events["installed"] or self.has_raised:
            return
        counts = ", ".join(f"{name} {value}" for name, value in self.events.items())
        warnings.warn(
            f"a CurvatureGroup has installed no spectrum ({counts}): the base alone has trained. Call `warm_up` before "
            "training, since a process that is still being compiled at the end comes too late; train for longer than "
            "a process takes; or give deterministic=True, which waits for it."
            + ("" if self.last_error is None else f" The last error: {self.last_error}"),
            UserWarning,
            stacklevel=3,
        )


_unreported: set[_Log] = set()


def _end_all() -> None:
    """Closes, at exit, the groups that nobody has closed."""
    with contextlib.ExitStack() as stack:
        for log in list(_unreported):
            stack.callback(log.report)
            stack.callback(log.end, log.timeout)


class CurvatureGroup:
    r"""A group of devices that finds eigenpairs for a `dho2` that trains on others.

    The optimizer is a ``dho2(base, refresh_interval=None, ...)`` of the same `rank`, `eigensolver` and `newton`, whose
    ``update`` needs no batch. Its `metric` must be given here too if that is a :class:`dho2_optax.Metric`; one that is
    read from the base is known.

    After every update, :meth:`advance` looks whether the Lanczos process in flight has ended, puts its eigenpairs in
    use, and launches the next one on a copy of the parameters. It waits for nothing, except in deterministic mode. The
    first is launched after the first update, or with a metric after the tenth: a base's preconditioner says nothing
    before.

    A process that fails, takes longer than `timeout` or meets a number that is not finite changes nothing: training
    goes on with the last good spectrum, and :meth:`metrics` counts the event. An error that is not one of a device, a
    bug in `loss_fn` say, is raised by :meth:`advance` or :meth:`close`.

    A group is a context manager that ends with :meth:`close`. Where nobody closes a group, the end of the program does.

    The eigenvectors and the Krylov basis are split over the devices of the group. On GPU and TPU the groups run at the
    same time. On CPU two programs that both have several devices take turns; a group of one device runs beside the
    training. The axis of its devices is called ``"curvature"``, or `axis_name`: a `loss_fn` that averages over them, as
    one with BatchNorm does, has to know.

    Args:
      loss_fn: as in :func:`dho2`.
      devices: the devices of the group, all of this process.
      curvature: as in :func:`dho2`.
      has_aux: as in :func:`dho2`.
      rank: as in :func:`dho2`.
      batch_size: as in :func:`dho2`.
      eigensolver: as in :func:`dho2`.
      newton: as in :func:`dho2`.
      metric: as in :func:`dho2`.
      interval: updates between two launches, at least.
      deterministic: use the spectrum launched after update ``t`` from update ``t + interval`` on, neither earlier nor
        later, waiting for it if need be. Then two runs give the same parameters bit for bit.
      timeout: seconds after which a process counts as stalled and is given up, compilation apart. No other is
        launched before it has ended after all.
      axis_name: see above.

    Raises:
      ValueError: for options out of range or devices of another process, and in :meth:`advance` for an optimizer of
        another rank, or a batch that the devices cannot share evenly.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> loss_fn = lambda params, batch: jnp.mean(batch * params**2)
      >>> tx = dho2.dho2(optax.sgd(0.1), rank=2, refresh_interval=None)
      >>> options = {"rank": 2, "interval": 5, "deterministic": True}
      >>> params, batch = jnp.ones(4), jnp.asarray([4.0, 1.0, 0.1, 0.01])
      >>> state = tx.init(params)
      >>> with dho2.CurvatureGroup(loss_fn, devices=jax.devices()[-1:], **options) as group:
      ...     for _ in range(20):
      ...         grads = jax.grad(loss_fn)(params, batch)
      ...         updates, state = tx.update(grads, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...         state = group.advance(state, params, batch[None])
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
        batch_size: BatchSize = "auto",
        eigensolver: Eigensolver = Eigensolver(),
        newton: Newton = Newton(),
        metric: Metric | None = None,
        interval: int = 50,
        deterministic: bool = False,
        timeout: float = 60.0,
        axis_name: str = "curvature",
    ) -> None:
        """See the class."""
        check_options(eigensolver=eigensolver, newton=newton)
        check_objective(loss_fn, curvature, batch_size)
        operator = curvature
        if loss_fn is not None:
            operator = curvature_lib.hessian_on_part(
                loss_fn, has_aux=has_aux, batch_size=batch_size, axis_name=axis_name
            )
        if operator is None:
            raise ValueError("give either `loss_fn` or `curvature`.")
        if eigensolver.rayleigh is not None:
            raise ValueError("`rayleigh` is for the refreshes of dho2; a group makes no products for it, give None.")
        if not devices or not all(isinstance(device, jax.Device) for device in devices):
            raise ValueError(f"`devices` must be a non-empty list of jax devices, got {devices!r}.")
        if len(set(devices)) != len(devices):
            raise ValueError(f"`devices` must all be different, got {devices!r}.")
        elsewhere = [device for device in devices if device.process_index != jax.process_index()]
        if elsewhere:
            raise ValueError(
                f"`devices` must be of this process, {jax.process_index()}, got {elsewhere} of process "
                f"{elsewhere[0].process_index}; choose among jax.local_devices()."
            )
        if not isinstance(axis_name, str):
            raise ValueError(f"`axis_name` must be a string, got {axis_name!r}.")
        if not (metric is None or isinstance(metric, Metric)):
            raise ValueError(f"`metric` must be None or a dho2_optax.Metric, got {metric!r}.")
        arguments.check_numbers("positive", whole=True, interval=interval)
        arguments.check_numbers("positive", infinite=True, timeout=timeout)
        self._solver = make_solver(rank, eigensolver, newton, axis_name, max_residual=0.1)
        self._operator = operator
        self._axis_name = axis_name
        self._metric = metric
        self._mesh = Mesh(np.array(devices), (axis_name,))
        self._interval = int(interval)
        self._deterministic = deterministic
        self._timeout = timeout
        # Lowered or compiled, by kind: (params, batch, old spectrum, its factors, new ones, count) -> `_Found`.
        self._solve: dict[Any, Any] = {}
        self._read: Any = None  # compiled: (state, params) -> see `_Factors`
        self._convert: Any = None  # compiled: eigenvectors in segments of the group -> in the optimizer's shapes
        self._deliver: Any = None  # compiled: (optimizer state, spectrum, count, matvecs) -> optimizer state
        self._spectrum: Spectrum | None = None  # the last good one
        self._factors: Factors | None = None  # of its metric, whole
        self._count: int | None = None  # of updates
        self._next_launch = 0
        self._staleness = 0
        self._wait_seconds = 0.0
        self._busy_seconds = 0.0
        self._log = _Log(timeout)
        # Lowers what a thread will lower: the modules that this imports can't be imported while the program ends.
        jax.jit(jnp.linalg.eigh).lower(jax.ShapeDtypeStruct((2, 2), jnp.float32))
        # A thread keeps its group alive, so there is nothing to wait for where the group is forgotten.
        weakref.finalize(self, self._log.report).atexit = False
        # What is registered last runs first: before the finalizers of `weakref`, with which JAX takes apart what a
        # thread may be tracing with, and before JAX lets go of the devices.
        atexit.unregister(_end_all)
        atexit.register(_end_all)

    def __enter__(self) -> Self:
        """The group itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Closes it; after an error, without waiting for its devices and without a word."""
        if kind is None:
            return self.close()
        self._log.end(0.0)
        self._forget()
        self._log.flight = self._log.stalled = None
        return _unreported.discard(self._log)

    @property
    def devices(self) -> list[Any]:
        """The devices of the group."""
        return list(self._mesh.devices.flat)

    @property
    def last_error(self) -> str | None:
        """What the last process that failed raised."""
        return self._log.last_error

    def metrics(self) -> dict[str, float]:
        """Numbers about the group so far, of the host: reading them waits for no device.

        Returns:
          A dict: ``launches``, ``installed``; ``rejected`` (a number was not finite, or the batch an outlier),
          ``failures`` (an error on a device), ``stalls``; ``staleness`` (updates between the snapshot and the use of
          the last spectrum); ``wait_seconds`` (that :meth:`advance` waited for processes) and ``busy_seconds`` (that
          processes ran).
        """
        return {
            **{name: float(value) for name, value in self._log.events.items()},
            "staleness": float(self._staleness),
            "wait_seconds": self._wait_seconds,
            "busy_seconds": self._busy_seconds,
        }

    def memory(self, params: Any, batch: Any) -> programs.Memory:
        """What the Lanczos program needs on each device of the group, for parameters and a batch like these.

        A metric adds its factors, old and new, as they are on every device.
        """
        return programs.memory(self._compiled(self._lowered(params, batch, None)))

    def warm_up(self, state: Any, params: Any, batch: Any) -> None:
        """Compiles everything ahead of its use, for arguments like those of :meth:`advance`; changes nothing."""
        factors = self._read_factors(state, params)
        self._compiled(self._lowered(params, batch, factors[1]))
        self._install(state, params, self._empty(self._snapshot(params)), factors[0], 0, 0)

    def advance(self, state: Any, params: Any, batch: Any) -> Any:
        """Installs the spectrum if one is there, and launches the next process; to be called after every update.

        Args:
          state: of an optimizer that contains one ``dho2(..., refresh_interval=None)``.
          params: the parameters after the update, those that the optimizer sees: behind ``optax.masked`` its part.
          batch: what `loss_fn` is called with; its leading axes are split over the group.

        Returns:
          The state, to be used in place of `state`.
        """
        if self._count is None:
            ours, first = find_state(state), 0
            _check_visible(ours, params)
            if ours.factors is not None:
                first = metric_lib.MATURE_AFTER
                # What is wrong is said at once, and not when the metric means something.
                ours.factors.metric(self._metric)
                batch_specs(batch, self._mesh, self._axis_name)
            self._count = int(ours.count)
            self._next_launch = max(self._count, first)
        else:
            self._count += 1
        state, log = self._collect(state, params), self._log
        if log.stalled is not None and log.stalled.is_done():
            log.stalled = None
        if log.flight is None and log.stalled is None and self._count >= self._next_launch:
            self._launch(state, params, batch)
        return state

    def close(self) -> None:
        """Waits for what is in flight, for up to `timeout` seconds, and drops it.

        Warns where processes were launched and no spectrum was ever installed. Closing a second time does nothing.

        Raises:
          Exception: that of `loss_fn` or `curvature`, if the process in flight ended with it.
        """
        self._log.end(self._timeout)
        self._forget()
        self._log.report()

    def _forget(self) -> None:
        """Lets go of this training: the next may be another one, and takes over its Lanczos programs alone."""
        self._count = self._spectrum = self._factors = None
        self._read = self._convert = self._deliver = None

    def _collect(self, state: Any, params: Any) -> Any:
        """Installs the spectrum of the process in flight if it is due and there."""
        log = self._log
        flight, count = log.flight, self._count or 0
        if flight is None or (self._deterministic and count < flight.launched_at + self._interval):
            return state
        if self._deterministic:
            begin = time.perf_counter()
            flight.wait(self._timeout)
            self._wait_seconds += time.perf_counter() - begin
        if not flight.is_done():
            if flight.seconds() >= self._timeout:
                log.events["stalls"] += 1
                log.flight, log.stalled = None, flight
            return state
        log.flight = None
        self._busy_seconds += flight.seconds()
        if flight.found is None:
            log.failed(flight.error or RuntimeError("the Lanczos process ended without a result."))
            return state
        spectrum, finite, matvecs = flight.found
        if not (finite and flight.is_trusted()):
            log.events["rejected"] += 1
            return state
        self._spectrum, self._factors = spectrum, flight.factors[1]
        log.events["installed"] += 1
        self._staleness = count - flight.launched_at
        return self._install(state, params, spectrum, flight.factors[0], flight.launched_at, matvecs)

    def _launch(self, state: Any, params: Any, batch: Any) -> None:
        count = self._count or 0
        self._next_launch = count + self._interval
        _unreported.add(self._log)
        try:
            factors = self._read_factors(state, params)
            bounds = jax.tree.map(jnp.copy, find_state(state).bounds)  # the state may be donated
            params, batch = self._snapshot(params), self._place(batch)
            if self._spectrum is None:
                self._spectrum, self._factors = self._empty(params), factors[1]
            number = jax.device_put(np.int32(min(count, counters.LARGEST)), NamedSharding(self._mesh, PartitionSpec()))
        except jax.errors.JaxRuntimeError as error:
            self._log.failed(error)
            return
        try:
            # Traced here: what says how, as ``jax.default_matmul_precision`` does, is of this thread.
            kind = self._lowered(params, batch, factors[1])
        except Exception:
            self._log.has_raised = True
            raise
        arguments = (params, batch, self._spectrum, self._factors, factors[1], number)
        self._log.flight = _Flight(count, factors, bounds, lambda: self._compiled(kind), arguments)
        self._log.events["launches"] += 1

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
                layout = Layout(params, axis_name)
                return new, layout.unpack(layout.gather(new.values)) if elementwise else new.values

            def specs(axis_name: str) -> tuple[Any, Any]:
                on_segments = isinstance(ours.factors.base, OnSegments)
                base = specs_of(ours.base_state, axis_name) if on_segments else PartitionSpec()
                kept = _specs_as_kept(ours, axis_name, elementwise).factors
                return (kept, base, PartitionSpec()), (kept, PartitionSpec())

            shardings = jax.tree.map(lambda x: x.sharding, ours.factors)
            run = _as_the_optimizer(read, ours, axis_name, specs)
            self._read = jax.jit(run, out_shardings=(shardings, ours.spectrum.eigenvalues.sharding))
        new, whole = self._read(ours.factors, ours.base_state, params)
        return new, new._replace(values=self._snapshot(whole))

    def _optimizers_axis(self, ours: DHO2State, params: Any) -> str | None:
        """The axis over which the optimizer splits vectors, by any name on one device; None if it does not."""
        rows = ours.spectrum.eigenvectors
        if of_stack(rows, params) == Layout(params, None):
            return None
        spec = getattr(rows[0].sharding, "spec", ())
        return spec[1] if len(spec) > 1 and isinstance(spec[1], str) else self._axis_name

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

        def copy(x: Any, spec: PartitionSpec) -> jax.Array:
            # On CPU a device reads an array of NumPy where it is, and a loader may write the next batch there.
            x = x.copy() if isinstance(x, np.ndarray) else x
            return jax.device_put(x, NamedSharding(self._mesh, spec), may_alias=False)

        return jax.tree.map(copy, batch, specs)

    def _shard_map(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _spectrum_specs(self) -> Spectrum:
        whole: Any = PartitionSpec()
        short = whole if vectors.is_short(self._solver.basis_dtype) else None
        return Spectrum(whole, PartitionSpec(None, self._axis_name), whole, whole, short)

    def _empty(self, params: Any) -> Spectrum:
        solver = self._solver

        def empty(params: Any) -> Spectrum:
            like = Layout(params, self._axis_name).split(params)
            return zero_spectrum(solver.num_pairs, like, solver.basis_dtype)

        return jax.jit(self._shard_map(empty, PartitionSpec(), self._spectrum_specs()))(params)

    def _compiled(self, kind: Any) -> Any:
        """The Lanczos process on the group for what :meth:`_lowered` has seen; compiled once."""
        if isinstance(self._solve[kind], jax.stages.Lowered):
            self._solve[kind] = self._solve[kind].compile()
        return self._solve[kind]

    def _lowered(self, params: Any, batch: Any, factors: Factors | None) -> Any:
        """Lowers the Lanczos process, once for arguments of one kind, of the same structure, shapes and dtypes.

        Returns:
          The kind.
        """
        params, batch, factors = vectors.abstract((params, batch, factors))
        leaves, treedef = jax.tree.flatten((params, batch, factors))
        kind = treedef, tuple((x.shape, x.dtype) for x in leaves)
        if kind in self._solve:
            return kind
        solver, operator, axis_name, metric = self._solver, self._operator, self._axis_name, self._metric

        def on_segments(factors: Factors | None, layout: Layout) -> Geometry:
            kept = None if factors is None else factors.split(layout, metric)
            return geometry(kept, layout, metric)

        def solve(
            params: Any, batch: Any, old: Spectrum, old_factors: Any, factors: Any, count: jax.Array
        ) -> tuple[Spectrum, jax.Array, jax.Array]:
            layout = Layout(params, axis_name)
            before, now = (on_segments(x, layout) for x in (old_factors, factors))
            matvec = in_metric(curvature_lib.segmented_matvec(operator, params, batch, axis_name), now)
            process, found = solver.run(matvec, old, count, layout, carrier(before, now))
            new = solver.publish(process, found)
            return new, is_sound(process, new), process.count

        whole, spectrum = PartitionSpec(), self._spectrum_specs()
        in_specs = (whole, batch_specs(batch, self._mesh, self._axis_name), spectrum, whole, whole, whole)
        mapped = jax.jit(self._shard_map(solve, in_specs, (spectrum, whole, whole)))

        def abstract(tree: Any, specs: Any) -> Any:
            return jax.tree.map(
                lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self._mesh, spec)),
                tree,
                specs,
            )

        everywhere, all_factors = (jax.tree.map(lambda _: whole, tree) for tree in (params, factors))
        old = jax.eval_shape(lambda p: self._empty(p), abstract(params, everywhere))
        spectrum = spectrum._replace(eigenvectors=(spectrum.eigenvectors,) * len(old.eigenvectors))
        self._solve[kind] = mapped.lower(
            abstract(params, everywhere),
            abstract(batch, in_specs[1]),
            abstract(old, spectrum),
            abstract(factors, all_factors),
            abstract(factors, all_factors),
            abstract(jax.ShapeDtypeStruct((), np.int32), whole),
        )
        return kind

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
        got, wanted = ({x.dtype for x in rows} for rows in (found.eigenvectors, target))
        if got != wanted:
            raise ValueError(f"`basis_dtype` must be that of the optimizer, {_names(wanted)}, got {_names(got)}.")
        replicated: Any = ours.spectrum.eigenvalues.sharding
        eigenvectors = self._relayout(found.eigenvectors, target, params)
        moved = jax.device_put(
            found._replace(eigenvectors=eigenvectors),
            Spectrum(
                replicated,
                jax.tree.map(lambda x: x.sharding, target),
                replicated,
                replicated,
                None if found.orthonormalizer is None else replicated,
            ),
            may_alias=False,  # the state may be donated, and the group keeps what it has found
        )
        nothing: Any = ()
        if self._deliver is None:
            damping, metric, axis_name = self._solver.damping, self._metric, self._optimizers_axis(ours, params)

            def deliver(
                state: DHO2State, new: Spectrum, factors: Any, like: Any, found_at: jax.Array, matvecs: jax.Array
            ) -> DHO2State:
                layout = Layout(like, axis_name)
                before, now = (geometry(x, layout, metric) for x in (state.factors, factors))
                carry = carrier(before, now)
                state = install(
                    state,
                    new,
                    factors,
                    carry=carry,
                    found_at=found_at,
                    damping=damping,
                    axis_name=segments.bound_axis(axis_name),
                )
                # The new spectrum goes into the state as it is: what a program returns it would copy.
                return state._replace(matvecs=counters.add(state.matvecs, matvecs), spectrum=nothing)

            elementwise = ours.factors is not None and ours.factors.metric(metric).elementwise

            def specs(axis_name: str) -> tuple[Any, Any]:
                kept, whole = _specs_as_kept(ours, axis_name, elementwise), PartitionSpec()
                return (kept, kept.spectrum, kept.factors, whole, whole, whole), kept._replace(spectrum=nothing)

            run = _as_the_optimizer(deliver, ours, axis_name, specs)
            shardings = jax.tree.map(lambda x: x.sharding, ours._replace(spectrum=nothing))
            self._deliver = jax.jit(run, out_shardings=shardings)
        ours = self._deliver(
            ours, moved, factors, params, jnp.int32(min(launched_at, counters.LARGEST)), jnp.int32(matvecs)
        )
        return replace_state(state, ours._replace(base_state=base_state, spectrum=moved))

    def _relayout(self, found: Packed, target: Packed, params: Any) -> Packed:
        """Eigenvectors in the buffers of the group, in those of the optimizer."""
        before, after = (of_stack(rows, params) for rows in (found, target))
        if before == after:
            return found
        if self._convert is None:
            self._convert = jax.jit(
                jax.vmap(lambda row: after.pack(before.unpack(row))),
                out_shardings=NamedSharding(self._mesh, PartitionSpec()),
            )
        return self._convert(found)


def _check_visible(state: DHO2State, params: Any) -> None:
    """Raises ValueError for parameters that are not those for which the state was made."""
    rows = state.spectrum.eigenvectors
    packed = jax.eval_shape(of_stack(rows, params).pack, vectors.abstract(params))
    if [x.shape for x in packed] != [x.shape[1:] for x in rows]:
        raise ValueError(
            "`params` must be those that the optimizer sees, got others; behind optax.masked or optax.partition give "
            "the group these alone, and a `loss_fn` that fills in the rest."
        )


def _names(dtypes: set[Any]) -> str:
    return " and ".join(sorted(map(str, dtypes)))


def _as_the_optimizer(
    function: Callable[..., Any], state: DHO2State, axis_name: str | None, specs: Callable[[str], tuple[Any, Any]]
) -> Callable[..., Any]:
    """`function` as the optimizer runs its own: on one device of the axis over which it splits vectors, if any.

    What is made of segments outside of ``shard_map`` does not know over how many devices they are padded. `specs` are
    those of inputs and outputs.
    """
    mesh = getattr(jax.tree.leaves(state.spectrum.eigenvectors)[0].sharding, "mesh", None)
    if axis_name is None or not isinstance(mesh, Mesh) or axis_name not in mesh.axis_names:  # that is, on one device
        return function
    return over_axis(function, mesh, axis_name, *specs(axis_name))


def _specs_as_kept(state: DHO2State, axis_name: str, elementwise: bool) -> Any:
    """The ``PartitionSpec`` of every leaf of an optimizer's own state, without that of its base."""
    specs = jax.tree.map(lambda _: PartitionSpec(), state._replace(base_state=()))
    rows = jax.tree.map(lambda _: PartitionSpec(None, axis_name), state.spectrum.eigenvectors)
    split = state.factors is not None and elementwise
    factors = jax.tree.map(lambda _: PartitionSpec(axis_name) if split else PartitionSpec(), state.factors)
    return specs._replace(spectrum=specs.spectrum._replace(eigenvectors=rows), factors=factors)
