"""The version, read by the build and by `dho2_optax.__version__`."""

__version__ = "0.1.0"
