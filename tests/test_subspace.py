import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dho2_optax import metric, subspace
from dho2_optax.eigensolver import Spectrum
from dho2_optax.subspace import Damping
from tests.helpers import AXIS, flat, on_devices, unflatten

_LIKE = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(7, np.float32), "c": np.float32(0)}
_N = 20
_EIGENVALUES = np.float32([8.0, -5.0, 3.0, 2.0])
_MASK = np.array([True, True, False, True])
_DAMPING = Damping(0.4, 0.1)
_LEARNING_RATE = 0.1


def _rows(mask=_MASK, seed=0):
    """Orthonormal rows, zero where they are masked out."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(_N, len(mask))))
    return (rotation.T * mask[:, None]).astype(np.float32)


def _spectrum(rows, eigenvalues=_EIGENVALUES, mask=_MASK):
    eigenvectors = jax.vmap(partial(unflatten, like=_LIKE))(rows)
    return Spectrum(eigenvalues, eigenvectors, np.zeros_like(eigenvalues), mask)


def _gradient(seed):
    return np.random.default_rng(seed).normal(size=_N).astype(np.float32)


def _numbers(eigenvalues, mask=None):
    """A spectrum of which only the numbers matter."""
    eigenvalues = np.asarray(eigenvalues, np.float32)
    mask = np.ones(eigenvalues.shape, bool) if mask is None else np.asarray(mask)
    return Spectrum(eigenvalues, np.zeros((len(mask), 1), np.float32), eigenvalues, mask)


@partial(jax.jit, static_argnames=("base", "subspace_tx", "axis_name"))
def _step(
    gradient,
    spectrum,
    subspace_state,
    base_state,
    alpha=0.3,
    sigma=2.0,
    base=optax.sgd(_LEARNING_RATE),  # noqa: B008
    subspace_tx=optax.trace(0.9),  # noqa: B008
    axis_name=None,
):
    return subspace.hybrid_step(
        gradient,
        spectrum,
        subspace_tx,
        subspace_state,
        lambda g: base.update(g, base_state),
        alpha=alpha,
        scale=lambda tolerable: jnp.float32(sigma),
        damping=_DAMPING,
        axis_name=axis_name,
    )[:3]


def _start():
    """States of the subspace's momentum and of SGD, and the spectrum of the tests."""
    zeros = np.zeros(len(_MASK), np.float32)
    return optax.trace(0.9).init(zeros), optax.sgd(_LEARNING_RATE).init(_LIKE)


class _Dense:
    """The update rule in float64 on flat vectors, with SGD as base and momentum in the subspace."""

    def __init__(self, rows):
        self.rows = rows.astype(np.float64)
        self.momentum = np.zeros(len(rows))

    def __call__(self, gradient, alpha=0.3, sigma=2.0):
        v, g = self.rows, gradient.astype(np.float64)
        magnitude = np.abs(_EIGENVALUES.astype(np.float64))
        inverse = _MASK / (np.maximum(magnitude, 0.4 * 8.0) + 0.1)
        coordinates = v @ g
        self.momentum = coordinates + 0.9 * self.momentum
        d = -_LEARNING_RATE * (g - v.T @ coordinates)
        inside = v @ d
        return sigma * d - v.T @ (sigma * inside + alpha * inverse * self.momentum)


def test_updates_equal_the_dense_formula():
    rows = _rows()
    dense, spectrum, (subspace_state, base_state) = _Dense(rows), _spectrum(rows), _start()
    for t in range(3):
        gradient = _gradient(t)
        update, subspace_state, base_state = _step(unflatten(gradient, _LIKE), spectrum, subspace_state, base_state)
        np.testing.assert_allclose(flat(update), dense(gradient), atol=1e-6)
    np.testing.assert_allclose(subspace_state.trace, dense.momentum, atol=1e-6)


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"sigma": 1.0}])
def test_alpha_and_sigma_are_those_of_the_dense_formula(options):
    rows, gradient = _rows(), _gradient(0)
    update, *_ = _step(unflatten(gradient, _LIKE), _spectrum(rows), *_start(), **options)
    np.testing.assert_allclose(flat(update), _Dense(rows)(gradient, **options), atol=1e-6)
    assert np.max(np.abs(flat(update) - _Dense(rows)(gradient))) > 1e-2


