"""Errors of usage: each is a line that names the argument and says what to do."""

import functools
import re

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from benchmarks.options import grouped
from tests.helpers import AXIS

_PARAMS = {"w": jnp.linspace(0.1, 0.9, 8).reshape(2, 4), "b": jnp.linspace(-0.5, 0.5, 4)}
_BATCH = jnp.ones(4)


def _loss(params, batch):
    return jnp.mean(batch) * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def _optimizer(loss_fn=_loss, base=None, **options):
    options = {"rank": 2, "order": 4, "refresh_interval": 1, **options}
    return dho2.dho2(optax.sgd(0.1) if base is None else base, loss_fn, **grouped(**options))


def _trace(tx, state=None, params=_PARAMS, **arguments):
    """Traces an update."""
    state = jax.eval_shape(tx.init, params) if state is None else state
    return jax.eval_shape(lambda g, s: tx.update(g, s, params, **arguments), params, state)


def _refused(message, function, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


# Parameters and updates.


@pytest.mark.parametrize("constructor", [dho2.dho2, dho2.mr_dho2])
@pytest.mark.parametrize("mesh", [None, 2])
def test_updates_that_are_not_like_the_parameters(constructor, mesh):
    options = {} if mesh is None else {"mesh": jax.make_mesh((mesh,), (AXIS,)), "axis_name": AXIS}
    tx = constructor(optax.sgd(0.1), _loss, **grouped(rank=2, order=4, **options))
    state = jax.eval_shape(tx.init, _PARAMS)

    def update(grads):
        return jax.eval_shape(lambda s: tx.update(grads, s, _PARAMS, batch=_BATCH), state)

    for shape in ((2,), (), (4, 1)):
        said = rf"`updates` must have the shapes of `params`, got {re.escape(str(shape))} for \(4,\) at \['b'\]\."
        _refused(said, update, {**_PARAMS, "b": jnp.ones(shape)})
    transposed = {**_PARAMS, "w": _PARAMS["w"].T}
    _refused(r"`updates` must have the shapes of `params`, got \(4, 2\) for \(2, 4\) at \['w'\]", update, transposed)
    for grads in ({"w": _PARAMS["w"], "b": None}, {**_PARAMS, "more": jnp.ones(1)}):
        _refused(r"`updates` must be a pytree like `params`, got [13] leaves for 2\.", update, grads)


def test_arrays_of_numpy_are_parameters_whatever_their_dtypes():
    tx = _optimizer()
    params = {"w": np.full((2, 4), 0.5), "b": np.ones(4, np.float32), "one": np.float64(2.0)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params, batch=_BATCH)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    assert dho2.metrics(state)["refreshes"] == 2


def test_what_is_no_number_is_no_parameter():
    for leaf in (np.array(["x"]), np.array([None])):
        _refused(r"`params` must hold real floating-point numbers, got .* at \['n'\]", _optimizer().init, {"n": leaf})


@pytest.mark.parametrize("dtype", ["int32", "complex64", "float33", 3])
def test_a_dtype_that_vectors_cannot_be_stored_in(dtype):
    said = "`basis_dtype` must be None or a real floating-point dtype, got "
    _refused(said, dho2.Eigensolver, basis_dtype=dtype)


@pytest.mark.parametrize(
    "tx",
    [
        _optimizer(lambda p, b: b * p**2, rank=1, order=1),
        dho2.mr_dho2(optax.sgd(0.1), lambda p, b: b * p**2, rank=1, eigensolver=dho2.Eigensolver(order=1)),
        optax.chain(dho2.soap(0.1)),
        dho2.shampoo(0.1),
    ],
    ids=["dho2", "mr_dho2", "soap", "shampoo"],
)
def test_python_floats_are_parameters(tx):
    tx = optax.with_extra_args_support(tx)
    state, number = tx.init(0.5), tx.init(jnp.float32(0.5))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, number)
    for _ in range(2):
        update, state = tx.update(1.0, state, 0.5, batch=3.0)
        wanted, number = tx.update(jnp.float32(1.0), number, jnp.float32(0.5), batch=3.0)
        np.testing.assert_array_equal(update, wanted)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, number)


