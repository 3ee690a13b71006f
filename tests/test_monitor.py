"""What is read from a state, wherever it is, and what alarms make of it."""

import inspect
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dho2_optax as dho2
from dho2_optax.flax import TrainState
from dho2_optax.state import find_state, replace_state
from tests.helpers import python_blocks

_DIAGONAL = jnp.asarray([8.0, -4.0, 2.0, 1.0])
_START = {"a": jnp.ones(4), "b": jnp.ones(2)}
_OPTIONS = {"rank": 2, "refresh_interval": 1, "warmup_steps": 1, "eigensolver": dho2.Eigensolver(order=4)}


def _loss(params, batch):
    return 0.5 * jnp.sum(batch * params["a"] ** 2)


def _optimizer(loss_fn=_loss, **options):
    return dho2.dho2(optax.sgd(0.01), loss_fn, **_OPTIONS, **options)


def _step(tx, params=_START, **extra):
    def step(params, batch):
        grads = jax.grad(_loss)(params, batch)
        return tx.update(grads, tx.init(params), params, batch=batch, **extra)[1]

    return jax.jit(step)(params, _DIAGONAL)


_MASK = {"a": True, "b": False}
_LABELS = {"a": "hybrid", "b": "sgd"}
_WRAPPED = {
    "chain": lambda: _step(optax.chain(optax.clip(100.0), _optimizer())),
    "named_chain": lambda: _step(optax.named_chain(("clip", optax.clip(100.0)), ("hybrid", _optimizer()))),
    "masked": lambda: _step(optax.masked(_optimizer(), _MASK), full_params=_START),
    "partition": lambda: _step(
        optax.partition({"hybrid": _optimizer(), "sgd": optax.sgd(0.1)}, _LABELS), full_params=_START
    ),
    "MultiSteps": lambda: _step(dho2.MultiSteps(_optimizer(), every_k_schedule=1).gradient_transformation()),
    "optax.MultiSteps": lambda: _step(optax.MultiSteps(_optimizer(), every_k_schedule=1)),
    "inject_hyperparams": lambda: _step(optax.inject_hyperparams(lambda alpha: _optimizer(alpha=alpha))(alpha=0.1)),
    "apply_if_finite": lambda: _step(optax.apply_if_finite(_optimizer(), 3)),
    "train_state": lambda: jax.jit(
        lambda state: state.apply_gradients(grads=jax.grad(_loss)(state.params, _DIAGONAL), batch=_DIAGONAL)
    )(TrainState.create(apply_fn=None, params=_START, tx=_optimizer())),
}


def _check(metrics):
    """Those of one refresh at the start, of diag(8, -4, 2, 1)."""
    assert metrics["updates"] == metrics["refreshes"] == 1
    assert metrics["active_pairs"] == 2
    np.testing.assert_allclose(metrics["eigenvalue_0"], 8, rtol=1e-4)
    np.testing.assert_allclose(metrics["eigenvalue_min"], -4, rtol=1e-4)
    np.testing.assert_allclose(metrics["condition_number"], 2, rtol=1e-4)
    # The gradient is the diagonal itself.
    np.testing.assert_allclose(metrics["gradient_share"], (64 + 16) / (64 + 16 + 4 + 1), rtol=1e-4)


@pytest.mark.parametrize("name", _WRAPPED)
def test_metrics_of_a_state_inside_others(name):
    state = _WRAPPED[name]()
    _check(jax.device_get(dho2.metrics(state)))
    assert float(dho2.orthogonality_error(state)) < 1e-5
    assert dho2.alarms(dho2.metrics(state)) == []


class _Model(nnx.Module):
    def __init__(self):
        self.a = nnx.Param(_START["a"])


