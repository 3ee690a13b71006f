"""The train state of linen, and docs/flax.md: its programs run before and after the change that it shows."""

import contextlib
import functools
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dho2_optax as dho2
from dho2_optax.flax import TrainState
from tests.helpers import python_blocks

_BATCH = jnp.linspace(1.0, 3.0, 6)
_PARAMS = {"w": jnp.linspace(0.1, 0.9, 6)}


def _loss(params, batch):
    return jnp.mean(batch * params["w"] ** 2)


def _value(params):
    return _loss(params, _BATCH)


class _WithStatistics(TrainState):
    statistics: Any


def _state(tx, kind=TrainState, **fields):
    return kind.create(apply_fn=None, params=_PARAMS, tx=tx, **fields)


def _spy(seen):
    """SGD that keeps what `update` is given."""

    def update(grads, state, params=None, **extra):
        seen.append(extra)
        return jax.tree.map(lambda g: -0.1 * g, grads), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(4)(x)))


def _trained(tx, params, batch, gather=lambda params: params):
    """The parameters after three updates."""

    @jax.jit
    def step(state, batch):
        def loss_fn(params):
            return jnp.mean((state.apply_fn({"params": gather(params)}, batch[0]) - batch[1]) ** 2)

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params), value_fn=loss_fn)

    state = TrainState.create(apply_fn=_Net().apply, params=params, tx=tx)
    for _ in range(3):
        state = step(state, batch)
    assert int(dho2.metrics(state.opt_state)["refreshes"]) > 0
    return state.params


_REFRESHED = {"rank": 2, "refresh_interval": 1, "warmup_steps": 1, "eigensolver": dho2.Eigensolver(order=4)}


@pytest.mark.parametrize(
    ("tx", "arguments"),
    [
        (dho2.dho2(optax.sgd(0.1), _loss, **_REFRESHED), {"batch": _BATCH}),
        (optax.chain(optax.clip(9.0), dho2.dho2(optax.sgd(0.1), **_REFRESHED)), {"value_fn": _value}),
        (dho2.mr_dho2(optax.sgd(0.1), rank=2), {"hvp": {"w": jnp.ones(6)}}),
    ],
    ids=["batch", "value_fn", "hvp"],
)
def test_what_the_optimizer_needs_gets_to_it(tx, arguments):
    state, grads = _state(tx), jax.grad(_value)(_PARAMS)
    updates, expected = tx.update(grads, tx.init(_PARAMS), _PARAMS, **arguments)
    state = jax.jit(lambda state, grads: state.apply_gradients(grads=grads, **arguments))(state, grads)
    np.testing.assert_allclose(state.params["w"], _PARAMS["w"] + updates["w"], rtol=1e-6)
    assert dho2.metrics(state.opt_state)["matvecs"] == dho2.metrics(expected)["matvecs"] > 0
    assert int(state.step) == 1
    assert state.tx is tx


def test_what_accumulates_gradients_is_told_too_and_refreshes():
    state = _state(dho2.MultiSteps(dho2.dho2(optax.sgd(0.1), _loss, **_REFRESHED), every_k_schedule=2))
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(_value)(state.params), batch=_BATCH))
    for _ in range(4):
        state = step(state)
    assert dho2.metrics(state.opt_state)["refreshes"] > 0
    assert _value(state.params) < _value(_PARAMS)


def test_fields_are_replaced_and_nothing_else_is_kept_from_the_optimizer():
    seen: list[dict[str, Any]] = []
    state = _state(_spy(seen), _WithStatistics, statistics=jnp.zeros(2))
    after = state.apply_gradients(grads=_PARAMS, statistics=jnp.ones(2), value=1.0, batch=_BATCH)
    assert seen[0].keys() == {"value", "batch"}
    np.testing.assert_array_equal(after.statistics, 1)
    np.testing.assert_allclose(after.params["w"], 0.9 * _PARAMS["w"])
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_field_comes_before_an_argument_of_its_name():
    class WithBatch(TrainState):
        batch: Any

    seen: list[dict[str, Any]] = []
    after = _state(_spy(seen), WithBatch, batch=0).apply_gradients(grads=_PARAMS, batch=1)
    assert (seen, after.batch) == ([{}], 1)


