"""What a person decides by: whether a hybrid is ahead of the first-order optimizers, in one line for each task."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from dho2_optax.plots import megabytes
from dho2_optax.poc.optimizers import OPTIMIZERS
from dho2_optax.poc.results import (
    TIE_SECONDS,
    TIE_STEPS,
    Results,
    Row,
    count_devices,
    median_to_target,
    state_sizes,
    within,
)

__all__ = ["against_bases", "verdicts"]

_APART = 2.0  # times one loss is the other
_SAVED = 0.05  # of the memory of a state, at least, to speak of it


@dataclasses.dataclass(frozen=True)
class _Standing:
    """An optimizer on a task, by the time that its loss is at some value: medians over the seeds."""

    optimizer: str
    steps: float | None  # None: it is not
    seconds: float | None
    final_loss: float
    memory: float  # bytes of the whole training step on one device


def verdicts(results: Results) -> list[str]:
    """Say in one line for each task which hybrid is ahead of the best first-order optimizer, and in what.

    The best are those that are first at the target in time; where none gets there, those that end lowest. They are
    compared on the most devices on which both kinds ended well, in updates, time and memory; the others with their own
    bases. Memory is saved where the hybrid's state takes less on each of many devices than on few, compiled ones
    included.
    """
    return [_verdict(results, task["name"]) for task in results.tasks]


def against_bases(results: Results) -> list[str]:
    """Compare each hybrid with its base: at the target, or where that is of the runs, at what the base ends at."""
    return [
        f"{_called(results, task['name'])}: {hybrid.optimizer} {_comparison(hybrid, base, loss)}."
        for task in results.tasks
        for hybrid, base, loss in _pairs(results, task["name"])
    ]


def _called(results: Results, task: str) -> str:
    """The name of a task, with the number of devices where that is not the largest that was asked for."""
    devices, _ = _runs(results, task)
    most = max((row.devices for row in results.rows if row.task == task and row.seed is not None), default=devices)
    return task if devices == most else f"{task} on {count_devices(devices)}"


def _pairs(results: Results, task: str) -> list[tuple[_Standing, _Standing, float]]:
    """Each hybrid, its base, and the loss at which they are compared."""
    (_, runs), target = _runs(results, task), results.target(task)
    pairs = []
    for name in (name for name in runs if OPTIMIZERS[name].hybrid and OPTIMIZERS[name].base in runs):
        base = OPTIMIZERS[name].base
        loss = within(statistics.median(row.final_loss or 0.0 for row in runs[base]))
        loss = target.loss if target is not None and target.fixed else loss
        pairs.append((_standing(name, runs[name], loss), _standing(base, runs[base], loss), loss))
    return pairs


def _runs(results: Results, task: str) -> tuple[int, dict[str, list[Row]]]:
    """The runs of a task that ended well, by optimizer: all seeds did; and the number of devices.

    Of all numbers of devices the largest on which a hybrid and a first-order optimizer did, or else on which any did.
    """
    begun: dict[int, dict[str, list[Row]]] = {}
    for row in results.rows:
        if row.task == task and row.seed is not None and row.status in ("ok", "diverged", "failed"):
            begun.setdefault(row.devices, {}).setdefault(row.optimizer, []).append(row)
    well = {
        devices: {name: rows for name, rows in runs.items() if all(row.final_loss is not None for row in rows)}
        for devices, runs in begun.items()
    }

    def kinds(devices: int) -> int:
        return len({OPTIMIZERS[name].hybrid for name in well[devices]})

    devices = max(well, key=lambda devices: (kinds(devices), devices), default=0)
    return devices, well.get(devices, {})


def _standing(optimizer: str, rows: Sequence[Row], loss: float) -> _Standing:
    steps, seconds = zip(*(row.reach(loss) for row in rows), strict=True)
    return _Standing(
        optimizer=optimizer,
        steps=median_to_target(steps),
        seconds=median_to_target(seconds),
        final_loss=statistics.median(row.final_loss or 0.0 for row in rows),
        memory=statistics.median(row.total_bytes or 0 for row in rows),
    )


def _verdict(results: Results, task: str) -> str:
    target, (_, runs) = results.target(task), _runs(results, task)
    if target is None or not runs:
        return f"{task}: no run has ended well, so nothing can be said."
    name = _called(results, task)
    standings = [_standing(name, rows, target.loss) for name, rows in runs.items()]
    hybrids = [s for s in standings if OPTIMIZERS[s.optimizer].hybrid]
    rivals = [s for s in standings if not OPTIMIZERS[s.optimizer].hybrid]
    if not hybrids:
        asked = any(OPTIMIZERS[name].hybrid for name in results.settings["optimizers"])
        return f"{name}: {'no hybrid has ended well' if asked else 'no hybrid was asked for'}, so there is no verdict."
    if not rivals:
        best = _best(hybrids)
        return f"{name}: there is no first-order optimizer to compare with; {best.optimizer} {_alone(best)}."
    hybrid, rival = _best(hybrids), _best(rivals)
    compared = f"{hybrid.optimizer} {_comparison(hybrid, rival, target.loss)}{_saved(results, task, hybrid.optimizer)}"
    text = f"{name}: {_headline(hybrid, rival)}: {compared}."
    others = [
        f"{ours.optimizer} needs {_share(ours.seconds, base.seconds)} of the time and "
        f"{_share(ours.steps, base.steps)} of the updates of {base.optimizer}"
        for ours, base, _ in _pairs(results, task)
        if ours.steps and base.steps and {ours.optimizer, base.optimizer} != {hybrid.optimizer, rival.optimizer}
    ]
    return f"{text} On their own bases: {', '.join(others)}." if others else text


def _saved(results: Results, task: str, optimizer: str) -> str:
    """Say how much less memory a state takes on each of more devices."""
    sizes = state_sizes(results.rows, task, optimizer)
    if len(sizes) < 2:
        return ""
    few, many = min(sizes), max(sizes)
    saved = 1 - sizes[many] / sizes[few]
    if saved < _SAVED:
        return f"; more devices save no memory: its state takes {megabytes(sizes[many])} on each of {many}"
    return (
        f"; memory saved: {saved:.0%} of its state, {megabytes(sizes[many])} on each of {many} devices instead of "
        f"{megabytes(sizes[few])} on {few}"
    )


def _share(ours: float | None, theirs: float | None) -> str:
    return f"{(ours or 0.0) / (theirs or 1.0):.2f}"


def _best(standings: Sequence[_Standing]) -> _Standing:
    return min(standings, key=lambda s: (math.inf if s.seconds is None else s.seconds, s.final_loss))


def _headline(hybrid: _Standing, rival: _Standing) -> str:
    if hybrid.steps is None and rival.steps is None:
        return "nobody reaches the target"
    won = {
        "time": _outcome(hybrid.seconds, rival.seconds, TIE_SECONDS),
        "updates": _outcome(hybrid.steps, rival.steps, TIE_STEPS),
    }
    ahead = [name for name, outcome in won.items() if outcome > 0]
    behind = [name for name, outcome in won.items() if outcome < 0]
    if ahead and behind:
        return f"the hybrid wins in {ahead[0]} and loses in {behind[0]}"
    if ahead:
        even = [name for name, outcome in won.items() if not outcome]
        return f"the hybrid wins in {' and '.join(ahead)}" + (f" and ties in {even[0]}" if even else "")
    return f"no hybrid wins, the best loses in {' and '.join(behind)}" if behind else "a tie"


def _outcome(ours: float | None, theirs: float | None, tie: float) -> int:
    """1 where ours is less, -1 where theirs is, 0 where neither is by more than a tie."""
    mine, other = (math.inf if value is None else value for value in (ours, theirs))
    return (mine * tie < other) - (other * tie < mine)


def _comparison(hybrid: _Standing, rival: _Standing, loss: float) -> str:
    """Say where two stand at a loss: always updates, time and memory."""
    memory = f"a step takes {_pair(hybrid.memory, rival.memory, megabytes, 'less')} of memory on a device"
    both = f"ends at {hybrid.final_loss:.3g}, {rival.optimizer} at {rival.final_loss:.3g}"
    ends = f"{both}; {memory}"
    if hybrid.steps is None and rival.steps is None:
        return f"{ends}"
    if hybrid.steps is None or hybrid.seconds is None:
        return f"does not reach {loss:.3g}, where {rival.optimizer} {_alone(rival)}; it {ends}"
    if rival.steps is None or rival.seconds is None:
        return f"{_alone(hybrid)}, {rival.optimizer} never; it {ends}"
    return (
        f"against {rival.optimizer} needs {_pair(hybrid.seconds, rival.seconds, _seconds, 'less')} and "
        f"{_pair(hybrid.steps, rival.steps, _updates, 'fewer')} to {loss:.3g}; "
        f"{f'it {both}; ' if _apart(hybrid.final_loss, rival.final_loss) else ''}{memory}"
    )


def _apart(ours: float, theirs: float) -> bool:
    """Whether two losses are so far from each other that this is news."""
    return min(ours, theirs) > 0 and max(ours, theirs) > _APART * min(ours, theirs)


def _alone(standing: _Standing) -> str:
    if standing.steps is None or standing.seconds is None:
        return f"ends at {standing.final_loss:.3g} and does not reach the target"
    return f"is there after {_seconds(standing.seconds)} and {_updates(standing.steps)}"


def _pair(ours: float, theirs: float, show: Callable[[float], str], less: str) -> str:
    """Write two quantities and their ratio.

    Example:
      >>> from dho2_optax.poc import verdict
      >>> verdict._pair(2.0, 3.0, verdict._seconds, "less")
      '2.00 s instead of 3.00 s (1.50 times less)'
    """
    text = f"{show(ours)} instead of {show(theirs)}"
    if not (ours and theirs) or round(max(ours, theirs) / min(ours, theirs), 2) == 1:
        return text
    return f"{text} ({max(ours, theirs) / min(ours, theirs):.2f} times {less if ours < theirs else 'more'})"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _updates(value: float) -> str:
    return f"{value:.0f} updates"
