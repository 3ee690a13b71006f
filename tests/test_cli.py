import dataclasses
import errno
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

import dho2_optax as dho2
from dho2_optax import cli
from dho2_optax.poc import data, report, runner, tasks
from dho2_optax.writers import read

TASK_MODULE = """
import dataclasses
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

def empty():
    return Task("empty", None, None, {"x": np.ones((0, 3))}, {"x": np.ones(3)})

def no_arrays():
    return Task("no arrays", None, None, {}, {})

def exits():
    raise SystemExit(3)

class Speechless(BaseException):
    def __str__(self):
        raise RuntimeError

def speechless():
    raise Speechless

def wordy():
    raise RuntimeError("word " * 10_000)

def no_parameters():
    return _changed(init=lambda key: key.no_such_attribute)

def other_test_data():
    return _changed(test={"x": np.ones((4, 2))})

def vector_accuracy():
    return _changed(accuracy=lambda params, batch: batch["y"])

def _changed(**changes):
    return dataclasses.replace(line(), **changes)

def named_long():
    return _changed(name="a" * 10_000)

def named_on_two_lines():
    return _changed(name="a\\nb")

def named_by_no_text():
    return _changed(name="\\ud800")

def named_by_number():
    return _changed(name=3)

def named_oddly():
    return _changed(name="[/a] $x^$ :smile: <b> ../é" + "e" * 70)

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
    assert len(lines[0]) < 1100
    assert lines[0].isprintable()
    return lines[0]


def _train(task_module, *arguments):
    return cli.main(["poc", "--task", f"{task_module}:line", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--steps", "many"], "--steps: expected a whole number"),
        (["--steps", "1" + "0" * 400], "--steps: expected a whole number of at most 2147483647"),
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
        (["--model", "transformer"], "unknown model 'transformer': choose from pinn, mlp, cnn"),
        (["--model", "pinn", "--data", "digits"], "--model pinn solves an equation and reads no data"),
        (["--model", "mlp,"], "--model: expected names separated by commas"),
        (["--optimizers", "sgd,newton"], "argument --optimizers: unknown optimizer 'newton': choose from sgd, adam"),
        (["--lr", "adam"], "--lr: expected NAME=VALUE, got 'adam'"),
        (["--lr", "adam=fast"], "--lr: expected a number, got 'fast'"),
        (["--lr", "adam=-1"], "--lr: a learning rate must be positive"),
        (["--lr", "newton=1"], "argument --lr: unknown optimizer 'newton': choose from sgd, adam"),
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
        (["--task", ""], "--task must look like module:function, got ''"),
        (["--task", ":"], "--task must look like module:function"),
        (["--task", "json:"], "--task must look like module:function"),
        (["--task", ":loads"], "--task must look like module:function"),
        (["--task", "json:loads:loads"], "--task must look like module:function"),
        (["--task", "-x:f"], "--task: expected one argument"),
        (["--task=-x:f"], "No module named '-x'"),
        (["--task", ".:f"], "--task .:f: TypeError"),
        (["--task", "..json:f"], "--task ..json:f: TypeError"),
        (["--task", "no_such..module:f"], "No module named 'no_such'"),
        (["--task", "\0:f"], r"--task \x00:f: "),
        (["--task", "json:\0"], r"--task json:\x00: AttributeError"),
        (["--task", "\x1b[31m\n:f"], r"--task \x1b[31m :f: ModuleNotFoundError"),
        (["--task", "\ud800é☃:f"], r"--task \ud800é☃:f: ModuleNotFoundError"),
        (["--task", "x" * 10_000], "--task must look like module:function, got 'xxx"),
        (["--task", "x" * 10_000 + ":f"], "x:f: ModuleNotFoundError: No module named 'xxx"),
        (["--task", "json:" + "x" * 10_000], "AttributeError: module 'json' has no attribute 'xxx"),
        (["--task", "json." * 2_000 + "x:f"], "RecursionError"),
        (["--task", "sys:exit"], "--task sys:exit failed: SystemExit"),
        (["--data", "x" * 10_000], "x cannot be read: File name too long"),
        (["--data", "\0"], r"\x00"),
        (["--data", "\ud800"], r"no data at \ud800"),
        (["--data", "/dev/null"], "/dev/null is a file"),
        (["--data", "/dev/null/x"], "no data at /dev/null/x"),
        (["--out", "x" * 10_000], "x cannot be written: File name too long"),
        (["--out", "\0"], r"--out \x00 cannot be written: "),
        (["--out", "\ud800"], r"--out \ud800 cannot be written: "),
        (["--out", "/dev/null"], "--out /dev/null cannot be written: File exists"),
        (["--out", "/dev/null/x"], "--out /dev/null/x cannot be written: Not a directory"),
        (["--metrics", "x" * 10_000], "x cannot be written: File name too long"),
        (["--metrics", "\0"], r"--metrics \x00 cannot be written: "),
        (["--metrics", "\ud800"], r"--metrics \ud800 cannot be written: "),
        (["--metrics", "/dev/null/x"], "--metrics /dev/null/x cannot be written: File exists"),
        (["--tensorboard", "x" * 10_000], "x cannot be written: File name too long"),
        (["--tensorboard", "\0"], r"--tensorboard \x00 cannot be written: "),
        (["--tensorboard", "\ud800"], r"--tensorboard \ud800 cannot be written: "),
        (["--tensorboard", "/dev/null/x"], "--tensorboard /dev/null/x cannot be written: Not a directory"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--step", "3"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert complaint in _rejected(capsys, *arguments)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("not_a_task", "returned int, not a Task"),
        ("fails", "RuntimeError: no such luck"),
        ("vector_loss", "loss_fn must return a scalar"),
        ("uneven", "must share a leading axis"),
        ("empty", "must share a leading axis of at least one sample, got [(0,)]"),
        ("no_arrays", "must share a leading axis of at least one sample, got []"),
        ("exits", "failed: SystemExit: 3"),
        ("speechless", "failed: Speechless"),
        ("wordy", "failed: RuntimeError: word word"),
        ("no_parameters", "init failed: AttributeError"),
        ("other_test_data", "loss_fn failed on a sample of `test`: "),
        ("vector_accuracy", "accuracy must return a scalar"),
        ("named_long", "name of a task must have 1 to 100 printable characters, got 'aaa"),
        ("named_on_two_lines", r"printable characters, got 'a\nb'"),
        ("named_by_no_text", r"printable characters, got '\ud800'"),
        ("named_by_number", "printable characters, got 3"),
    ],
)
def test_a_bad_task_is_one_line(capsys, task_module, function, complaint):
    assert complaint in _rejected(capsys, "--task", f"{task_module}:{function}")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyError('key')", "KeyError: 'key'"),
        ("class Own(BaseException): pass\nraise Own", "Own"),
        ("1 +", "SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_raises_when_imported_is_one_line(capsys, task_module, tmp_path, code, complaint):
    name = f"raising_{task_module}"
    (tmp_path / f"{name}.py").write_text(code)
    assert f"--task {name}:f: {complaint}" in _rejected(capsys, "--task", f"{name}:f")


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


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (("poc",), "rich", "poc"),
        (("plan", "--model", "mlp"), "rich", "poc"),
        (("poc", "--model", "pinn", "--tensorboard", "board"), "tensorboardX", "monitor"),
    ],
)
def test_a_missing_extra_says_how_to_install_it(arguments, package, extra, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name))
    assert cli.main(arguments) == 2
    said = f'dho2-optax: error: {package} is missing: pip install "dho2_optax[{extra}]"\n'
    assert capsys.readouterr().err == said


def test_a_missing_command(capsys):
    assert cli.main([]) == 2
    assert "command" in capsys.readouterr().err


def test_the_help_names_every_optimizer_and_the_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["poc", "--help"])
    said = capsys.readouterr().out
    said = " ".join(said.split())
    assert "sgd, adam, muon, soap, fosi, dho2, dho2-muon, dho2-soap, mr-dho2, mr-dho2-roles" in said
    assert "(default adam,dho2,soap,dho2-soap for pinn, adam,dho2,muon,dho2-muon for others)" in said
    assert "(default pinn,autoencoder,cnn)" in said
    for default in (
        "default 1000 for pinn, 300 for others",
        "30 for pinn, 8 for others",
        "100 for pinn, 50 for others",
    ):
        assert default in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "one of the arguments --model --params --shapes is required"),
        (["--params", "0"], "expected a whole number of at least 1, got '0'"),
        (["--params", "many"], "expected a whole number of at least 1, got 'many'"),
        (["--params", "5", "--shapes", "3x4"], "argument --shapes: not allowed with argument --params"),
        (["--shapes", "3x4,x"], "expected shapes such as 784x1024,1024, got 'x'"),
        (["--shapes", "3x0"], "expected shapes such as 784x1024,1024, got '3x0'"),
        (["--model", "vgg"], "unknown model 'vgg': choose from pinn"),
        (["--params", "5"], "`hardware` must be given on cpu"),
        (["--params", "5", "--hardware", "gtx"], "--hardware gtx: choose from v5e"),
        (["--params", "5", "--hardware", "h100", "--network", "slow"], "expected 10gbit, 25gbit, 100gbit or bytes"),
        (["--params", "5", "--hardware", "h100", "--devices", "0"], "`devices` must be positive, got 0"),
        (["--params", "5", "--hardware", "h100", "--devices", "16"], "`network` must be given for 16 devices"),
        (["--params", "5", "--hardware", "h100", "--rank", "0"], "`rank` must be positive, got 0"),
        (["--params", "5", "--hardware", "h100", "--rank", "two"], "argument --rank: invalid int value: 'two'"),
        (["--params", "5", "--hardware", "h100", "--order", "-1"], "`order` must be positive, got -1"),
        (["--params", "5", "--hardware", "h100", "--interval", "0"], "`interval` must be positive, got 0"),
        (["--params", "5", "--hardware", "h100", "--curvature-devices", "1"], "`curvature_devices` must be fewer than"),
        (["--params", "5", "--hardware", "h100", "--budget", "2"], "`budget` must be below 1, got 2.0"),
        (["--params", "5", "--hardware", "h100", "--budget", "nan"], "`budget` must be positive, got nan"),
        (["--params", "5", "--measure", "--devices", "65"], "at most 64 virtual CPU devices"),
        (["--params", "5", "--measure", "--devices", "2", "--batch-size", "3"], "multiple of the 2 devices, got 3"),
        (["--params", "5", "--hardware", "h100", "--sample-bytes", "-1"], "`sample_bytes` must be non-negative"),
        (["--params", "1e6", "--hardware", "h100", "--rank", "9" * 400], "OverflowError: int"),
        (["--params", "1e6", "--hardware", "h100", "--batch-size", "9" * 400], "OverflowError: int"),
    ],
)
def test_bad_arguments_of_a_plan_are_one_line_and_exit_code_2(capsys, arguments, complaint):
    assert cli.main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_plan_is_printed_as_tables_or_as_json(capsys):
    arguments = ["plan", "--shapes", "784x1024,1024,1024x10,10", "--devices", "4", "--hardware", "h100"]
    arguments += ["--batch-size", "512", "--rank", "4", "--order", "10", "--interval", "20", "--budget", "0.9"]
    arguments += ["--curvature-batch", "64", "--sample-flops", "1e9", "--curvature-devices", "2"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    for text in ("814,090 in 4 arrays", "4, 10, 20", "64 of 512 samples", "forms of refresh", "streaming", "2 + 2"):
        assert text in said
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shapes = [(784, 1024), (1024,), (1024, 10), (10,)]
    options = {"batch_size": 512, "devices": 4, "hardware": "h100", "rank": 4, "order": 10, "interval": 20}
    options |= {"budget": 0.9, "curvature_batch": 64, "sample_flops": 1e9, "curvature_devices": 2}
    assert found == json.loads(json.dumps(dataclasses.asdict(dho2.plan(shapes, **options))))


def test_the_plans_that_the_pages_ask_for_are_made(capsys):
    root = Path(__file__).parents[1]
    pages = (root / "README.md").read_text() + (root / "docs" / "plan.md").read_text()
    commands = re.findall(r"^dho2-optax (plan .*)$|`dho2-optax (plan -[^`]+)`", pages, flags=re.MULTILINE)
    assert len(commands) == 4
    for command in map("".join, commands):
        assert cli.main(command.split()) == 0, command
        assert "forms of refresh" in capsys.readouterr().out


def test_a_plan_for_a_model_takes_its_parameters_work_and_defaults(capsys):
    assert cli.main(["plan", "--model", "mlp", "--hardware", "a100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    task = tasks.from_dataset("mlp", data.load("digits"))
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert found["num_leaves"] == len(jax.tree.leaves(params))
    assert found["num_params"] == sum(x.size for x in jax.tree.leaves(params))
    assert (found["rank"], found["interval"]) == (task.rank, task.refresh_interval)
    assert found["batch_size"] == task.batch_size


def test_a_plan_may_measure_this_machine(capsys):
    arguments = ["plan", "--shapes", "64x32,32", "--measure", "--hardware", "v5e", "--devices", "2", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["hardware"], found["devices"]) == ("cpu", 2)
    assert found["base_seconds"] > 0


@pytest.mark.parametrize("arguments", [["--help"], ["poc", "--help"], ["plan", "--help"]])
def test_the_help_lists_the_exit_codes(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        cli.main(arguments)
    said = capsys.readouterr().out
    for code in ("0, all runs ended", "1, a run failed", "2, the arguments", "130 after Ctrl-C", "143 after SIGTERM"):
        assert code in said


@pytest.mark.parametrize("arguments", [["--help"], ["poc", "--help"], ["plan", "--help"], ["--version"]])
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


def test_every_update_is_recorded_as_it_goes(capsys, task_module, tmp_path):
    file, board = tmp_path / "metrics.jsonl", tmp_path / "board"
    where = ("--metrics", str(file), "--tensorboard", str(board))
    options = ("--optimizers", "adam,dho2", "--devices", "2", "--steps", "12", "--refresh-interval", "5")
    arguments = (
        "poc",
        "--task",
        f"{task_module}:line",
        *options,
        "--rank",
        "2",
        "--out",
        str(tmp_path / "report"),
        *where,
    )
    assert cli.main(arguments) == 0
    capsys.readouterr()
    records = read(file)
    of = {name: [r for r in records if r["optimizer"] == name] for name in ("adam", "dho2")}
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    for row in results["rows"]:
        if row["losses"]:
            found = of[row["optimizer"]]
            assert [r["step"] for r in found] == list(range(12))
            assert [r["loss"] for r in found] == row["losses"]
            assert [r["seconds"] for r in found] == row["seconds"]
            assert {(r["task"], r["devices"], r["seed"], r["tuning"]) for r in found} == {("line", 2, 0, False)}
    assert "refreshes" not in of["adam"][0]
    assert of["dho2"][-1]["refreshes"] == 2
    assert of["dho2"][-1]["eigenvalue_0"] > 0
    assert set(results["rows"][1]["counters"]) == {"refreshes", "rejected_refreshes", "matvecs", "eigenvalue_max"}
    assert len(list(board.glob("*/events.out.tfevents.*"))) == 2
    # What is there is kept, unless it is said that it need not be.
    for kept in (where[:2], where[2:]):
        again = ("poc", "--task", f"{task_module}:line", "--out", str(tmp_path / "other"), *kept)
        assert "is there already: give --overwrite to replace it" in _rejected(capsys, *again[1:])
    assert read(file) == records


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


QUICK = ("--optimizers", "sgd,adam", "--steps", "3", "--devices", "1", "--batch-size", "32")


@pytest.fixture
def untrained(monkeypatch):
    """Runs that train nothing, but report."""
    monkeypatch.setattr(runner._Session, "run_task", lambda self, task: None)


def test_a_name_of_odd_characters_is_reported(capsys, task_module, tmp_path):
    out = tmp_path / "[/o]\udcff"
    code = cli.main(["poc", "--task", f"{task_module}:named_oddly", *QUICK, "--out", str(out)])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    assert "[/a] $x^$ :smile: <b> ../éeee" in captured.out
    assert r"[/o]\udcff/report.html" in captured.out
    assert "[/a] $x^$ :smile: &lt;b&gt; ../éeee" in (out / "report.html").read_text()
    assert len(list(out.glob("loss-*.png"))) == 1


@pytest.mark.parametrize("tune", [False, True])
def test_failed_runs_make_the_exit_code_1_and_are_counted(capsys, task_module, tmp_path, monkeypatch, tune):
    train = runner.train

    def fail(task, program, *rest):
        # Of the tuning, only one rate fails.
        if program.spec.optimizer == "sgd" and program.spec.learning_rate == (0.3 if tune else 0.1):
            raise RuntimeError("out of luck\nand more")
        return train(task, program, *rest)

    monkeypatch.setattr(runner, "train", fail)
    arguments = ["--optimizers", "sgd", "--lr", "sgd=0.1", "--tune"] if tune else []
    code = _train(task_module, *QUICK, *arguments, "--quiet", "--out", tmp_path)
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert captured.err == f"dho2-optax: error: 1 run failed: {tmp_path / 'report.html'} says why\n"
    page = (tmp_path / "report.html").read_text()
    assert "RuntimeError: out of luck" in page
    assert ("1 of the 5 runs that tune sgd failed" in page) == tune
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "complete"


def test_a_second_run_into_a_folder_is_refused_unless_it_overwrites(capsys, task_module, tmp_path, untrained):
    assert _train(task_module, *QUICK, "--out", tmp_path) == 0
    capsys.readouterr()
    results, page = tmp_path / "results.json", tmp_path / "report.html"
    before = results.read_bytes(), page.read_bytes()
    again = ["--task", f"{task_module}:line", *QUICK, "--out", str(tmp_path)]
    assert f"--out {tmp_path} holds results.json of an earlier run: give --overwrite" in _rejected(capsys, *again)
    assert (results.read_bytes(), page.read_bytes()) == before
    results.unlink()
    line = _rejected(capsys, *again)
    assert f"--out {tmp_path} holds report.html" in line
    assert line.endswith("give --overwrite to replace it, or another --out")
    assert page.read_bytes() == before[1]
    assert _train(task_module, *QUICK, "--out", tmp_path, "--overwrite", "--seeds", "7") == 0
    assert json.loads(results.read_text())["settings"]["seeds"] == [7]
    assert page.read_bytes() != before[1]


def test_a_folder_is_one_runs_until_that_ends_or_is_killed(capsys, task_module, tmp_path, untrained):
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        arguments = ["--task", f"{task_module}:line", *QUICK, "--out", str(tmp_path)]
        for more in ([], ["--overwrite"]):
            assert f"--out {tmp_path}: another run writes there" in _rejected(capsys, *arguments, *more)
        assert not (tmp_path / "results.json").exists()
        other.kill()
    assert _train(task_module, *QUICK, "--out", tmp_path) == 0
    assert (tmp_path / ".lock").exists()
    assert _train(task_module, *QUICK, "--out", tmp_path, "--overwrite") == 0


def test_a_run_keeps_its_folder_to_itself(capsys, task_module, tmp_path, monkeypatch):
    lines = []

    def run_a_second(session, task):
        if not lines:
            lines.append("")
            lines.append(_rejected(capsys, "--task", f"{task_module}:line", *QUICK, "--out", str(tmp_path)))

    monkeypatch.setattr(runner._Session, "run_task", run_a_second)
    assert _train(task_module, *QUICK, "--out", tmp_path) == 0
    assert "another run writes there" in lines[1]


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_a_full_disk_is_one_line_and_the_old_file_stays(capsys, task_module, tmp_path, monkeypatch, untrained, name):
    (tmp_path / name).write_text("old")
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(target) == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    code = _train(task_module, *QUICK, "--out", tmp_path, "--overwrite")
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err == f"dho2-optax: error: {tmp_path / name} cannot be written: No space left on device\n"
    assert "How to read this" in captured.out  # the tables are printed all the same
    assert (tmp_path / name).read_text() == "old"
    assert not list(tmp_path.glob("*.part"))


FULL_OUTPUT = "dho2-optax: error: standard output cannot be written: No space left on device\n"


def test_standard_output_that_is_full_is_one_line(capsys, task_module, tmp_path, monkeypatch, untrained):
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert _train(task_module, *QUICK, "--out", tmp_path / "o") == 1
    assert capsys.readouterr().err == FULL_OUTPUT


def test_what_a_full_standard_output_refused_is_not_tried_again_at_the_exit():
    command = [sys.executable, "-m", "dho2_optax", "poc", "--help"]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    assert (done.returncode, done.stderr) == (1, FULL_OUTPUT)


@pytest.fixture
def _hears_interrupts():
    """Here and in processes started from here, also where pytest was started to ignore them, by `nohup`, say."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_hears_interrupts")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_partial_report(capsys, task_module, tmp_path, monkeypatch, number, expected):
    train, write_html = runner.train, report.write_html

    def interrupt_later(task, program, seed, *rest):
        if seed == 2:
            signal.raise_signal(number)
        return train(task, program, seed, *rest)

    def write_and_interrupt(*arguments):
        if number == signal.SIGTERM:  # a second one does not stop the report
            signal.raise_signal(number)
        return write_html(*arguments)

    monkeypatch.setattr(runner, "train", interrupt_later)
    monkeypatch.setattr(report, "write_html", write_and_interrupt)
    before = signal.getsignal(signal.SIGTERM)
    code = _train(task_module, *QUICK, "--optimizers", "sgd", "--seeds", "0,1,2,3", "--out", tmp_path)
    assert code == expected
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == ""
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert [row["seed"] for row in results["rows"]] == [0, 1]
    assert "Interrupted." in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("_hears_interrupts")
