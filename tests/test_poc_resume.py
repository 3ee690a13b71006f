"""A proof of concept that goes on: what is not measured again, fewer devices, and checkpoints that do not fit."""

import asyncio
import dataclasses
import errno
import gc
import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from dho2_optax import cli
from dho2_optax.poc import processes, report, results, runner, saving, tasks, training

_STEPS = 12


def _valley():
    x = np.linspace(0.5, 1.5, 8, dtype=np.float32)[:, None]
    return tasks.Task(
        name="valley",
        init=lambda key: {"w": jax.random.normal(key, (5,)), "none": np.zeros((0, 2), np.float32)},
        loss_fn=lambda params, batch: (params["w"] ** 2 * np.arange(1, 6, dtype=np.float32)).sum() * batch["x"].mean(),
        train={"x": x},
        test={"x": x},
    )


_SETTINGS = runner.Settings(
    data="valley",
    optimizers=("adam",),
    chosen={"valley": ("adam",)},
    devices=(1,),
    compiled_devices=(),
    batch_size={"valley": 8},
    num_steps={"valley": _STEPS},
    target=None,
    learning_rates={},
    tune=False,
    seeds=(0,),
    rank={"valley": 2},
    refresh_interval={"valley": 5},
    command="dho2-optax poc",
)


_HYBRID = {"optimizers": ("dho2",), "chosen": {"valley": ("dho2",)}}


def _run(folder, *, resume=False, every=0.0, **changes):
    settings = dataclasses.replace(_SETTINGS, **changes)
    earlier = results.Results.load(folder / "results.json") if resume else None
    if earlier is not None:
        assert runner.Settings.of(earlier.settings) == settings
    console = Console(quiet=True)
    return runner.run(settings, [_valley()], folder, console, earlier=earlier, checkpoint_every=every)


@pytest.fixture
def trained(monkeypatch):
    """The runs that are made, each by learning rate and seed; and whether, and after how many steps, one is cut off."""
    real, made, cut = training.train, [], {}

    def train(task, program, seed, evaluate, on_step, *rest):
        made.append((program.spec.learning_rate, seed))

        def show(step, loss):
            on_step(step, loss)
            if cut.get("run") == len(made) and step == cut["step"]:
                raise cut.get("error", KeyboardInterrupt)

        return real(task, program, seed, evaluate, show, *rest)

    monkeypatch.setattr(runner, "train", train)
    monkeypatch.setattr(report, "write_html", lambda *arguments: None)  # takes longer than all else
    return made, cut


def _saved(folder):
    return sorted((folder / "poc-checkpoints").glob("*/*"))


def test_of_writes_that_fail_beside_the_one_that_is_raised_nothing_is_said(capfd, caplog):
    saving._orbax()

    async def fail():
        raise ValueError("File too large")

    async def leave_two():
        await asyncio.wait([asyncio.ensure_future(fail()) for _ in range(2)])  # asks for no result

    asyncio.run(leave_two())
    gc.collect()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_what_has_ended_is_not_run_again_and_what_was_cut_off_goes_on(tmp_path, trained):
    made, cut = trained
    (tmp_path / "whole").mkdir()
    whole = _run(tmp_path / "whole", seeds=(0, 1, 2), **_HYBRID)
    made.clear()
    cut |= {"run": 2, "step": 7}
    found = _run(tmp_path, seeds=(0, 1, 2), **_HYBRID)
    assert (found.status, [row.seed for row in found.rows]) == ("interrupted", [0])
    [checkpoint] = _saved(tmp_path)
    assert checkpoint.name == "7"  # the step that was cut off is lost
    first = found.rows[0]
    made.clear()
    cut.clear()
    found = _run(tmp_path, resume=True, seeds=(0, 1, 2), **_HYBRID)
    assert [seed for _, seed in made] == [1, 2]
    assert found.status == "complete"
    assert dataclasses.replace(found.rows[0], steps_to_target=None, seconds_to_target=None) == dataclasses.replace(
        first, steps_to_target=None, seconds_to_target=None
    )
    assert [row.taken_up for row in found.rows] == [[], [[7, 1]], []]
    for row, other in zip(found.rows, whole.rows, strict=True):
        assert (row.losses, row.test_loss, row.refresh_steps) == (other.losses, other.test_loss, other.refresh_steps)
        assert len(row.seconds) == _STEPS
    assert found.seconds > sum(map(sum, (row.seconds for row in found.rows)))
    assert not (tmp_path / "poc-checkpoints").exists()
    made.clear()
    assert _run(tmp_path, resume=True, seeds=(0, 1, 2), **_HYBRID).rows == found.rows
    assert not made