def test_python_floats_are_parameters_of_products_and_of_lanczos():
    tx = dho2.mr_dho2(optax.sgd(0.1), rank=1, eigensolver=dho2.Eigensolver(order=1))
    loss_fn = lambda params, batch: batch * params["x"] ** 2  # noqa: E731
    value, grads, hvp = dho2.value_grad_and_hvp(loss_fn)({"x": 0.5}, tx.init({"x": 0.5}), 3.0)
    assert (float(value), float(grads["x"]), abs(float(hvp["x"]))) == (0.75, 3.0, 6.0)
    assert float(dho2.lanczos(lambda x: 4.0 * x, 1.0, rank=1).eigenvalues[0]) == pytest.approx(4.0)


_NO_PARAMETERS = ["text", 3, True, object(), jax.nn.tanh, jax.random.key(0)]


@pytest.mark.parametrize("leaf", _NO_PARAMETERS, ids=lambda x: type(x).__name__)
def test_leaves_that_are_no_parameters(leaf):
    said = r"`params` must hold real floating-point numbers, got .* at \['b'\]; .*masked.*eqx\.filter.*wrt=nnx\.Param"
    on_mesh = _optimizer(mesh=jax.make_mesh((1,), (AXIS,)), axis_name=AXIS)
    for tx in (_optimizer(), on_mesh):
        _refused(said, tx.init, {**_PARAMS, "b": leaf})
        _refused(said, tx.update, _PARAMS, tx.init(_PARAMS), {**_PARAMS, "b": leaf}, batch=_BATCH)


def test_none_is_no_leaf():
    _trace(_optimizer(lambda p, b: _loss(p["w"], b)), params={"w": _PARAMS, "none": None}, batch=_BATCH)


# The loss.

_LOSSES = {
    "a pair": (lambda p, b: (_loss(p, b), {}), False, "`loss_fn` must return a scalar, got a tuple; give has_aux=True"),
    "no pair": (
        _loss,
        True,
        r"`loss_fn` must return a pair \(loss, aux\) .* an array of shape \(\); give has_aux=False",
    ),
    "an array": (lambda p, b: b * p["b"], False, r"`loss_fn` must return a scalar, got .* \(4,\); take the mean"),
    "an array in a pair": (lambda p, b: (b, 1), True, r"`loss_fn` must return a scalar, got .* \(4,\); take the mean"),
    "a dict": (lambda p, b: {"loss": _loss(p, b)}, False, "`loss_fn` must return a scalar, got a dict"),
    "nothing": (lambda p, b: None, False, "`loss_fn` must return a scalar, got a NoneType"),
}


@pytest.mark.parametrize("name", _LOSSES)
def test_a_loss_that_returns_something_else(name):
    loss_fn, has_aux, message = _LOSSES[name]
    _refused(message, _trace, _optimizer(loss_fn, has_aux=has_aux), batch=_BATCH)
    _refused(message, dho2.hessian(loss_fn, has_aux=has_aux), _PARAMS, _PARAMS, _BATCH)
    state = dho2.mr_dho2(optax.sgd(0.1), rank=2).init(_PARAMS)
    _refused(message, dho2.value_grad_and_hvp(loss_fn, has_aux=has_aux), _PARAMS, state, _BATCH)
    by_value = message.replace("loss_fn", "value_fn")
    _refused(by_value, _trace, _optimizer(None, has_aux=has_aux), value_fn=lambda p: loss_fn(p, _BATCH))


def test_an_output_loss_that_is_no_scalar():
    operator = dho2.gauss_newton(lambda p, b: b * p["b"], lambda z, b: z**2)
    _refused(r"`output_loss_fn` must return a scalar, got .* \(4,\); take the mean", operator, _PARAMS, _PARAMS, _BATCH)


