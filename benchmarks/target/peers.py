"""Methods of other libraries: K-FAC (`kfac-jax` 0.0.8), matrix-free Gauss-Newton and AdaHessian (`python-somax` 1.0.1).

They have an environment of their own, in which the rest of the benchmark runs too:

    python3.11 -m venv .venv-peers
    .venv-peers/bin/pip install jax==0.10.2 optax==0.2.8 kfac-jax==0.0.8 python-somax==1.0.1 -e '.[poc]' scipy
    .venv-peers/bin/python -m benchmarks.target mlp --batch-size 2000 --methods kfac somax_sgn

All but AdaHessian must know the network's outputs and its loss on them, so they take the tasks of the proof of concept
only: autoencoder, mlp, digits_mlp, cnn and resnet. K-FAC has no blocks for the convolutions of the last two on CPU,
which are products of patches there.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import kfac_jax
import optax
import somax
from kfac_jax._src import tag_graph_matcher
from somax.curvature.base import CurvatureState

from benchmarks.target.interface import Method, Setting, Trainer
from benchmarks.target.tasks import Target
from dho2_optax.poc import models

_KFAC_JAX = {"version": f"kfac-jax {importlib.metadata.version('kfac-jax')}"}
_SOMAX = {"version": f"python-somax {importlib.metadata.version('python-somax')}"}


def _evaluate_equation(eqn: Any, inputs: list[Any]) -> list[Any]:
    with jax.extend.source_info_util.user_context(eqn.source_info.traceback):
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if isinstance(outputs, list) else [outputs]


# `get_bind_params` returns a dict since jax 0.9.2; kfac-jax 0.0.8 expects a pair: "too many values to unpack".
# Training by the replacement under jax 0.10.2 agrees with training by the original under jax 0.9.1.
if jax.__version_info__ >= (0, 9, 2):
    tag_graph_matcher.eval_jaxpr_eqn = _evaluate_equation


# What these libraries must know of a task.


def _predict(task: Target) -> Callable[[Any, Any], jax.Array]:
    """(parameters, images) -> logits."""
    num_classes = 0 if task.name == models.AUTOENCODER else int(task.train["labels"].max()) + 1
    model = models.build(task.name.removeprefix("digits_"), num_classes)
    return lambda params, images: model.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def _pixels(batch: Any) -> jax.Array:
    return batch["images"].reshape(len(batch["images"]), -1)


def _reconstruction_loss(logits: jax.Array, batch: Any) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, _pixels(batch)).sum(axis=-1).mean()


def _classification_loss(logits: jax.Array, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


# kfac-jax.


def _registered_loss(task: Target) -> Callable[[Any, Any], jax.Array]:
    """The loss of the task, which also tells kfac-jax the distribution that the network predicts."""
    predict = _predict(task)

    def reconstruction(params: Any, batch: Any) -> jax.Array:
        logits = predict(params, batch["images"])
        kfac_jax.register_multi_bernoulli_predictive_distribution(logits, _pixels(batch))
        return _reconstruction_loss(logits, batch)

    def classification(params: Any, batch: Any) -> jax.Array:
        logits = predict(params, batch["images"])
        kfac_jax.register_categorical_predictive_distribution(logits, batch["labels"])
        return _classification_loss(logits, batch)

    return reconstruction if task.name == models.AUTOENCODER else classification


def _kfac(
    description: str,
    choose: Callable[[Setting], Mapping[str, Any]],
    centres: Mapping[str, float],
    rate_name: str = "learning rate",
    **options: Any,
) -> Method:
    """K-FAC with layers found by kfac-jax; `choose` makes the arguments of the optimizer for a setting."""

    def build(setting: Setting) -> Trainer:
        optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(_registered_loss(setting.task)), l2_reg=0.0, num_burnin_steps=0, **choose(setting)
        )

        def init(params: Any, batch: Any) -> Any:
            key = jax.random.key(0)
            return params, optimizer.init(params, key, batch), key, 0

        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, state, key, count = carry
            params, state, stats = optimizer.step(
                params, state, jax.random.fold_in(key, count), batch=batch, global_step_int=count
            )
            return (params, state, key, count + 1), stats["loss"]

        return Trainer(init, step, lambda carry: carry[0])

    return Method(
        description, "baseline", build, centres, {**_KFAC_JAX, **options}, rate_name=rate_name, compiled="by itself"
    )


_DAMPING = {"default": 0.1, "autoencoder": 10.0}  # by task; where it adapts, the first, unless that is tuned


def _scheduled(setting: Setting) -> dict[str, Any]:
    return {"learning_rate_schedule": setting.schedule, "momentum_schedule": lambda count: 0.9}


def _damping(setting: Setting) -> float:
    return _DAMPING.get(setting.task.name, _DAMPING["default"])


def _fixed(setting: Setting) -> dict[str, Any]:
    damping = _damping(setting)
    return {**_scheduled(setting), "damping_schedule": lambda count: damping}


def _adapted_damping(setting: Setting) -> dict[str, Any]:
    return {**_scheduled(setting), "use_adaptive_damping": True, "initial_damping": _damping(setting)}


def _adapted(setting: Setting) -> dict[str, Any]:
    adaptive = {f"use_adaptive_{what}": True for what in ("learning_rate", "momentum", "damping")}
    return {**adaptive, "initial_damping": setting.rate}


# somax.


class _BernoulliGaussNewton:
    """The curvature operator that somax lacks: Gauss-Newton of sigmoid cross entropy, summed over pixels."""

    def __init__(self, predict: Callable[[Any, Any], jax.Array]) -> None:
        self._predict = predict

    def init(self, params: Any, batch: Any, *, with_grad: bool = False) -> tuple[CurvatureState, Any]:
        logits, jvp = jax.linearize(lambda p: self._predict(p, batch["images"]), params)
        transpose = jax.linear_transpose(jvp, params)
        loss, slope = jax.value_and_grad(_reconstruction_loss)(logits, batch)
        probabilities = jax.nn.sigmoid(logits)
        weights = probabilities * (1 - probabilities) / len(logits)
        return CurvatureState((loss, jvp, transpose, weights)), transpose(slope)[0] if with_grad else ()

    def matvec(self, params: Any, state: CurvatureState, v: Any) -> Any:
        _, jvp, transpose, weights = state.cache
        return transpose(weights * jvp(v))[0]

    def loss(self, params: Any, state: CurvatureState, batch: Any) -> jax.Array:
        return state.cache[0]

    def loss_only(self, params: Any, batch: Any) -> jax.Array:
        return _reconstruction_loss(self._predict(params, batch["images"]), batch)


def _sgn(setting: Setting, *, damping: Mapping[str, float], **options: Any) -> somax.SecondOrderMethod:
    """The method of somax's README: damped Gauss-Newton systems of the whole batch, solved by conjugate gradients."""
    predict = _predict(setting.task)
    method = somax.sgn_ce(
        predict_fn=predict,
        x_key="images",
        y_key="labels",
        lam0=damping.get(setting.task.name, damping["default"]),
        learning_rate=setting.schedule,
        record_loss_every_k=1,
        **options,
    )
    if setting.task.name == models.AUTOENCODER:
        method.op = _BernoulliGaussNewton(predict)
    return method