def test_metrics_of_an_optimizer_of_nnx_and_of_its_state():
    model = _Model()
    optimizer = nnx.Optimizer(model, _optimizer(None), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(params):
            return 0.5 * jnp.sum(_DIAGONAL * params["a"][...] ** 2)

        params = nnx.state(model, nnx.Param)
        optimizer.update(model, jax.grad(loss)(params), value_fn=loss)
        return dho2.metrics(optimizer)

    _check(jax.device_get(step(model, optimizer)))
    for held in (optimizer, optimizer.opt_state):
        _check(jax.device_get(dho2.metrics(held)))
        assert float(dho2.orthogonality_error(held)) < 1e-5


def test_metrics_beside_a_group():
    tx = dho2.dho2(optax.sgd(0.01), rank=2, refresh_interval=None)
    params, state = {"a": jnp.ones(4)}, tx.init({"a": jnp.ones(4)})
    solver = dho2.Eigensolver(order=4)
    mean = lambda params, batch: jnp.mean(0.5 * jnp.sum(batch * params["a"] ** 2, axis=-1))  # noqa: E731
    options = {"rank": 2, "interval": 1, "deterministic": True, "eigensolver": solver, "batch_size": None}
    with dho2.CurvatureGroup(mean, devices=jax.devices()[-1:], **options) as group:
        for _ in range(2):
            state = group.advance(state, params, _DIAGONAL[None])
        _, state = jax.jit(tx.update)({"a": _DIAGONAL}, state, params)
        metrics = dho2.metrics(state) | group.metrics()
    _check(metrics)
    assert dho2.alarms(metrics) == []
    assert metrics["installed"] == 1


@pytest.mark.parametrize("how", ["vmap", "pmap", "pmap, read inside"])
def test_metrics_of_many_states_have_their_leading_axes(how):
    split = dho2.Split("data") if how != "vmap" else None
    tx = _optimizer(split=split)

    def step(batch):
        params = {"a": jnp.ones(4)}
        state = tx.init(params)
        _, state = tx.update(jax.grad(_loss)(params, batch), state, params, batch=batch[None])
        return state if how != "pmap, read inside" else (dho2.metrics(state), dho2.orthogonality_error(state, "data"))

    batches = jnp.stack([_DIAGONAL, _DIAGONAL])
    if how == "vmap":
        state = jax.jit(jax.vmap(step))(batches)
    else:
        state = jax.pmap(step, axis_name="data", devices=jax.devices("cpu")[:2])(batches)
    metrics, error = (dho2.metrics(state), None) if how != "pmap, read inside" else state
    assert {x.shape for x in metrics.values()} == {(2,)}
    for i in range(2):
        _check({name: float(x[i]) for name, x in metrics.items()})
    with pytest.raises(ValueError, match=r"`metrics` must hold scalars, got '\w+' of shape \(2,\)"):
        dho2.alarms(metrics)
    if error is not None:
        assert np.max(error) < 1e-5
        return
    with pytest.raises(ValueError, match=r"`state` must be one state, got one of shape \(2,\)"):
        dho2.orthogonality_error(state)


def test_the_share_of_the_gradient_is_that_in_the_metric():
    scales = jnp.asarray([1.0, 4.0, 0.25, 1.0])
    metric = dho2.Metric(
        lambda state, like, axis_name: {"a": scales},
        lambda p, x: jax.tree.map(lambda p, x: jnp.sqrt(p) * x, p, x),
        lambda p, x: jax.tree.map(lambda p, x: x / jnp.sqrt(p), p, x),
    )
    tx = dho2.dho2(optax.sgd(0.01), _loss, **_OPTIONS, metric=metric)
    params, gradient = {"a": jnp.ones(4)}, jnp.asarray([1.0, 2.0, -3.0, 0.5])
    _, state = jax.jit(tx.update)({"a": gradient}, tx.init(params), params, batch=_DIAGONAL)
    # The largest of diag(8, -16, 0.5, 1) are the first two.
    lengths = np.asarray(scales * gradient**2)
    np.testing.assert_allclose(dho2.metrics(state)["gradient_share"], lengths[:2].sum() / lengths.sum(), rtol=1e-4)


def test_the_share_is_no_number_before_there_are_eigenpairs_and_zero_of_nothing():
    tx = dho2.dho2(optax.sgd(0.01), _loss, **{**_OPTIONS, "warmup_steps": 2})
    params = {"a": jnp.ones(4)}
    update = jax.jit(tx.update)
    _, state = update({"a": _DIAGONAL}, tx.init(params), params, batch=_DIAGONAL)
    assert np.isnan(dho2.metrics(state)["gradient_share"])
    _, state = update({"a": _DIAGONAL}, state, params, batch=_DIAGONAL)
    _check(dho2.metrics(state) | {"updates": 1})
    for gradient in (jnp.zeros(4), jnp.full(4, jnp.nan), jnp.full(4, 1e30)):
        _, now = update({"a": gradient}, state, params, batch=_DIAGONAL)
        assert dho2.metrics(now)["gradient_share"] == 0
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(find_state(now).share))


def test_vectors_that_overlap_are_seen():
    state = _step(_optimizer())
    ours = find_state(state)
    tilted = jax.tree.map(lambda v: v.at[1].add(0.1 * v[0]), ours.spectrum.eigenvectors)
    spoilt = replace_state(state, ours._replace(spectrum=ours.spectrum._replace(eigenvectors=tilted)))
    error = float(dho2.orthogonality_error(spoilt))
    assert error == pytest.approx(0.1, rel=1e-3)
    [line] = dho2.alarms({**dho2.metrics(spoilt), "orthogonality_error": error})
    assert line.startswith("orthogonality: an error of 0.1; ")


_FINE = {
    "updates": 500,
    "refreshes": 10,
    "rejected_refreshes": 1,
    "matvecs": 160,
    "age": 50,
    "active_pairs": 8,
    "pairs_in_null_space": 0,
    "pairs_with_large_residual": 0,
    "gradient_share": 0.4,
    "condition_number": 100.0,
    "eigenvalue_max": 1.0,
    "eigenvalue_min": -10.0,
    "missed_curvature": 3.0,
    "base_brake": 1.0,
    "orthogonality_error": 1e-6,
    "launches": 12.0,
    "rejected": 0.0,
    "failures": 0.0,
    "stalls": 0.0,
    "staleness": 50.0,
}


