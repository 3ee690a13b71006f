"""The proof of concept killed, stopped and out of disk: what is left, and how it goes on."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dho2_optax import cli

pytestmark = pytest.mark.timeout(3600)  # seconds of the clock, not of the processor

# Parameters enough for a refresh, or a probe, that takes longer than what else there is in a step.
_TASK = """
import jax, jax.numpy as jnp, numpy as np
from dho2_optax.poc.tasks import Task

def net():
    x = np.random.default_rng(0).normal(size=(96, 30)).astype(np.float32)
    data = {"x": x, "y": np.tanh(x @ np.linspace(-1, 1, 30, dtype=np.float32))}

    def init(key):
        first, second = jax.random.split(key)
        return {"w": jax.random.normal(first, (30, 20)) / 5, "v": jax.random.normal(second, (20,)) / 4}

    def loss_fn(params, batch):
        return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]) ** 2)

    return Task("net", init, loss_fn, data, data, batch_size=24)
"""
# The command, and a kill by itself: so many seconds after a step has ended, in the middle of the next one.
_COMMAND = """
import os, signal, sys, threading, time
from dho2_optax import cli
from dho2_optax.poc import runner

after, seconds = int(os.environ.get("KILL_AFTER", -1)), float(os.environ.get("KILL_SECONDS", 0))
train = runner.train

def die():
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGTERM if "KILL_BY" in os.environ else signal.SIGKILL)

def killed_later(task, program, seed, evaluate, on_step, *rest):
    def and_die(step, loss):
        on_step(step, loss)
        if step == after:
            die() if "KILL_BY" in os.environ else threading.Thread(target=die).start()
        if step == after + 1:
            open("survived", "w").close()
    return train(task, program, seed, evaluate, and_die, *rest)

