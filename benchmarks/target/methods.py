"""The methods that are compared, by name.

All are given the same schedule, `Setting.schedule`, and tuned by the same rule. Hybrids make their curvature products
on the first eighth of the batch (or what other part the task says), but at least on as many samples as hold 256
predictions; option ``curvature_batch_size`` changes that. The first refresh of `dho2` is when the learning rate is at
its peak.

An ablation with ``rank=0`` is missing because it is the base alone.

Methods of other libraries are added by `benchmarks.target.peers`, where those libraries are installed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import dho2_optax as dho2
from benchmarks.options import grouped
from benchmarks.target import newton, peers
from benchmarks.target.interface import Method, Setting, Trainer
from benchmarks.target.safeguards import SAFEGUARDS

_MOMENTUM = 0.9
_MIN_CURVATURE_PREDICTIONS = 256
_HYBRID = {"rank": 8, "order": 16}
_DHO2 = {**_HYBRID, "refresh_interval": 100}
_MR_DHO2 = {**_HYBRID, "probe_interval": 4}
_FOSI = {"rank": 10, "refresh_interval": 50}
_RANK30 = {"rank": 30, "order": 32, "curvature_batch_size": 128}  # two products more than pairs will do
_RANK62 = {"rank": 62, "order": 64, "curvature_batch_size": 512}
_NYS_NEWTON = {"rank": 60, "interval": 20, "steps": 100}  # as published, but there with up to 1000 steps
_NYS_NEWTON_DAMPING = 0.01

SGD_CENTRES = {
    "default": 0.1,
    "autoencoder": 0.002,
    "lstm": 1.0,
    "transformer": 0.2,
    "logistic": 0.05,
    "least_squares": 0.1,
}
ADAM_CENTRES = {
    "default": 0.01,
    "autoencoder": 0.004,
    "resnet": 0.005,
    "resnet_bn": 0.005,
    "transformer": 0.005,
    "least_squares": 0.002,
}
MUON_CENTRES = {"default": 0.02, "least_squares": 0.005}
SOPHIA_CENTRES = {"default": 0.002}


def _muon(rate: Any) -> optax.GradientTransformation:
    """Muon for every kernel, those of convolutions as matrices too; Adam for biases, embeddings and scales."""

    def dimensions(path: Any, leaf: Any) -> Any:
        if path[-1].key != "kernel":
            return None
        return contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return contrib.muon(
        rate, muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(dimensions, params)
    )


# Base optimizers: (learning rate or schedule) -> transformation.
BASES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": functools.partial(optax.sgd, momentum=_MOMENTUM),
    "adam": optax.adam,
    "adamw": functools.partial(optax.adamw, weight_decay=0.01),
    "muon": _muon,
    "sophia": contrib.sophia,
    "soap": dho2.soap,
    "shampoo": dho2.shampoo,
}
_CENTRES = {"sgd": SGD_CENTRES, "muon": MUON_CENTRES, "sophia": SOPHIA_CENTRES}

# (parameters, optimizer state, batch) -> (loss, gradient, keyword arguments of `update`)
Gradients = Callable[[Any, Any, Any], tuple[Any, Any, dict[str, Any]]]
Extra = Callable[[Any, Any, Any], dict[str, Any]]  # (batch, loss, gradient) -> keyword arguments of `update`


def _gradients(loss_fn: Callable[..., Any], extra: Extra = lambda batch, loss, grads: {}) -> Gradients:
    def compute(params: Any, state: Any, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
        del state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return loss, grads, extra(batch, loss, grads)

    return compute


def _trainer(
    tx: optax.GradientTransformation, gradients: Gradients, products: Callable[[Any], Any] = lambda state: 0
) -> Trainer:
    """A trainer whose carry is parameters and optimizer state."""
    update = optax.with_extra_args_support(tx).update

    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, grads, extra = gradients(params, state, batch)
        updates, state = update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    return Trainer(
        init=lambda params, batch: (params, tx.init(params)),
        step=step,
        params=lambda carry: carry[0],
        products=lambda carry: products(carry[1]),
    )


# Baselines.


def _baseline(base: str, description: str) -> Method:
    def build(setting: Setting) -> Trainer:
        loss_fn = setting.task.loss_fn
        # Only Sophia reads the objective.
        gradients = _gradients(loss_fn, lambda batch, loss, grads: {"obj_fn": lambda params: loss_fn(params, batch)})
        return _trainer(BASES[base](setting.schedule), gradients)

    return Method(description, "baseline", build, _CENTRES.get(base, ADAM_CENTRES))


def _searching(setting: Setting, tx: optax.GradientTransformationExtraArgs) -> Trainer:
    """A trainer with a line search on the batch, whose evaluations of loss and gradient are part of the step.

    On the full batch the search of the last update has ended where this one starts, so its gradient is used again.
    """
    loss_fn = setting.task.loss_fn

    def gradients(params: Any, state: Any, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
        value_fn = lambda params: loss_fn(params, batch)  # noqa: E731
        if setting.batch_size == setting.task.num_train:
            loss, grads = optax.value_and_grad_from_state(value_fn)(params, state=state)
        else:
            loss, grads = jax.value_and_grad(value_fn)(params)
        return loss, grads, {"value": loss, "grad": grads, "value_fn": value_fn}

    return _trainer(tx, gradients)


def _lbfgs() -> Method:
    """L-BFGS with its line search on the batch; tuned is how many pairs it remembers, instead of a learning rate."""
    return Method(
        "L-BFGS (optax), zoom line search on each batch",
        "baseline",
        lambda setting: _searching(setting, optax.lbfgs(memory_size=int(setting.rate))),
        {"default": 8},
        rate_name="memory",
        limits=(1, 64),
        compiled="for each rate",
    )


def _newton(setting: Setting, **options: Any) -> Trainer:
    """NysNewton-CG; what is tuned is its damping."""
    loss_fn = setting.task.loss_fn
    tx = newton.nys_newton_cg(loss_fn, setting.rate, **options)
    return _trainer(tx, _gradients(loss_fn, _with_batch), lambda state: state.products)


def _nys_newton(kind: Literal["baseline", "ablation"], **given: Any) -> Method:
    options = {**_NYS_NEWTON, **given}
    return Method(
        f"NysNewton-CG, {options['steps']} steps of conjugate gradients at most",
        kind,
        functools.partial(_newton, **options),
        {"default": _NYS_NEWTON_DAMPING},
        options,
        rate_name="damping",
        only_full_batch=True,
    )


class _Turns(NamedTuple):
    """The carry of `_in_turn`."""

    params: Any
    first: Any  # optimizer state
    second: Any
    count: jax.Array  # shape=(), int32: updates


def _in_turn(first: Trainer, second: Trainer, switch: Any) -> Trainer:
    """Trains by one method for `switch` updates, and from there on by another; both made by `_trainer`."""

    def init(params: Any, batch: Any) -> _Turns:
        return _Turns(params, first.init(params, batch)[1], second.init(params, batch)[1], jnp.zeros((), jnp.int32))

    def step(carry: _Turns, batch: Any) -> tuple[_Turns, jax.Array]:
        def early() -> tuple[_Turns, jax.Array]:
            (params, state), loss = first.step((carry.params, carry.first), batch)
            return carry._replace(params=params, first=state), loss

        def late() -> tuple[_Turns, jax.Array]:
            (params, state), loss = second.step((carry.params, carry.second), batch)
            return carry._replace(params=params, second=state), loss

        after, loss = jax.lax.cond(carry.count < switch, early, late)
        return after._replace(count=carry.count + 1), loss

    return Trainer(init, step, lambda carry: carry.params, lambda carry: second.products((carry.params, carry.second)))


def _adam_then(description: str, second: Callable[[Setting], Trainer], **fields: Any) -> Method:
    """Half of the updates by Adam, on a schedule of that length, and the rest by another method without a rate."""

    def build(setting: Setting) -> Trainer:
        half = setting.num_steps // 2
        of_adam = setting._replace(num_steps=half)
        adam = _trainer(optax.adam(of_adam.schedule), _gradients(setting.task.loss_fn))
        return _in_turn(adam, second(setting), half)

    description = f"Adam for half of the updates, then {description}"
    return Method(description, "baseline", build, ADAM_CENTRES, steady=False, only_full_batch=True, **fields)


def _fosi(base: str, **options: Any) -> Method:
    """As its authors use it: heavy ball mirrored in the subspace with a scale limit of 3, Adam's averaging with 1."""
    options = {**_FOSI, "base_scale_limit": 3.0 if base == "sgd" else 1.0, **options}

    def build(setting: Setting) -> Trainer:
        loss_fn = setting.task.loss_fn
        subspace = optax.trace(_MOMENTUM) if base == "sgd" else optax.ema(_MOMENTUM, debias=False)
        tx = dho2.fosi(BASES[base](setting.schedule), loss_fn, subspace=subspace, **options)
        return _trainer(tx, _gradients(loss_fn, _with_batch), _products)

    return Method(
        f"FOSI as published, on {base}", "baseline", build, _CENTRES.get(base, ADAM_CENTRES), {"base": base, **options}
    )


