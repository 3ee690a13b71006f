"""What an update may learn curvature from, without an optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dho2_optax import learning, metric
from dho2_optax.learning import Inputs, Learning
from dho2_optax.options import Split
from dho2_optax.packing import Layout
from tests.helpers import AXIS, flat

_PARAMS = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(3.0)}
_VECTOR = {"a": jnp.asarray([1.0, 0.0]), "b": jnp.asarray(2.0)}
_LAYOUT = Layout(_PARAMS, None)


def _loss(params: Any, batch: Any) -> jax.Array:
    return 0.5 * jnp.mean(batch) * (jnp.sum(params["a"] ** 2) + params["b"] ** 2)


def _source(known: Learning, inputs: Inputs) -> Any:
    return learning.source(
        known,
        _PARAMS,
        _LAYOUT,
        inputs,
        trusted=lambda: jnp.asarray(True),
        factors=lambda base_state: None,
        geometry=lambda factors: metric.EUCLIDEAN,
    )


def test_a_product_that_is_given_comes_before_one_that_we_would_make():
    inputs = Inputs(batch=jnp.asarray([3.0]), hvp=_VECTOR)
    streaming = _source(Learning(loss_fn=_loss, required=False), inputs)
    assert streaming.matvec_at is None
    np.testing.assert_array_equal(flat(streaming.product()), flat(_VECTOR))
    synchronous = _source(Learning(loss_fn=_loss), inputs)
    assert synchronous.product is None
    np.testing.assert_allclose(flat(synchronous.matvec_at(_PARAMS)(_LAYOUT.pack(_VECTOR))), 3 * flat(_VECTOR))


def test_without_anything_there_is_nothing_or_it_is_asked_for():
    found = _source(Learning(loss_fn=None, required=False), Inputs())
    assert found.matvec_at is found.product is found.rayleigh is None
    with pytest.raises(ValueError, match="`update` needs `value_fn=`"):
        _source(Learning(loss_fn=None), Inputs())
    with pytest.raises(ValueError, match="`update` needs `batch=`"):
        _source(Learning(loss_fn=_loss), Inputs())


def test_a_second_operator_is_at_the_parameters_of_the_update():
    rayleigh = lambda params, vector, batch: jax.tree.map(lambda p, v: p * v * batch, params, vector)  # noqa: E731
    found = _source(Learning(loss_fn=_loss, rayleigh=rayleigh), Inputs(batch=jnp.asarray([3.0])))
    np.testing.assert_allclose(flat(found.rayleigh(_LAYOUT.pack(_VECTOR))), 3 * flat(_PARAMS) * flat(_VECTOR))


@pytest.mark.parametrize("average", [False, True])
def test_a_segment_is_of_the_mean_or_of_what_is_given(average):
    split = Split(AXIS, average_gradients=average)
    gradients = jnp.asarray([[2.0, 4.0], [6.0, 8.0]])
    own = lambda g: learning.own_segment(g, Layout(g, AXIS), split)  # noqa: E731
    (segments,) = jax.vmap(own, axis_name=AXIS)(gradients)
    # The second device has padding.
    expected = [4.0, 6.0] if average else [2.0, 4.0]
    np.testing.assert_allclose(segments[0, :2, 0], expected)
    assert not segments[1].any()
    (whole,) = learning.own_segment(gradients, Layout(gradients, None), None)
    np.testing.assert_array_equal(whole, gradients)
