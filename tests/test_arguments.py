"""Every number that a constructor takes: nonsense is refused there, and says which argument it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_optax as dho2
from benchmarks.options import grouped
from dho2_optax import arguments


def _loss(params, batch):
    return jnp.sum(params**2) * batch


def _group(**options):
    return dho2.CurvatureGroup(_loss, **grouped(devices=jax.devices()[:1], **options))


def _lanczos(**options):
    return dho2.lanczos(lambda x: x, jnp.ones(5), rank=2, **options)


_MAKERS = {
    "dho2": lambda **options: dho2.dho2(optax.sgd(0.1), _loss, **grouped(**options)),
    "mr_dho2": lambda **options: dho2.mr_dho2(optax.sgd(0.1), _loss, **grouped(**options)),
    "fosi": lambda **options: dho2.fosi(optax.sgd(0.1), _loss, **options),
    "CurvatureGroup": _group,
    "soap": lambda **options: dho2.soap(**{"learning_rate": 0.1, **options}),
    "shampoo": lambda **options: dho2.shampoo(**{"learning_rate": 0.1, **options}),
    "hessian": lambda **options: dho2.hessian(_loss, **options),
    "gauss_newton": lambda **options: dho2.gauss_newton(_loss, _loss, **options),
    "lanczos": _lanczos,
    "value_grad_and_hvp": lambda **options: dho2.value_grad_and_hvp(_loss, **options),
}
_SIZES = {"batch_size": "size", "microbatch_size": "size"}
_SOLVER = {"rank": "int", "num_smallest": "int", "order": "int", "tolerance": "number"}
_HYBRID = {
    **_SOLVER,
    "alpha": "number",
    "max_residual": "number, infinite",
    "limit": "number, infinite",
    "growth": "number, infinite",
    "sharpness": "number, infinite",
    "floor": "number",
    "damping": "number",
    "warmup_steps": "whole",
    "batch_size": "size",
}
_KRONECKER = {
    "learning_rate": "number",
    "b1": "number",
    "b2": "number",
    "eps": "number",
    "weight_decay": "number",
    "precondition_interval": "whole",
    "max_size": "int",
}
_ARGUMENTS = {
    "dho2": {**_HYBRID, "refresh_interval": "whole"},
    "mr_dho2": {**_HYBRID, "probe_interval": "whole"},
    "fosi": {
        "rank": "int",
        "num_smallest": "int",
        "alpha": "number",
        "refresh_interval": "whole",
        "warmup_steps": "whole",
        "base_scale_limit": "number, infinite",
    },
    "CurvatureGroup": {
        **_SOLVER,
        "max_residual": "number, infinite",
        "floor": "number",
        "damping": "number",
        "batch_size": "size",
        "interval": "whole",
        "timeout": "number, infinite",
    },
    "soap": _KRONECKER,
    "shampoo": _KRONECKER,
    "hessian": {**_SIZES, "batch_start": "int"},
    "gauss_newton": {**_SIZES, "batch_start": "int"},
    "lanczos": {"num_smallest": "int", "order": "int", "tolerance": "number"},
    "value_grad_and_hvp": {"batch_size": "size"},
}
_NEVER = [float("nan"), -float("inf"), -1, -0.5, True, np.True_, "3", [1.0], 1j, np.float32("nan"), np.ones(2)]
_NEVER += [jnp.float32("nan"), jnp.int32(-1), jnp.bfloat16(-0.5), jnp.bool_(True), jnp.complex64(1j)]
_FRACTIONS = [0.5, np.float32(2.5), np.float64(7.5), np.array(1.5), jnp.float32(0.5), jnp.bfloat16(2.5)]
_BAD = {
    "number": [*_NEVER, float("inf"), np.float32("inf"), jnp.float32("inf")],
    "number, infinite": _NEVER,
    "whole": [*_NEVER, *_FRACTIONS, float("inf"), 2**31],
    "int": [*_NEVER, *_FRACTIONS, float("inf"), jnp.int32(3)],
    "size": [*_NEVER, *_FRACTIONS, float("inf"), 0, 2.0],
}


@pytest.mark.parametrize("maker", _MAKERS)
def test_nonsense_is_refused_by_name(maker):
    for name, kind in _ARGUMENTS[maker].items():
        for value in _BAD[kind]:
            with pytest.raises(ValueError, match=f"`{name}` must be .*got ") as caught:
                _MAKERS[maker](**{name: value})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("maker", _MAKERS)
def test_a_number_is_a_number_in_whatever_form(maker):
    # The largest pairs of none, and bases in [0, 1).
    good = {"num_smallest": 0, "b1": 0.5, "b2": 0.5, "rank": 2, "order": 9}
    for name, kind in _ARGUMENTS[maker].items():
        value = good.get(name, 50)
        forms = [value, np.array(value)[()]]
        if kind.startswith(("number", "whole")):
            forms += [np.float32(value), np.array(value), jnp.float32(value)]
        if kind == "whole":
            forms += [50.0, jnp.int32(50), 2**31 - 1]
        if kind.endswith("infinite"):
            forms += [float("inf"), np.inf]
        for form in forms:
            _MAKERS[maker](**{name: form})


def test_traced_numbers_and_schedules_pass():
    def build(x):
        for maker in _ARGUMENTS.keys() - {"CurvatureGroup"}:  # of the host
            for name, kind in _ARGUMENTS[maker].items():
                if kind.startswith(("number", "whole")):
                    _MAKERS[maker](**{name: x})
        return x

    jax.eval_shape(build, 0.5)
    schedule = optax.constant_schedule(0.1)
    for maker, name in {"dho2": "alpha", "mr_dho2": "alpha", "fosi": "alpha", "soap": "learning_rate"}.items():
        _MAKERS[maker](**{name: schedule})
    dho2.shampoo(schedule, weight_decay=schedule)
    for name in ("floor", "warmup_steps"):
        with pytest.raises(ValueError, match=f"`{name}` must be a number"):
            _MAKERS["dho2"](**{name: schedule})


def test_what_none_stands_for():
    dho2.dho2(optax.sgd(0.1), refresh_interval=None, warmup_steps=None)
    for maker, name in (("fosi", "refresh_interval"), ("mr_dho2", "probe_interval"), ("dho2", "alpha")):
        with pytest.raises(ValueError, match=f"`{name}` must be a number"):
            _MAKERS[maker](**{name: None})


@pytest.mark.parametrize("value", [0.5, float("inf"), 2**31])
def test_whole_numbers_say_how_large_they_may_be(value):
    with pytest.raises(ValueError, match=rf"`x` must be a positive integer below 2\*\*31, got {value}"):
        arguments.check_numbers("positive", whole=True, x=value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: dho2.hessian(3.0), "loss_fn"),
        (lambda: dho2.value_grad_and_hvp(None), "loss_fn"),
        (lambda: dho2.gauss_newton(None, _loss), "model_fn"),
        (lambda: dho2.gauss_newton(_loss, 1), "output_loss_fn"),
    ],
)
def test_what_must_be_a_function(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be callable"):
        make()


def test_an_interval_may_be_a_float_that_is_whole():
    def count(interval):
        tx = dho2.dho2(optax.sgd(0.1), lambda p, b: jnp.sum(p**2), rank=1, refresh_interval=interval)
        state = tx.init(jnp.ones(3))
        for _ in range(4):
            _, state = tx.update(jnp.ones(3), state, jnp.ones(3), batch=1.0)
        return int(dho2.metrics(state)["refreshes"])

    assert count(2.0) == count(np.float32(2.0)) == count(2) == 2
