"""As many devices in one process and in several give the same parameters: the example, and what the user shards."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.processes import ROOT, finish, start


def _run(num_processes, folder, optimizer, *options):
    """Eight devices, in one process or shared by several."""
    example = str(ROOT / "examples" / "multi_process.py")
    arguments = ("-W", "error", example, "--checkpoints", str(folder), "--optimizer", optimizer, *options)
    ends = finish(start(num_processes, 8 // num_processes, *arguments))
    assert [code for code, _, _ in ends] == [0] * num_processes, ends
    printed = [[line for line in output.splitlines() if line.startswith("step")] for _, output, _ in ends]
    assert not any(printed[1:])
    return printed[0]


def _saved(folder, step):
    with ocp.PyTreeCheckpointer() as checkpointer:
        path = folder / str(step) / "default"
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, restore_args=as_numpy)


@pytest.mark.parametrize("optimizer", ["dho2", "mr_dho2"])
@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(optimizer, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = _run(1, one, optimizer)
    first = _run(2, two, optimizer, "--steps", "40")
    second = _run(2, two, optimizer)  # goes on from the checkpoint
    assert [line.split(",")[0] for line in (*first, *second)] == ["step 20", "step 40", "step 60"]
    assert first + second == alone
    for step in (40, 60):
        expected, found = _saved(one, step), _saved(two, step)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert expected["state"]["count"] == step
        assert expected["state"]["refreshes"] >= 1
        for got, want in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(expected["params"]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path):
    one, moved = tmp_path / "one", tmp_path / "moved"
    alone = _run(1, one, "dho2")
    assert _run(2, moved, "dho2", "--steps", "20") + _run(1, moved, "dho2") == alone


@pytest.mark.slow
def test_parameters_sharded_by_the_user_over_two_processes_end_as_in_one(tmp_path):
    found = []
    for num_processes in (1, 2):
        out = tmp_path / f"{num_processes}.npz"
        program = ("-W", "error", "-m", "tests.multidevice.sharded", "--out", str(out))
        ends = finish(start(num_processes, 4 // num_processes, *program))
        assert [code for code, _, _ in ends] == [0] * num_processes, ends
        found.append(dict(np.load(out)))
    one, two = found
    assert one.keys() == two.keys()
    assert sum(key.endswith("parts") for key in one) == 3
    for key, want in one.items():
        if key.endswith("parts"):
            assert want == two[key] == 4
        elif key.endswith("refreshes"):
            assert want == two[key] >= 3
        else:
            np.testing.assert_allclose(two[key], want, rtol=1e-5, atol=1e-5, err_msg=key)
