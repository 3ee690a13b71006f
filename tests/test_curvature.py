import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dho2_optax import curvature
from dho2_optax.curvature import gauss_newton, hessian
from dho2_optax.packing import Layout
from tests.helpers import AXIS, SPLITTING, count_instructions, flat, flat_rows, on_devices, unflatten

_NUM_SAMPLES = 24
_RTOL = 1e-5  # float32, a few dozen operations deep


def _params(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 4), "b": (4,), "v": (4, 2), "gain": ()}
    return {k: np.asarray(rng.normal(size=shape), dtype) for k, shape in shapes.items()}


def _batch(num_samples=_NUM_SAMPLES, dtype=np.float32):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(num_samples, 3)).astype(dtype)
    return {"x": x, "y": rng.normal(size=(num_samples, 2)).astype(dtype)}


def _model(params, batch):
    return params["gain"] * jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["v"]


def _output_loss(outputs, batch):
    # Not quadratic, so that its Hessian depends on the outputs.
    return jnp.mean(jnp.sum(jnp.log(jnp.cosh(outputs - batch["y"])), axis=1))


def _loss(params, batch):
    return _output_loss(_model(params, batch), batch)


def _loss_with_aux(params, batch):
    outputs = _model(params, batch)
    return _output_loss(outputs, batch), {"outputs": outputs}


@pytest.fixture(scope="module")
def dense():
    """The Hessian of `_loss` and its Gauss-Newton matrix, in float64."""
    with jax.enable_x64(True):
        params, batch = _params(dtype=np.float64), _batch(dtype=np.float64)
        vector = flat(params)

        @jax.jit
        def matrices(vector):
            model = lambda v: _model(unflatten(v, params), batch)  # noqa: E731
            jacobian = jax.jacobian(model)(vector).reshape(-1, vector.size)
            curved = jax.hessian(lambda z: _output_loss(z.reshape(-1, 2), batch))
            outer = curved(model(vector).reshape(-1))
            whole = jax.hessian(lambda v: _loss(unflatten(v, params), batch))(vector)
            return whole, jacobian.T @ outer @ jacobian

        return [np.asarray(matrix) for matrix in matrices(vector)]


@pytest.fixture(scope="module")
def reference():
    """The plain Hessian product in float32."""
    return np.asarray(flat(jax.jit(hessian(_loss))(_params(0), _params(5), _batch())))


def _product(operator, batch=None, vector=None):
    batch = _batch() if batch is None else batch
    vector = _params(5) if vector is None else vector
    return flat(jax.jit(operator)(_params(0), vector, batch))


def _assert_same(x, y, rtol=_RTOL):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.max(np.abs(y)))


@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse"])
def test_hessian_equals_the_dense_float64_one(mode, dense):
    _assert_same(_product(hessian(_loss, mode=mode)), dense[0] @ flat(_params(5)))


def test_gauss_newton_equals_the_dense_float64_one(dense):
    hessian_matrix, matrix = dense
    operator = gauss_newton(_model, _output_loss)
    _assert_same(_product(operator), matrix @ flat(_params(5)))
    assert np.min(np.linalg.eigvalsh(matrix)) > -1e-12
    assert np.linalg.norm(hessian_matrix - matrix) > 0.1 * np.linalg.norm(matrix)


def test_operators_keep_float64(dense):
    with jax.enable_x64(True):
        params, vector = _params(0, np.float64), _params(5, np.float64)
        batch = _batch(dtype=np.float64)
        operators = hessian(_loss), gauss_newton(_model, _output_loss)
        for operator, matrix in zip(operators, dense, strict=True):
            product = jax.jit(operator)(params, vector, batch)
            assert product["w"].dtype == jnp.float64
            _assert_same(flat(product), matrix @ flat(vector), rtol=1e-12)


@jax.custom_vjp
def _square(x):
    return x**2


_square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


@jax.custom_vjp
def _cube(x):
    return x**3


# A kernel whose backward pass is one more function without a forward rule.
_cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * _square(x) * g,))


def test_reverse_over_reverse_works_where_only_a_custom_vjp_is_defined():
    loss = lambda x, batch: jnp.sum(_cube(batch * x))  # noqa: E731
    x, v, batch = np.float32([1, -2]), np.float32([1, 0.5]), np.float32([1, 2])
    product = hessian(loss, mode="reverse-over-reverse")(x, v, batch)
    np.testing.assert_allclose(product, 6 * batch**3 * x * v, rtol=1e-6)
    with pytest.raises(ValueError, match=r"custom_vjp only; give .*reverse-over-reverse"):
        hessian(loss, mode="forward-over-reverse")(x, v, batch)