def test_a_tuning_goes_on_where_it_was_cut_off(tmp_path, trained):
    made, cut = trained
    cut |= {"run": 4, "step": 3}
    found = _run(tmp_path, tune=True)
    assert (found.status, len(found.tried), found.tuning) == ("interrupted", 3, [])
    rates = [rate for rate, _ in made]
    cut.clear()
    made.clear()
    found = _run(tmp_path, resume=True, tune=True)
    assert made[0][0] == rates[3]
    assert not {rate for rate, _ in made[:-1]} & set(rates[:3])
    assert found.tried[3].taken_up == [[3, 1]]
    [search] = found.tuning
    assert found.rows[0].learning_rate == search.chosen
    assert len(search.learning_rates) == len(found.tried)


def test_a_tuning_of_which_a_run_failed_goes_on_and_replaces_what_was_run_at_its_choice(tmp_path, trained):
    made, cut = trained
    cut |= {"run": 7, "step": 4, "error": RuntimeError("out of luck")}
    found = _run(tmp_path, tune=True, every=1e6)
    best = made[6][0]
    assert found.num_failed == 1
    assert [row.learning_rate for row in found.rows] == [found.tuning[0].chosen] != [best]
    cut.clear()
    made.clear()
    found = _run(tmp_path, resume=True, tune=True, every=1e6)
    assert made == [(best, 0), (best, 0)]
    assert (found.num_failed, len(found.tuning), found.tuning[0].chosen) == (0, 1, best)
    assert [row.learning_rate for row in found.rows] == [best]


def test_a_tuning_that_was_cut_off_while_it_was_widened_goes_on_there(tmp_path, trained):
    made, cut = trained
    cut |= {"run": 7, "step": 3}
    changes = {"tune": True, "learning_rates": {"adam": 3.0}, "every": 1e6}
    assert _run(tmp_path, **changes).status == "interrupted"
    rates = [rate for rate, _ in made]
    assert rates[5:] == [0.03, 0.09]
    cut.clear()
    made.clear()
    found = _run(tmp_path, resume=True, **changes)
    assert [rate for rate, _ in made] == [0.09, 0.3]
    [search] = found.tuning
    assert (search.learning_rates, search.chosen, search.widened) == (sorted(rates), 0.3, True)


def test_what_failed_is_tried_again_from_its_last_checkpoint(tmp_path, trained):
    _, cut = trained
    cut |= {"run": 1, "step": 4, "error": RuntimeError("out of luck")}
    found = _run(tmp_path)
    assert (found.status, found.rows[0].status) == ("complete", "failed")
    assert _saved(tmp_path)
    cut.clear()
    found = _run(tmp_path, resume=True)
    assert [(row.status, row.taken_up) for row in found.rows] == [("ok", [[4, 1]])]
    [said] = report._taken_up(found)
    assert "went on from a checkpoint after 4 steps, on 1 device;" in said


def test_on_fewer_devices_a_run_goes_on_with_those_that_can_share_a_batch(tmp_path, trained, monkeypatch):
    _, cut = trained
    (tmp_path / "whole").mkdir()
    whole = _run(tmp_path / "whole", devices=(8,), compiled_devices=(4, 2), **_HYBRID)
    cut |= {"run": 2, "step": 7}
    _run(tmp_path, devices=(8,), compiled_devices=(4, 2), **_HYBRID)
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    found = _run(tmp_path, resume=True, devices=(8,), compiled_devices=(4, 2), **_HYBRID)
    row = found.rows[0]
    assert (row.devices, row.train_devices, row.taken_up) == (8, 2, [[7, 2]])
    np.testing.assert_allclose(row.losses, whole.rows[0].losses, rtol=1e-4)
    assert [row.devices for row in found.rows] == [8, 2]  # no program for four devices can be made
    assert [row.devices_left for row in found.rows] == [2, None]
    reading = dict(report._said(found))["How to read this"]
    [fewer] = [text for text in reading if "asked for" in text]
    assert fewer.startswith("valley, dho2: 8 devices were asked for, but there were no more than 2 that can share a")
    assert any("8 devices of the kind cpu: their seconds are of there." in text for text in reading)


class _Group:
    """In place of devices that find curvature: counts the steps that it is told of."""

    def __init__(self, context):
        self._steps = 0

    def memory(self, params, batch):
        return SimpleNamespace(total=0)

    def warm_up(self, state, params, batch):
        pass

    def advance(self, state, params, batch):
        self._steps += 1
        return state

    def metrics(self):
        return dict.fromkeys((*training._OF_GROUP, "staleness"), float(self._steps))

    def close(self):
        pass