def test_a_base_that_leaves_the_complement_is_projected_back():
    # Adam's update of a gradient in the complement has a part in the subspace, which is taken out.
    base = optax.adam(_LEARNING_RATE)
    rows, gradient = _rows(), _gradient(0)
    state = _start()[0], base.init(_LIKE)
    update, _, base_state = _step(unflatten(gradient, _LIKE), _spectrum(rows), *state, alpha=0.0, base=base)
    v = rows.astype(np.float64)
    complement = gradient - v.T @ (v @ gradient)
    direction = -_LEARNING_RATE * np.sign(complement)  # Adam's first step
    expected = 2 * (direction - v.T @ (v @ direction))
    np.testing.assert_allclose(flat(update), expected, atol=1e-5)
    np.testing.assert_allclose(rows @ flat(update), 0, atol=1e-6)
    np.testing.assert_allclose(flat(base_state[0].mu), 0.1 * complement, atol=1e-6)


def test_with_all_pairs_masked_the_update_is_the_scaled_base():
    mask, gradient = np.zeros(4, bool), _gradient(0)
    spectrum = _spectrum(_rows(mask), mask=mask)
    update, *_ = _step(unflatten(gradient, _LIKE), spectrum, *_start())
    np.testing.assert_allclose(flat(update), -2 * _LEARNING_RATE * gradient, rtol=1e-6)


def test_updates_keep_the_dtypes_of_the_base():
    base = optax.sgd(_LEARNING_RATE)
    gradient = unflatten(_gradient(0), _LIKE)
    short = {**gradient, "a": gradient["a"].astype(jnp.bfloat16)}
    spectrum = _spectrum(_rows())
    update, *_ = _step(short, spectrum, _start()[0], base.init(short), base=base)
    assert {k: x.dtype for k, x in update.items()} == {
        "a": jnp.bfloat16,
        "b": jnp.float32,
        "c": jnp.float32,
    }
    np.testing.assert_allclose(flat(update), _Dense(_rows())(_gradient(0)), atol=2e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_stays_out_of_the_subspace(bad):
    rows, spectrum = _rows(), _spectrum(_rows())
    gradient = _gradient(0)
    _, subspace_state, base_state = _step(unflatten(gradient, _LIKE), spectrum, *_start())
    spoiled = gradient.copy()  # not in place: the first step may still be reading it
    spoiled[5] = bad
    update, after, _ = _step(unflatten(spoiled, _LIKE), spectrum, subspace_state, base_state)
    np.testing.assert_array_equal(after.trace, subspace_state.trace)
    assert np.any(np.asarray(after.trace))
    # What is left is the base's own update, with the bad number where it was.
    update = flat(update)
    assert not np.isfinite(update[5])
    others = np.arange(_N) != 5
    np.testing.assert_allclose(update[others], -2 * _LEARNING_RATE * gradient[others], rtol=1e-6)
    following = _step(unflatten(_gradient(1), _LIKE), spectrum, after, base_state)[0]
    dense = _Dense(rows)
    dense(_gradient(0))
    np.testing.assert_allclose(flat(following), dense(_gradient(1)), atol=1e-6)


@pytest.mark.parametrize("how", ["shard_map", "shard_map without vma", "vmap"])
def test_over_an_axis_the_update_is_that_of_the_whole_vector(how):
    num_devices = 4
    rows, gradient = _rows(), _gradient(0)
    local_rows = np.moveaxis(rows.reshape(4, num_devices, -1), 1, 0)
    base = optax.sgd(_LEARNING_RATE)

    def program(numbers, local):
        eigenvalues, mask, momentum = numbers
        local_gradient, eigenvectors = local
        spectrum = Spectrum(eigenvalues, eigenvectors, eigenvalues, mask)
        state = optax.TraceState(trace=momentum)
        options = {"base": base, "axis_name": AXIS}
        update, _, _ = _step(local_gradient, spectrum, state, base.init(gradient), **options)
        return update

    numbers = _EIGENVALUES, _MASK, np.zeros(4, np.float32)
    local = gradient.reshape(num_devices, -1), local_rows
    update = on_devices(program, num_devices, how)(numbers, local)
    np.testing.assert_allclose(np.ravel(update), _Dense(rows)(gradient), atol=1e-6)


def _uses(hlo, shape):
    """The opcodes of all instructions of the main computation that read a parameter of this shape.

    A loop fusion of nothing but one product and elementwise work counts as the product: it reads its operands once.
    """
    bodies = dict(re.findall(r"^%([\w.-]+) \(.*?\n(.*?)^}", hlo, re.MULTILINE | re.DOTALL))
    main = re.search(r"^ENTRY .*?^}", hlo, re.MULTILINE | re.DOTALL).group()
    instructions = re.findall(r"%([\w.-]+) = (\S+) ([\w-]+)\((.*)", main)
    names, opcodes = set(), []
    for name, kind, opcode, rest in instructions:
        operands = set(re.findall(r"%([\w.-]+)", rest))
        if opcode == "parameter" and kind.startswith(shape):
            names.add(name)
        elif operands & names and opcode in ("bitcast", "copy"):
            names.add(name)
            opcodes += ["copy"] if opcode == "copy" else []
        elif operands & names and opcode == "fusion":
            body = bodies[re.search(r"calls=%([\w.-]+)", rest).group(1)]
            opcodes.append("dot" if body.count(" dot(") == 1 and " copy(" not in body else opcode)
        elif operands & names:
            opcodes.append(opcode)
    return opcodes


def test_an_update_makes_four_passes_over_the_eigenvectors():
    like = {"a": jax.ShapeDtypeStruct((30, 40), jnp.float32), "b": jax.ShapeDtypeStruct((500,), jnp.float32)}
    k = 7
    row = jax.ShapeDtypeStruct((k,), jnp.float32)
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((k, *x.shape), x.dtype), like)
    spectrum = Spectrum(row, stack, row, jax.ShapeDtypeStruct((k,), jnp.bool))
    base = optax.adam(_LEARNING_RATE)
    states = jax.eval_shape(optax.trace(0.9).init, row), jax.eval_shape(base.init, like)
    compiled = _step.lower(like, spectrum, *states, base=base).compile()
    for shape in ("f32[7,30,40]", "f32[7,500]"):
        assert _uses(compiled.as_text(), shape) == ["dot"] * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 7 * 500