def test_has_aux_ignores_the_second_output(reference):
    _assert_same(_product(hessian(_loss_with_aux, has_aux=True)), reference)
    with pytest.raises(ValueError, match="`loss_fn` must return a scalar, got a tuple; give has_aux=True"):
        hessian(_loss_with_aux)(_params(0), _params(5), _batch())


def test_batch_size_takes_the_first_samples(reference):
    first = jax.tree.map(lambda x: x[:6], _batch())
    product = _product(hessian(_loss, batch_size=6))
    np.testing.assert_array_equal(product, _product(hessian(_loss), first))
    assert np.linalg.norm(product - reference) > 0.1 * np.linalg.norm(reference)
    gauss_newtons = [
        _product(gauss_newton(_model, _output_loss, batch_size=6)),
        _product(gauss_newton(_model, _output_loss), first),
    ]
    np.testing.assert_array_equal(*gauss_newtons)


def test_batch_start_leaves_samples_out():
    some, rest = (jax.tree.map(lambda x, part=part: x[part], _batch()) for part in (slice(4, 10), slice(20, None)))
    _assert_same(_product(hessian(_loss, batch_size=6, batch_start=4)), _product(hessian(_loss), some))
    _assert_same(_product(hessian(_loss, batch_start=20)), _product(hessian(_loss), rest))
    gauss_newtons = [gauss_newton(_model, _output_loss, **options) for options in ({"batch_start": 20}, {})]
    _assert_same(_product(gauss_newtons[0]), _product(gauss_newtons[1], rest))


def test_a_batch_start_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="`batch_start` must leave some of the samples of the batch, got 24 for 24"):
        hessian(_loss, batch_start=24)(_params(0), _params(5), _batch())
    with pytest.raises(ValueError, match="`batch_start` must be non-negative, got -1"):
        hessian(_loss, batch_start=-1)


def test_an_array_that_is_not_of_samples_is_not_cut():
    loss = lambda params, batch: _loss(params, batch[0]) * batch[1][0]  # noqa: E731
    with pytest.raises(ValueError, match=r"leading axis of every array, got lengths \[2, 24\]"):
        hessian(loss, batch_size=6)(_params(0), _params(5), (_batch(), jnp.ones(2)))


@pytest.mark.parametrize("microbatch_size", [1, 8, 24])
def test_microbatches_add_up_to_the_whole_batch(microbatch_size, reference):
    _assert_same(_product(hessian(_loss, microbatch_size=microbatch_size)), reference)


def test_microbatches_of_gauss_newton_and_of_a_sub_batch(dense):
    operator = gauss_newton(_model, _output_loss, microbatch_size=4)
    _assert_same(_product(operator), dense[1] @ flat(_params(5)))
    both = _product(hessian(_loss, batch_size=8, microbatch_size=4))
    _assert_same(both, _product(hessian(_loss, batch_size=8)))


def test_microbatches_are_summed_in_float32():
    # Steps of 2**-7 do not survive in a bfloat16 sum of some hundreds of terms.
    batch = jnp.full(512, 1.0)
    loss = lambda x, batch: 0.5 * jnp.mean(batch) * x**2  # noqa: E731
    operator = jax.jit(hessian(loss, microbatch_size=1))
    product = operator(jnp.bfloat16(1), jnp.bfloat16(1.0), batch)
    assert product.dtype == jnp.bfloat16
    assert product == 1


def test_microbatches_lower_the_temporary_memory():
    def loss(params, batch):
        hidden = batch
        for w in params:
            hidden = jnp.tanh(hidden @ w)
        return jnp.mean(hidden**2)

    params = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2

    def temporaries(operator, num_samples=8192):
        batch = jax.ShapeDtypeStruct((num_samples, 64), jnp.float32)
        compiled = jax.jit(operator).lower(params, params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(hessian(loss)) > 8192 * 64 * 4
    # What the product with 256 samples takes by itself, these samples, the sum of the products, and a few numbers. By
    # itself it takes 6 times the samples with XLA of jax 0.10, and 7 times with that of 0.12.
    alone, samples, total = temporaries(hessian(loss), 256), 256 * 64 * 4, 2 * 64 * 64 * 4
    assert temporaries(hessian(loss, microbatch_size=256)) < alone + samples + total + 1024


@pytest.mark.parametrize("size", [5, 25, 48])
def test_microbatches_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=rf"`microbatch_size` must divide.*got {size}.*24"):
        hessian(_loss, microbatch_size=size)(_params(0), _params(5), _batch())


