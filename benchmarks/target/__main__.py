"""The command line: ``python -m benchmarks.target TASK --batch-size B``."""

import argparse
import sys
from pathlib import Path

from benchmarks import machine
from benchmarks.target import report, tasks
from benchmarks.target.methods import KINDS, METHODS, select
from benchmarks.target.store import RESULTS, Store
from benchmarks.target.study import Study


def main() -> None:
    """Runs a study, or parts of one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.target", description="Time to a target loss of tuned optimizers on one task."
    )
    parser.add_argument("task", choices=tasks.TASKS)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["baseline", "hybrid"],
        metavar="METHOD",
        help=f"names or kinds: {', '.join((*KINDS, *METHODS))} (default: baseline hybrid)",
    )
    parser.add_argument("--steps", type=int, default=500, help="full length of a run (default: 500)")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best learning rate (default: 3)")
    parser.add_argument(
        "--shortened",
        nargs="*",
        choices=KINDS,
        default=["hybrid"],
        help="kinds that are also trained with schedules of 1/3, 1/2 and 2/3 of the length (default: hybrid)",
    )
    parser.add_argument("--phase", choices=("all", "tune", "final", "robust", "time", "report"), default="all")
    parser.add_argument("--chunk", type=int, default=100, help="steps in a chunk that is timed")
    parser.add_argument("--repeats", type=int, default=5, help="chunks that are timed")
    parser.add_argument("--data", default=tasks.FASHION_MNIST, help="folder of the four IDX files of Fashion-MNIST")
    parser.add_argument("--text", help="folder of text files, for lstm and transformer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    machine.keep_memory("benchmarks.target")
    store = Store(arguments.out / f"{arguments.task}_{arguments.batch_size}", machine.describe(sys.argv))
    if arguments.phase != "report":
        try:
            study = Study(
                tasks.build(arguments.task, tasks.Sources(arguments.data, arguments.text)),
                select(arguments.methods),
                arguments.batch_size,
                arguments.steps,
                store,
                seeds=arguments.seeds,
                shortened=arguments.shortened,
                log=lambda line: print(line, flush=True),
            )
        except ValueError as error:
            parser.error(str(error))
        timing = {"chunk": arguments.chunk, "repeats": arguments.repeats}
        phases = {
            "all": lambda: study.all(**timing),
            "tune": study.tune,
            "final": study.final,
            "robust": study.robust,
            "time": lambda: study.time(**timing),
        }
        phases[arguments.phase]()
    if arguments.phase in ("all", "report"):
        print(report.table(report.summarize(store)))


if __name__ == "__main__":
    main()