def test_what_a_group_of_devices_counts_is_of_the_whole_run(tmp_path, trained, monkeypatch):
    _, cut = trained
    optimizer = dataclasses.replace(training.OPTIMIZERS["adam"], group=_Group)
    monkeypatch.setattr(training, "OPTIMIZERS", {"adam": optimizer})
    cut |= {"run": 1, "step": 7}
    _run(tmp_path, devices=(2,))
    cut.clear()
    [row] = _run(tmp_path, resume=True, devices=(2,)).rows
    assert row.taken_up == [[7, 2]]
    assert row.counters == dict.fromkeys(training._OF_GROUP, float(_STEPS)) | {"staleness": _STEPS - 7.0}


def test_a_checkpoint_of_something_else_fails_the_run_and_stays(tmp_path, trained):
    _, cut = trained
    cut |= {"run": 1, "step": 4}
    _run(tmp_path)
    [checkpoint] = _saved(tmp_path)
    folder = checkpoint.parent
    shutil.rmtree(checkpoint)
    with ocp.CheckpointManager(folder, item_names=("arrays", "measured")) as manager:
        arrays = {"params": {"w": np.ones(5)}, "state": {"mu": np.ones(5)}}
        manager.save(4, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), measured=ocp.args.JsonSave({})))
    cut.clear()
    found = _run(tmp_path, resume=True)
    assert found.rows[0].status == "failed"
    assert "ValueError: `state` does not fit `like`: it lacks" in found.rows[0].message
    assert _saved(tmp_path) == [checkpoint]


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path, trained):
    _, cut = trained
    cut |= {"run": 1, "step": 4}
    _run(tmp_path)
    [checkpoint] = _saved(tmp_path)
    for file in (checkpoint / "arrays").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    cut.clear()
    with pytest.raises(saving.CheckpointError, match=r"poc-checkpoints/.*/4 cannot be read: ValueError"):
        _run(tmp_path, resume=True)
    assert _saved(tmp_path) == [checkpoint]


def test_a_checkpoint_that_cannot_be_written_ends_all_and_says_why(tmp_path, trained, monkeypatch):
    made, _ = trained

    def full(*arguments, **options):
        raise ValueError(f"Error writing: [{os.strerror(errno.ENOSPC)}]")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(saving.CheckpointError, match="cannot be written: No space left on device"):
        _run(tmp_path, seeds=(0, 1))
    assert len(made) == 1


def test_checkpoints_are_written_on_a_schedule_only(tmp_path, trained):
    _, cut = trained
    cut |= {"run": 1, "step": 7}
    _run(tmp_path, every=1e6)
    assert not _saved(tmp_path)


# The command line.


def _complaint(capsys, *arguments):
    assert cli.main(["poc", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


def test_what_cannot_go_on_is_one_line(capsys, tmp_path):
    absent = tmp_path / "absent"
    assert _complaint(capsys, "--resume", "--out", absent).endswith(f"--resume: there is no run in {absent}")
    assert not absent.exists()
    (tmp_path / "results.json").write_text('{"machine": {}, "set')
    assert "results.json holds no results of this version: JSON" in _complaint(capsys, "--resume", "--out", tmp_path)
    (tmp_path / "results.json").write_text('{"machine": {}, "settings": {}, "tasks": [], "future": 1}')
    assert "results.json holds no results of this version: Type" in _complaint(capsys, "--resume", "--out", tmp_path)
    (tmp_path / "results.json").write_text('{"machine": {}, "settings": {"rank": 3}, "tasks": []}')
    assert "the settings are not of this version: KeyError" in _complaint(capsys, "--resume", "--out", tmp_path)
    line = _complaint(capsys, "--resume", "--out", tmp_path, "--steps", 3)
    assert line.endswith("--resume goes on with the options of the run in --out: drop --steps")
    assert "not allowed with argument" in _complaint(capsys, "--resume", "--overwrite")
    assert "expected a number of at least 0, got '-1'" in _complaint(capsys, "--checkpoint-every", "-1")


def test_processes_that_cannot_share_a_run_do_not_go_on_with_it(capsys, tmp_path, trained, monkeypatch):
    _, cut = trained
    cut |= {"run": 1, "step": 4}
    _run(tmp_path, devices=(4,))
    monkeypatch.setattr(cli, "_join", lambda options, most: (3, 3))
    line = _complaint(capsys, "--resume", "--out", tmp_path)
    assert "--resume: 3 processes cannot share 4 devices and batches of 8: start no more than the first, and" in line
    monkeypatch.setattr(cli, "_join", lambda options, most: (8, 8))
    assert "8 processes cannot share 4 devices" in _complaint(capsys, "--resume", "--out", tmp_path)
    assert _saved(tmp_path)


def test_a_process_that_does_not_see_the_folder_of_the_first_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    out = tmp_path / "of the first alone"
    line = _complaint(capsys, "--model", "mlp", "--steps", 1, "--devices", 1, "--out", out)
    assert line.endswith(f"--out {out}: not the folder of the first process; give one that all processes see")
    assert not out.exists()
