"""Run the command line with `python -m dho2_optax`."""

import sys

from dho2_optax.cli import main

if __name__ == "__main__":
    sys.exit(main())
