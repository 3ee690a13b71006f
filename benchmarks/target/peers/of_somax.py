"""Matrix-free Gauss-Newton and AdaHessian of `python-somax` 1.0.1.

Gauss-Newton takes the tasks of the proof of concept only: autoencoder, mlp, digits_mlp, cnn and resnet.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import somax
from somax.curvature.base import CurvatureState

from benchmarks.target.interface import Method, Setting, Trainer
from benchmarks.target.peers.images import network, reconstruction_loss
from dho2_optax.poc import models

_SOMAX = {"version": f"python-somax {importlib.metadata.version('python-somax')}"}

_CG = {"tol": 1e-4, "maxiter": 20, "stabilise_every": 10}


class _BernoulliGaussNewton:
    """The curvature operator that somax lacks: Gauss-Newton of sigmoid cross entropy, summed over pixels."""

    def __init__(self, predict: Callable[[Any, Any], jax.Array]) -> None:
        self._predict = predict

    def init(self, params: Any, batch: Any, *, with_grad: bool = False) -> tuple[CurvatureState, Any]:
        logits, jvp = jax.linearize(lambda p: self._predict(p, batch["images"]), params)
        transpose = jax.linear_transpose(jvp, params)
        loss, slope = jax.value_and_grad(reconstruction_loss)(logits, batch)
        probabilities = jax.nn.sigmoid(logits)
        weights = probabilities * (1 - probabilities) / len(logits)
        return CurvatureState((loss, jvp, transpose, weights)), transpose(slope)[0] if with_grad else ()

    def matvec(self, params: Any, state: CurvatureState, v: Any) -> Any:
        _, jvp, transpose, weights = state.cache
        return transpose(weights * jvp(v))[0]

    def loss(self, params: Any, state: CurvatureState, batch: Any) -> jax.Array:
        return state.cache[0]

    def loss_only(self, params: Any, batch: Any) -> jax.Array:
        return reconstruction_loss(self._predict(params, batch["images"]), batch)


def _sgn(setting: Setting, *, damping: Mapping[str, float], **options: Any) -> somax.SecondOrderMethod:
    """The method of somax's README: damped Gauss-Newton systems of the whole batch, solved by conjugate gradients."""
    predict = network(setting.task)
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


METHODS: dict[str, Method] = {
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
