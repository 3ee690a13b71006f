import dataclasses
import json
import math
import resource

import numpy as np
import pytest

from dho2_optax import plots
from dho2_optax.poc import report, results, runner, tasks, training, verdict
from dho2_optax.poc.results import Results, Row


def _row(optimizer, losses, *, devices=8, seed=0, status="ok", refresh_steps=(), probe_steps=(), **fields):
    row = Row("mlp", optimizer, devices, seed, 0.1, status, **fields)
    row.losses, row.seconds = (
        list(losses),
        [0.5 if i in refresh_steps else 0.3 if i in probe_steps else 0.1 for i in range(len(losses))],
    )
    row.refresh_steps, row.probe_steps = list(refresh_steps), list(probe_steps)
    row.measure()
    return row


def _results(*rows, **settings):
    names = list(dict.fromkeys(row.optimizer for row in rows))
    given = {"optimizers": names, "devices": [8], "tune": False, "seeds": [0], "data": "digits"}
    given |= {
        "batch_size": {"mlp": 8},
        "num_steps": {"mlp": 20},
        "rank": {"mlp": 2},
        "refresh_interval": {"mlp": 5},
        "command": "x",
    }
    machine = {"virtual_devices": True, "device_kind": "cpu", "device_count": 8, "date": "today"}
    machine |= {"cpu": "a cpu", "cores": 2, "platform": "here", "versions": {"jax": "1"}}
    machine |= {"commit": None}
    task = {"name": "mlp", "num_parameters": 10, "num_train": 20, "num_test": 10_000}
    task |= {"target": None, "target_reason": ""}
    found = Results(machine=machine, settings=given | settings, tasks=[task], status="complete")
    found.rows = list(rows)
    return found


def _decay(rate, count=20):
    return [math.exp(-rate * i) for i in range(count)]


def test_smoothing_is_a_trailing_mean():
    losses = np.random.default_rng(0).uniform(size=100)
    smooth = plots.smoothed(losses)
    assert np.isinf(smooth[:4]).all()
    for i in (4, 50, 99):
        assert smooth[i] == pytest.approx(losses[i - 4 : i + 1].mean())


def test_a_loss_that_is_far_off_spoils_no_other_window():
    for spike in (1e18, math.inf, math.nan):
        losses = [0.01] * 100
        losses[20] = spike
        smooth = plots.smoothed(losses)
        np.testing.assert_allclose(np.delete(smooth, range(20, 25))[4:], 0.01, rtol=1e-12)
        np.testing.assert_allclose(smooth[20:25], spike / 5)
    assert plots.smoothed([]).shape == (0,)


def test_the_target_is_the_best_baseline_and_counts_steps_and_seconds():
    found = _results(
        _row("sgd", _decay(0.1)),
        _row("adam", _decay(0.2)),
        _row("dho2", _decay(0.4), refresh_steps=[5]),
    )
    found.aim(None)
    [target] = found.targets
    assert target.loss == pytest.approx(1.01 * math.exp(-0.2 * 19))
    assert "adam" in target.origin
    sgd, adam, hybrid = found.rows
    assert sgd.steps_to_target is None
    assert adam.steps_to_target == 20
    assert hybrid.steps_to_target == 11  # exp(-0.4 * 10) is the first below
    assert hybrid.seconds_to_target == pytest.approx(10 * 0.1 + 0.5)


def test_a_baseline_that_ends_at_nothing_is_the_best():
    found = _results(_row("sgd", _decay(0.1)), _row("adam", [1.0] * 19 + [0.0]))
    found.aim(None)
    assert found.targets[0].loss == 0.0
    assert "adam" in found.targets[0].origin


def test_a_given_target_is_used():
    found = _results(_row("sgd", _decay(0.1)))
    found.aim(0.5)
    assert found.targets[0].loss == 0.5
    assert found.rows[0].steps_to_target == 8


def test_a_refresh_costs_what_it_adds_to_a_step():
    row = _row("dho2", _decay(0.1), refresh_steps=[5, 10])
    assert row.refresh_seconds == pytest.approx(0.4)
    assert row.step_seconds_median == pytest.approx(0.1)
    assert row.step_seconds_p99 > 0.4