def test_a_rematerialised_loss_lowers_the_temporary_memory():
    """A product keeps what the gradient keeps, and its derivative; with ``jax.checkpoint`` less."""
    layers, batch = np.zeros((16, 32, 32), np.float32), np.zeros((512, 32), np.float32)

    def temporaries(remat):
        def layer(hidden, kernel):
            return jnp.sin(jnp.tanh(jnp.sin(hidden @ kernel))), None

        def loss(layers, batch):
            hidden, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, batch, layers)
            return jnp.mean(jnp.cos(hidden))

        compiled = jax.jit(hessian(loss)).lower(layers, layers, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Inputs of layers and their derivatives are kept, and not what is computed inside.
    assert temporaries(remat=True) < 0.6 * temporaries(remat=False)


def test_microbatches_of_samples_of_unequal_number_are_refused():
    batch = {**_batch(), "y": np.zeros((12, 2), np.float32)}
    with pytest.raises(ValueError, match=r"`microbatch_size` must divide.*\[12, 24\]"):
        hessian(_loss, microbatch_size=6)(_params(0), _params(5), batch)


@pytest.mark.parametrize("name", ["batch_size", "microbatch_size"])
@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize(
    "make", [lambda **kw: hessian(_loss, **kw), lambda **kw: gauss_newton(_model, _output_loss, **kw)]
)
def test_sizes_that_are_not_positive_are_refused(make, name, size):
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got {size}"):
        make(**{name: size})


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"`mode` must be one of .*forward-over-reverse.*'forward'"):
        hessian(_loss, mode="forward")


@pytest.mark.parametrize("options", [{"batch_size": 12}, {"microbatch_size": 6}])
def test_scalars_and_random_keys_in_a_batch_are_left_whole(options):
    def loss(params, batch):
        noise = jax.random.normal(batch["key"], (4,))
        return batch["weight"] * batch["factor"] * _loss({**params, "b": params["b"] + noise}, batch)

    key = jax.random.key(3)
    batch = {**_batch(), "key": key, "weight": 2.0, "factor": np.float32(3)}
    noise = np.asarray(jax.random.normal(key, (4,)))
    shifted = {**_params(0), "b": _params(0)["b"] + noise}
    samples = jax.tree.map(lambda x: x[: options.get("batch_size")], _batch())
    expected = flat(jax.jit(hessian(_loss))(shifted, _params(5), samples))
    _assert_same(_product(hessian(loss, **options), batch), 6 * expected)


@pytest.mark.parametrize("how", [*SPLITTING, "vmap"])
def test_segmented_matvec_is_the_hessian_of_the_global_mean_loss(how, dense):
    num_devices = 4
    local = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), _batch())

    def program(whole, batch):
        params, vector = whole
        matvec = curvature.segmented_matvec(hessian(_loss), params, batch, AXIS)
        layout = Layout(params, AXIS)
        return layout.unpack(layout.gather(matvec(layout.split(vector))))

    run = on_devices(program, num_devices, how)
    for product in flat_rows(run((_params(0), _params(5)), local)):
        _assert_same(product, dense[0] @ flat(_params(5)))
    if how != "vmap":
        hlo = run.lower((_params(0), _params(5)), local).compile().as_text()
        assert count_instructions(hlo, "reduce-scatter") == 1
        assert count_instructions(hlo, "all-reduce") == 0


def test_segmented_matvec_without_an_axis_is_the_operator(reference):
    matvec = curvature.segmented_matvec(hessian(_loss), _params(0), _batch(), None)
    layout = Layout(_params(0), None)
    _assert_same(flat(layout.unpack(jax.jit(matvec)(layout.pack(_params(5))))), reference)


def test_segmented_matvec_hands_the_operator_vectors_in_the_dtypes_of_the_parameters():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    seen = []

    def operator(params, vector, batch):
        seen.append(jax.tree.map(lambda x: x.dtype, vector))
        return vector

    matvec = curvature.segmented_matvec(operator, params, (), None)
    layout = Layout(params, None)
    matvec(layout.pack(jax.tree.map(lambda x: x.astype(jnp.float32), params)))
    assert seen == [{"a": jnp.bfloat16, "b": jnp.float32}]