@pytest.mark.parametrize(("number", "expected"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_before_any_run_is_one_line(capsys, task_module, tmp_path, number, expected):
    name = f"signalling_{task_module}"
    (tmp_path / f"{name}.py").write_text(f"import signal\nsignal.raise_signal(signal.{number})\n")
    assert cli.main(["poc", "--task", f"{name}:f"]) == expected
    assert capsys.readouterr().err == "dho2-optax: interrupted\n"


@pytest.mark.usefixtures("_hears_interrupts")  # which puts back what was there
def test_an_interrupt_that_the_caller_ignores_stays_ignored(task_module, tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    text = (tmp_path / f"{task_module}.py").read_text()
    (tmp_path / f"{task_module}.py").write_text(f"import signal\nsignal.raise_signal(signal.SIGINT)\n{text}")
    assert _train(task_module, *QUICK, "--optimizers", "sgd", "--out", tmp_path / "o") == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_command_line_runs_outside_the_main_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["poc", "--steps", "0"])))
    thread.start()
    thread.join()
    assert codes == [2]
    assert "--steps: expected a whole number" in capsys.readouterr().err


def _environment():
    """An environment in which the command chooses its devices itself."""
    hidden = ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC")
    return {key: value for key, value in os.environ.items() if key not in hidden}


