import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dho2_optax import cli

TASK_MODULE = """
import jax.numpy as jnp
import numpy as np
from dho2_optax.poc.tasks import Task

def line():
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32)
    return Task(
        name="line",
        init=lambda key: {"w": jnp.zeros(3)},
        loss_fn=lambda params, batch: jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2),
        train={"x": x, "y": y},
        test={"x": x, "y": y},
    )

def not_a_task():
    return 3

def fails():
    raise RuntimeError("no such luck\\nsecond line")

def vector_loss():
    task = line()
    return Task("vector", task.init, lambda params, batch: batch["y"], task.train, task.test)

def uneven():
    return Task("uneven", None, None, {"x": np.ones(3), "y": np.ones(4)}, {"x": np.ones(3)})

"""


@pytest.fixture
def task_module(tmp_path, monkeypatch):
    """A module of tasks in the current directory, importable under a name of its own."""
    name = f"tasks_of_{re.sub('[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / f"{name}.py").write_text(TASK_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return name


def _rejected(capsys, *arguments):
    """Run a command that must be refused, and return its one line of complaint."""
    code = cli.main(["poc", *arguments])
    captured = capsys.readouterr()
    assert code == 2
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("dho2-optax: error: ")
    assert "Traceback" not in captured.err
    return lines[0]


def _train(task_module, *arguments):
    return cli.main(["poc", "--task", f"{task_module}:line", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--steps", "many"], "--steps: expected a whole number"),
        (["--epochs", "-3"], "--epochs: expected a whole number"),
        (["--steps", "5", "--epochs", "5"], "not allowed with"),
        (["--batch-size", "-1"], "--batch-size: expected a whole number"),
        (["--batch-size", "100", "--devices", "8"], "--batch-size 100 does not divide over 8"),
        (["--batch-size", "5000"], "--batch-size 5000: there are only 1438 training samples"),
        (["--devices", "0"], "--devices: expected a whole number"),
        (["--devices", "1,x"], "--devices: expected a whole number of at least 1, got 'x'"),
        (["--devices", "16"], "--devices 16: there are only 8 devices"),
        (["--devices", "500"], "--devices 500: at most 64 virtual CPU devices"),
        (["--devices", "7,8,5"], "no batch of at most 256"),
        (["--model", "transformer"], "unknown model 'transformer': choose from mlp, cnn"),
        (["--model", "mlp,"], "--model: expected names separated by commas"),
        (["--optimizers", "sgd,newton"], "unknown optimizer 'newton': choose from sgd, adam"),
        (["--lr", "adam"], "--lr: expected NAME=VALUE, got 'adam'"),
        (["--lr", "adam=fast"], "--lr: expected a number, got 'fast'"),
        (["--lr", "adam=-1"], "--lr: a learning rate must be positive"),
        (["--lr", "newton=1"], "unknown optimizer 'newton'"),
        (["--lr", "adam=1", "--optimizers", "sgd"], "--lr adam: that optimizer is not among"),
        (["--target", "nan"], "--target: expected a number, got 'nan'"),
        (["--seeds", "0,-1"], "--seeds: expected a whole number of at least 0"),
        (["--rank", "0"], "--rank: expected a whole number"),
        (["--refresh-interval", "0"], "--refresh-interval: expected a whole number"),
        (["--data", "/no/such/folder"], "no data at /no/such/folder"),
        (["--task", "json"], "--task must look like module:function, got 'json'"),
        (["--task", "no_such_module:f"], "ModuleNotFoundError: No module named 'no_such_module'"),
        (["--task", "json:no_such_function"], "AttributeError"),
        (["--task", "json:__name__"], "__name__ is not a function"),
        (["--task", "json:loads", "--model", "mlp"], "drop --model and --data"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--step", "3"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, arguments, complaint):
    assert complaint in _rejected(capsys, *arguments)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("not_a_task", "returned int, not a Task"),
        ("fails", "RuntimeError: no such luck"),
        ("vector_loss", "loss_fn must return a scalar"),
        ("uneven", "must share a leading axis"),
    ],
)
def test_a_bad_task_is_one_line(capsys, task_module, function, complaint):
    assert complaint in _rejected(capsys, "--task", f"{task_module}:{function}")


def test_a_truncated_file_is_named(capsys, tmp_path):
    path = tmp_path / "test_batch.bin"
    path.write_bytes(b"short")
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(bytes(3073))
    assert f"{path} is truncated" in _rejected(capsys, "--data", str(tmp_path))


def test_an_output_folder_that_cannot_be_written(capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    for out in (blocker, blocker / "below"):
        assert f"--out {out} cannot be written" in _rejected(capsys, "--out", str(out))


def test_a_missing_extra_says_how_to_install_it(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else find(name))
    assert 'rich is missing: pip install "dho2_optax[poc]"' in _rejected(capsys)


def test_a_missing_command(capsys):
    assert cli.main([]) == 2
    assert "command" in capsys.readouterr().err


def test_the_help_names_every_optimizer_and_the_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["poc", "--help"])
    said = capsys.readouterr().out
    assert "sgd, adam, fosi, dho2, mr-dho2, mr-dho2-roles (default sgd,adam,fosi,dho2)" in said


@pytest.mark.parametrize("arguments", [["--help"], ["poc", "--help"], ["--version"]])
def test_help_and_version(capsys, arguments):
    with pytest.raises(SystemExit, match="0"):
        cli.main(arguments)
    assert "dho2-optax" in capsys.readouterr().out


def test_a_users_task_is_trained_and_reported(capsys, task_module, tmp_path):
    out = tmp_path / "report"
    code = _train(
        task_module,
        "--optimizers",
        "sgd,adam",
        "--steps",
        "30",
        "--devices",
        "1,4",
        "--batch-size",
        "32",
        "--out",
        str(out),
        "--seeds",
        "0,1",
    )
    captured = capsys.readouterr()
    assert code == 0
    assert captured.err == ""
    assert "report.html" in captured.out
    results = json.loads((out / "results.json").read_text())
    rows = results["rows"]
    assert {(r["optimizer"], r["devices"], r["seed"]) for r in rows} == {
        (name, devices, seed) for name in ("sgd", "adam") for devices in (1, 4) for seed in (0, 1)
    }
    assert all(row["status"] == "ok" for row in rows)
    # Splitting the batch changes nothing but rounding.
    one, four = (next(r for r in rows if (r["optimizer"], r["devices"], r["seed"]) == ("sgd", n, 1)) for n in (1, 4))
    assert one["losses"] == pytest.approx(four["losses"], rel=1e-4)
    assert one["traffic_per_step"] == 0
    assert four["traffic_per_step"] > 0


def test_a_diverged_run_is_a_marked_row(capsys, task_module, tmp_path):
    code = _train(
        task_module,
        "--optimizers",
        "sgd,adam",
        "--steps",
        "60",
        "--devices",
        "2",
        "--batch-size",
        "32",
        "--lr",
        "sgd=1e12",
        "--out",
        str(tmp_path / "o"),
    )
    assert code == 0
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    status = {row["optimizer"]: row["status"] for row in rows}
    assert status == {"sgd": "diverged", "adam": "ok"}
    assert "diverged" in capsys.readouterr().out
    assert "diverged" in (tmp_path / "o" / "report.html").read_text()


def test_a_target_that_is_never_reached_is_said(capsys, task_module, tmp_path):
    code = _train(
        task_module,
        "--optimizers",
        "sgd",
        "--steps",
        "5",
        "--devices",
        "1",
        "--batch-size",
        "32",
        "--target",
        "-1",
        "--out",
        str(tmp_path / "o"),
    )
    assert code == 0
    assert "not reached" in capsys.readouterr().out
    [row] = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert row["steps_to_target"] is None


def test_an_optimizer_that_needs_more_devices_is_a_marked_row(capsys, task_module, tmp_path):
    code = _train(
        task_module,
        "--optimizers",
        "sgd,mr-dho2-roles",
        "--steps",
        "3",
        "--devices",
        "1",
        "--out",
        str(tmp_path / "o"),
    )
    assert code == 0
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert {row["optimizer"]: row["status"] for row in rows} == {"sgd": "ok", "mr-dho2-roles": "needs 2 devices"}
    assert "needs 2 devices" in (tmp_path / "o" / "report.html").read_text()
    assert "mr-dho2-roles" in capsys.readouterr().out


def test_quiet_prints_nothing(capsys, task_module, tmp_path):
    code = _train(
        task_module,
        "--optimizers",
        "sgd",
        "--steps",
        "3",
        "--devices",
        "1",
        "--quiet",
        "--out",
        str(tmp_path / "o"),
    )
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err) == (0, "", "")
    assert (tmp_path / "o" / "report.html").exists()