def test_a_probe_costs_what_it_adds_to_a_step_that_does_nothing_else():
    row = _row("mr-dho2", _decay(0.1, 21), refresh_steps=[10], probe_steps=[0, 4, 8])
    assert row.probe_seconds == pytest.approx(0.2)
    assert row.refresh_seconds == pytest.approx(0.4)
    without_ordinary_steps = _row("mr-dho2", _decay(0.1), refresh_steps=[10], probe_steps=[*range(10), *range(11, 20)])
    assert without_ordinary_steps.probe_seconds is without_ordinary_steps.refresh_seconds is None


def test_the_distribution_of_the_step_times():
    row = Row("mlp", "sgd", 1, 0, 0.1, "ok", losses=[1.0] * 101, seconds=[0.1 + 0.001 * i for i in range(101)])
    row.measure()
    assert row.step_seconds_median == pytest.approx(0.15)
    assert row.step_seconds_p90 == pytest.approx(0.19)
    assert row.step_seconds_p99 == pytest.approx(0.199)
    assert row.step_seconds_max == pytest.approx(0.2)
    assert row.step_seconds_tail == pytest.approx(0.199 / 0.15)


def test_the_report_shows_the_distribution_of_the_step_times(tmp_path):
    from rich.console import Console

    rows = _row("sgd", _decay(0.1)), _row("mr-dho2", _decay(0.1), refresh_steps=[10], probe_steps=[0, 5, 9])
    found = _results(*rows)
    page = report.write_html(found, tmp_path).read_text()
    for title in ("ms/step p90", "ms/step p99", "ms/step max", "p99/median", "ms/probe", "ms/refresh"):
        assert f">{title}</th>" in page
    assert (tmp_path / "steps-mlp.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "tables.txt", "w+") as file:
        report.print_tables(found, Console(file=file, width=80))
        file.seek(0)
        assert "p99/median" in file.read()


def test_the_report_says_which_devices_find_curvature(tmp_path):
    counters = {"launches": 4.0, "installed": 3.0, "staleness": 7.0, "rejected": 0.0, "failures": 1.0, "stalls": 0.0}
    devices = {"train_devices": 4, "curvature_devices": 3}
    row = _row(
        "mr-dho2-roles", _decay(0.1), counters=counters, curvature_device_bytes=5000, total_bytes=4000, **devices
    )
    page = report.write_html(_results(row), tmp_path).read_text()
    assert "of 8 devices 4 train, 3 curvature, 1 idle" in page
    assert "4 Lanczos processes launched, 3 put in use, 1 without a result; the last was 7 steps old" in page
    assert ">4 + 3</td>" in page
    assert ">5 kB</td>" in page


def _printed(found, tmp_path):
    from rich.console import Console

    with open(tmp_path / "tables.txt", "w+") as file:
        report.print_tables(found, Console(file=file, width=1000))
        file.seek(0)
        return file.read()


def test_alarms_are_explained_in_the_report_and_named_in_the_terminal(tmp_path):
    alarms = {
        "gradient share": {"count": 3, "last": 12, "text": "0.004 of the gradient is in the subspace; raise `rank`"},
        "base brake": {"count": 1, "last": 8, "text": "the base's step is shortened to 0.2"},
    }
    found = _results(
        _row("adam", _decay(0.2)),
        _row("dho2", _decay(0.4), looks=20),
        _row("fosi", [1.0] * 20, looks=20, alarms=alarms),
    )
    found.save(tmp_path / "results.json")
    found = Results.load(tmp_path / "results.json")
    page = report.write_html(found, tmp_path).read_text()
    run = "mlp, fosi on 8 devices, seed 0"
    assert f"{run}: gradient share, in 3 of 20 looks at the metrics, the last after 12 updates: 0.004 of the" in page
    assert f"{run}: base brake, in 1 of 20 looks at the metrics, the last after 8 updates: the base&#39;s step" in page
    assert "mlp, dho2 on 8 devices, seed 0: " not in page
    printed = _printed(found, tmp_path)
    assert "\nAlarms\n  - fosi on mlp: gradient share, base brake. What to do is in report.html." in printed
    assert "0.004 of the gradient" not in printed


def test_results_without_alarms_or_of_before_there_were_any_have_no_such_heading(tmp_path):
    path = tmp_path / "results.json"
    _results(_row("adam", _decay(0.2)), _row("dho2", _decay(0.4), looks=20)).save(path)
    fields = json.loads(path.read_text())
    for row in fields["rows"]:
        del row["looks"], row["alarms"]
    older = tmp_path / "older.json"
    older.write_text(json.dumps(fields))
    for found in map(Results.load, (path, older)):
        assert "Alarms" not in report.write_html(found, tmp_path).read_text()
        assert "Alarms" not in _printed(found, tmp_path)


def test_a_long_list_of_optimizers_is_cut_in_parts_that_fit():
    assert [list(part) for part in report._parts([1, 2, 3, 4, 5, 6], 5)] == [[1, 2, 3], [4, 5, 6]]
    assert [list(part) for part in report._parts([1, 2], 5)] == [[1, 2]]


def test_seeds_are_combined_by_their_median_and_failures_are_counted():
    rows = [_row("sgd", _decay(r), seed=i) for i, r in enumerate((0.1, 0.2, 0.3))]
    rows.append(_row("sgd", [1.0, math.nan], seed=3, status="diverged"))
    [summary] = results.summarize(rows)
    assert summary["final_loss"] == pytest.approx(math.exp(-0.2 * 19))
    assert summary.status == "diverged in 1 of 4"


def test_a_seed_that_never_gets_there_counts_in_the_median_to_the_target():
    def reaching(optimizer, *counts):
        return [_row(optimizer, [1.0] * (n - 1) + [0.1] * (21 - n), seed=i) for i, n in enumerate(counts)]

    rows = reaching("adam", *[20] * 5) + reaching("dho2", 6, 7, 20, 21, 21)
    line, _ = _verdict(*rows, target=0.5, target_reason="enough")
    assert line.startswith("mlp: a tie: dho2 against adam needs 2.00 s instead of 2.00 s and 20 updates instead of 20")
    summary = results.summarize(rows)[1]
    assert (summary.reached, summary["steps_to_target"], summary["seconds_to_target"]) == (3, 20, pytest.approx(2.0))


def test_findings_name_wins_and_losses():
    found = _results(
        _row("sgd", _decay(0.2), test_accuracy=0.95),
        _row("dho2", _decay(0.4), refresh_steps=[2, 3, 4, 5, 6], test_accuracy=0.90),
    )
    found.aim(None)
    said = results.findings(found)
    assert any("11 against 20 steps of sgd" in text for text in said["wins"])
    assert any("3.10 against 2.00 seconds" in text for text in said["does_not_win"])
    assert any("90.0% test accuracy, sgd at 95.0%" in text for text in said["does_not_win"])


def test_a_small_test_set_cannot_tell_accuracies_apart():
    rows = _row("sgd", _decay(0.2), test_accuracy=0.98), _row("dho2", _decay(0.2), test_accuracy=1.0)
    found = _results(*rows)
    assert any("100.0% test accuracy" in text for text in results.findings(found)["wins"])
    found.tasks[0]["num_test"] = 100
    said = results.findings(found)
    assert not any("accuracy" in text for text in said["wins"])
    assert any("no difference that 100 samples" in text for text in said["does_not_win"])


def test_a_baseline_that_diverged_has_no_accuracy_to_compare_with():
    found = _results(_row("adam", [1.0, math.inf], status="diverged"), _row("dho2", _decay(0.2), test_accuracy=0.9))
    found.aim(None)
    assert not any("accuracy" in text for texts in results.findings(found).values() for text in texts)


def test_findings_say_when_a_hybrid_never_gets_there():
    found = _results(_row("sgd", _decay(0.2)), _row("fosi", _decay(0.1)))
    found.aim(None)
    said = results.findings(found)
    assert not said["wins"]
    assert any("fosi never reaches the target" in text for text in said["does_not_win"])


def test_findings_compare_memory_between_device_counts():
    def sized(devices, size, status):
        row = Row("mlp", "dho2", devices, None, 0.1, status)
        row.base_state_bytes, row.curvature_state_bytes = size // 4, size - size // 4
        return row

    found = _results(sized(1, 8000, "compiled"), sized(8, 1000, "compiled"))
    [text] = results.findings(found)["memory"]
    assert "8 kB on 1 device and 1 kB on each of 8: 8.00 times less (the ideal is 8)" in text


def test_memory_is_that_of_the_devices_that_there_were():
    def sized(devices, left, size):
        sizes = {"base_state_bytes": 0, "curvature_state_bytes": size}
        return Row("mlp", "dho2", devices, None, 0.1, "compiled", devices_left=left, **sizes)

    [text] = results.findings(_results(sized(1, None, 8000), sized(8, 2, 4000)))["memory"]
    assert "8 kB on 1 device and 4 kB on each of 2: 2.00 times less (the ideal is 2)" in text
    assert not results.findings(_results(sized(2, None, 4000), sized(8, 2, 4000)))["memory"]


@pytest.mark.parametrize(("name", "value"), [("cpu", "another"), ("cores", 4), ("device_count", 1)])
def test_results_that_go_on_elsewhere_keep_the_machine_that_they_come_from(tmp_path, name, value):
    found = _results(_row("adam", _decay(0.2)))
    begun = found.machine
    found.move_to(begun | {"date": "tomorrow"})
    assert (found.machine["date"], found.earlier_machines) == ("tomorrow", [])
    found.machine = begun
    found.move_to(begun | {name: value})
    assert (found.machine[name], found.earlier_machines) == (value, [begun])
    found.save(tmp_path / "results.json")
    reading = dict(report._said(Results.load(tmp_path / "results.json")))["How to read this"]
    said = "begun at today on a cpu, 2 cores, 8 devices of the kind cpu: their seconds are of there."
    assert any(said in text for text in reading)


def test_results_are_json_even_when_a_loss_is_not_a_number(tmp_path):
    found = _results(_row("sgd", [1.0, math.inf, math.nan], status="diverged"))
    path = tmp_path / "results.json"
    found.save(path)
    found.save(path)
    loaded = json.loads(path.read_text())
    assert loaded["rows"][0]["losses"] == [1.0, None, None]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_numbers_that_are_not_finite_are_read_again_and_reported(tmp_path):
    counters = {"refreshes": 3.0, "eigenvalue_max": math.nan}
    found = _results(_row("dho2", [1.0, 2.0, math.inf], status="diverged", counters=counters), _row("sgd", _decay(0.1)))
    found.tried = [_row("sgd", [math.inf], status="diverged")]
    found.save(tmp_path / "results.json")
    found = Results.load(tmp_path / "results.json")
    np.testing.assert_array_equal(found.rows[0].losses, [1.0, 2.0, math.nan])
    np.testing.assert_array_equal(found.tried[0].losses, [math.nan])
    assert found.rows[0].counters == {"refreshes": 3.0, "eigenvalue_max": pytest.approx(math.nan, nan_ok=True)}
    assert "diverged" in report.write_html(found, tmp_path).read_text()


def test_the_report_marks_what_went_wrong_and_escapes_it(tmp_path):
    failed = Row("mlp", "fosi", 8, 0, 0.1, "failed", message="ValueError: <b>no</b>")
    found = _results(_row("sgd", _decay(0.1)), failed)
    found.status = "interrupted"
    found.aim(None)
    page = report.write_html(found, tmp_path).read_text()
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in page
    assert "Interrupted." in page
    assert "virtual" in page
    assert "--tune" in page


def test_a_report_without_any_run(tmp_path):
    found = _results()
    found.status = "interrupted"
    page = report.write_html(found, tmp_path).read_text()
    assert "No run got this far" in page


@pytest.mark.parametrize("name", ["results.json", "loss-mlp.png", "report.html"])
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, name):
    # Without a row there are no pictures: the page is the first file.
    found = _results() if name == "report.html" else _results(_row("sgd", _decay(0.1)))
    path = tmp_path / name
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a disk that fills up in mid-file
    try:
        with pytest.raises(OSError, match=f"^{path} cannot be written: File too large$"):
            found.save(path) if name == "results.json" else report.write_html(found, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_runs_are_counted_with_those_of_the_tuning():
    failed = Row("mlp", "adam", 8, 0, 0.1, "failed", message="E")
    found = _results(_row("sgd", _decay(0.1)), failed, _row("sgd", [1.0, math.inf], status="diverged"))
    assert found.num_failed == 1
    search = {
        "learning_rates": [0.1, 0.3],
        "final_losses": [None, None],
        "steps_to_target": [None, None],
        "chosen": None,
    }
    found.tuning.append(results.Tuning("mlp", "sgd", **search, widened=False, at_edge=False, failed=2, message="No"))
    assert found.num_failed == 3
    assert "mlp: 2 of the 2 runs that tune sgd failed: No." in results.findings(found)["failures"]


def _bowl(curvature):
    x = np.ones((8, 1), np.float32)
    return tasks.Task(
        name="bowl",
        init=lambda key: {"w": np.ones(2, np.float32)},
        loss_fn=lambda params, batch: curvature * (params["w"] ** 2).sum() * batch["x"].mean(),
        train={"x": x},
        test={"x": x},
    )


def _settings(**changes):
    given = {
        "data": "bowl",
        "optimizers": ("sgd",),
        "chosen": {"bowl": ("sgd",)},
        "devices": (1,),
        "compiled_devices": (),
        "batch_size": {"bowl": 8},
        "num_steps": {"bowl": 10},
        "target": None,
        "learning_rates": {},
        "tune": False,
        "seeds": (0,),
        "rank": {"bowl": 2},
        "refresh_interval": {"bowl": 5},
        "command": "test",
    }
    return runner.Settings(**(given | changes))


def _run(tmp_path, task, **changes):
    from rich.console import Console

    return runner.run(_settings(**changes), [task], tmp_path, Console(quiet=True))


def test_tuning_takes_the_best_of_the_grid_and_widens_it_at_its_edge(tmp_path):
    # The best rate is far below the default of 0.1, where the grid starts at 0.01.
    found = _run(tmp_path, _bowl(300.0), tune=True)
    [search] = found.tuning
    assert search.widened
    assert search.learning_rates == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    finite = [loss for loss in search.final_losses if loss is not None]
    assert search.chosen == search.learning_rates[search.final_losses.index(min(finite))]
    assert found.rows[0].learning_rate == search.chosen
    inside = _run(tmp_path, _bowl(10.0), tune=True)
    assert not inside.tuning[0].widened
    assert len(inside.tuning[0].learning_rates) == 5


def test_an_exception_in_one_run_marks_its_row_and_the_others_go_on(tmp_path, monkeypatch):
    real = training.train

    def fail_once(task, program, seed, *rest):
        if seed == 1:
            raise RuntimeError("out of luck\nand more")
        return real(task, program, seed, *rest)

    monkeypatch.setattr(runner, "train", fail_once)
    found = _run(tmp_path, _bowl(1.0), seeds=(0, 1, 2))
    assert [row.status for row in found.rows] == ["ok", "failed", "ok"]
    assert found.rows[1].message == "RuntimeError: out of luck"
    assert found.status == "complete"


def test_an_interrupt_keeps_what_is_done(tmp_path, monkeypatch):
    real = training.train

    def interrupt_later(task, program, seed, *rest):
        if seed == 2:
            raise KeyboardInterrupt
        return real(task, program, seed, *rest)

    monkeypatch.setattr(runner, "train", interrupt_later)
    found = _run(tmp_path, _bowl(1.0), seeds=(0, 1, 2, 3))
    assert found.status == "interrupted"
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2


def test_what_gives_cause_for_concern_in_a_run_is_in_its_row(tmp_path):
    bowl = _bowl(1.0)
    plane = dataclasses.replace(bowl, loss_fn=lambda params, batch: (params["w"].sum() - 9.0) * batch["x"].mean())
    names = ("sgd", "dho2")
    found = _run(tmp_path, plane, optimizers=names, chosen={"bowl": names}, num_steps={"bowl": 25})
    first_order, hybrid = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (first_order["looks"], first_order["alarms"]) == (0, {})
    assert hybrid["looks"] == 25
    [refreshed, *_] = hybrid["refresh_steps"]
    alarm = hybrid["alarms"]["no active pairs"]
    assert (alarm["count"], alarm["last"]) == (25 - refreshed, 25)
    assert "there is no curvature" in alarm["text"]
    assert f"no active pairs, in {alarm['count']} of 25 looks" in (tmp_path / "report.html").read_text()
    assert found.rows[1].alarms == hybrid["alarms"]


def test_counts_that_are_only_compiled_are_marked_and_measured(tmp_path):
    found = _run(tmp_path, _bowl(1.0), devices=(4,), compiled_devices=(1, 2))
    assert [(row.devices, row.status) for row in found.rows] == [
        (4, "ok"),
        (1, "compiled"),
        (2, "compiled"),
    ]
    assert all(row.total_bytes for row in found.rows)
    assert "compiled only" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "memory-bowl.png").exists()