@pytest.mark.skipif(
    any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="there may be such a device",
)
@pytest.mark.parametrize("arguments", [["plan", "--params", "5"], ["poc", "--devices", "65"]])
def test_a_platform_that_is_not_there_is_one_line(tmp_path, arguments):
    environment = _environment() | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "dho2_optax", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    said = "dho2-optax: error: no device can be used: JAX_PLATFORMS is 'cuda'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_a_disk_that_fills_up_while_updates_are_recorded_is_one_line(task_module, tmp_path):
    command = [sys.executable, "-m", "dho2_optax", "poc", "--task", f"{task_module}:line", *QUICK, "--steps", "2000"]
    command += ["--quiet", "--metrics", "metrics.jsonl", "--out", "report"]
    # JAX warns that it cannot keep compiled programs either.
    environment = {**_environment(), "PYTHONPATH": str(Path(cli.__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    _, errors = process.communicate(timeout=200)
    said = "dho2-optax: error: metrics.jsonl cannot be written: File too large\n"
    assert (process.returncode, errors) == (1, said)
    assert len(read(tmp_path / "metrics.jsonl")) > 50


@pytest.mark.slow
def test_the_command_trains_on_real_data_and_writes_a_self_contained_report(tmp_path):
    out = tmp_path / "report"
    command = [sys.executable, "-m", "dho2_optax", "poc", "--model", "mlp", "--steps", "20"]
    command += ["--devices", "2", "--refresh-interval", "8", "--rank", "2", "--out", str(out)]
    command += ["--optimizers", "sgd,adam,fosi,dho2"]
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
@pytest.mark.usefixtures("_hears_interrupts")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_a_partial_report(tmp_path, number, expected):
    out = tmp_path / "report"
    command = [sys.executable, "-m", "dho2_optax", "poc", "--model", "mlp", "--steps", "100"]
    command += ["--devices", "1", "--optimizers", "sgd", "--out", str(out), "--batch-size", "64"]
    command += ["--seeds", ",".join(map(str, range(1000)))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    deadline = time.monotonic() + 120
    file = out / "results.json"
    while not (file.exists() and json.loads(file.read_text())["rows"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == expected, errors
    assert "Traceback" not in output + errors
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert 1 <= len(results["rows"]) < 1000
    assert "Interrupted" in (out / "report.html").read_text()
    assert not list(out.glob("*.part"))