def test_a_subclass_names_more_arguments():
    class More(TrainState):
        update_arguments = TrainState.update_arguments | {"temperature"}

    seen: list[dict[str, Any]] = []
    _state(_spy(seen), More).apply_gradients(grads=_PARAMS, temperature=2.0)
    assert seen == [{"temperature": 2.0}]


def test_a_misspelt_argument_is_refused():
    with pytest.raises(TypeError, match="batch_statz"):
        _state(_spy([])).apply_gradients(grads=_PARAMS, batch_statz=1)


def test_other_optimizers_step_as_they_do_in_the_original():
    tx, grads = optax.adam(0.1), jax.grad(_value)(_PARAMS)
    ours = _state(tx).apply_gradients(grads=grads, batch=_BATCH, value_fn=_value)
    theirs = _state(tx, train_state.TrainState).apply_gradients(grads=grads)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    jax.tree.map(np.testing.assert_array_equal, ours.opt_state, theirs.opt_state)


def test_the_core_does_not_import_flax():
    program = "import sys, dho2_optax; assert 'flax' not in sys.modules; from dho2_optax import flax as f; f.TrainState"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# docs/flax.md.

_TEXT = (Path(__file__).parents[1] / "docs" / "flax.md").read_text()
_SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", _TEXT, flags=re.DOTALL | re.MULTILINE))
_LOOPS = ("Flax's linen", "Flax's nnx", "Equinox", "Plain JAX")


def _diff(title: str) -> list[str]:
    [block] = re.findall(r"```diff\n(.*?)```", _SECTIONS[title], flags=re.DOTALL)
    return block.splitlines()


def _side(lines: list[str], sign: str) -> str:
    """The program before (`-`) or after (`+`) the change."""
    return "\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign))


def _run(code: str, names: dict[str, Any] | None = None) -> tuple[dict[str, Any], float]:
    """The names that code leaves behind, and the loss that it prints."""
    names = {} if names is None else dict(names)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, names)
    return names, float(output.getvalue())


@functools.cache
def _after(title: str) -> tuple[dict[str, Any], float]:
    return _run(_side(_diff(title), "+"))


def _optimizer_state(names: dict[str, Any]) -> Any:
    if "optimizer" in names:
        return names["optimizer"].opt_state
    return getattr(names["state"], "opt_state", names["state"])


def test_there_is_a_section_for_each():
    assert list(_SECTIONS) == [*_LOOPS, "Products on a part of the batch"]


@pytest.mark.parametrize("title", _LOOPS)
def test_a_change_of_at_most_five_lines_trains_better(title):
    if title == "Equinox":
        pytest.importorskip("equinox")
    lines = _diff(title)
    assert sum(line.startswith("+") for line in lines) <= 5
    _, before = _run(_side(lines, "-"))
    names, after = _after(title)
    assert dho2.metrics(_optimizer_state(names))["refreshes"] == 4
    assert after < before
    names, streaming = _run(_side(lines, "+").replace("dho2.dho2(", "dho2.mr_dho2("))
    assert dho2.metrics(_optimizer_state(names))["matvecs"] > 16
    assert streaming < 1.1 * before


def test_products_on_a_part():
    blocks = python_blocks(_SECTIONS["Products on a part of the batch"])
    assert len(blocks) == 4
    for title, number in (("Flax's linen", 0), ("Flax's nnx", 1)):
        names, whole = _after(title)
        names, part = _run(blocks[number], names)
        assert part < 1.5 * whole
        assert dho2.metrics(_optimizer_state(names))["refreshes"] == 4
        names, streaming = _run(blocks[number + 2], names)
        assert streaming < 0.1
        assert dho2.metrics(_optimizer_state(names))["matvecs"] > 16


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_parameters_sharded_as_the_batch_train_as_on_one_device(kind):
    """On Explicit axes the loss gathers what it applies, since `nn.Dense` does not."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(kind,))
    x = jax.random.normal(jax.random.key(0), (8, 4))
    batch = x, jnp.sin(3 * x[:, :2])
    params = _Net().init(jax.random.key(1), x)["params"]
    tx = dho2.dho2(optax.adam(1e-2), **_REFRESHED)

    def gather(params):
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec())), params)

    placed = jax.device_put((params, batch), NamedSharding(mesh, PartitionSpec("data")))
    found = _trained(tx, *placed, *([gather] if kind == AxisType.Explicit else []))
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(_trained(tx, params, batch)), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), leaf.ndim)
