"""What numbers of `monitor` give cause for concern, and what to do about it; on the host, in plain Python."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dho2_optax import arguments

_EARLY = 2  # refreshes: until then there was next to nothing that could have been missed


def alarms(
    metrics: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    *,
    max_age: float = 300,
    max_condition: float = 1e4,
    max_rejected: float = 0.1,
    max_missed: float = 0.7,
    min_share: float = 0.01,
    max_share: float = 0.99,
    min_brake: float = 0.3,
    max_orthogonality_error: float = 1e-3,
) -> list[str]:
    r"""What in some metrics gives cause for concern, one line each, which ends with what to do.

    Numbers that are missing or NaN raise no alarm. Nothing is kept between two calls: a rate is that since `before`, or
    since the first update. In runs that went well :math:`\|c\|^2 / \|g\|^2`, the share of the gradient in the subspace,
    was between 0.07 and 0.85 at nine of ten updates, and the condition number below 4000.

    Args:
      metrics: those of :func:`metrics`; with ``| group.metrics()`` those of a :class:`CurvatureGroup` too, and with
        ``| {"orthogonality_error": dho2_optax.orthogonality_error(state)}`` that.
      before: the same some updates earlier; counters then count from there. None: from the first update.
      max_age: updates since the parameters that the eigenpairs belong to, and between the snapshot and the use of those
        of a group. The default is three times the default `refresh_interval`: give three times yours.
      max_condition: :math:`|\lambda|_{\max} / |\lambda|_{\min}` of the active pairs.
      max_rejected: rejected refreshes, or probes of `mr_dho2`, as a part of all.
      max_missed: the largest curvature that the base was left with before the last refresh, in units of
        :math:`|\lambda|_{\max}`. The first two refreshes are let pass.
      min_share: of the gradient in the subspace.
      max_share: of the gradient in the subspace.
      min_brake: factor by which the base's step is shortened.
      max_orthogonality_error: :math:`\max_{ij} |V V^\top - I|_{ij}`.

    Returns:
      A list of lines such as ``"condition number: 5e+04, ..."``; empty if all is well.

    Raises:
      ValueError: for a limit that is not a non-negative number, or metrics that are not scalars, as those of a state of
        ``vmap`` or ``pmap``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> state = dho2.dho2(optax.sgd(0.1), rank=2).init(jnp.ones(3))
      >>> alarms(dho2.metrics(state))
      []
      >>> [line.partition(":")[0] for line in alarms({"age": 400, "base_brake": 1.0})]
      ['old eigenpairs']
    """
    limits: dict[str, Any] = {
        "max_age": max_age,
        "max_condition": max_condition,
        "max_rejected": max_rejected,
        "max_missed": max_missed,
        "min_share": min_share,
        "max_share": max_share,
        "min_brake": min_brake,
        "max_orthogonality_error": max_orthogonality_error,
    }
    arguments.check_numbers("non-negative", infinite=True, **limits)
    now, earlier = _Numbers("metrics", metrics), _Numbers("before", before or {})
    lines = [
        *_of_refreshes(now, earlier, max_age, max_rejected),
        *_of_pairs(now, max_condition, max_missed, max_orthogonality_error),
        *_of_steps(now, min_share, max_share, min_brake),
        *_of_a_group(now, earlier, max_age),
    ]
    return lines


class _Numbers:
    """Some metrics, NaN where they are not there: no comparison with it holds."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if np.shape(value) != ():
                raise ValueError(
                    f"`{name}` must hold scalars, got {key!r} of shape {np.shape(value)}; give those of one state."
                )
        self._values = values

    def __getitem__(self, key: str) -> float:
        value = self._values.get(key)
        return math.nan if value is None else float(value)

    def since(self, earlier: "_Numbers", *keys: str) -> float:
        """How far counters have grown together; those that are not there do not count."""
        return sum(np.nan_to_num(self[key]) - np.nan_to_num(earlier[key]) for key in keys)