@jax.custom_vjp
def _twice_product(x, y):
    return 2 * x * y


@jax.custom_vjp
def _square(x):
    return x**2


# As in attention kernels: the backward pass has a custom_vjp of its own.
_square.defvjp(lambda x: (x**2, x), lambda x, y: (_twice_product(x, y),))
_twice_product.defvjp(lambda x, y: (2 * x * y, (x, y)), lambda pair, z: (2 * pair[1] * z, 2 * pair[0] * z))


def _backward_loss(params, batch):
    return jnp.mean(batch) * jnp.sum(_square(params["b"])) + 0.0 * jnp.sum(params["w"])


def test_functions_without_forward_mode():
    remedy = r"custom_vjp only; give `curvature=dho2_optax\.hessian\(loss_fn, mode='reverse-over-reverse'\)`"
    _refused(remedy, dho2.hessian(_backward_loss), _PARAMS, _PARAMS, _BATCH)
    _refused(remedy, _trace, _optimizer(_backward_loss), batch=_BATCH)
    state = dho2.mr_dho2(optax.sgd(0.1), rank=2).init(_PARAMS)
    product = dho2.value_grad_and_hvp(_backward_loss)
    _refused("custom_vjp only; give mr_dho2 `curvature=.*reverse-over-reverse", product, _PARAMS, state, _BATCH)
    square, identity = (lambda p, b: _square(p["b"])), (lambda p, b: p["b"])
    total, total_square = (lambda z, b: z.sum()), (lambda z, b: _square(z).sum())
    for operator in (dho2.gauss_newton(square, total), dho2.gauss_newton(identity, total_square)):
        _refused(
            "custom_vjp only; give `model_fn` and `output_loss_fn` a custom_jvp", operator, _PARAMS, _PARAMS, _BATCH
        )
    # The remedy is one.
    operator = dho2.hessian(_backward_loss, mode="reverse-over-reverse")
    np.testing.assert_allclose(operator(_PARAMS, _PARAMS, _BATCH)["b"], 2 * _PARAMS["b"])
    _trace(_optimizer(None, curvature=operator), batch=_BATCH)


def test_other_type_errors_of_the_users_function_stay_what_they_are():
    def loss_fn(params, batch):
        raise TypeError("no such thing")

    with pytest.raises(TypeError, match="no such thing"):
        dho2.hessian(loss_fn)(_PARAMS, _PARAMS, _BATCH)


# Losses of models, as Equinox and nnx have them, and of the parameters alone, as linen's users write them.


