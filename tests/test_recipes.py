"""The code of docs/recipes.md runs as it stands, and what the recipes say of it is true."""

import contextlib
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import metric
from dho2_optax.packing import Layout, of_stack
from dho2_optax.streaming import is_due
from tests.helpers import AXIS, SPLITTING, flat, flat_rows, make_mesh, on_devices, python_blocks, unflatten

_SECTIONS = dict(
    re.findall(
        r"^## (.*?)\n(.*?)(?=^## |\Z)",
        (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
)
_H = 1e-2  # step of central differences
_EXACT = 1e-2  # what differences and the Lanczos process leave of a defect, relative to the largest eigenvalue
_WRONG = 0.1  # and the least that the Hessian of another function makes
_SOLVER = dho2.Eigensolver(order=12)
# Products on the whole batch, whose Hessian is known.
_OPTIONS: dict[str, Any] = {"rank": 2, "warmup_steps": 1, "batch_size": None, "eigensolver": _SOLVER}


@functools.cache
def _recipe(title: str) -> dict[str, Any]:
    """The names that the code of a section leaves behind, and as `printed` what it prints."""
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for block in python_blocks(_SECTIONS[title]):
            exec(block, names)
    return {**names, "printed": output.getvalue()}


def _found(tx: Any, params: Any, batch: Any) -> Any:
    """The spectrum found before the first update."""

    def first_update(params: Any, batch: Any) -> Any:
        _, state = tx.update(params, tx.init(params), params, batch=batch)
        return dho2.spectrum(state)

    return jax.jit(first_update)(params, batch)


def _rows(stack: Any, params: Any) -> list[Any]:
    """Vectors like `params` from a packed stack of them, seen from outside of ``shard_map``."""
    layout = of_stack(stack, params)
    return [layout.unpack(jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), stack)) for i in range(len(stack[0]))]


def _half(state: Any, params: Any) -> Callable[[Any], Any]:
    """The square root of the metric in use, on vectors like `params`."""
    layout = Layout(params, None)
    geometry = metric.geometry(state.factors, layout)
    return lambda x: layout.unpack(geometry.half(layout.pack(x)))


def _derivative(gradient: Callable[[Any], Any], params: Any, vector: Any) -> np.ndarray:
    """The derivative of a gradient along a vector, by central differences."""
    ahead = flat(gradient(jax.tree.map(lambda p, v: p + _H * v, params, vector)))
    behind = flat(gradient(jax.tree.map(lambda p, v: p - _H * v, params, vector)))
    return (ahead - behind) / (2 * _H)


def _defects(gradient: Callable[[Any], Any], params: Any, spectrum: Any, half: Any = lambda x: x) -> np.ndarray:
    """How far pairs are from being eigenpairs of the derivative of `gradient`, beyond their residuals.

    With `half`, the square root of a metric, of that derivative in the metric.
    """
    defects = []
    for value, row in zip(np.asarray(spectrum.eigenvalues), _rows(spectrum.eigenvectors, params), strict=True):
        direction = half(row)
        norm = np.linalg.norm(flat(direction))
        product = norm * _derivative(gradient, params, jax.tree.map(lambda x, norm=norm: x / norm, direction))
        product = flat(half(unflatten(np.float32(product), params)))
        defects.append(np.linalg.norm(product - value * flat(row)))
    return (np.array(defects) - np.asarray(spectrum.residuals)) / np.abs(spectrum.eigenvalues).max()


def _probed(state: Any, params: Any) -> Any:
    """The vector that the next probe multiplies."""
    vector = state.probing.process.vector
    return _rows(jax.tree.map(lambda leaf: leaf[None], vector), params)[0]


def _joined(segments: Any, params: Any) -> Any:
    """The vector of which every device returned a segment."""
    return _rows(jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), segments), params)[0]


def _assert_is_derivative(hvp: Any, gradient: Callable[[Any], Any], params: Any, vector: Any) -> None:
    expected = _derivative(gradient, params, vector)
    np.testing.assert_allclose(flat(hvp), expected, atol=_EXACT * np.linalg.norm(expected))


def _first(tree: Any) -> Any:
    """What the first device returned."""
    return jax.tree.map(lambda x: x[0], tree)


def _sharded(tree: Any, mesh: Any, spec: Any) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, spec))


