"""K-FAC of `kfac-jax` 0.0.8, on tasks of the proof of concept: autoencoder, mlp and digits_mlp.

It has no blocks for the convolutions of cnn and resnet on CPU, which are products of patches there. Nor has it for
differential equations: it finds layers by parameters that are used once, and derivatives of a network use each of them
often, so that all would have the diagonal blocks of "generic" parameters.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend
import kfac_jax
from kfac_jax._src import tag_graph_matcher

from benchmarks.target.interface import Method, Setting, Trainer
from benchmarks.target.peers.images import classification_loss, network, pixels, reconstruction_loss
from benchmarks.target.tasks import Target
from dho2_optax.poc import models

_KFAC_JAX = {"version": f"kfac-jax {importlib.metadata.version('kfac-jax')}"}


def _evaluate_equation(eqn: Any, inputs: list[Any]) -> list[Any]:
    with jax.extend.source_info_util.user_context(eqn.source_info.traceback):
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if isinstance(outputs, list) else [outputs]


# `get_bind_params` returns a dict since jax 0.9.2; kfac-jax 0.0.8 expects a pair: "too many values to unpack".
# Training by the replacement under jax 0.10.2 agrees with training by the original under jax 0.9.1.
if jax.__version_info__ >= (0, 9, 2):
    tag_graph_matcher.eval_jaxpr_eqn = _evaluate_equation


def _registered_loss(task: Target) -> Callable[[Any, Any], jax.Array]:
    """The loss of the task, which also tells kfac-jax the distribution that the network predicts."""
    predict = network(task)

    def reconstruction(params: Any, batch: Any) -> jax.Array:
        logits = predict(params, batch["images"])
        kfac_jax.register_multi_bernoulli_predictive_distribution(logits, pixels(batch))
        return reconstruction_loss(logits, batch)

    def classification(params: Any, batch: Any) -> jax.Array:
        logits = predict(params, batch["images"])
        kfac_jax.register_categorical_predictive_distribution(logits, batch["labels"])
        return classification_loss(logits, batch)

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
}
"""By name."""