# Hybrids.


def _with_batch(batch: Any, loss: Any, grads: Any) -> dict[str, Any]:
    del grads
    return {"batch": batch, "value": loss}  # the loss is for safeguards; bases let it pass


def _products(state: Any) -> Any:
    return dho2.metrics(state)["matvecs"]


def _curvature_batch_size(setting: Setting, wanted: int | None) -> int:
    least = -(-_MIN_CURVATURE_PREDICTIONS // setting.task.predictions)
    share = int(setting.batch_size * setting.task.curvature_share)
    return min(setting.batch_size, max(share, least) if wanted is None else wanted)


def _dho2(
    base: str,
    note: str = "",
    *,
    curvature_batch_size: int | None = None,
    curvature_samples: int | None = None,
    decay_alpha: float | None = None,
    safeguard: str | None = None,
    **options: Any,
) -> Method:
    """`dho2` on a base; `decay_alpha` is a peak of `alpha`, which then follows the schedule of the base.

    `curvature_samples` makes the products on so many training samples, always the same, instead of on the batch;
    `safeguard` names one of `benchmarks.target.safeguards`. The first refresh is when the learning rate is at its peak.
    """
    if safeguard is not None:
        note = SAFEGUARDS[safeguard][0]
    options = {**_DHO2, **options}

    def build(setting: Setting) -> Trainer:
        loss_fn = setting.task.loss_fn
        if curvature_samples is None:
            operator = dho2.hessian(loss_fn, batch_size=_curvature_batch_size(setting, curvature_batch_size))
        else:
            fixed = jax.tree.map(lambda x: x[:curvature_samples], setting.task.train)
            of_fixed = dho2.hessian(loss_fn)
            operator = lambda params, vector, batch: of_fixed(params, vector, fixed)  # noqa: E731
        alpha = {} if decay_alpha is None else {"alpha": lambda count: decay_alpha * setting.shape(count)}
        warmup_steps = jnp.maximum(setting.warmup_steps, 1).astype(int)

        def make(**given: Any) -> optax.GradientTransformationExtraArgs:
            given = {"curvature": operator, "warmup_steps": warmup_steps, **options, **alpha, **given}
            return dho2.dho2(BASES[base](setting.schedule), **grouped(**given))

        tx = make() if safeguard is None else SAFEGUARDS[safeguard][1](make)
        return _trainer(tx, _gradients(loss_fn, _with_batch), _products)

    stored = {"base": base, "curvature_batch_size": curvature_batch_size, "decay_alpha": decay_alpha, **options}
    # Absent unless given: stored results are found by their options, older ones without these.
    later = {"curvature_samples": curvature_samples, "safeguard": safeguard}
    stored |= {name: value for name, value in later.items() if value is not None}
    stored["warmup_steps"] = "those of the learning rate"
    return Method(
        f"dho2 on {base}{note and ', ' + note}",
        "ablation" if note else "hybrid",
        build,
        _CENTRES.get(base, ADAM_CENTRES),
        stored,
    )


def _of_one_batch(
    base: str,
    refresh_interval: int,
    note: str = "",
    *,
    kind: Literal["hybrid", "ablation"] = "hybrid",
    **given: Any,
) -> Method:
    """`dho2` for problems with one batch, where what limits the hybrid is how many pairs it has."""
    options = {**_RANK30, "refresh_interval": refresh_interval, **given}
    words = f"rank {options['rank']} by {options['order']} products, a refresh every {refresh_interval} updates"
    method = _dho2(base, f"{words}{note and ', ' + note}", **options)
    return dataclasses.replace(method, kind=kind, only_full_batch=True)


def _mr_dho2(base: str, note: str = "", *, curvature_batch_size: int | None = None, **options: Any) -> Method:
    """`mr_dho2` on a base; where the curvature batch is the whole one, in the linearisation of the gradient."""
    options = {**_MR_DHO2, **options}

    def build(setting: Setting) -> Trainer:
        loss_fn = setting.task.loss_fn
        size = _curvature_batch_size(setting, curvature_batch_size)
        probing = dho2.value_grad_and_hvp(loss_fn, batch_size=size if size < setting.batch_size else None)

        def gradients(params: Any, state: Any, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
            loss, grads, hvp = probing(params, state, batch)
            return loss, grads, {"hvp": hvp}

        return _trainer(dho2.mr_dho2(BASES[base](setting.schedule), **grouped(**options)), gradients, _products)

    return Method(
        f"mr_dho2 on {base}{note and ', ' + note}",
        "ablation" if note else "hybrid",
        build,
        _CENTRES.get(base, ADAM_CENTRES),
        {"base": base, "curvature_batch_size": curvature_batch_size, **options},
    )


METHODS: dict[str, Method] = {
    "sgd": _baseline("sgd", "SGD, momentum 0.9"),
    "adam": _baseline("adam", "Adam"),
    "adamw": _baseline("adamw", "AdamW, weight decay 0.01"),
    "muon": _baseline("muon", "Muon (optax.contrib) on kernels, Adam elsewhere"),
    "soap": _baseline("soap", "SOAP (ours, dho2_optax.soap), bases renewed every 10 steps"),
    "sophia": _baseline("sophia", "Sophia (optax.contrib), Hutchinson's estimator every 10 steps"),
    "lbfgs": _lbfgs(),
    "adam_lbfgs": _adam_then("L-BFGS (optax), memory 10", lambda setting: _searching(setting, optax.lbfgs())),
    "adam_broyden": _adam_then(
        "self-scaled Broyden, a dense matrix",
        lambda setting: _searching(setting, newton.self_scaled_broyden()),
        most_parameters=10_000,
    ),
    "adam_nys_newton_cg": _adam_then(
        f"NysNewton-CG, damping {_NYS_NEWTON_DAMPING}, 100 steps of conjugate gradients at most",
        lambda setting: _newton(setting._replace(rate=_NYS_NEWTON_DAMPING), **_NYS_NEWTON),
        options={"damping": _NYS_NEWTON_DAMPING, **_NYS_NEWTON},
    ),
    "nys_newton_cg": _nys_newton("baseline"),
    "nys_newton_cg_1000": _nys_newton("ablation", steps=1000),
    "fosi_sgd": _fosi("sgd"),
    "fosi_adam": _fosi("adam"),
    "dho2_sgd": _dho2("sgd"),
    "dho2_adam": _dho2("adam"),
    "dho2_muon": _dho2("muon"),
    "dho2_soap": _dho2("soap"),
    "dho2_adam_rank30": _of_one_batch("adam", 50),
    "dho2_soap_rank30": _of_one_batch("soap", 50, "no metric", metric=None),
    "dho2_adam_rank30_interval100": _of_one_batch("adam", 100),
    "dho2_soap_rank30_interval100": _of_one_batch("soap", 100, "no metric", metric=None),
    "dho2_adam_rank62": _of_one_batch("adam", 200, "products on half the points", **_RANK62),
    "dho2_soap_rank62": _of_one_batch("soap", 200, "products on half the points, no metric", **_RANK62, metric=None),
    "dho2_sgd_rank30": _of_one_batch("sgd", 50),
    "dho2_muon_rank30": _of_one_batch("muon", 50),
    "mr_dho2_sgd": _mr_dho2("sgd"),
    "mr_dho2_adam": _mr_dho2("adam"),
    "dho2_adam_alpha0": _dho2("adam", "no step in the subspace", alpha=0.0),
    "dho2_adam_unscaled": _dho2("adam", "the base not scaled", base_scale_limit=1.0),
    "dho2_adam_no_metric": _dho2("adam", "no metric", metric=None),
    "dho2_adam_unbounded": _dho2("adam", "FOSI's rule of scale", sharpness_limit=float("inf"), base_scale_growth=1e9),
    "dho2_adam_rank4": _dho2("adam", "rank 4", rank=4, order=8),
    "dho2_adam_rank16": _dho2("adam", "rank 16", rank=16, order=32),
    "dho2_adam_interval50": _dho2("adam", "a refresh every 50 updates", refresh_interval=50),
    "dho2_adam_often": _dho2(
        "adam", "a refresh every 50 updates, products on 128 samples", refresh_interval=50, curvature_batch_size=128
    ),
    "dho2_adam_rank30_no_metric": _of_one_batch("adam", 50, "no metric", kind="ablation", metric=None),
    "dho2_adam_rank30_alpha0": _of_one_batch("adam", 50, "no step in the subspace", kind="ablation", alpha=0.0),
    "dho2_adam_rank30_unscaled": _of_one_batch(
        "adam", 50, "the base not scaled", kind="ablation", base_scale_limit=1.0
    ),
    "dho2_soap_rank30_metric": _of_one_batch("soap", 50, "its metric", kind="ablation", metric="base"),
    "dho2_soap_rank30_alpha0": _of_one_batch(
        "soap", 50, "no metric, no step in the subspace", kind="ablation", metric=None, alpha=0.0
    ),
    "dho2_soap_rank30_unscaled": _of_one_batch(
        "soap", 50, "no metric, the base not scaled", kind="ablation", metric=None, base_scale_limit=1.0
    ),
    "dho2_soap_no_metric": _dho2("soap", "no metric", metric=None),
    "dho2_adam_interval200": _dho2("adam", "a refresh every 200 updates", refresh_interval=200),
    "dho2_adam_order4": _dho2("adam", "order 4 * rank", order=4 * _DHO2["rank"]),
    "dho2_adam_curvature128": _dho2("adam", "products on 128 samples", curvature_batch_size=128),
    "dho2_adam_curvature8192": _dho2("adam", "products on the same 8192 samples always", curvature_samples=8192),
    "dho2_adam_limit10": _dho2("adam", "a scale of up to 10", base_scale_limit=10.0),
    "dho2_adam_floor": _dho2("adam", "eigenvalues at least a tenth of the largest", floor=0.1),
    **{f"dho2_adam_{name}": _dho2("adam", safeguard=name) for name in SAFEGUARDS},
    "dho2_adam_decay": _dho2("adam", "alpha follows the schedule", decay_alpha=0.1),
}
"""By name, in the order of the report."""

METHODS |= peers.METHODS

KINDS = ("baseline", "hybrid", "ablation")


def select(names: Iterable[str]) -> dict[str, Method]:
    """Methods by names, or by kinds that stand for all of their methods; in the order of the registry."""
    wanted = set(names)
    unknown = wanted - set(METHODS) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown methods {sorted(unknown)}: choose from {', '.join((*KINDS, *METHODS))}")
    return {name: method for name, method in METHODS.items() if name in wanted or method.kind in wanted}