def _of_refreshes(now: _Numbers, earlier: _Numbers, max_age: float, max_rejected: float) -> list[str]:
    lines = []
    rejected = now.since(earlier, "rejected_refreshes", "rejected")
    probes = not math.isnan(now["probe_interval"])
    made = now.since(earlier, "matvecs") if probes else now.since(earlier, "refreshes")
    if rejected > max_rejected * (rejected + made):
        what = "probes and refreshes" if probes else "refreshes"
        lines.append(
            f"rejected refreshes: {rejected:.0f} of {rejected + made:.0f} {what}; look for numbers that are not finite "
            "in the loss and its second derivatives (sqrt, norm or log at zero, float16), and for batches whose "
            "gradient is more than four times as long as usual"
        )
    if now["age"] > max_age:
        some = now["refreshes"] > 0
        lines.append(
            f"old eigenpairs: {'of' if some else 'none after'} {now['age']:.0f} updates{' ago' if some else ''}; see "
            "that `update` is given a batch, a product or a value function and that `allow_refresh` is not always "
            "False, shorten `refresh_interval` or `probe_interval`, or raise `max_age` to three times your interval"
        )
    skipped = now.since(earlier, "skipped_probes")
    if skipped > 0:
        lines.append(
            f"skipped probes: {skipped:.0f}; give `update` the `hvp` of value_grad_and_hvp, or `loss_fn` at "
            "construction and the `batch`"
        )
    return lines


def _of_pairs(now: _Numbers, max_condition: float, max_missed: float, max_error: float) -> list[str]:
    lines = []
    if now["refreshes"] > 0 and now["active_pairs"] == 0:
        if now["pairs_with_large_residual"] > 0:
            remedy = "residuals are large: raise `Eigensolver.order`, the batch of the products, or `max_residual`"
        else:
            remedy = "there is no curvature: is the loss linear in the parameters, or are they masked?"
        lines.append(f"no active pairs: all is left to the base; {remedy}")
    if now["condition_number"] > max_condition:
        lines.append(
            f"condition number: {now['condition_number']:.3g}, the smallest pairs count for nothing; lower `rank`, or "
            "raise `Newton.floor` or `Newton.damping` if losses jump"
        )
    largest = max(abs(now["eigenvalue_max"]), abs(now["eigenvalue_min"]))
    if now["refreshes"] > _EARLY and now["missed_curvature"] > max_missed * largest:
        lines.append(
            f"missed curvature: {now['missed_curvature']:.3g} of {largest:.3g} was outside the eigenvectors before "
            "these; refresh more often, or raise `rank` or the batch of the products"
        )
    if now["orthogonality_error"] > max_error:
        lines.append(
            f"orthogonality: an error of {now['orthogonality_error']:.2g}; leave `basis_dtype` at float32 or more, and "
            "see that a `curvature` of your own is symmetric"
        )
    return lines


def _of_steps(now: _Numbers, min_share: float, max_share: float, min_brake: float) -> list[str]:
    lines = []
    if now["active_pairs"] > 0 and now["gradient_share"] < min_share:
        lines.append(
            f"gradient share: {now['gradient_share']:.2g} of the gradient is in the subspace, so that the hybrid is "
            "little but its base; raise `rank`, refresh more often, or take the base alone"
        )
    if now["gradient_share"] > max_share:
        lines.append(
            f"gradient share: {now['gradient_share']:.4g} of the gradient is in the subspace, and the base has nothing "
            "left to do; raise `alpha` or refresh more often"
        )
    if now["base_brake"] < min_brake:
        lines.append(
            f"base brake: the base's step is shortened to {now['base_brake']:.2g}, gradients are longer than usual; if "
            "it lasts, refresh more often, lower the base's learning rate or `BaseScale.limit`"
        )
    return lines


def _of_a_group(now: _Numbers, earlier: _Numbers, max_age: float) -> list[str]:
    lines = []
    lost = {name: now.since(earlier, name) for name in ("failures", "stalls")}
    if any(count > 0 for count in lost.values()):
        said = ", ".join(f"{count:.0f} {name}" for name, count in lost.items() if count > 0)
        lines.append(
            f"curvature group: {said}; read `group.last_error`, and raise `timeout` if processes are just slow"
        )
    if now["staleness"] > max_age:
        lines.append(
            f"staleness: the group's last eigenpairs came {now['staleness']:.0f} updates after their snapshot; give it "
            "more devices, a smaller batch or a lower `order`"
        )
    return lines
