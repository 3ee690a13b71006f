"""Options as they are stored with results: each by one name of its own, whatever object it is given in."""

import dataclasses
from typing import Any

import dho2_optax as dho2

_STORED = {"base_scale_limit": "limit", "base_scale_growth": "growth", "sharpness_limit": "sharpness"}
_GROUPS = {"eigensolver": dho2.Eigensolver, "newton": dho2.Newton, "base_scale": dho2.BaseScale, "split": dho2.Split}


def grouped(**options: Any) -> dict[str, Any]:
    """Arguments of a constructor that takes these objects."""
    options = {_STORED.get(name, name): value for name, value in options.items()}
    for argument, group in _GROUPS.items():
        names = {field.name for field in dataclasses.fields(group)} & options.keys()
        if names:
            options[argument] = group(**{name: options.pop(name) for name in names})
    return options