def _verdict(*rows, **task):
    found = _results(*rows)
    found.tasks[0] |= task
    found.aim(None)
    [line] = verdict.verdicts(found)
    assert "\n" not in line
    return line, verdict.against_bases(found)


def test_the_verdict_of_a_win_names_time_updates_and_memory():
    line, pairs = _verdict(
        _row("sgd", _decay(0.1), total_bytes=500),
        _row("adam", _decay(0.2), total_bytes=1000),
        _row("dho2", _decay(0.4), refresh_steps=[5], total_bytes=3000),
    )
    assert line == (
        "mlp: the hybrid wins in time and updates: dho2 against adam needs 1.50 s instead of 2.00 s (1.33 times less) "
        "and 11 updates instead of 20 updates (1.82 times fewer) to 0.0226; "
        "it ends at 0.0005, adam at 0.0224; a step takes 3 kB instead of 1 kB (3.00 times more) of memory on a device."
    )
    assert len(pairs) == 1
    assert "dho2 against adam needs 1.50 s instead of 2.00 s" in pairs[0]


def test_the_verdict_of_a_loss_a_draw_and_a_win_in_one_thing_only():
    slower = _row("dho2", _decay(0.1), total_bytes=1)
    line, _ = _verdict(_row("adam", _decay(0.2), total_bytes=2), slower)
    assert line.startswith("mlp: no hybrid wins, the best loses in time and updates: dho2 does not reach 0.0226")
    assert "1 B instead of 2 B (2.00 times less)" in line
    line, _ = _verdict(_row("adam", _decay(0.2)), _row("dho2", _decay(0.2)))
    assert line.startswith("mlp: a tie: dho2 against adam needs 2.00 s instead of 2.00 s and 20 updates instead of 20")
    line, _ = _verdict(_row("adam", _decay(0.2)), _row("dho2", _decay(0.4), refresh_steps=range(2, 10)))
    assert line.startswith("mlp: the hybrid wins in updates and loses in time: dho2 against adam needs 4.30 s")
    line, _ = _verdict(_row("adam", _decay(0.2)), _row("dho2", _decay(0.4), refresh_steps=[3, 4]))
    assert line.startswith("mlp: the hybrid wins in updates and ties in time: ")