def test_there_is_a_recipe_for_each_part():
    parts = ["Weight decay", "Gradient clipping", "Gradient accumulation", "Fine-tuning", "BatchNorm", "Dropout"]
    rest = ["Your own shard_map", "Hyperparameters in the state", "When no pair is active"]
    assert list(_SECTIONS) == [*parts, *rest]


@pytest.mark.parametrize(
    ("title", "num_losses"),
    [
        ("Weight decay", 1),
        ("Gradient clipping", 1),
        ("Gradient accumulation", 1),
        ("Fine-tuning", 1),
        ("BatchNorm", 2),
        ("Dropout", 2),
        ("Your own shard_map", 2),
        ("Hyperparameters in the state", 1),
    ],
)
def test_the_code_runs(title, num_losses):
    losses = [float(line) for line in _recipe(title)["printed"].splitlines()]
    assert len(losses) == num_losses
    assert max(losses) < (0.5 if title == "Dropout" else 0.2 if title == "Fine-tuning" else 0.1)


# Weight decay and clipping: linear regression, whose Hessian is known and the same everywhere.


def _eigenvalues(batch: Any) -> np.ndarray:
    """Of the Hessian of the regression, the largest first."""
    inputs = np.asarray(batch[0], np.float64)
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    return np.linalg.eigvalsh(2 * inputs.T @ inputs / len(inputs))[::-1]


def _away_from_zero(params: Any) -> Any:
    return jax.tree.map(lambda x: x + 1, params)


def _update(tx: Any, gradient: Any, state: Any, params: Any) -> np.ndarray:
    return flat(jax.jit(tx.update)(gradient, state, params)[0])


def test_decay_behind_the_optimizer_is_that_of_adamw_in_every_direction():
    names = _recipe("Weight decay")
    rate = names["learning_rate"] * names["weight_decay"]
    params = _away_from_zero(names["params"])
    gradient = jax.grad(names["loss_fn"])(params, names["batch"])

    adamw = optax.adamw(names["learning_rate"], weight_decay=names["weight_decay"])
    after, *_ = names["step"](params, names["tx"].init(params), names["batch"])
    expected = flat(params) + _update(adamw, gradient, adamw.init(params), params)
    np.testing.assert_allclose(flat(after), expected, atol=1e-6)

    state = names["state"][0]
    assert dho2.metrics(state)["active_pairs"] >= 2
    alone = dho2.dho2(optax.adam(names["learning_rate"]), rank=4, refresh_interval=None)
    behind = optax.chain(alone, optax.add_decayed_weights(-rate))
    difference = _update(behind, gradient, (state, optax.EmptyState()), params) - _update(
        alone, gradient, state, params
    )
    np.testing.assert_allclose(difference, -rate * flat(params), rtol=1e-3)


def test_decay_in_the_base_leaves_the_subspace_out_and_is_scaled_outside():
    names = _recipe("Weight decay")
    rate = names["learning_rate"] * names["weight_decay"]
    params = _away_from_zero(names["params"])
    gradient = jax.tree.map(jnp.ones_like, params)
    state = names["state"][0]
    # A gradient of usual length, and all pairs in use.
    state = state._replace(bounds=state.bounds._replace(usual=jnp.float32(100), least=jnp.float32(0)))
    # With the scale that the eigenvalues alone ask for, so that it is the same with and without decay, and a Newton
    # step that is shorter than the base's, which would bound it.
    options: dict[str, Any] = {
        "rank": 4,
        "alpha": 1e-4,
        "refresh_interval": None,
        "base_scale": dho2.BaseScale(sharpness=np.inf, growth=np.inf),
    }
    adam, adamw = optax.adam(1e-2), optax.adamw(1e-2, weight_decay=rate / 1e-2)
    moments, _ = state.base_state
    with_decay = state._replace(base_state=(moments, *adamw.init(params)[1:]))
    updates, after = jax.jit(dho2.dho2(adamw, **options).update)(gradient, with_decay, params)
    difference = flat(updates) - _update(dho2.dho2(adam, **options), gradient, state, params)

    half = _half(state, params)
    rows = flat_rows(dho2.spectrum(state, params).eigenvectors)
    outside = flat(params) / flat(half(jax.tree.map(jnp.ones_like, params)))
    outside -= rows.T @ (rows @ outside)
    scale = dho2.metrics(after)["base_scale"]
    assert scale > 1.5
    expected = flat(half(unflatten(np.float32(-scale * rate * outside), params)))
    np.testing.assert_allclose(difference, expected, atol=1e-3 * np.abs(expected).max())
    assert np.linalg.norm(difference + rate * flat(params)) > 0.1 * rate * np.linalg.norm(flat(params))


