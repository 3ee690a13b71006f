"""The proof of concept in several processes, of which one may end before the others."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dho2_optax import cli
from dho2_optax.poc import processes, results
from tests.helpers import AXIS, make_mesh
from tests.processes import ROOT, finish, start
from tests.test_cli import TASK_MODULE

_TOGETHER = "--coordinator, --num-processes, --process-id belong together: give "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "a:1"], _TOGETHER + "--num-processes and --process-id too"),
        (["--num-processes", "2"], _TOGETHER + "--coordinator and --process-id too"),
        (["--coordinator", "a:1", "--process-id", "0"], _TOGETHER + "--num-processes too"),
        (["--num-processes", "2", "--process-id", "0"], _TOGETHER + "--coordinator too"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id must be from 0 to 1, got 2",
        ),
        (
            ["--coordinator", "a", "--num-processes", "2", "--process-id", "0"],
            "--coordinator: expected HOST:PORT, got 'a'",
        ),
        (
            ["--coordinator", "a:99999", "--num-processes", "2", "--process-id", "0"],
            "--coordinator: expected HOST:PORT, got 'a:99999'",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "0", "--process-id", "0"],
            "argument --num-processes: expected a whole number of at least 1, got '0'",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "0", "--devices", "3"],
            "--devices 3 does not divide over 2 processes",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(arguments, message, capsys):
    assert cli.main(["poc", *arguments]) == 2
    assert capsys.readouterr().err == f"dho2-optax: error: {message}\n"
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(("tasks", "expected"), [("4", 4), ("1", 1), (None, 1)])
def test_the_cluster_says_how_many_processes_there_are(tasks, expected, monkeypatch):
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[1-2]", "NTASKS": tasks, "PROCID": "1", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
        if tasks is not None:
            monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes.number(None, None, None) == expected
    assert processes.number("node1:99", 3, 0) == 3


def test_where_the_cluster_cannot_be_asked_there_is_one_process(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a pod of no job, without the package of Kubernetes
    assert processes.number(None, None, None) == 1


def test_one_process_has_its_devices_in_order_and_places_as_ever():
    assert processes.is_first()
    assert processes.devices(3) == jax.devices()[:3]
    sharding = NamedSharding(make_mesh(4), PartitionSpec(AXIS))
    placed = processes.put({"x": np.arange(8.0)}, sharding)
    assert placed["x"].sharding == sharding
    processes.check(jax.errors.JaxRuntimeError("that of one process is a failed run, and nothing more"))


def _command(out, *arguments):
    task = () if "--resume" in arguments else ("--task", "lines:line")
    return ("-W", "error", "-m", "dho2_optax", "poc", *task, "--out", str(out), *arguments)


@pytest.fixture
def _here(tmp_path, monkeypatch):
    (tmp_path / "lines.py").write_text(TASK_MODULE)
    monkeypatch.chdir(tmp_path)


def _start(num_processes, num_devices, out, *arguments):
    path = os.pathsep.join([str(ROOT), str(out.parent)])
    return start(num_processes, num_devices, *_command(out, *arguments), PYTHONPATH=path)


def _said(text):
    """What was written, without what the runtime tells of its own connections."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_two_processes_find_what_one_does_and_the_first_alone_speaks(tmp_path):
    arguments = ("--optimizers", "adam,dho2,mr-dho2-roles", "--steps", "20", "--refresh-interval", "8", "--rank", "2")
    arguments += ("--devices", "4")
    one, two = tmp_path / "one", tmp_path / "two"
    [(code, _, errors)] = finish(_start(1, 4, one, *arguments))
    assert code == 0, errors
    ends = finish(_start(2, 2, two, *arguments))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert any(line.startswith("Verdict") for line in _said(ends[0][1]))
    assert _said(ends[1][1]) == _said(ends[1][2]) == []
    rows = [{row["optimizer"]: row for row in json.loads((x / "results.json").read_text())["rows"]} for x in (one, two)]
    for name in ("adam", "dho2"):
        alone, shared = (found[name] for found in rows)
        assert shared["status"] == "ok"
        np.testing.assert_allclose(shared["losses"], alone["losses"], rtol=1e-5)
        np.testing.assert_allclose(shared["test_loss"], alone["test_loss"], rtol=1e-5)
        assert shared["total_bytes"] == alone["total_bytes"]
        assert shared["refresh_steps"] == alone["refresh_steps"]
    assert rows[1]["mr-dho2-roles"]["status"] == "needs one process"
    machine = json.loads((two / "results.json").read_text())["machine"]
    assert (machine["process_count"], machine["device_count"]) == (2, 4)
    assert "Several processes shared the work" in (two / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and "cache" not in path.name) == [
        "one",
        "two",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("gone", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)], ids=["first", "second", "hangs"]
)
def test_where_one_process_is_lost_the_other_ends_in_time_with_one_clear_line(gone, how, tmp_path):
    out = tmp_path / "report"
    seeds = ",".join(map(str, range(2000)))
    both = _start(2, 2, out, "--optimizers", "sgd", "--steps", "50", "--devices", "4", "--seeds", seeds)
    deadline = time.monotonic() + 150
    try:
        while not (out / "results.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert all(process.poll() is None for process in both)
        both[gone].send_signal(how)
        begin = time.monotonic()
        _, errors = both[1 - gone].communicate(timeout=processes.HEARTBEAT_SECONDS + 30)
        seconds = time.monotonic() - begin
    finally:
        both[1 - gone].kill()
        both[gone].kill()
        both[gone].communicate()
    assert both[1 - gone].returncode == 1, errors
    assert seconds < processes.HEARTBEAT_SECONDS + 15
    said = [line for line in errors.splitlines() if line.startswith("dho2-optax")]
    assert len(said) == 1, errors
    assert re.match("dho2-optax: error: another process has ended or cannot be reached", said[0])
    assert "Traceback" not in errors


_STEPS = 200
_SAVED = (
    "--optimizers",
    "dho2",
    "--steps",
    str(_STEPS),
    "--devices",
    "2",
    "--rank",
    "2",
    "--refresh-interval",
    "10",
    "--lr",
    "dho2=0.01",
)


def _row(out):
    [row] = json.loads((out / "results.json").read_text())["rows"]
    return row


def _last_checkpoint(out):
    return max((int(path.name) for path in (out / "poc-checkpoints").glob("*/*") if path.name.isdigit()), default=0)


def _steps_made():
    """The steps that were made, in the order of their making, by the lines of `--metrics`."""
    return [json.loads(line)["step"] for line in Path("metrics").read_text().splitlines()]


def _stop_one(out, gone, how, deadline=150):
    """Start two processes and send one of them a signal after some checkpoints; the ends of both."""
    both = _start(2, 1, out, *_SAVED, "--metrics", "metrics", "--checkpoint-every", "0.3")
    end = time.monotonic() + deadline
    while _last_checkpoint(out) < 12 and all(x.poll() is None for x in both) and time.monotonic() < end:
        time.sleep(0.01)
    both[gone].send_signal(how)
    return finish(both)


def _assert_goes_on(out, num_processes, num_devices, expected):
    """From its last checkpoint, to the end of the run that was never stopped."""
    step, before = _last_checkpoint(out), len(_steps_made())
    assert 12 <= step < _STEPS
    ends = finish(_start(num_processes, num_devices, out, "--resume"))
    assert [code for code, _, _ in ends] == [0] * num_processes, ends
    assert not any(_said(errors) for _, _, errors in ends)
    assert _steps_made()[before:] == list(range(step, _STEPS))  # nothing is done again
    row = _row(out)
    assert (row["status"], row["taken_up"]) == ("ok", [[step, num_processes * num_devices]])
    np.testing.assert_allclose(row["losses"], expected["losses"], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(row["test_loss"], expected["test_loss"], rtol=1e-5, atol=1e-9)
    assert row["refresh_steps"] == expected["refresh_steps"]
    assert len(row["seconds"]) == _STEPS
    assert not (out / "poc-checkpoints").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_after_one_of_two_processes_is_killed_both_go_on_from_the_last_checkpoint(tmp_path):
    """Or one goes on alone, with the devices that it has."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "report"
    [(code, _, errors)] = finish(_start(1, 2, undisturbed, *_SAVED))
    assert code == 0, errors
    ends = _stop_one(out, 1, signal.SIGKILL)
    assert [code for code, _, _ in ends] == [1, -signal.SIGKILL], ends
    [said] = [line for line in ends[0][2].splitlines() if line.startswith("dho2-optax")]
    assert "another process has ended or cannot be reached" in said
    shutil.copytree(out, tmp_path / "copy")
    _assert_goes_on(out, 2, 1, _row(undisturbed))
    _assert_goes_on(tmp_path / "copy", 1, 1, _row(undisturbed))


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_where_one_process_is_told_to_stop_all_stop_after_the_same_step(tmp_path):
    out = tmp_path / "report"
    ends = _stop_one(out, 1, signal.SIGTERM)
    assert [code for code, _, _ in ends] == [130, 143], ends
    found = results.Results.load(out / "results.json")
    assert (found.status, found.rows) == ("interrupted", [])
    assert _steps_made() == list(range(_last_checkpoint(out)))  # the step that ran is ended and saved
    assert (out / "report.html").exists()