@pytest.mark.parametrize(
    ("changed", "name", "remedy"),
    [
        ({"rejected_refreshes": 2}, "rejected refreshes: 2 of 12 refreshes", "not finite"),
        ({"rejected": 1.0}, "rejected refreshes: 2 of 12 refreshes", "not finite"),
        ({"refreshes": 0, "rejected_refreshes": 3}, "rejected refreshes: 3 of 3", "not finite"),
        ({"rejected_refreshes": 18, "probe_interval": 4}, "rejected refreshes: 18 of 178 probes", "not finite"),
        ({"age": 301}, "old eigenpairs: of 301 updates ago", "`refresh_interval`"),
        ({"age": 301, "refreshes": 0, "rejected_refreshes": 0}, "old eigenpairs: none after 301 updates", "`update`"),
        ({"skipped_probes": 1}, "skipped probes: 1", "`hvp`"),
        ({"active_pairs": 0, "pairs_with_large_residual": 8}, "no active pairs", "`Eigensolver.order`"),
        ({"active_pairs": 0, "pairs_in_null_space": 8}, "no active pairs", "linear in the parameters"),
        ({"condition_number": 1.1e4}, "condition number: 1.1e+04", "lower `rank`"),
        ({"missed_curvature": 7.1}, "missed curvature: 7.1 of 10", "refresh more often"),
        ({"orthogonality_error": 2e-3}, "orthogonality: an error of 0.002", "`basis_dtype`"),
        ({"gradient_share": 0.009}, "gradient share: 0.009", "raise `rank`"),
        ({"gradient_share": 0.995}, "gradient share: 0.995", "raise `alpha`"),
        ({"base_brake": 0.25}, "base brake: the base's step is shortened to 0.25", "learning rate"),
        ({"failures": 1.0, "stalls": 2.0}, "curvature group: 1 failures, 2 stalls", "`group.last_error`"),
        ({"staleness": 301.0}, "staleness: the group's last eigenpairs came 301 updates", "more devices"),
    ],
)
def test_an_alarm_is_one_line_that_says_what_to_do(changed, name, remedy):
    assert dho2.alarms(_FINE) == []
    [line] = dho2.alarms({**_FINE, **changed})
    assert line.startswith(name)
    assert remedy in line.partition(";")[2]
    assert "\n" not in line


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_age", 49),
        ("max_condition", 99.0),
        ("max_rejected", 0.09),
        ("max_missed", 0.29),
        ("min_share", 0.41),
        ("max_share", 0.39),
        ("min_brake", 1.1),
        ("max_orthogonality_error", 1e-7),
    ],
)
def test_each_limit_is_heeded(limit, value):
    lines = dho2.alarms(_FINE, **{limit: value})
    assert len(lines) == (2 if limit == "max_age" else 1)  # the staleness of a group is an age too


@pytest.mark.parametrize("value", [-1.0, np.nan, "much", None, True])
def test_limits_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="`max_age` must be "):
        dho2.alarms({}, max_age=value)


def test_counters_count_from_the_metrics_before():
    late = {**_FINE, "rejected_refreshes": 2, "skipped_probes": 3, "stalls": 1.0, "probe_interval": 1, "matvecs": 170}
    assert dho2.alarms(late, late) == []
    early = {**late, "rejected_refreshes": 0, "matvecs": 168}
    [line] = dho2.alarms(late, early)
    assert line.startswith("rejected refreshes: 2 of 4 probes")


def test_what_is_missing_raises_no_alarm():
    assert dho2.alarms({}) == []
    assert dho2.alarms(dict.fromkeys(_FINE, np.nan)) == []
    assert dho2.alarms({**_FINE, "refreshes": 2, "rejected_refreshes": 0, "missed_curvature": 10.0}) == []


def test_the_code_of_the_page_runs(capsys):
    page = Path(__file__).parents[1] / "docs" / "monitoring.md"
    names = {}
    for block in python_blocks(page.read_text()):
        exec(block, names)
    folder = names["folder"]
    assert len(names["records"]) == 100
    assert {path.name for path in folder.glob("*.png")} == {
        f"{x}.png" for x in ("spectrum", "loss", "memory", "density")
    }
    assert list((folder / "run").glob("events.out.tfevents.*"))
    # Of alarms it prints none, and then the part of the eigenvalues that is negative.
    [line] = capsys.readouterr().out.splitlines()
    assert 0 <= float(line) < 0.6
    shutil.rmtree(folder)


def test_the_page_names_every_limit_with_its_default():
    text = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text()
    for name, parameter in inspect.signature(dho2.alarms).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            [shown] = set(re.findall(rf"`{name}=([^`]*)`", text))
            assert float(shown) == parameter.default, name