@pytest.mark.parametrize(
    ("eigenvalues", "mask", "floor", "damping", "magnitudes"),
    [
        ([4.0, -2.0, 1.0], None, 0.0, 0.0, [4, 2, 1]),
        ([4.0, -2.0, 1.0], None, 0.4, 0.0, [4, 2, 1.6]),
        ([4.0, -2.0, 1.0], None, 0.0, 0.5, [4.5, 2.5, 1.5]),
        ([4.0, -2.0, 1.0], None, 0.75, 1.0, [5, 4, 4]),
        ([4.0, 0.0, 1.0], None, 0.5, 0.0, [4, 2, 2]),
        ([4.0, 0.0, 1.0], None, 0.0, 0.0, [4, np.inf, 1]),
        ([0.0, 0.0, 0.0], None, 0.5, 0.0, [np.inf, np.inf, np.inf]),
        ([0.0, 0.0, 0.0], None, 0.5, 0.1, [0.1, 0.1, 0.1]),
        ([100.0, -2.0, 1.0], [False, True, True], 0.75, 0.0, [np.inf, 2, 1.5]),
        ([np.nan, -2.0, 1.0], [False, True, True], 0.75, 0.0, [np.inf, 2, 1.5]),
    ],
)
def test_inverse_eigenvalues(eigenvalues, mask, floor, damping, magnitudes):
    result = _inverse_eigenvalues(_numbers(eigenvalues, mask), Damping(floor, damping))
    np.testing.assert_allclose(result, 1 / np.asarray(magnitudes), rtol=1e-6)


_inverse_eigenvalues = jax.jit(subspace.inverse_eigenvalues)
_base_scale = jax.jit(subspace.base_scale, static_argnums=1)


