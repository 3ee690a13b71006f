"""What the proof of concept writes of every update, when it begins anew and when it goes on."""

import pytest

from dho2_optax.poc.recording import Recorder
from dho2_optax.poc.results import Row
from dho2_optax.writers import read
from tests.test_writers import scalars

_ROW = Row("digits", "dho2", 2, 3, 0.1, "compiled")


def _write(recorder, steps, loss):
    with recorder.of(_ROW, "a-run", tuning=False) as record:
        for step in steps:
            record(step, {"loss": loss})
    recorder.close()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_recorder_replaces_or_goes_on(tmp_path, resume):
    file, folder = tmp_path / "metrics.jsonl", tmp_path / "board"
    _write(Recorder(file, folder), (0, 1, 2), 0.5)
    # Under another second: the names of event files have no finer time.
    for path in (folder / "a-run").iterdir():
        path.rename(path.with_name("events.out.tfevents.0"))
    _write(Recorder(file, folder, resume=resume), (2, 3), 0.25)
    first = [("loss", step, 0.5) for step in range(3)] if resume else []
    found, taken_up = scalars(folder / "a-run")
    assert found == [*first, ("loss", 2, 0.25), ("loss", 3, 0.25)]
    assert taken_up == ([2] if resume else [])
    records = read(file)
    assert [(record["step"], record["loss"]) for record in records] == [(step, loss) for _, step, loss in found]
    run = {"task": "digits", "optimizer": "dho2", "devices": 2, "learning_rate": 0.1, "seed": 3, "tuning": False}
    assert all(run.items() <= record.items() for record in records)


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(Recorder(None, None), (0,), 0.5)
    assert not list(tmp_path.iterdir())