def test_clipping_in_front_shortens_the_newton_step_and_behind_the_whole():
    names = _recipe("Gradient clipping")
    params, found = names["params"], names["state"][1].spectrum
    tx = dho2.dho2(optax.sgd(0.1), rank=4, refresh_interval=None, newton=dho2.Newton(subspace=optax.identity()))
    state = tx.init(params)._replace(spectrum=found)
    gradient = jax.tree.map(jnp.ones_like, params)
    norm = np.linalg.norm(flat(gradient))
    whole = _update(tx, gradient, state, params)
    clip = optax.clip_by_global_norm(0.25)
    front = _update(optax.chain(clip, tx), gradient, (optax.EmptyState(), state), params)
    behind = _update(optax.chain(tx, clip), gradient, (state, optax.EmptyState()), params)
    rows = flat_rows(dho2.spectrum(state, params).eigenvectors)
    assert np.linalg.norm(rows @ whole) > 1e-3
    np.testing.assert_allclose(rows @ front, 0.25 / norm * (rows @ whole), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(behind, whole * min(1, 0.25 / np.linalg.norm(whole)), rtol=1e-4)


def test_a_penalty_is_part_of_the_curvature_and_clipping_is_not():
    names = _recipe("Gradient clipping")

    def penalized(params: Any, batch: Any) -> jax.Array:
        return names["loss_fn"](params, batch) + 0.5 * 0.7 * optax.tree.norm(params, squared=True)

    tx = optax.chain(optax.clip_by_global_norm(1e-6), dho2.dho2(optax.sgd(0.1), penalized, **_OPTIONS))
    found = _found(tx, names["params"], names["batch"])
    np.testing.assert_allclose(found.eigenvalues, _eigenvalues(names["batch"])[:2] + 0.7, rtol=1e-3)


def test_streaming_with_clipping_in_front_and_decay_behind():
    names = _recipe("Gradient clipping")
    batch, clip = names["batch"], optax.clip_by_global_norm(1e-3)
    streaming = dho2.mr_dho2(optax.sgd(0.1), rank=2, eigensolver=dho2.Eigensolver(order=8), probe_interval=1)
    tx = optax.chain(clip, streaming, optax.add_decayed_weights(-0.01))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        _, grads, hvp = dho2.value_grad_and_hvp(names["loss_fn"], batch_size=None)(params, state, batch)
        updates, state = tx.update(grads, state, params, hvp=hvp)
        return optax.apply_updates(params, updates), state

    params = _away_from_zero(names["params"])
    after, state = step(params, tx.init(params))
    gradient = flat(jax.grad(names["loss_fn"])(params, batch))
    expected = 0.99 * flat(params) - 0.1 * 1e-3 * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(flat(after), expected, atol=1e-6)
    for _ in range(20):
        after, state = step(after, state)
    assert dho2.metrics(state)["active_pairs"] == 2
    np.testing.assert_allclose(dho2.spectrum(state).eigenvalues, _eigenvalues(batch)[:2], rtol=1e-3)


def test_what_clips_on_several_devices():
    num_devices = 4
    clip, sgd = optax.clip_by_global_norm(1.0), optax.sgd(0.1)
    options: dict[str, Any] = {"rank": 2, "refresh_interval": None, "split": dho2.Split(AXIS)}
    optimizers = {
        "in front": optax.chain(clip, dho2.dho2(sgd, **options)),
        "in front of the average": optax.chain(
            clip, dho2.dho2(sgd, **options | {"split": dho2.Split(AXIS, average_gradients=True)})
        ),
        "in the base": dho2.dho2(optax.chain(clip, sgd), **options),
        "in the whole base": dho2.dho2(
            optax.chain(clip, sgd), **options | {"split": dho2.Split(AXIS, base_on_segments=False)}
        ),
    }

    def updates(params: Any, gradient: Any) -> dict[str, Any]:
        mean = jax.lax.pmean(gradient, AXIS)
        return {
            name: tx.update(gradient if "average" in name else mean, tx.init(params), params)[0]
            for name, tx in optimizers.items()
        }

    gradients = np.random.default_rng(0).normal(size=(num_devices, 1000)).astype(np.float32)
    gradients *= np.arange(1, 1 + num_devices, dtype=np.float32)[:, None]
    params = jnp.zeros(1000)
    found = on_devices(updates, num_devices, "shard_map")(params, gradients)
    mean = gradients.mean(axis=0)
    expected = -0.1 * mean / np.linalg.norm(mean)
    for name, update in found.items():
        right = name in ("in front", "in the whole base")
        error = np.linalg.norm(update[0] - expected) / np.linalg.norm(expected)
        assert error < 1e-5 if right else error > 0.1, (name, error)


# Gradient accumulation.


def test_accumulation_makes_curvature_on_real_updates_only():
    names = _recipe("Gradient accumulation")
    metrics = dho2.metrics(names["state"])
    assert metrics["refreshes"] == 5  # every 20 of 100 real updates
    assert metrics["matvecs"] == 5 * 8


def test_accumulation_takes_curvature_from_the_mini_batch_of_the_last_mini_step():
    names = _recipe("Gradient accumulation")
    inner = dho2.dho2(optax.sgd(0.1), names["loss_fn"], metric=None, **_OPTIONS)
    tx = optax.chain(dho2.MultiSteps(inner, every_k_schedule=4).gradient_transformation())
    params = names["params"]
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(4):
        batch = jax.tree.map(lambda leaf, i=i: leaf[i], names["batches"])
        _, state = update(params, state, params, batch=batch)
    np.testing.assert_allclose(dho2.spectrum(state).eigenvalues, _eigenvalues(batch)[:2], rtol=1e-3)
    first = jax.tree.map(lambda leaf: leaf[0], names["batches"])
    assert np.abs(_eigenvalues(first)[0] / _eigenvalues(batch)[0] - 1) > 0.01


# Fine-tuning.


def test_fine_tuning_leaves_the_frozen_alone_and_learns_the_curvature_of_the_others():
    names = _recipe("Fine-tuning")
    np.testing.assert_array_equal(names["params"]["body"], names["pretrained"])
    state = names["state"]
    assert dho2.metrics(state)["refreshes"] == 5
    rows = flat_rows(dho2.spectrum(state, {"body": optax.MaskedNode(), "head": names["params"]["head"]}).eigenvectors)
    assert rows.shape == (4, 32)

    params, batch = names["params"], names["batch"]
    tx = optax.masked(
        dho2.dho2(optax.sgd(0.1), names["loss_fn"], metric=None, **_OPTIONS), {"body": False, "head": True}
    )
    _, state = jax.jit(tx.update)(params, tx.init(params), params, batch=batch, full_params=params)
    hidden = np.tanh(np.asarray(batch[0], np.float64) @ np.asarray(params["body"]))
    expected = np.linalg.eigvalsh(2 * hidden.T @ hidden / len(hidden))[::-1]
    np.testing.assert_allclose(dho2.spectrum(state).eigenvalues, expected[:2], rtol=1e-3)


@pytest.mark.parametrize("silenced", [True, False])
def test_a_mask_hands_the_gradient_of_the_others_on(silenced):
    names = _recipe("Fine-tuning")
    params = names["params"]
    hybrid = dho2.dho2(optax.sgd(0.1), names["loss_fn"], metric=None, **_OPTIONS)
    parts = [optax.masked(hybrid, {"body": False, "head": True})]
    if silenced:
        parts.append(optax.masked(optax.set_to_zero(), {"body": True, "head": False}))
    tx = optax.chain(*parts)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params, batch=names["batch"], full_params=params)
    np.testing.assert_array_equal(updates["body"], np.zeros((4, 32)) if silenced else gradient["body"])