@pytest.mark.parametrize(
    ("eigenvalues", "mask", "num_smallest", "limit", "expected"),
    [
        ([8.0, 6.0, 4.0], None, 0, 3.0, 2),  # the ratio of the extremes
        ([9.0, 6.0, 1.0], None, 0, 3.0, 3),  # the limit
        ([9.0, 6.0, 1.0], None, 0, 1e9, 9),
        ([9.0, 6.0, 1.0], None, 0, 1.0, 1),
        ([9.0, 6.0, 1.0], None, 0, 0.0, 1),  # a limit below 1 counts as 1
        ([-8.0, 6.0, 4.0], None, 0, 3.0, 2),  # by magnitude
        ([1.0, -8.0, 4.0], [False, True, True], 0, 3.0, 2),  # masked pairs do not count
        ([8.0, 4.0, 0.0], None, 0, 3.0, 2),  # nor do directions without curvature
        ([0.1, 4.0, 8.0], None, 1, 3.0, 2),  # nor the smallest of algebraic selection
        ([8.0, 4.0, 2.0], [False] * 3, 0, 3.0, 1),
        ([0.0, 0.0, 0.0], None, 0, 3.0, 1),
    ],
)
def test_base_scale(eigenvalues, mask, num_smallest, limit, expected):
    sigma = _base_scale(_numbers(eigenvalues, mask), num_smallest, limit)
    assert sigma.dtype == jnp.float32
    np.testing.assert_allclose(sigma, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("eigenvalues", "residuals", "mask", "num_smallest", "expected"),
    [
        ([8.0, 4.0, 2.0], [0.0, 0.0, 1.0], [True, True, False], 0, 2),  # 2 + 1 is below the smallest in use
        ([8.0, 4.0, 2.0], [0.0, 0.0, 4.0], [True, True, False], 0, 8 / 6),  # 2 + 4 is not
        ([8.0, 4.0, -2.0], [0.0, 0.0, 4.0], [True, True, False], 0, 8 / 6),  # by magnitude
        ([8.0, 4.0, 2.0], [0.0, 0.0, 9.0], [True, True, False], 0, 1),  # steeper than all in use, maybe
        ([8.0, 6.0, 2.0], [0.0, 0.0, 0.0], [True, False, True], 0, 8 / 6),
        ([8.0, 6.0, 5.0, 2.0], [0.0, 1.0, 0.5, 0.0], [True, False, False, True], 0, 8 / 7),  # the largest of several
        ([8.0, 4.0, 0.0], [9.0, 9.0, 0.0], [True, True, True], 0, 2),  # residuals of pairs in use do not count
        ([8.0, 4.0, 0.0], [0.0, 0.0, 0.0], [True, True, False], 0, 2),  # a pair that does not exist
        ([-7.0, 4.0, 8.0], [2.0, 0.0, 0.0], [False, True, True], 1, 2),  # the smallest of algebraic selection
        ([6.0, 4.0, 2.0], [0.0, 0.0, 0.0], [False, False, False], 0, 1),
    ],
)
def test_pairs_left_to_the_base_limit_its_scale(eigenvalues, residuals, mask, num_smallest, expected):
    spectrum = _numbers(eigenvalues, mask)._replace(residuals=np.float32(residuals))
    np.testing.assert_allclose(_base_scale(spectrum, num_smallest, 3.0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("missed", "tolerable", "expected"), [(0, np.inf, 2), (5, np.inf, 8 / 5), (5, 7, 7 / 5), (9, 20, 1)]
)
def test_missed_curvature_limits_the_scale(missed, tolerable, expected):
    sigma = _base_scale(_numbers([8.0, -6.0, 4.0]), 0, 3.0, tolerable, missed)
    np.testing.assert_allclose(sigma, expected, rtol=1e-6)


def test_missed_curvature_is_that_of_the_new_spectrum_outside_of_the_old_one():
    old, new = _rows(seed=0), _rows(mask=np.array([True, True, True, False]), seed=1)
    known = new.T @ np.diag(np.abs(_EIGENVALUES)) @ new
    outside = np.eye(_N) - old.T @ old
    expected = np.linalg.norm(outside @ known @ outside, 2)
    spectra = _spectrum(old), _spectrum(new, mask=np.array([True, True, True, False]))
    missed = jax.jit(lambda old, new: subspace.missed_curvature(old, new, None))
    np.testing.assert_allclose(missed(*spectra), expected, rtol=1e-5)
    nothing = _spectrum(np.zeros_like(old), mask=np.zeros(4, bool))
    np.testing.assert_allclose(missed(nothing, spectra[1]), 8, rtol=1e-5)
    np.testing.assert_allclose(missed(spectra[1], spectra[1]), 0, atol=1e-5)
    # A row masked out in the new spectrum does not count, whatever its Ritz value.
    large = spectra[1]._replace(eigenvalues=np.float32([8.0, -5.0, 3.0, 1e6]))
    np.testing.assert_allclose(missed(spectra[0], large), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def turned():
    """Two spectra and the state of a subspace optimizer carried from one to the other."""
    old, new = _rows(seed=0), _rows(mask=np.array([True, True, True, False]), seed=1)
    state = {
        "momentum": np.float32([1, 2, 3, 4]),
        "count": np.int32(5),
        "counts": np.arange(4, dtype=np.int32),
        "other": np.ones(3, np.float32),
        "short": np.asarray([1, 2, 3, 4], jnp.bfloat16),
    }
    return old, new, state


def test_the_subspace_state_is_rotated_to_the_new_coordinates(turned):
    old, new, state = turned
    mask = np.any(new, axis=1)
    carry = jax.jit(lambda s: subspace.rotate_state(s, _spectrum(old), _spectrum(new, mask=mask), None))
    carried = carry(state)
    rotation = new.astype(np.float64) @ old.T.astype(np.float64)
    np.testing.assert_allclose(carried["momentum"], rotation @ state["momentum"], atol=1e-6)
    np.testing.assert_allclose(np.float32(carried["short"]), rotation @ state["momentum"], atol=2e-2)
    assert carried["short"].dtype == jnp.bfloat16
    for name in ("count", "counts", "other"):
        np.testing.assert_array_equal(carried[name], state[name])


def test_rotation_within_the_same_subspace_carries_the_vector_over():
    # Turning the basis inside its span, and its order and signs, changes coordinates but not the vector.
    everything = np.ones(4, bool)
    old = _rows(everything)
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))
    new = (turn @ old).astype(np.float32)
    momentum = np.float32([1, 2, 3, 4])
    old_pairs, new_pairs = (_spectrum(rows, mask=everything) for rows in (old, new))
    carried = jax.jit(lambda q: subspace.rotate_state(q, old_pairs, new_pairs, None))(momentum)
    np.testing.assert_allclose(new.T @ carried, old.T @ momentum, atol=1e-6)