def test_the_verdict_names_the_memory_that_more_devices_save():
    def rows(on_one, on_eight):
        state = {"base_state_bytes": 0}
        alone = Row("mlp", "dho2", 1, None, 0.1, "compiled", curvature_state_bytes=on_one, **state)
        return _row("adam", _decay(0.2)), _row("dho2", _decay(0.4), curvature_state_bytes=on_eight, **state), alone

    line, _ = _verdict(*rows(8000, 1000))
    assert line.endswith("; memory saved: 88% of its state, 1 kB on each of 8 devices instead of 8 kB on 1.")
    line, _ = _verdict(*rows(1001, 1000))
    assert line.endswith("; more devices save no memory: its state takes 1 kB on each of 8.")
    assert "memory saved" not in _verdict(*rows(8000, 1000)[:2])[0]


def test_the_best_hybrid_and_the_best_baseline_meet_in_the_verdict():
    rows = [_row(name, _decay(rate)) for name, rate in (("adam", 0.2), ("soap", 0.3), ("dho2", 0.25))]
    line, pairs = _verdict(*rows, _row("dho2-soap", _decay(0.5)))
    assert "dho2-soap against soap needs" in line
    assert line.endswith("On their own bases: dho2 needs 0.85 of the time and 0.85 of the updates of adam.")
    assert [text.split(" needs")[0] for text in pairs] == ["mlp: dho2 against adam", "mlp: dho2-soap against soap"]