class _Net(nnx.Module):
    def __init__(self):
        self.linear, self.norm = nnx.Linear(4, 1, rngs=nnx.Rngs(0)), nnx.BatchNorm(1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("use", [lambda x: x(1.0), lambda x: x.real, lambda x: jnp.sin(x)], ids=["call", "get", "sin"])
def test_none_where_a_module_of_equinox_holds_something_else(use):
    params = {"w": _PARAMS["w"], "activation": None}
    said = r" was called with the parameters, where None .* eqx\.combine\(params, static\)"
    loss_fn = lambda p, b: jnp.sum(p["w"]) * use(p["activation"])  # noqa: E731
    _refused("`loss_fn`" + said, _trace, _optimizer(loss_fn), params=params, batch=_BATCH)
    _refused("`value_fn`" + said, _trace, _optimizer(None), params=params, value_fn=lambda p: loss_fn(p, _BATCH))
    state = dho2.mr_dho2(optax.sgd(0.1), rank=2).init(params)
    _refused("`loss_fn`" + said, dho2.value_grad_and_hvp(loss_fn), params, state, _BATCH)


def test_other_errors_beside_none_stay_what_they_are():
    def loss_fn(params, batch):
        raise TypeError("no such thing")

    with pytest.raises(TypeError, match="no such thing"):
        _trace(_optimizer(loss_fn), params={"w": _PARAMS["w"], "none": None}, batch=_BATCH)


def _parameters_of(model):
    """What an nnx.Optimizer hands to the transformation."""
    return nnx.as_pure(nnx.state(model, nnx.Param))


def test_a_loss_of_the_model_of_nnx():
    loss_fn = lambda model, batch: jnp.mean(model(batch))  # noqa: E731
    params, batch = _parameters_of(_Net()), jnp.ones((3, 4))
    said = r"`loss_fn` was called with the parameters, an nnx\.State, .* nnx\.merge\(.*, copy=True\)"
    _refused(said, _trace, _optimizer(loss_fn), params=params, batch=batch)
    state = jax.eval_shape(dho2.mr_dho2(optax.sgd(0.1), rank=2).init, params)
    _refused(said, jax.eval_shape, dho2.value_grad_and_hvp(loss_fn), params, state, batch)


def test_a_loss_that_changes_variables_of_the_model_of_nnx():
    graphdef, params, rest = nnx.split(_Net(), nnx.Param, ...)

    def value_fn(params, **kwargs):
        return jnp.mean(nnx.merge(graphdef, params, rest, **kwargs)(jnp.ones((3, 4))))

    trace = functools.partial(_trace, _optimizer(None), params=nnx.as_pure(params))
    said = r"`value_fn` changes variables of nnx from outside .* nnx\.merge\(graphdef, params, rest, copy=True\)"
    _refused(said, trace, value_fn=value_fn)
    trace(value_fn=functools.partial(value_fn, copy=True))  # the remedy is one


def test_a_product_at_a_model():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    state = jax.eval_shape(dho2.mr_dho2(optax.sgd(0.1), rank=2).init, nnx.state(model, nnx.Param))
    product = dho2.value_grad_and_hvp(lambda model, x: jnp.mean(model(x)))
    said = r"`params` must be a pytree like .*, got a Linear; .* eqx\.filter\(.*\), in flax's nnx by nnx\.state\("
    _refused(said, jax.eval_shape, product, model, state, jnp.ones((3, 4)))


def test_a_loss_of_the_parameters_alone():
    said = r"`loss_fn` is called with \(params, batch\), but takes \(params\); "
    alone = lambda params: _loss(params, _BATCH)  # noqa: E731
    for constructor in (dho2.dho2, dho2.mr_dho2, dho2.fosi):
        _refused(said + "give .* as `value_fn=`", constructor, optax.sgd(0.1), alone)
    _refused(said + "have it take the batch", dho2.value_grad_and_hvp, alone)
    _trace(_optimizer(None), value_fn=alone)
    said = r"`value_fn` is called with \(params\), but takes \(params, batch\); .*`batch=`"
    _refused(said, _trace, _optimizer(None), value_fn=_loss)


# What update is given.


def _by_train_state(tx):
    state = flax.training.train_state.TrainState.create(apply_fn=None, params=_PARAMS, tx=tx)
    jax.eval_shape(lambda grads: state.apply_gradients(grads=grads, batch=_BATCH), _PARAMS)


def _by_multi_steps(tx):
    _trace(optax.chain(optax.MultiSteps(tx, 2), optax.identity()), batch=_BATCH)


@pytest.mark.parametrize("drop", [_by_train_state, _by_multi_steps])
def test_who_drops_the_batch_is_named(drop):
    said = (
        r"TrainState\.apply_gradients and .*MultiSteps in a chain drop .*flax\.TrainState .*\.gradient_transformation"
    )
    _refused("`update` needs `batch=`.*" + said, drop, _optimizer())
    _refused("`update` needs `value_fn=`.*" + said, drop, _optimizer(None))


def test_a_product_of_other_shapes():
    tx = dho2.mr_dho2(optax.sgd(0.1), rank=2)
    hvp = {**_PARAMS, "b": jnp.ones(5)}
    _refused(r"`hvp` must have the shapes of `params`, got \[\(5,\), \(2, 4\)\]", _trace, tx, hvp=hvp)


_OTHERS = {
    "rank": (_optimizer(rank=3, order=6), r"`spectrum` is that of another `rank`"),
    "parameters": (_optimizer(), r"`spectrum` is that of another .*parameters"),
    "base": (_optimizer(base=optax.sgd(0.1, momentum=0.9)), "`base_state` is that of another `base`"),
    "subspace": (_optimizer(subspace=optax.adam(0.1)), "`subspace_state` is that of another `subspace`"),
    "kind": (dho2.mr_dho2(optax.sgd(0.1), rank=2), r"`probing` is that of another kind \(dho2, mr_dho2\)"),
}


@pytest.mark.parametrize("name", _OTHERS)
def test_the_state_of_another_optimizer(name):
    other, message = _OTHERS[name]
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)} if name == "parameters" else _PARAMS
    said = "`state` must be one of this optimizer, but its " + message
    _refused(said, _trace, _optimizer(), other.init(params), batch=_BATCH)