def test_rotation_sums_over_the_axis(turned):
    old, new, state = turned
    num_devices = 4
    cut = lambda rows: np.moveaxis(rows.reshape(4, num_devices, -1), 1, 0)  # noqa: E731

    def program(momentum, local):
        spectra = (Spectrum(_EIGENVALUES, rows, _EIGENVALUES, _MASK) for rows in local)
        return subspace.rotate_state(momentum, *spectra, AXIS)

    run = on_devices(program, num_devices, "shard_map")
    carried = run(state["momentum"], (cut(old), cut(new)))
    for p in range(num_devices):
        np.testing.assert_allclose(carried[p], new @ old.T @ state["momentum"], atol=1e-6)


def test_with_damping_it_is_the_newton_step_that_is_carried_over(turned):
    old, new, state = turned
    mask, eigenvalues = np.any(new, axis=1), np.float32([6.0, 4.0, -1.0, 0.5])
    spectra = _spectrum(old), _spectrum(new, eigenvalues, mask)
    carried = jax.jit(lambda q: subspace.rotate_state(q, *spectra, None, _DAMPING))(state["momentum"])
    before, after = (np.asarray(_inverse_eigenvalues(s, _DAMPING), np.float64) for s in spectra)
    expected = new.astype(np.float64) @ old.T.astype(np.float64) @ (before * state["momentum"])
    np.testing.assert_allclose(after * carried, expected, atol=1e-6)
    assert carried[3] == 0


# What bounds a hybrid by its base.


def _bounds(usual=1.0, last=1.0, peak=0.0, least=0.0, brake=1.0):
    return subspace.Bounds(*map(jnp.float32, (usual, last, peak, least, brake)))


def test_the_usual_length_follows_by_a_tenth_at_most():
    for length, expected in ((1e6, np.exp(0.1)), (1e-9, np.exp(-0.1)), (1.5, 1.5**0.1), (0.0, 1), (np.inf, 1)):
        np.testing.assert_allclose(_bounds().after(jnp.float32(length)).usual, expected, rtol=1e-5)
    np.testing.assert_allclose(_bounds(usual=0).after(jnp.float32(7)).usual, 7)
    assert _bounds().after(jnp.float32(jnp.nan)).usual == 1


def test_a_gradient_is_an_outlier_until_a_momentum_has_forgotten_it():
    bounds = _bounds().after(jnp.float32(10))
    untrusted = 0
    while not bounds.trust():
        untrusted += 1
        bounds = bounds.after(jnp.float32(1))
    # 10 * 0.9^t is below four times the usual length, which the outlier has moved too, after nine updates.
    assert untrusted == 9
    assert _bounds().after(jnp.float32(4)).trust()
    assert not _bounds().after(jnp.float32(jnp.inf)).trust()
    assert _bounds(usual=0).after(jnp.float32(1e9)).trust()