def test_a_target_of_the_task_is_what_a_verdict_is_about():
    rows = _row("adam", _decay(0.2)), _row("dho2", _decay(0.4))
    line, _ = _verdict(*rows, target=0.5, target_reason="enough")
    assert "3 updates instead of 5 updates (1.67 times fewer) to 0.5" in line
    line, _ = _verdict(*rows, target=1e-9, target_reason="enough")
    assert line.startswith("mlp: nobody reaches the target: dho2 ends at 0.0005, adam at 0.0224")
    found = _results(*rows)
    found.tasks[0] |= {"target": 0.5, "target_reason": "enough"}
    found.aim(None)
    assert found.targets[0].origin == "enough"
    found.aim(0.7)
    assert found.targets[0].loss == 0.7


def test_a_verdict_needs_a_hybrid_and_a_baseline_that_ended_well():
    failed = Row("mlp", "dho2", 8, 0, 0.1, "failed", message="E")
    diverged = _row("dho2", [1.0, math.inf], status="diverged")
    for bad in (failed, diverged):
        assert _verdict(_row("adam", _decay(0.2)), bad)[0] == "mlp: no hybrid has ended well, so there is no verdict."
    assert _verdict(_row("adam", _decay(0.2)))[0] == "mlp: no hybrid was asked for, so there is no verdict."
    assert "no first-order optimizer to compare with; dho2 is there after" in _verdict(_row("dho2", _decay(0.2)))[0]
    assert _verdict(failed)[0] == "mlp: no run has ended well, so nothing can be said."


