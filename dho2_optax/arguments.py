"""Checks of the arguments of constructors: nonsense is a ValueError that names the argument and what is allowed.

And what the arguments of a tuple with names are called in ``help()``.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_Kind = TypeVar("_Kind", bound=type)

INJECTION_HINT = "(With `optax.inject_hyperparams`, inject into a function of the hyperparameters that calls this one.)"
_INT32_MAX = 2**31 - 1

Allowed = Literal["positive", "non-negative", "at least 1", "in [0, 1)"]
_HOLDS = {
    "positive": lambda x: x > 0,
    "non-negative": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
}


def as_written(kind: _Kind) -> _Kind:
    """For a ``NamedTuple`` in whose module annotations are strings: ``help()`` shows these, not a ``ForwardRef``."""
    kind.__annotations__ = {name: hint.__forward_arg__ for name, hint in kind.__annotations__.items()}
    kind.__new__.__annotations__ = dict(kind.__annotations__)
    return kind


def is_int(value: Any) -> bool:
    """Whether `value` is an int of Python or NumPy; a bool is none here."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def known(value: Any) -> int | float | None:
    """The number that `value` is, if it is one of Python or NumPy; None for others, arrays of JAX among them."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_traced(value: Any) -> bool:
    """Whether `value` is a number that nobody knows yet."""
    return isinstance(value, Tracer) and value.shape == () and jnp.issubdtype(value.dtype, np.number)


def on_host(value: Any) -> Any:
    """`value`, as one of NumPy if it is a number in an array of JAX that is not traced."""
    is_concrete = isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.shape == ()
    return np.asarray(value) if is_concrete and jnp.issubdtype(value.dtype, np.number) else value


def check_numbers(
    allowed: Allowed,
    *,
    whole: bool = False,
    infinite: bool = False,
    optional: bool = False,
    schedule: bool = False,
    **values: Any,
) -> None:
    """Checks numbers; traced ones pass unseen.

    Args:
      allowed: which numbers are.
      whole: whether only whole numbers are; a float such as 50.0 is one.
      infinite: whether infinity is.
      optional: whether None is.
      schedule: whether functions are.
      **values: the arguments, by name.

    Raises:
      ValueError: for the first that is not allowed.

    Example:
      >>> check_numbers("positive", whole=True, interval=50.0)
      >>> check_numbers("positive", whole=True, interval=0.5)
      Traceback (most recent call last):
      ValueError: `interval` must be a positive integer below 2**31, got 0.5.
    """
    for name, value in values.items():
        if (value is None and optional) or (schedule and callable(value)):
            continue
        if _is_traced(value):
            continue
        number = known(on_host(value))
        if number is None:
            others = ", a schedule" * schedule + " or None" * optional
            raise ValueError(f"`{name}` must be a number{others}, got {value!r}.")
        if not _HOLDS[allowed](number):
            raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
        if not whole and math.isinf(number) and not infinite:
            raise ValueError(f"`{name}` must be finite, got {value!r}.")
        if whole and not (number <= _INT32_MAX and number == int(number)):
            raise ValueError(f"`{name}` must be a {allowed} integer below 2**31, got {value!r}.")


def check_sizes(*, auto: bool = False, **values: Any) -> None:
    """Raises ValueError for what is neither a positive Python int nor None, nor, where it is allowed, ``"auto"``."""
    for name, value in values.items():
        if value is None or (auto and isinstance(value, str) and value == "auto"):
            continue
        if not is_int(value):
            others = ", 'auto'" if auto else ""
            raise ValueError(f"`{name}` must be a Python int{others} or None, got {value!r}.")
        if int(value) <= 0:
            raise ValueError(f"`{name}` must be positive, got {value!r}.")


def check_flags(**values: Any) -> None:
    """Raises ValueError for what is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_functions(*, optional: bool = False, **values: Any) -> None:
    """Raises ValueError for what is not callable; None is let pass where it is `optional`."""
    for name, value in values.items():
        if not callable(value) and not (value is None and optional):
            raise ValueError(f"`{name}` must be callable, got {value!r}. {INJECTION_HINT}")


def check_transformations(**values: Any) -> None:
    """Raises ValueError for what is no optax transformation."""
    for name, value in values.items():
        if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
            raise ValueError(f"`{name}` must be an optax.GradientTransformation, got {value!r}.")


def check_calls(name: str, function: Callable[..., Any] | None, *arguments: str, remedy: str) -> None:
    """Raises ValueError for a function that cannot be called with as many arguments; None is let pass.

    Example:
      >>> check_calls("loss_fn", lambda params: 0.0, "params", "batch", remedy="give `value_fn=`")
      Traceback (most recent call last):
      ValueError: `loss_fn` is called with (params, batch), but takes (params); give `value_fn=`.
    """
    try:
        signature = inspect.signature(function) if function is not None else None
    except (TypeError, ValueError):  # of functions that are not written in Python
        return
    if signature is None:
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        given, taken = ", ".join(arguments), ", ".join(signature.parameters)
        raise ValueError(f"`{name}` is called with ({given}), but takes ({taken}); {remedy}.") from None


def check_floating(**values: Any) -> None:
    """Raises ValueError for a value that is neither None nor a real floating-point dtype."""
    for name, value in values.items():
        try:
            is_floating = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
        except TypeError:
            is_floating = False
        if not is_floating:
            raise ValueError(f"`{name}` must be None or a real floating-point dtype, got {value!r}.")


def check_updates(updates: Any, params: Any) -> None:
    """Raises ValueError for updates whose leaves are not of the shapes of those of the parameters."""
    given, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (updates, params))
    if len(given) != len(wanted):
        raise ValueError(f"`updates` must be a pytree like `params`, got {len(given)} leaves for {len(wanted)}.")
    for (path, update), (_, leaf) in zip(given, wanted, strict=True):
        if jnp.shape(update) != jnp.shape(leaf):
            raise ValueError(
                f"`updates` must have the shapes of `params`, got {jnp.shape(update)} for {jnp.shape(leaf)} at "
                f"{jax.tree_util.keystr(path)}."
            )


def check_params(params: Any) -> None:
    """Raises ValueError for parameters that are not real floating-point numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_array = hasattr(leaf, "dtype")
        if not is_array or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"`params` must hold real floating-point numbers, got {leaf.dtype if is_array else repr(leaf)} at "
                f"{jax.tree_util.keystr(path)}; leave such leaves out: by optax.masked, in Equinox by "
                "eqx.filter(model, eqx.is_inexact_array), in flax's nnx by wrt=nnx.Param."
            )
