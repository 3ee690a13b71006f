"""Parameters that ``optax.masked`` and ``optax.partition`` hide from the optimizer inside them."""

from typing import Any, NamedTuple

import jax
import optax


class Shown(NamedTuple):
    """Stands for a leaf that is not hidden, where no array shall."""


def is_hidden(x: Any) -> bool:
    """Whether `x` stands for a hidden leaf."""
    return isinstance(x, optax.MaskedNode)


def any_hidden(tree: Any) -> bool:
    """Whether `tree` has hidden leaves."""
    return any(map(is_hidden, jax.tree.leaves(tree, is_leaf=is_hidden)))


def fill(tree: Any, values: Any) -> Any:
    """`tree` with its hidden leaves taken from `values`."""
    return jax.tree.map(lambda x, value: value if is_hidden(x) else x, tree, values, is_leaf=is_hidden)


def hide(tree: Any, like: Any) -> Any:
    """`tree` with the leaves hidden that are hidden in `like`."""
    return jax.tree.map(
        lambda x, value: x if is_hidden(x) else value,
        like,
        tree,
        is_leaf=lambda x: is_hidden(x) or isinstance(x, Shown),
    )