def _adahessian(setting: Setting, **options: Any) -> somax.SecondOrderMethod:
    return somax.adahessian(
        loss_fn=setting.task.loss_fn, learning_rate=setting.schedule, record_loss_every_k=1, **options
    )


def _somax(
    description: str,
    make: Callable[..., somax.SecondOrderMethod],
    products: Callable[[Any], Any],
    centres: Mapping[str, float],
    **options: Any,
) -> Method:
    """A method of somax; `products` tells from the information on a step how many curvature products it made."""

    def build(setting: Setting) -> Trainer:
        method = make(setting, **options)

        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, state, count = carry
            # The same key always: the estimator adds the number of the step.
            params, state, info = method.step(params, batch, state, jax.random.key(0))
            return (params, state, count + products(info)), info["loss_before"]

        return Trainer(
            lambda params, batch: (params, method.init(params), jnp.zeros((), jnp.int32)),
            step,
            lambda carry: carry[0],
            lambda carry: carry[2],
        )

    return Method(description, "baseline", build, centres, {**_SOMAX, **options})


_CG = {"tol": 1e-4, "maxiter": 20, "stabilise_every": 10}

METHODS: dict[str, Method] = {
    "kfac": _kfac(
        "K-FAC (kfac-jax), momentum 0.9, fixed damping",
        _fixed,
        {"default": 0.1, "autoencoder": 0.2},
        damping=_DAMPING,
    ),
    "kfac_damping": _kfac(
        "K-FAC (kfac-jax), momentum 0.9, adaptive damping",
        _adapted_damping,
        {"default": 0.1, "autoencoder": 0.2},
        initial_damping=_DAMPING,
    ),
    "kfac_adaptive": _kfac(
        "K-FAC (kfac-jax), adaptive learning rate, momentum and damping",
        _adapted,
        {"default": 1.0, "autoencoder": 10.0},
        rate_name="initial damping",
    ),
    "somax_sgn": _somax(
        "Gauss-Newton by 20 steps of conjugate gradients (somax), damped",
        _sgn,
        # One product for the residual of the warm start, one whenever the residual is computed anew.
        lambda info: info["cg_iters"] + info["cg_iters"] // _CG["stabilise_every"] + 1,
        {"default": 0.1, "autoencoder": 0.3},
        damping={"default": 0.01, "autoencoder": 1.0},
        **_CG,
    ),
    "somax_adahessian": _somax(
        "AdaHessian (somax), Hutchinson's estimator every step",
        _adahessian,
        lambda info: 1,
        {"default": 0.01},
    ),
}
"""By name."""
