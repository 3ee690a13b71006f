"""The methods that are compared, by name.

All are given the same schedule, `Setting.schedule`, and tuned by the same rule. Hybrids make their curvature products
on the first eighth of the batch (or what other part the task says), but at least on as many samples as hold 256
predictions; option ``curvature_batch_size`` changes that. The first refresh of `dho2` is when the learning rate is at
its peak.

An ablation with ``rank=0`` is missing because it is the base alone.

Methods of other libraries are added by the optional module `benchmarks.target.peers`: a dict ``METHODS``. It may import
what is not installed everywhere.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import dho2_optax as dho2
from benchmarks.options import grouped
from benchmarks.target.interface import Method, Setting, Trainer
from benchmarks.target.safeguards import SAFEGUARDS

_MOMENTUM = 0.9
_MIN_CURVATURE_PREDICTIONS = 256
_HYBRID = {"rank": 8, "order": 16}
_DHO2 = {**_HYBRID, "refresh_interval": 100}
_MR_DHO2 = {**_HYBRID, "probe_interval": 4}
_FOSI = {"rank": 10, "refresh_interval": 50}

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


def _lbfgs() -> Method:
    """L-BFGS with its line search on the batch; tuned is how many pairs it remembers, instead of a learning rate."""

    def build(setting: Setting) -> Trainer:
        loss_fn = setting.task.loss_fn

        def extra(batch: Any, loss: Any, grads: Any) -> dict[str, Any]:
            # Of this batch: what the line search left in the state belongs to the last one.
            return {"value": loss, "grad": grads, "value_fn": lambda params: loss_fn(params, batch)}

        return _trainer(optax.lbfgs(memory_size=int(setting.rate)), _gradients(loss_fn, extra))

    return Method(
        "L-BFGS (optax), zoom line search on each batch",
        "baseline",
        build,
        {"default": 8},
        rate_name="memory",
        limits=(1, 64),
        compiled="for each rate",
    )


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
    "fosi_sgd": _fosi("sgd"),
    "fosi_adam": _fosi("adam"),
    "dho2_sgd": _dho2("sgd"),
    "dho2_adam": _dho2("adam"),
    "dho2_muon": _dho2("muon"),
    "dho2_soap": _dho2("soap"),
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

with contextlib.suppress(ImportError):
    from benchmarks.target import peers  # pyright: ignore[reportAttributeAccessIssue]

    METHODS |= peers.METHODS

KINDS = ("baseline", "hybrid", "ablation")


def select(names: Iterable[str]) -> dict[str, Method]:
    """Methods by names, or by kinds that stand for all of their methods; in the order of the registry."""
    wanted = set(names)
    unknown = wanted - set(METHODS) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown methods {sorted(unknown)}: choose from {', '.join((*KINDS, *METHODS))}")
    return {name: method for name, method in METHODS.items() if name in wanted or method.kind in wanted}