def _environment():
    """An environment in which the command chooses its devices itself."""
    hidden = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC")
    return {key: value for key, value in os.environ.items() if key not in hidden}


@pytest.mark.slow
def test_the_command_trains_on_real_data_and_writes_a_self_contained_report(tmp_path):
    out = tmp_path / "report"
    command = [sys.executable, "-m", "dho2_optax", "poc", "--model", "mlp", "--steps", "20"]
    command += ["--devices", "2", "--refresh-interval", "8", "--rank", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["machine"]["versions"]["jax"]
    rows = {row["optimizer"]: row for row in results["rows"]}
    assert set(rows) == {"sgd", "adam", "fosi", "dho2"}
    for name, row in rows.items():
        assert row["status"] == "ok", row["message"]
        assert len(row["losses"]) == len(row["seconds"]) == 20
        assert row["final_loss"] < row["losses"][0]
        assert row["total_bytes"] >= row["parameter_bytes"] + row["temporary_bytes"]
        assert bool(row["refresh_steps"]) == (name in ("fosi", "dho2"))
        assert 0 <= row["test_accuracy"] <= 1
    # Split over two devices, dho2's curvature state, rank vectors and Adam's metric, is smaller than FOSI's replicated
    # one, rank vectors: 3/4 with rank 2.
    assert rows["dho2"]["curvature_state_bytes"] < 0.76 * rows["fosi"]["curvature_state_bytes"]
    page = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page
    assert "@import" not in page
    for png in ("loss-mlp.png", "time.png"):
        assert (out / png).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_interrupted_run_leaves_a_partial_report(tmp_path):
    out = tmp_path / "report"
    command = [sys.executable, "-m", "dho2_optax", "poc", "--model", "mlp", "--steps", "100"]
    command += ["--devices", "1", "--optimizers", "sgd", "--out", str(out), "--batch-size", "64"]
    command += ["--seeds", ",".join(map(str, range(1000)))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    deadline = time.monotonic() + 120
    while not (out / "results.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in output + errors
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert 1 <= len(results["rows"]) < 1000
    assert "Interrupted" in (out / "report.html").read_text()
    assert not list(out.glob("*.part"))
