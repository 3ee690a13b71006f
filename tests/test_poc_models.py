import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dho2_optax.poc import data, models, tasks
from dho2_optax.poc.data import Dataset


def _dataset(shape, count=16):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(count, *shape)).astype(np.float32)
    labels = (np.arange(count) % 10).astype(np.int32)
    return Dataset("noise", images, labels, images[:4], labels[:4])


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("name", list(models.MODELS))
def test_every_model_takes_every_image_shape(name, shape):
    task = tasks.from_dataset(name, _dataset(shape))
    params = jax.eval_shape(task.init, jax.random.key(0))
    loss, grads = jax.eval_shape(jax.value_and_grad(task.loss_fn), params, task.train)
    assert loss.shape == ()
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert models.num_parameters(params) > 1000


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("kernel_size", "stride", "size"), [(3, 1, 7), (3, 2, 7), (3, 2, 8), (1, 2, 8), (2, 1, 5)])
def test_patches_give_the_convolution(kernel_size, stride, size, padding):
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (3, size, size + 1, 2))
    kernel = jax.random.normal(keys[1], (kernel_size, kernel_size, 2, 5))
    expected = jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        models.convolve_patches(images, kernel, (stride, stride), padding), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_on_cpu_no_convolution_is_left_to_xla(name):
    task = tasks.from_dataset(name, _dataset((8, 8, 1)))
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(jax.grad(task.loss_fn))(params, task.train))


@pytest.mark.parametrize("name", list(models.MODELS))
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(name):
    task = tasks.from_dataset(name, _dataset((8, 8, 1)))
    params = jax.jit(task.init)(jax.random.key(0))
    loss_fn = jax.jit(task.loss_fn)
    whole = loss_fn(params, task.train)
    halves = [loss_fn(params, jax.tree.map(lambda x, s=s: x[s], task.train)) for s in (slice(0, 8), slice(8, 16))]
    np.testing.assert_allclose(whole, np.mean(halves), rtol=1e-5)


@pytest.mark.parametrize("name", list(models.MODELS))
def test_a_hessian_vector_product_goes_through_every_model(name):
    task = tasks.from_dataset(name, _dataset((8, 8, 1)))

    @jax.jit
    def product(key):
        params = task.init(key)
        tangent = jax.tree.map(jnp.ones_like, params)
        gradient = jax.grad(lambda p: task.loss_fn(p, task.train))
        return jax.jvp(gradient, (params,), (tangent,))[1]

    leaves = jax.tree.leaves(product(jax.random.key(0)))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    assert any(bool(jnp.any(leaf != 0)) for leaf in leaves)


def test_accuracy_counts_what_is_right():
    task = tasks.from_dataset("mlp", _dataset((8, 8, 1)))
    params = jax.tree.map(jnp.zeros_like, task.init(jax.random.key(0)))
    # All logits are equal, so class 0 is predicted: right in 2 of 16.
    assert task.accuracy is not None
    assert float(task.accuracy(params, task.train)) == pytest.approx(2 / 16)
    assert tasks.from_dataset("autoencoder", _dataset((8, 8, 1))).accuracy is None


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="unknown model 'vit': choose from mlp, cnn"):
        models.build("vit", 10)


@pytest.mark.parametrize(
    ("train", "shown"),
    [({"x": np.ones((0, 3))}, r"\[\(0,\)\]"), ({"x": np.ones(3), "y": np.ones(4)}, "3"), ({}, "")],
)
def test_a_task_checks_its_samples(train, shown):
    with pytest.raises(tasks.TaskError, match=f"must share a leading axis.*{shown}"):
        tasks.Task("t", lambda key: 0, lambda p, b: jnp.zeros(()), train, {"x": np.ones(3)})


def test_an_equation_is_a_task_with_a_known_solution():
    task = tasks.pinn(32)
    assert task.num_train == 32
    assert task.accuracy is None
    params = jax.jit(task.init)(jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, params)
    # The error of a network that is zero everywhere is the whole solution.
    assert float(task.error(zero, task.test)) == pytest.approx(1.0, rel=1e-5)
    # So is its loss what it misses at the start: the mean square of a sine, by 128 points with both ends.
    assert float(task.loss_fn(zero, task.train)) == pytest.approx(0.5 * 127 / 128, rel=1e-3)


def test_classifying_the_digits_has_a_target_of_its_own():
    digits = data.load(data.DIGITS)
    assert tasks.from_dataset("cnn", digits).target == 0.05
    assert tasks.from_dataset("autoencoder", digits).target is None
    assert tasks.from_dataset("cnn", _dataset((8, 8, 1))).target is None
    assert tasks.from_dataset("cnn", _dataset((8, 8, 1))._replace(name=data.DIGITS)).target is None
