"""Lines of JSON and scalars for TensorBoard, read back."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

import dho2_optax as dho2
from dho2_optax.writers import JSONLines, TensorBoard, read

_VALUES = {
    "loss": jnp.float32(0.5),
    "half": jnp.bfloat16(1.5),
    "count": np.int32(3),
    "flag": True,
    "number": 2.25,
    "unknown": jnp.float32(jnp.nan),
    "pair": jnp.asarray([1.0, jnp.inf]),
}


def scalars(folder):
    """(name, step, value) of all event files, and the steps at which a run was taken up."""
    found, taken_up = [], []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            [size] = struct.unpack("<Q", data[:8])  # and its checksum; behind the record another
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            taken_up += [event.step] * (event.session_log.status == 1)
    return found, taken_up


def test_lines_of_json_are_written_at_once_and_read_back(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with JSONLines(path) as writer:
        writer.write(0, {**_VALUES, "run": "a"})
        [line] = path.read_text().splitlines()
        writer.write(jnp.int32(1), {"loss": 0.25})
    assert json.loads(line) == {
        "step": 0,
        "loss": 0.5,
        "half": 1.5,
        "count": 3,
        "flag": True,
        "number": 2.25,
        "unknown": None,
        "pair": [1.0, None],
        "run": "a",
    }
    first, second = read(path)
    assert math.isnan(first["unknown"])
    assert math.isnan(first["pair"][1])
    assert second == {"step": 1, "loss": 0.25}


def test_a_file_is_replaced_or_gone_on_with(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, append in ((0, False), (1, True)):
        with JSONLines(path, append=append) as writer:
            writer.write(step, {})
    assert [record["step"] for record in read(path)] == [0, 1]
    JSONLines(path).close()
    assert read(path) == []


def test_what_goes_on_replaces_a_last_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for before, steps in (('{"step": 0}\n{"st', [0, 1]), ('{"st', [1]), ("", [1])):
        path.write_text(before)
        with JSONLines(path, append=True) as writer:
            writer.write(1, {})
        assert [record["step"] for record in read(path)] == steps


def test_a_last_line_that_was_cut_off_is_left_out_and_others_are_errors(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st')
    assert read(path) == [{"step": 0}]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="`path` must be a file of JSON lines, got in line 2"):
        read(path)


def test_scalars_for_tensorboard(tmp_path):
    with TensorBoard(tmp_path / "run") as writer:
        writer.write(0, _VALUES)
        writer.write(7, {"loss": 0.25})
    found, taken_up = scalars(tmp_path / "run")
    assert found == [
        ("loss", 0, 0.5),
        ("half", 0, 1.5),
        ("count", 0, 3),
        ("flag", 0, 1),
        ("number", 0, 2.25),
        ("pair/0", 0, 1),
        ("loss", 7, 0.25),
    ]
    assert taken_up == []
    with TensorBoard(tmp_path / "run", from_step=5) as writer:
        writer.write(5, {"loss": 0.75})
    assert scalars(tmp_path / "run")[1] == [5]


@pytest.mark.parametrize("make", [lambda folder: JSONLines(folder / "a.jsonl"), TensorBoard], ids=["json", "board"])
def test_metrics_of_an_optimizer_are_taken_and_nonsense_is_refused(make, tmp_path):
    state = dho2.dho2(optax.sgd(0.1), rank=2).init(jnp.ones(3))
    with make(tmp_path) as writer:
        writer.write(0, dho2.metrics(state))
        with pytest.raises(ValueError, match=r"`step` must be a whole number, got 0\.5"):
            writer.write(0.5, {})
        with pytest.raises(ValueError, match="`values` must not have the name 'step', got 3 for it"):
            writer.write(0, {"step": 3})
        with pytest.raises(ValueError, match=r"`values` must hold numbers.*, got None"):
            writer.write(0, {"loss": None})
        with pytest.raises(ValueError, match="`values` must hold numbers"):
            writer.write(0, {"state": 1j})
        writer.close()


def test_without_tensorboardx_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'tensorboardX is missing: pip install "dho2_optax\[monitor\]"'):
        TensorBoard(tmp_path)