@pytest.mark.parametrize("num_devices", [2, 7])  # 7 asks for other padding than 1, 2, 4 and 8
def test_the_state_of_another_optimizer_on_a_mesh(num_devices):
    placed = {"mesh": jax.make_mesh((num_devices,), (AXIS,)), "axis_name": AXIS}
    other = _optimizer(base=optax.adam(0.1), **placed).init(_PARAMS)
    said = "`base_state` is that of another `base`"
    _refused(said, _trace, _optimizer(**placed), other, batch=_BATCH)
    # Where they are the same it goes on.
    _trace(_optimizer(base=optax.adam(0.2), **placed), other, batch=jnp.ones(num_devices))


def test_the_order_and_the_metric_of_another_optimizer():
    one, other = (dho2.mr_dho2(optax.adam(0.1), rank=2, eigensolver=dho2.Eigensolver(order=order)) for order in (4, 5))
    _refused("its `probing` is that of another .* or `order`", _trace, one, other.init(_PARAMS))
    without = dho2.mr_dho2(optax.adam(0.1), rank=2, eigensolver=dho2.Eigensolver(order=4), metric=None)
    _refused("its `factors` is that of another `metric`", _trace, one, without.init(_PARAMS))


def test_the_state_of_a_composition():
    state = optax.chain(_optimizer()).init(_PARAMS)
    _refused(
        "`state` must be a DHO2State, as `init` returns it, got a tuple", _trace, _optimizer(), state, batch=_BATCH
    )


# Devices.


def test_an_axis_that_is_not_bound():
    said = rf"`axis_name` '{AXIS}' is bound only inside shard_map .* give the optimizer's Split a `mesh` too"
    _refused(said, _trace, _optimizer(axis_name=AXIS), batch=_BATCH)
    _refused(said, dho2.lanczos, lambda x: x, jnp.ones(4), rank=1, axis_name=AXIS)


@pytest.mark.parametrize("constructor", [dho2.dho2, dho2.mr_dho2])
def test_parameters_that_are_sharded_along_the_axis(constructor):
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(AxisType.Explicit,))
    options = grouped(rank=2, order=4, mesh=mesh, axis_name=AXIS)
    tx = constructor(optax.sgd(0.1), _loss, **options)
    with jax.set_mesh(mesh):
        place = lambda spec: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), _PARAMS)  # noqa: E731
        said = rf"must be whole along mesh axis '{AXIS}', got P\('{AXIS}',\) at \['b'\]; jax\.sharding\.reshard it"
        _refused("`params` " + said, tx.init, place(P(AXIS)))
        whole = place(P())
        state = jax.eval_shape(tx.init, whole)
        update = lambda params, grads: jax.eval_shape(tx.update, grads, state, params, batch=_BATCH)  # noqa: E731
        _refused("`params` " + said, update, place(P(AXIS)), whole)
        _refused("`updates` " + said, update, whole, place(P(AXIS)))
        # A batch that is not split yet is split.
        updates, _ = update(whole, whole)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, _PARAMS)
