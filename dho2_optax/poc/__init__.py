"""The proof of concept: train real models with every optimizer and report what it costs.

Run it as `dho2-optax poc`. It needs the extra: `pip install "dho2_optax[poc]"`.
"""
