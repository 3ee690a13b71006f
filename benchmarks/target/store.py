"""Results as JSON: a folder for each task and batch size, in it a file for each method, and one for the step times.

Two processes may work on different methods of one task. A file is read again before it is written, and replaced as a
whole.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "target"
TUNING_SEED = 100
_TIMING = "_timing"


def run_key(rate: float, seed: int, num_steps: int) -> str:
    """The key of a run in its file."""
    return f"rate={rate:.6g} seed={seed} steps={num_steps}"


class Store:
    """The results of one task and batch size."""

    def __init__(self, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
        self.folder, self._metadata = folder, dict(metadata or {})

    @property
    def methods(self) -> list[str]:
        """The methods that have results."""
        return sorted(path.stem for path in self.folder.glob("*.json") if path.stem != _TIMING)

    def head(self, method: str) -> dict[str, Any]:
        """All that is known of a method but its runs."""
        return {key: value for key, value in self._read(method).items() if key != "runs"}

    def runs(self, method: str) -> dict[str, dict[str, Any]]:
        """The runs of a method by their keys. A run also holds its "rate", "seed" and "num_steps"."""
        return self._read(method).get("runs", {})

    def run(
        self,
        method: str,
        head: Mapping[str, Any],
        make: Callable[[float, int, int], dict[str, Any]],
        rate: float,
        num_steps: int,
        seed: int,
    ) -> dict[str, Any]:
        """Returns a run of a method, which is made and stored unless it is there.

        Args:
          method: its name.
          head: stored above the runs; must be the same for all runs of a file.
          make: ``(rate, num_steps, seed) -> run``.
          rate: the tuned number.
          num_steps: how many steps.
          seed: of the run.
        """
        known = self._read(method)
        head = json.loads(json.dumps(head))
        if known and any(known[key] != value for key, value in head.items()):
            raise ValueError(f"{self._path(method)} was made with other options: delete it, or use another folder")
        key = run_key(rate, seed, num_steps)
        if key in known.get("runs", {}):
            return known["runs"][key]
        made = {"rate": rate, "seed": seed, "num_steps": num_steps, **make(rate, num_steps, seed)}
        made["commit"] = self._metadata.get("commit")
        runs = {**self.runs(method), key: made}
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(run)}" for k, run in sorted(runs.items()))
        top = json.dumps({**head, **self._metadata}, indent=1)
        self._write(method, f'{top[:-2]},\n "runs": {{\n{lines}\n }}\n}}\n')
        return made

    def times(self) -> dict[str, dict[str, Any]]:
        """What `training.time_steps` found, by method."""
        return self._read(_TIMING).get("methods", {})

    def add_times(self, times: Mapping[str, dict[str, Any]]) -> None:
        """Adds step times that were measured together, in place of older ones of the same methods."""
        together = sorted(times)
        new = {name: {**found, "commit": self._metadata.get("commit")} for name, found in times.items()}
        if len(together) > 1:
            new = {name: {**found, "measured_with": together} for name, found in new.items()}
        content = {**self._metadata, "methods": {**self.times(), **new}}
        self._write(_TIMING, json.dumps(content, indent=1) + "\n")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self, name: str, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(text)
        unfinished.replace(path)


def tuning_runs(runs: Mapping[str, dict[str, Any]], num_steps: int) -> dict[float, float]:
    """The final losses of the runs that tuned a method, by rate; infinite where a run diverged."""
    return {
        run["rate"]: loss_of(run)
        for run in runs.values()
        if run["seed"] == TUNING_SEED and run["num_steps"] == num_steps
    }


def loss_of(run: Mapping[str, Any]) -> float:
    """The final loss of a run, infinite if it diverged."""
    return float("inf") if run["final_loss"] is None else run["final_loss"]


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate of the lowest loss, the lower one of two."""
    return min(losses, key=lambda rate: (losses[rate], rate))