def test_a_batch_is_an_outlier_by_its_own_gradient():
    """Whatever the batches before it; what is not finite is no usual length, and the first gradient always is."""
    bounds = _bounds(peak=1e9)
    usual = [bool(bounds.after(jnp.float32(x)).is_usual()) for x in (0.0, 1e-3, 4.0, 4.5, 1e9, np.inf, np.nan)]
    assert usual == [True, True, True, False, False, False, False]
    first = [bool(_bounds(usual=0).after(jnp.float32(x)).is_usual()) for x in (0.0, 1e9, np.inf, np.nan)]
    assert first == [True, True, False, False]


def test_the_brake_is_by_how_much_gradients_are_longer_than_usual():
    """By the longest that a momentum remembers."""
    bounds, usual, peak = _bounds(), 1.0, 0.0
    for length in (1.0, 1.5, 1.0, 2.5, 2.0):
        bounds = bounds.after(jnp.float32(length))
        usual, peak = usual * (length / usual) ** 0.1, max(length, 0.9 * peak)
        np.testing.assert_allclose(bounds.brake, min(1, usual / peak), rtol=1e-5)


def test_after_an_outlier_the_base_is_not_braked():
    """It finds its way back as it would by itself: with the brake it learnt less from the rare samples that lead it."""
    bounds = _bounds()
    for length in (1e9, 1e4, 9e3, 1.8e4, np.inf, np.nan, 1.0):
        bounds = bounds.after(jnp.float32(length))
        assert not bounds.trust()
        assert bounds.brake == 1
    assert _bounds(usual=0, last=0).after(jnp.float32(jnp.nan)).brake == 1
    assert _bounds(usual=0, last=0).after(jnp.float32(3)).brake == 1


@partial(jax.jit, static_argnames=("base", "subspace_tx"))
def _bounded_step(gradient, bounds, subspace_state, base_state, alpha, spectrum, base, subspace_tx):
    return subspace.hybrid_step(
        gradient,
        spectrum,
        subspace_tx,
        subspace_state,
        lambda g: base.update(g, base_state),
        alpha=alpha,
        scale=lambda tolerable: jnp.float32(2.0),
        damping=Damping(0.0, 0.0),
        axis_name=None,
        bounds=bounds,
        momentum_of=lambda state, fed: metric.momentum(state, fed) or metric.Momentum(fed, metric.PLAIN_LIMIT),
    )


def test_the_update_on_an_outlier_is_the_bases_own():
    base, ema = optax.adam(0.1), optax.ema(0.9, debias=False)
    gradient = unflatten(_gradient(0), _LIKE)
    length = np.linalg.norm(_gradient(0))
    state = ema.init(jnp.zeros(4))._replace(ema=jnp.arange(4.0))
    for times, is_outlier in ((5, True), (3, False), (1.2, False)):
        step = _bounded_step(
            gradient,
            _bounds(length / times, last=length / times),
            state,
            base.init(_LIKE),
            0.1,
            _spectrum(_rows()),
            base=base,
            subspace_tx=ema,
        )
        own, own_state = base.update(gradient, base.init(_LIKE))
        brake = float(step.bounds.brake)
        assert brake == (1 if is_outlier else pytest.approx(np.exp(0.1 * min(np.log(times), 1)) / times, rel=1e-4))
        same = np.allclose(flat(step.update), brake * flat(own), rtol=1e-5)
        assert same == is_outlier
        assert float(step.sigma) == (1 if is_outlier else 2)
        assert np.array_equal(step.subspace_state.ema, state.ema) == is_outlier
        assert np.allclose(flat(step.base_state), flat(own_state), rtol=1e-5) == is_outlier


