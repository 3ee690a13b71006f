"""For models of Flax: a train state of linen that hands the optimizer what it needs beside gradients.

Imported on its own, and only it needs Flax: ``from dho2_optax.flax import TrainState``. An ``nnx.Optimizer`` passes
keyword arguments on by itself.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import optax
from flax.training import train_state

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):
    r"""Flax's ``TrainState``, whose ``apply_gradients`` passes on what ``tx.update`` needs to learn curvature.

    Use it in place of ``flax.training.train_state.TrainState``, of which it is a subclass, with the same fields and the
    same ``create``. With the parameters :math:`\theta`, the optimizer's state :math:`s` and the gradient :math:`g`,

    .. math::
        (u, s') = \text{update}(g, s, \theta, \ldots), \qquad \theta' = \theta + u,

    where the dots are the arguments named in `update_arguments`. Optimizers that take none of them ignore them.

    Attributes:
      update_arguments: names of the arguments of ``apply_gradients`` that ``tx.update`` is called with: those of
        :func:`dho2_optax.dho2` and those that optax's own optimizers know. Fields of the state come first, and a
        subclass may name more.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> from dho2_optax.flax import TrainState
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> tx = dho2.dho2(optax.sgd(0.1), rank=2, refresh_interval=5)
      >>> model = lambda params: x @ params["w"]
      >>> state = TrainState.create(apply_fn=model, params={"w": jnp.zeros(4)}, tx=tx)
      >>> @jax.jit
      ... def step(state):
      ...     loss_fn = lambda params: jnp.mean((state.apply_fn(params) - x.sum(axis=1)) ** 2)
      ...     return state.apply_gradients(grads=jax.grad(loss_fn)(state.params), value_fn=loss_fn)
      >>> for _ in range(10):
      ...     state = step(state)
      >>> int(dho2.metrics(state.opt_state)["refreshes"]), int(state.step)
      (2, 10)
    """

    update_arguments: ClassVar[frozenset[str]] = frozenset(
        {"allow_refresh", "batch", "full_params", "grad", "hvp", "obj_fn", "value", "value_fn"}
    )

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Any:
        """A state whose parameters have made one step.

        Args:
          grads: a pytree like ``params``.
          **kwargs: arguments of ``tx.update``, as `update_arguments` names them, and fields of the state to replace.

        Returns:
          A state with one more ``step``, new ``params`` and ``opt_state``, and the given fields replaced.

        Raises:
          TypeError: for an argument that is neither.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        extra = {name: kwargs.pop(name) for name in self.update_arguments - fields if name in kwargs}
        # `MultiSteps` passes them on, but is no transformation by its type.
        tx = self.tx if isinstance(self.tx, optax.MultiSteps) else optax.with_extra_args_support(self.tx)
        told = optax.GradientTransformationExtraArgs(tx.init, functools.partial(tx.update, **extra))
        # The step itself is flax's: it knows which of the parameters are none of the optimizer's.
        return super(TrainState, self.replace(tx=told)).apply_gradients(grads=grads, **{"tx": self.tx, **kwargs})
