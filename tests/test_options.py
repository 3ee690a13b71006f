"""The values that options are given in."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import dho2_optax as dho2
from tests.helpers import make_mesh

_CLASSES = (dho2.Eigensolver, dho2.Newton, dho2.BaseScale)


@pytest.mark.parametrize("options", _CLASSES)
def test_options_are_frozen_and_given_by_name(options):
    value = options()
    name = dataclasses.fields(options)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, getattr(value, name))
    with pytest.raises(TypeError, match="positional"):
        options(1)
    assert options() == value
    assert hash(options()) == hash(value)


def test_only_what_is_not_the_default_is_shown():
    assert [repr(options()) for options in _CLASSES] == ["Eigensolver()", "Newton()", "BaseScale()"]
    assert repr(dho2.Eigensolver(order=32, select="algebraic")) == "Eigensolver(select='algebraic', order=32)"
    assert repr(dho2.Split("data")) == "Split(axis_name='data')"
    jax.eval_shape(lambda x: [repr(dho2.Newton(damping=x)), x][1], 1.0)


@pytest.mark.parametrize("make", [dho2.dho2, dho2.mr_dho2])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("eigensolver", "Eigensolver"), ("newton", "Newton"), ("base_scale", "BaseScale"), ("split", "Split")],
)
def test_what_is_no_value_of_the_class_is_refused(make, name, kind):
    for value in (0.1, {"order": 3}, "data", *([] if name == "split" else [None])):
        with pytest.raises(ValueError, match=f"`{name}` must be a dho2_optax.{kind}, got "):
            make(optax.sgd(0.1), **{name: value})


def test_a_group_refuses_what_it_would_ignore():
    with pytest.raises(ValueError, match="`rayleigh` is for the refreshes of dho2; a group makes no products for it"):
        dho2.CurvatureGroup(
            curvature=lambda params, vector, batch: vector,
            devices=jax.devices()[:1],
            eigensolver=dho2.Eigensolver(rayleigh=lambda params, vector, batch: vector),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dho2.Eigensolver(order=0), "`order` must be an int of at least 1 or None, got 0"),
        (lambda: dho2.Eigensolver(anchored=jnp.bool_(True)), "`anchored` must be True or False, got "),
        (lambda: dho2.Eigensolver(rayleigh=3), "`rayleigh` must be callable, got 3"),
        (lambda: dho2.Newton(subspace=3), "`subspace` must be an optax.GradientTransformation, got 3"),
        (lambda: dho2.Split(None), "`axis_name` must be the name of one mesh axis, got None"),
        (lambda: dho2.Split("model", mesh=make_mesh(2)), r"`axis_name` must be one of \('data',\) of the mesh"),
    ],
)
def test_nonsense_is_refused_where_it_is_said(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_default_residual_depends_on_the_optimizer():
    """A pair with a residual of 0.2 is used by mr_dho2 and left to the base by dho2."""
    for make, expected in ((dho2.dho2, 0.1), (dho2.mr_dho2, 0.3)):
        settings = make(optax.sgd(0.1)).update.args[0]
        assert settings.solver.max_residual == expected
        given = make(optax.sgd(0.1), eigensolver=dho2.Eigensolver(max_residual=0.2)).update.args[0]
        assert given.solver.max_residual == 0.2