def test_on_an_outlier_the_base_goes_no_further_than_is_stable_where_it_has_been_kept_out():
    """SGD at a rate of 0.5 tolerates a curvature of 4, and there is one of 8."""
    base, ema = optax.sgd(0.5), optax.ema(0.9, debias=False)
    gradient = _gradient(0)
    length = np.linalg.norm(gradient)
    step = _bounded_step(
        unflatten(gradient, _LIKE), _bounds(length / 1e3, last=length / 1e3), ema.init(jnp.zeros(4)),
        base.init(_LIKE), 0.1, _spectrum(_rows()), base=base, subspace_tx=ema,
    )  # fmt: skip
    np.testing.assert_allclose(flat(step.update), -0.5 * (4 / 8) * gradient, rtol=1e-5)
    assert step.sigma == 1, "what the scale grows from at the next update"
    np.testing.assert_allclose(step.bounds.brake, 4 / 8, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "subspace_tx", "pace"),
    [
        (optax.sgd(0.5), optax.identity(), 1),
        (optax.sgd(0.5, momentum=0.9), optax.identity(), 10),
        (optax.sgd(0.5), optax.trace(0.9), 0.1),
    ],
    ids=["plain", "heavy ball", "heavy ball in the subspace"],
)
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_along_an_eigenvector_the_newton_step_goes_no_further_than_the_base(base, subspace_tx, pace, alpha):
    """A gradient that lasts takes heavy ball ten times its learning rate."""
    eigenvalues = np.float32([8.0, -1e-6, 3.0, 1e-3])
    rows, gradient = _rows(), _gradient(3)
    state = subspace_tx.init(jnp.zeros(4))
    step = _bounded_step(
        unflatten(gradient, _LIKE), _bounds(usual=100), state, base.init(_LIKE), alpha,
        _spectrum(rows, eigenvalues),
        base=base, subspace_tx=subspace_tx,
    )  # fmt: skip
    least = alpha / (0.5 * pace)
    expected = -alpha * (rows @ gradient) / np.maximum(np.abs(eigenvalues), least)
    np.testing.assert_allclose(rows @ flat(step.update), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(step.bounds.least, least, rtol=1e-4)


def test_where_no_pair_is_used_nothing_is_braked():
    """The update is the base's own then."""
    base, ema = optax.sgd(0.1), optax.ema(0.9, debias=False)
    gradient = _gradient(4)
    for alpha, braked in ((0.1, True), (1.0, False)):  # eigenvalues of up to 8 against 1 and 10
        step = _bounded_step(
            unflatten(gradient, _LIKE), _bounds(np.linalg.norm(gradient) / 2, least=10 * alpha), ema.init(jnp.zeros(4)),
            base.init(_LIKE), alpha, _spectrum(_rows()), base=base, subspace_tx=ema,
        )  # fmt: skip
        np.testing.assert_allclose(step.bounds.brake, 2**-0.9 if braked else 1, rtol=1e-4)


def test_pairs_along_which_the_base_goes_further_are_the_bases():
    base, ema = optax.sgd(0.1), optax.ema(0.9, debias=False)
    rows, gradient = _rows(), _gradient(4)
    step = _bounded_step(
        unflatten(gradient, _LIKE), _bounds(usual=100, least=4), ema.init(jnp.zeros(4)), base.init(_LIKE), 0.1,
        _spectrum(rows), base=base, subspace_tx=ema,
    )  # fmt: skip
    # Of the eigenvalues 8, -5 and 2 the last is; the scale of the base is 2 here.
    along = rows @ gradient
    expected = np.array([-0.1 * 0.1 * along[0] / 8, -0.1 * 0.1 * along[1] / 5, 0, -2 * 0.1 * along[3]])
    np.testing.assert_allclose(rows @ flat(step.update), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(step.subspace_state.ema, 0.1 * along * [1, 1, 0, 0], rtol=1e-4, atol=1e-6)


def test_a_scale_is_not_read_off_eigenvalues_that_are_the_bases():
    """Those of a batch that was dim differ by as much as right ones, and say nothing."""
    dim = _numbers([3e-4, 1e-4])
    np.testing.assert_allclose(subspace.base_scale(dim, 0, 10.0), 3, rtol=1e-5)
    np.testing.assert_allclose(subspace.base_scale(dim, 0, 10.0, least=1.0), 1)
    np.testing.assert_allclose(subspace.base_scale(_numbers([6.0, 1e-4]), 0, 10.0, least=2.0), 3, rtol=1e-5)


def test_a_newton_step_that_was_bounded_is_carried_over_as_it_was():
    """Else a momentum that stood over an eigenvalue that was far too small would come out of a refresh enormous."""
    rows = _rows(np.ones(4, bool))
    small, large = (_spectrum(rows, np.full(4, x, np.float32), np.ones(4, bool)) for x in (1e-4, 1.0))
    momentum = jnp.arange(1.0, 5.0)
    rotated = subspace.rotate_state(momentum, small, large, None, Damping(0.0, 0.0), least=0.5)
    np.testing.assert_allclose(rotated, momentum / 0.5, rtol=1e-5)