runner.train = killed_later
sys.exit(cli.main(sys.argv[1:]))
"""
_STEPS = 60
_INTERVAL = 10
_OPTIONS = ["--task", "net:net", "--steps", str(_STEPS), "--devices", "1", "--rank", "3", "--quiet"]
_OPTIONS += ["--refresh-interval", str(_INTERVAL), "--optimizers", "dho2,mr-dho2", "--checkpoint-every", "0"]
_UNFINISHED = ".orbax-checkpoint-tmp"


_PROCESSES = []


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(_TASK)
    yield tmp_path
    for process in _PROCESSES:
        process.kill()
    _PROCESSES.clear()


def _start(folder, *arguments, **environment):
    """The command in a process of its own, with as many devices as `--devices` says."""
    variables = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    root = str(Path(cli.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, "poc", *arguments, "--out", "out"],
        cwd=folder,
        env={**variables, "PYTHONPATH": root, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _PROCESSES.append(process)
    return process


def _finish(process, expected=0):
    output, errors = process.communicate(timeout=900)
    assert process.returncode == expected, errors
    return output, errors


def _rows(folder):
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["status"] == "complete"
    assert not (folder / "out" / "poc-checkpoints").exists()
    return {row["optimizer"]: row for row in results["rows"]}


def _await(process, condition, seconds=600.0):
    """Whether a condition has come true before the process ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def _names(folder):
    """What there is in a folder that may change or go away meanwhile."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _checkpoints(folder):
    """The step of the last complete checkpoint of every run, and the names of those that are not complete."""
    parent = folder / "out" / "poc-checkpoints"
    names = {run: _names(parent / run) for run in _names(parent)}
    steps = {run: max((int(x) for x in inside if x.isdigit()), default=0) for run, inside in names.items()}
    return steps, {(run, x) for run, inside in names.items() for x in inside if x.endswith(_UNFINISHED)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "net.py").write_text(_TASK)
    _finish(_start(folder, *_OPTIONS[:-1], "1000000"))
    return _rows(folder)


def _assert_same(rows, expected):
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        assert row["losses"] == expected[name]["losses"]
        assert row["test_loss"] == expected[name]["test_loss"]
        assert row["refresh_steps"] == expected[name]["refresh_steps"]
        assert row["probe_steps"] == expected[name]["probe_steps"]
        assert len(row["seconds"]) == _STEPS


def _kill(folder, arguments, how, undisturbed, rng):
    """Start the command and kill it: whether that came when it should, or None if it ended before."""
    (folder / "survived").unlink(missing_ok=True)
    (done, unfinished), variables = _checkpoints(folder), {}
    if how == "refresh":  # the next one of dho2, or the last step
        last = max((step for run, step in done.items() if "-dho2-" in run), default=0)
        step = next((step for step in undisturbed["dho2"]["refresh_steps"] if step > last), _STEPS - 1)
        seconds = rng.uniform(0.2, 0.8) * undisturbed["dho2"]["seconds"][step]
        variables = {"KILL_AFTER": str(step - 1), "KILL_SECONDS": str(seconds)}
    process = _start(folder, *arguments, **variables)
    if how == "random":
        _await(process, lambda: _checkpoints(folder)[0] != done)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
    elif how == "save":
        _await(process, lambda: _checkpoints(folder)[1] - unfinished)
        process.kill()
    process.communicate(timeout=900)
    if process.returncode == 0:
        return None
    assert process.returncode == -signal.SIGKILL
    after, unfinished = _checkpoints(folder)
    assert all(after[run] >= step for run, step in done.items() if run in after)  # no checkpoint is lost
    return {"random": True, "save": bool(unfinished), "refresh": not (folder / "survived").exists()}[how]


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_is_not(folder, undisturbed):
    """At random moments, in a save, in a refresh or a probe."""
    rng = random.Random(0)
    ways, times = ["random", "save", "refresh"] * 7, dict.fromkeys(("random", "save", "refresh"), 0)
    arguments = _OPTIONS
    for how in ways:
        came_in_time = _kill(folder, arguments, how, undisturbed, rng)
        if came_in_time is None:  # the run is over; another one
            _assert_same(_rows(folder), undisturbed)
        times[how] += came_in_time is True
        arguments = ["--resume", "--quiet"] if came_in_time is not None else [*_OPTIONS, "--overwrite"]
    _finish(_start(folder, *arguments))
    _assert_same(_rows(folder), undisturbed)
    assert times["random"] == 7, times
    assert min(times.values()) >= 4, times
    assert "went on from a checkpoint" in (folder / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_is_stopped_for_a_while_goes_on(folder, undisturbed):
    process = _start(folder, *_OPTIONS)
    assert _await(process, lambda: _checkpoints(folder)[0])
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    before = _checkpoints(folder)
    time.sleep(1)
    assert _checkpoints(folder) == before
    process.send_signal(signal.SIGCONT)
    _finish(process)
    _assert_same(_rows(folder), undisturbed)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on(folder, undisturbed):
    """Also without any checkpoint before."""
    process = _start(folder, *_OPTIONS[:-1], "1000000")
    assert _await(process, lambda: "results.json" in _names(folder / "out"))
    process.kill()
    process.communicate()
    process = _start(folder, "--resume", "--quiet", KILL_AFTER="26", KILL_BY="TERM")
    _, errors = _finish(process, 143)
    assert errors == ""
    steps, unfinished = _checkpoints(folder)
    assert list(steps.values()) == [27]  # the step that ran is ended
    assert not unfinished
    assert json.loads((folder / "out" / "results.json").read_text())["status"] == "interrupted"
    assert (folder / "out" / "report.html").exists()
    _finish(_start(folder, "--resume", "--quiet"))
    rows = _rows(folder)
    _assert_same(rows, undisturbed)
    assert rows["dho2"]["taken_up"] == [[27, 1]]
    _finish(_start(folder, "--resume", "--quiet"))  # there is nothing left to do
    assert _rows(folder) == rows


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line_and_the_last_checkpoint_stays(folder, undisturbed):
    # JAX warns that it cannot keep compiled programs either.
    process = _start(folder, *_OPTIONS, PYTHONWARNINGS="ignore")
    assert _await(process, lambda: any(_checkpoints(folder)[0].values()))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    [line] = errors.splitlines()
    assert line.startswith("dho2-optax: error: ")
    assert line.endswith("cannot be written: File too large")
    assert any(_checkpoints(folder)[0].values())
    _finish(_start(folder, "--resume", "--quiet"))
    _assert_same(_rows(folder), undisturbed)
    assert _rows(folder)["dho2"]["taken_up"]
