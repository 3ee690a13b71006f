"""Methods of other libraries, each where its library is installed; ``pip install -e '.[poc,benchmarks]'`` has them all.

A module of its own for each library: a dict ``METHODS``, and an `ImportError` where the library is missing.
"""

import contextlib
import importlib
import warnings

from benchmarks.target.interface import Method

METHODS: dict[str, Method] = {}
"""By name."""

for _library in ("kfac_jax", "somax", "optimistix"):
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # kfac-jax 0.0.8 looks at names that jax 0.10 deprecates
        METHODS |= importlib.import_module(f"benchmarks.target.peers.of_{_library}").METHODS
