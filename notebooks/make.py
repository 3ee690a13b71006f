"""Runs the notebooks, and writes each beside its source, with outputs.

    python -m notebooks.make                    # all
    python -m notebooks.make pinn --out DIR     # one, into a folder that is there

A notebook's source is its .py file, in the percent format of jupytext; the .ipynb is made from it. Run it from the root
of the repository, on a machine that does nothing else, since pictures have seconds in them.
"""

import argparse
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NAMES = ("quick_start", "how_it_works", "hessian_spectrum", "your_model", "pinn")

# In the kernel; what it warns of when it shuts down is its own affair.
_STRICT = """
import warnings
warnings.simplefilter("error")
warnings.simplefilter("ignore", PendingDeprecationWarning)
"""


def read(name: str) -> nbformat.NotebookNode:
    """A notebook without outputs, as its source says; cells are numbered, so that a new run changes outputs alone."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name}-{number}"
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: float = 900) -> None:
    """Runs all cells in a kernel of their own, in which warnings are errors, and puts their outputs into the notebook.

    Args:
      notebook: changed in place.
      folder: in which the kernel runs; that of the package, if it is not installed.
      timeout: seconds for one cell.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    client = NotebookClient(
        notebook, timeout=timeout, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    with client.setup_kernel():
        cells = [*notebook.cells]
        client.execute_cell(nbformat.v4.new_code_cell(_STRICT), 0, store_history=False)  # in place of the first
        notebook.cells = cells
        for index, cell in enumerate(cells):
            client.execute_cell(cell, index)


def main() -> None:
    """Runs the notebooks that are named, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the .ipynb files")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {unknown[0]!r}")
    for name in arguments.names or NAMES:
        begin = time.perf_counter()
        notebook = read(name)
        execute(notebook, FOLDER.parent)
        nbformat.write(notebook, arguments.out / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