def test_an_optimizer_of_which_a_seed_failed_has_not_ended_well():
    rows = [_row(name, _decay(rate), seed=i) for name, rate in (("adam", 0.2), ("dho2", 0.4)) for i in range(2)]
    rows += [_row("adam", _decay(0.2), seed=2), Row("mlp", "dho2", 8, 2, 0.1, "failed", message="E")]
    assert _verdict(*rows)[0] == "mlp: no hybrid has ended well, so there is no verdict."


def test_the_verdict_is_of_the_most_devices_on_which_both_kinds_ended_well():
    rows = [_row("adam", _decay(0.2), devices=1), _row("dho2", _decay(0.4), devices=1), _row("adam", _decay(0.2))]
    line, pairs = _verdict(*rows, Row("mlp", "dho2", 8, 0, 0.1, "failed", message="E"))
    assert line.startswith("mlp on 1 device: the hybrid wins in time and updates: dho2 against adam needs")
    [pair] = pairs
    assert pair.startswith("mlp on 1 device: dho2 against adam needs")


def test_verdicts_open_the_page_and_close_the_terminal(tmp_path):
    from rich.console import Console

    found = _results(_row("adam", _decay(0.2)), _row("dho2", _decay(0.4)))
    found.aim(None)
    page = report.write_html(found, tmp_path).read_text()
    order = ["the hybrid wins in time and updates", "<h2>Loss</h2>", "Where the hybrid wins", "<h2>Time</h2>"]
    assert sorted(order, key=page.index) == order
    with open(tmp_path / "tables.txt", "w+") as file:
        report.print_tables(found, Console(file=file, width=1000))
        file.seek(0)
        assert file.read().rstrip().splitlines()[-1].strip().startswith("- mlp: the hybrid wins")


def test_tuning_looks_for_the_first_at_a_target_that_is_given(tmp_path):
    # The lowest loss is at 1e-12 or so for several rates; 0.1 is there first.
    found = _run(tmp_path, _bowl(1.0), tune=True, target=0.5)
    [search] = found.tuning
    reached = [steps for steps in search.steps_to_target if steps is not None]
    assert reached
    assert search.steps_to_target[search.learning_rates.index(search.chosen)] == min(reached)
