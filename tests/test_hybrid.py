"""The rooms of an update, each by itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dho2_optax import hybrid, metric, refresh
from dho2_optax.eigensolver import Spectrum
from dho2_optax.hybrid import Settings
from dho2_optax.learning import Learning
from dho2_optax.options import BaseScale, Eigensolver, Newton, Split
from dho2_optax.packing import Layout
from dho2_optax.subspace import Damping
from tests.helpers import AXIS

_PARAMS = jnp.asarray([1.0, -2.0, 0.5])


def _settings(base: Any = None, split: Split | None = None, **options: Any) -> Settings:
    axis_name = None if split is None else split.axis_name
    given: dict[str, Any] = {
        "base": optax.with_extra_args_support(optax.sgd(0.5) if base is None else base),
        "solver": refresh.make_solver(2, Eigensolver(), Newton(), axis_name, max_residual=0.1),
        "refresh": refresh.external(),
        "learning": Learning(loss_fn=None, split=split, required=False),
        "alpha": 0.1,
        "subspace": optax.identity(),
        "damping": Damping(0.0, 0.0),
        "base_scale": BaseScale(),
        "metric": None,
    }
    return Settings(**{**given, **options})


def _with_pairs(settings: Settings) -> Any:
    """A state with the eigenvalues 8 and 4, of the first two coordinates."""
    state = hybrid.init(settings, _PARAMS)
    found = Spectrum(jnp.asarray([8.0, 4.0]), jnp.eye(2, 3), jnp.zeros(2), jnp.ones(2, bool))
    return state._replace(spectrum=found._replace(eigenvectors=(found.eigenvectors,)))


def test_the_scale_is_the_ratio_within_its_limit_its_growth_and_what_the_base_tolerates():
    infinite = jnp.asarray(jnp.inf)
    free = {"growth": jnp.inf, "sharpness": jnp.inf, "limit": jnp.inf}
    for changed, tolerable, expected in (
        ({}, infinite, 2.0),
        ({"limit": 1.5}, infinite, 1.5),
        ({"growth": 1.25}, infinite, 1.25),
        ({"sharpness": 0.5}, jnp.asarray(12.0), 1.5),
    ):
        settings = _settings(base_scale=BaseScale(**{**free, **changed}))
        assert float(hybrid.scale(settings, _with_pairs(settings), tolerable)) == pytest.approx(expected)


def test_a_step_is_newton_inside_and_the_base_outside():
    settings = _settings(optax.sgd(0.1), alpha=1.0, bounded=False)  # stable up to a curvature of 20
    gradient = jnp.asarray([16.0, 2.0, 3.0])
    stepped = hybrid.step(settings, (gradient,), _with_pairs(settings), _PARAMS, Layout(_PARAMS, None), {})
    np.testing.assert_allclose(stepped.update[0], [-2.0, -0.5, -0.1 * 3 * 1.01], rtol=1e-6)


@pytest.mark.parametrize("on_segments", [True, False])
def test_the_base_steps_alike_on_segments_and_on_whole_leaves(on_segments):
    """On whole leaves it may look at all of them, as clipping by norm does."""
    settings = _settings(optax.clip_by_global_norm(1.0), Split(AXIS, base_on_segments=on_segments))

    def one_device(gradient: Any) -> Any:
        state = hybrid.init(settings, _PARAMS)
        layout = Layout(_PARAMS, AXIS)
        return hybrid.base_step(settings, _PARAMS, layout, state.base_state, {}, (gradient,))[0][0]

    # Of each of two devices 128 rows.
    gradients = jnp.zeros((2, 128, 1)).at[:, 0, 0].set(jnp.asarray([3.0, 0.0])).at[0, 1, 0].set(4.0)
    steps = jax.vmap(one_device, axis_name=AXIS)(gradients)
    np.testing.assert_allclose(steps[0, :3, 0], [0.6, 0.8, 0.0], rtol=1e-6)
    assert not steps[1].any()


def test_a_base_without_momentum_has_the_gradient_for_one():
    gradient = jnp.asarray([1.0, 2.0, 3.0])
    plain = _settings()
    layout = Layout(_PARAMS, None)
    found = hybrid.momentum_of(plain, plain.base.init(_PARAMS), (gradient,), _PARAMS, layout)
    assert found.limit == metric.PLAIN_LIMIT
    np.testing.assert_array_equal(found.vector[0], gradient)
    heavy = _settings(optax.sgd(0.5, momentum=0.9))
    _, base_state = heavy.base.update(gradient, heavy.base.init(_PARAMS), _PARAMS)
    found = hybrid.momentum_of(heavy, base_state, (7 * gradient,), _PARAMS, layout)
    np.testing.assert_array_equal(found.vector[0], gradient)


@pytest.mark.parametrize(("choice", "known"), [(None, False), ("auto", True), ("base", True)])
def test_factors_are_those_of_the_metric_that_was_chosen(choice, known):
    adam = _settings(optax.adam(0.1), metric=choice)
    assert (hybrid.init(adam, _PARAMS).factors is not None) == known
    sgd = _settings(metric="auto")
    assert hybrid.init(sgd, _PARAMS).factors is None