# BatchNorm.


@functools.cache
def _batch_norm_gradient(train: bool = True) -> Callable[[Any], Any]:
    """The gradient on the recipe's batch, in training mode or with the running statistics that it ended with."""
    names = _recipe("BatchNorm")
    loss = _training_loss if train else _frozen_loss
    return jax.jit(jax.grad(lambda params: loss(params, names["batch"], names["batch_stats"])))


def _training_loss(params: Any, batch: Any, batch_stats: Any) -> jax.Array:
    return _recipe("BatchNorm")["loss_fn"](params, batch, batch_stats)[0]


def _frozen_loss(params: Any, batch: Any, batch_stats: Any) -> jax.Array:
    x, y = batch
    outputs = _recipe("BatchNorm")["Net"]().apply({"params": params, "batch_stats": batch_stats}, x, train=False)
    return jnp.mean((outputs - y) ** 2)


def test_running_statistics_move_once_per_update():
    names = _recipe("BatchNorm")
    batch = names["batch"]
    expected = jax.jit(lambda params, stats: names["loss_fn"](params, batch, stats)[1])
    for tx, step in (("tx", "step"), ("streaming", "streaming_step")):
        params, stats, state = names["params"], names["batch_stats"], names[tx].init(names["params"])
        for _ in range(28):  # streaming begins after ten
            before = params, stats
            params, state, stats, _ = names[step](params, state, stats, batch)
            np.testing.assert_allclose(flat(stats), flat(expected(*before)), rtol=1e-5)
            assert np.abs(flat(stats) - flat(before[1])).max() > 1e-4
        assert dho2.metrics(state)["matvecs"] >= 4


