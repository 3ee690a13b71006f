import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dho2_optax.masking import any_hidden, fill, hide, is_hidden

_WHOLE = {"a": np.float32([1, 2]), "b": {"c": np.float32(3), "d": np.float32([[4]])}}
_PARTLY = {"a": optax.MaskedNode(), "b": {"c": np.float32(30), "d": optax.MaskedNode()}}


def test_hidden_leaves_are_found():
    assert is_hidden(optax.MaskedNode())
    assert not is_hidden(np.float32(0))
    assert any_hidden(_PARTLY)
    assert not any_hidden(_WHOLE)
    assert not any_hidden({})


def test_fill_takes_hidden_leaves_from_the_values_and_keeps_the_others():
    filled = fill(_PARTLY, _WHOLE)
    assert jax.tree.structure(filled) == jax.tree.structure(_WHOLE)
    assert filled["a"] is _WHOLE["a"]
    assert filled["b"]["c"] == 30
    assert filled["b"]["d"] is _WHOLE["b"]["d"]
    assert fill(_WHOLE, _PARTLY)["b"]["c"] == 3


def test_a_hidden_leaf_may_stand_for_a_whole_subtree():
    filled = fill({"a": np.float32(1), "b": optax.MaskedNode()}, _WHOLE)
    assert filled == {"a": 1, "b": _WHOLE["b"]}
    assert is_hidden(hide(_WHOLE, {"a": np.float32(1), "b": optax.MaskedNode()})["b"])


def test_hide_hides_the_same_leaves_and_keeps_the_others():
    hidden = hide(_WHOLE, _PARTLY)
    assert jax.tree.structure(hidden) == jax.tree.structure(_PARTLY)
    assert is_hidden(hidden["a"])
    assert hidden["b"]["c"] == 3
    # What is hidden already stays so.
    assert jax.tree.structure(hide(_PARTLY, _PARTLY)) == jax.tree.structure(_PARTLY)
    assert jax.tree.structure(hide(_WHOLE, _WHOLE)) == jax.tree.structure(_WHOLE)


def test_fill_undoes_hide():
    restored = fill(hide(_WHOLE, _PARTLY), _WHOLE)
    jax.tree.map(np.testing.assert_array_equal, restored, _WHOLE)


@pytest.mark.parametrize("mask", [{"a": True, "b": False}, {"a": False, "b": {"c": True, "d": False}}])
def test_they_understand_what_optax_masks(mask):
    seen = []

    def update(updates, state, params=None):
        seen.append((updates, params))
        return updates, state

    tx = optax.masked(optax.GradientTransformation(lambda params: optax.EmptyState(), update), mask)
    tx.update(jax.tree.map(jnp.ones_like, _WHOLE), tx.init(_WHOLE), _WHOLE)
    updates, params = seen[0]
    assert any_hidden(updates)
    jax.tree.map(np.testing.assert_array_equal, fill(params, _WHOLE), _WHOLE)
    assert jax.tree.structure(hide(_WHOLE, params)) == jax.tree.structure(params)