def test_with_frozen_statistics_a_bias_that_the_mean_cancels_looks_steep():
    names = _recipe("BatchNorm")
    params = names["params"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    bias = zeros | {"Dense_0": zeros["Dense_0"] | {"bias": jnp.ones(8) / np.sqrt(8)}}
    assert np.linalg.norm(_derivative(_batch_norm_gradient(), params, bias)) < 1e-3
    assert np.linalg.norm(_derivative(_batch_norm_gradient(train=False), params, bias)) > 0.1
    # The metric of Adam makes the most of it.
    half = _half(names["state"], params)(jax.tree.map(jnp.ones_like, params))["Dense_0"]
    assert np.min(half["bias"]) > 10 * np.median(half["kernel"])


def test_an_optimizer_can_be_made_inside_the_step():
    """On a mesh, from a loss that holds the statistics of the moment, sharded over nothing."""
    names = _recipe("BatchNorm")
    mesh = make_mesh(4)
    seen = []

    def loss_fn(params: Any, batch: Any, batch_stats: Any) -> jax.Array:
        seen.append(jax.tree.map(jnp.shape, (batch, batch_stats)))
        return _frozen_loss(params, batch, batch_stats)

    def found(params: Any, batch: Any, stats: Any) -> Any:
        loss = functools.partial(loss_fn, batch_stats=stats)
        tx = dho2.dho2(optax.sgd(0.1), loss, split=dho2.Split(AXIS, mesh=mesh), **_OPTIONS)
        return dho2.spectrum(tx.update(params, tx.init(params), params, batch=batch)[1])

    jax.eval_shape(found, names["params"], names["batch"], names["batch_stats"])
    batch, stats = names["batch"], names["batch_stats"]
    shard = jax.tree.map(lambda x: x[: len(x) // 4], batch)
    assert seen
    assert all(shapes == jax.tree.map(jnp.shape, (shard, stats)) for shapes in seen)


def test_on_a_mesh_a_refresh_needs_the_axis():
    names = _recipe("BatchNorm")
    mesh = make_mesh(4)
    loss = functools.partial(names["loss_fn"], batch_stats=names["batch_stats"], axis_name=AXIS)
    tx = dho2.dho2(optax.sgd(0.1), loss, has_aux=True, split=dho2.Split(AXIS, mesh=mesh), **_OPTIONS)
    found = _found(tx, _sharded(names["params"], mesh, P()), _sharded(names["batch"], mesh, P(AXIS)))
    assert np.all(_defects(_batch_norm_gradient(), names["params"], found) < _EXACT)


def test_the_product_is_of_the_function_whose_gradient_is_taken():
    """On a mesh, where nothing is to be done for it."""
    names = _recipe("BatchNorm")
    mesh = make_mesh(4)
    params, batch = _sharded(names["params"], mesh, P()), _sharded(names["batch"], mesh, P(AXIS))
    loss = functools.partial(names["loss_fn"], batch_stats=names["batch_stats"])
    state = dho2.mr_dho2(optax.sgd(0.1), rank=2, split=dho2.Split(AXIS, mesh=mesh)).init(params)
    assert is_due(state)
    _, gradient, hvp = jax.jit(dho2.value_grad_and_hvp(loss, has_aux=True))(params, state, batch)
    np.testing.assert_allclose(flat(gradient), flat(_batch_norm_gradient()(names["params"])), atol=1e-6)
    _assert_is_derivative(hvp, _batch_norm_gradient(), names["params"], _probed(state, names["params"]))


@pytest.mark.parametrize("axis_name", [AXIS, None])
def test_in_a_shard_map_gradient_and_product_agree(axis_name):
    names = _recipe("BatchNorm")
    loss = functools.partial(names["loss_fn"], batch_stats=names["batch_stats"], axis_name=axis_name)
    tx = dho2.mr_dho2(optax.sgd(0.1), rank=2, split=dho2.Split(AXIS))

    def compute(params: Any, batch: Any) -> Any:
        state = tx.init(params)
        (_, stats), *found = dho2.value_grad_and_hvp(loss, has_aux=True, axis_name=AXIS)(params, state, batch)
        return jax.lax.pmean(found, AXIS), stats, state.probing.process.vector

    run = on_devices(compute, 4, "shard_map")
    batch = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), names["batch"])
    gradient = lambda params: _first(run(params, batch)[0][0])  # noqa: E731
    params = names["params"]
    (_, hvp), stats, segments = run(params, batch)
    _assert_is_derivative(_first(hvp), gradient, params, _joined(segments, params))
    error = np.linalg.norm(flat(gradient(params)) - flat(_batch_norm_gradient()(params)))
    spread = np.abs(flat_rows(stats) - flat_rows(stats)[0]).max()
    assert (error < 1e-5) == (spread < 1e-6) == (axis_name is not None)


# Dropout.


def _dropout_gradient(key: jax.Array) -> Callable[[Any], Any]:
    names = _recipe("Dropout")
    return lambda params: _jitted_gradient(names["loss_fn"])(params, (names["x"], names["y"], key))


@functools.cache
def _jitted_gradient(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(jax.grad(loss_fn))


def test_a_refresh_has_the_masks_of_the_gradient():
    names = _recipe("Dropout")
    key, other = jax.random.split(jax.random.key(5))
    params, state = names["params"], names["state"]
    due = state._replace(count=jnp.int32(119), clock=jnp.int32(119))
    _, state, _ = names["step"](params, due, (names["x"], names["y"], key))
    assert dho2.metrics(state)["age"] == 1
    half = _half(state, params)
    spectrum = dho2.spectrum(state)
    assert np.all(_defects(_dropout_gradient(key), params, spectrum, half) < _EXACT)
    assert np.max(_defects(_dropout_gradient(other), params, spectrum, half)) > _WRONG


def test_a_probe_has_the_masks_of_the_gradient():
    names = _recipe("Dropout")
    key, other = jax.random.split(jax.random.key(5))
    params = names["params"]
    state = dho2.mr_dho2(optax.sgd(0.1), rank=2).init(params)
    compute = jax.jit(dho2.value_grad_and_hvp(names["loss_fn"]))
    products = []
    for k in (key, other):
        _, gradient, hvp = compute(params, state, (names["x"], names["y"], k))
        np.testing.assert_allclose(flat(gradient), flat(_dropout_gradient(k)(params)), atol=1e-6)
        _assert_is_derivative(hvp, _dropout_gradient(k), params, _probed(state, params))
        products.append(flat(hvp))
    assert np.linalg.norm(products[0] - products[1]) > _WRONG * np.linalg.norm(products[0])


def test_on_a_mesh_every_sample_has_its_key():
    names = _recipe("Dropout")
    mesh = make_mesh(4)
    tx = dho2.dho2(optax.sgd(0.1), names["per_sample_loss"], split=dho2.Split(AXIS, mesh=mesh), **_OPTIONS)
    found = _found(tx, _sharded(names["params"], mesh, P()), _sharded(names["batch"], mesh, P(AXIS)))
    gradient = jax.jit(jax.grad(lambda params: names["per_sample_loss"](params, names["batch"])))
    assert np.all(_defects(gradient, names["params"], found) < _EXACT)


def test_in_a_shard_map_every_device_has_its_masks():
    names = _recipe("Dropout")
    tx = dho2.mr_dho2(optax.sgd(0.1), rank=2, split=dho2.Split(AXIS))

    def compute(whole: Any, local: Any) -> Any:
        params, key = whole
        state = tx.init(params)
        batch = (*local, jax.random.fold_in(key, jax.lax.axis_index(AXIS)))
        loss, *found = dho2.value_grad_and_hvp(names["loss_fn"], axis_name=AXIS)(params, state, batch)
        return loss, jax.lax.pmean(found, AXIS), state.probing.process.vector

    run = on_devices(compute, 4, "shard_map")
    params, key = names["params"], jax.random.key(5)
    same = jax.tree.map(lambda x: jnp.stack([x[:16]] * 4), (names["x"], names["y"]))
    losses, (_, hvp), segments = run((params, key), same)
    assert len(np.unique(losses)) == 4
    gradient = lambda params: _first(run((params, key), same)[1][0])  # noqa: E731
    _assert_is_derivative(_first(hvp), gradient, params, _joined(segments, params))


# The user's own shard_map.


@pytest.mark.parametrize("how", SPLITTING)
def test_what_the_gradient_is_with_and_without_the_cast(how):
    names = _recipe("Your own shard_map")
    loss_fn = names["loss_fn"]
    options: dict[str, Any] = {"rank": 1, "refresh_interval": None}
    averaging = dho2.dho2(optax.sgd(1.0), split=dho2.Split(AXIS, average_gradients=True), **options)
    not_averaging = dho2.dho2(optax.sgd(1.0), split=dho2.Split(AXIS), **options)

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda p: jax.lax.pcast(p, AXIS, to="varying"), params)

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jax.lax.pmean(loss_fn(params, batch), AXIS)

    def updates(params: Any, batch: Any) -> dict[str, Any]:
        local, mean = jax.grad(loss_fn)(params, batch), jax.grad(mean_loss)(params, batch)
        gradients = {
            "cast": (averaging, jax.grad(loss_fn)(cast(params), batch)),
            "no cast": (averaging, local),
            "averaged inside": (not_averaging, mean),
            "averaged twice": (averaging, mean),
        }
        return {name: tx.update(g, tx.init(params), params)[0] for name, (tx, g) in gradients.items()}

    params = jax.device_get(names["params"])
    batch = jax.tree.map(lambda x: x[:255].reshape(3, -1, *x.shape[1:]), jax.device_get(names["batch"]))
    shards = [jax.tree.map(lambda x, p=p: x[p], batch) for p in range(3)]
    local = [flat(jax.grad(loss_fn)(params, shard)) for shard in shards]
    mean = np.mean(local, axis=0)
    tracked = how == "shard_map"
    found = on_devices(updates, 3, how)(params, batch)
    for name, right in {
        "cast": [mean] * 3,
        "no cast": [3 * mean if tracked else mean] * 3,
        "averaged inside": None if not tracked else [mean] * 3,
        "averaged twice": [mean] * 3,
    }.items():
        for p in range(3):
            update = -flat(jax.tree.map(lambda x, p=p: x[p], found[name]))
            if right is not None:
                np.testing.assert_allclose(update, right[p], atol=1e-5, err_msg=name)
            else:
                assert np.abs(update - mean).max() > 0.01 * np.abs(mean).max()


# Hyperparameters in the state.


def test_a_hyperparameter_that_is_changed_in_the_state_counts_inside_the_objects_too():
    """A large damping leaves nothing of the Newton step, so the update is that of alpha=0."""
    names = _recipe("Hyperparameters in the state")
    state, params, batch = names["state"], names["params"], names["batch"]
    assert {name: float(x) for name, x in state.hyperparams.items()} == pytest.approx(
        {"learning_rate": 1e-2, "alpha": 0.1, "damping": 0.1}
    )

    def after(**changed: float) -> np.ndarray:
        hyperparams = {**state.hyperparams, **{name: jnp.asarray(x) for name, x in changed.items()}}
        start = jax.tree.map(jnp.copy, params)
        return flat(names["step"](start, state._replace(hyperparams=hyperparams), batch)[0]) - flat(params)

    assert dho2.metrics(state)["active_pairs"] > 0
    np.testing.assert_allclose(after(damping=1e9), after(alpha=0.0), atol=1e-7)
    assert np.abs(after(damping=0.0) - after(alpha=0.0)).max() > 1e-5
    assert np.abs(after(learning_rate=2e-2) - after()).max() > 1e-5
