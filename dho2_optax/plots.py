"""Pictures of a training and its curvature, with matplotlib, of the extra ``monitor``.

Every function draws on the axes that it is given, or on those of a new figure, and returns them; ``axes.figure`` is the
figure. The figure is one of matplotlib's own, not of pyplot: no window opens, and nothing is kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dho2_optax import arguments
from dho2_optax.density import Density

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "STYLE", "density", "loss", "megabytes", "memory", "smoothed", "spectrum"]

#: Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#000000")
#: For ``matplotlib.rc_context``: that of the pictures of this project.
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


def spectrum(records: Sequence[Mapping[str, Any]], axes: "Axes | None" = None) -> "Axes":
    """The eigenvalues in use against the updates, and what refreshes find to have been missed.

    Magnitudes are on a logarithmic scale; where there are negative eigenvalues they are below, on another.

    Args:
      records: one dict for each update that is shown, with ``eigenvalue_0``, ``eigenvalue_1`` ... as
        :func:`dho2_optax.metrics` names them, ``missed_curvature`` if it is there, and ``step``, or else they are
        counted: as :func:`dho2_optax.writers.read` gives them.
      axes: of matplotlib. None: new ones.

    Returns:
      The axes.

    Raises:
      ValueError: if no record has an eigenvalue.
      ImportError: matplotlib is not installed.

    Example:
      >>> axes = spectrum([{"step": 0, "eigenvalue_0": 2.0}, {"step": 9, "eigenvalue_0": 3.0}])
      >>> axes.get_xlabel()
      'updates'
    """
    names = sorted({name for r in records for name in r if _is_eigenvalue(name)}, key=lambda name: int(name[11:]))
    if not names:
        raise ValueError("`records` must have eigenvalues, as `dho2_optax.metrics` names them, got none.")
    axes = _axes(axes)
    steps = [record.get("step", i) for i, record in enumerate(records)]
    table = np.array([[_number(record.get(name)) for name in names] for record in records])
    axes.plot(steps, table, color=COLOURS[0], linewidth=1.0, drawstyle="steps-post")
    axes.lines[-1].set_label("eigenvalues")
    missed = np.array([_number(record.get("missed_curvature")) for record in records])
    missed[~(missed > 0)] = math.nan
    if np.any(np.isfinite(missed)):
        look = {"color": COLOURS[3], "linestyle": ":", "linewidth": 1.4, "drawstyle": "steps-post"}
        axes.plot(steps, missed, label="missed by those before", **look)
    magnitudes = np.abs(table[np.isfinite(table) & (table != 0)])
    if np.any(table < 0):
        axes.set_yscale("symlog", linthresh=np.min(magnitudes))
        axes.axhline(0, color="#555555", linewidth=0.8)
    elif len(magnitudes):
        axes.set_yscale("log")
    axes.set(xlabel="updates", ylabel="eigenvalues")
    axes.legend()
    return axes


def density(
    found: Density, axes: "Axes | None" = None, *, width: float | None = None, num_points: int = 1000, **look: Any
) -> "Axes":
    r"""The density of the eigenvalues, :math:`\frac1m \sum_{p,i} w_{pi}\, N(\theta_{pi}, \text{width}^2)`.

    Its integral is 1, so an eigenvalue that stands alone among `n` is a peak of the area :math:`1/n`: the scale is
    logarithmic, and what is less than a hundredth of that of the smallest weight is not shown.

    Args:
      found: what :func:`dho2_optax.spectral_density` has found.
      axes: of matplotlib. None: new ones.
      width: of the peaks, a standard deviation in the unit of the eigenvalues. Default: a hundredth of their range.
      num_points: of the curve.
      **look: arguments of ``axes.plot``.

    Returns:
      The axes.

    Raises:
      ValueError: if `width` is not positive, `num_points` less than 2, or what was found is not finite.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> import dho2_optax as dho2
      >>> diagonal = jnp.linspace(0.0, 1.0, 100)
      >>> axes = density(dho2.spectral_density(lambda x: diagonal * x, diagonal, order=8, num_probes=2))
      >>> axes.get_yscale()
      'log'
    """
    if not arguments.is_int(num_points) or num_points < 2:
        raise ValueError(f"`num_points` must be a Python int of at least 2, got {num_points!r}.")
    nodes, weights = (np.asarray(x, np.float64) for x in found)
    if not np.all(np.isfinite(nodes)):
        raise ValueError("`found` must be finite, got NaN: a product of the operator was not.")
    counts = weights > np.finfo(np.float32).eps ** 2
    low, high = np.min(nodes[counts]), np.max(nodes[counts])
    span = high - low or max(abs(high), 1.0)
    width = span / 100 if width is None else width
    # Evenly, and close around every node, so that no peak falls between two points.
    near = nodes[counts][:, None] + width * np.linspace(-6, 6, 25)
    points = np.union1d(np.linspace(low - 4 * width, high + 4 * width, num_points), near.ravel())
    values = np.asarray(found.at(points, width))
    axes = _axes(axes)
    axes.plot(points, values, **{"color": COLOURS[0], "linewidth": 1.4, **look})
    peak = np.min(weights[counts]) / len(weights) / (width * math.sqrt(2 * math.pi))
    axes.set_yscale("log")
    axes.set_ylim(max(peak / 100, 1e-9 * np.max(values)), 3 * np.max(values))
    axes.set(xlabel="eigenvalue", ylabel="density")
    return axes


def loss(
    losses: Sequence[float], axes: "Axes | None" = None, *, seconds: Sequence[float] | None = None, **look: Any
) -> "Axes":
    """The loss against updates, or against time: each, faint, and the mean over the last twentieth of the run.

    Args:
      losses: of each update.
      axes: of matplotlib. None: new ones.
      seconds: that each update took. None: against the number of updates.
      **look: arguments of ``axes.plot`` for the mean; `label` and `color`, say.

    Returns:
      The axes.

    Raises:
      ValueError: if there are no losses, or not as many `seconds`.
      ImportError: matplotlib is not installed.

    Example:
      >>> loss([3.0, 2.0, 1.0], seconds=[0.1, 0.1, 0.1]).get_xlabel()
      'seconds'
    """
    if not len(losses):
        raise ValueError("`losses` must have at least one number, got none.")
    if seconds is not None and len(seconds) != len(losses):
        raise ValueError(f"`seconds` must be as many as `losses`, {len(losses)}, got {len(seconds)}.")
    axes = _axes(axes)
    x = np.arange(1, len(losses) + 1) if seconds is None else np.cumsum(seconds)
    [line] = axes.plot(x, smoothed(losses), **{"linewidth": 1.8, **look})
    axes.plot(x, losses, color=line.get_color(), alpha=0.18, linewidth=0.8)
    if axes.get_yscale() == "linear" and all(value > 0 for value in losses if math.isfinite(value)):
        axes.set_yscale("log")
    axes.set(xlabel="updates" if seconds is None else "seconds", ylabel="loss")
    longest = max(np.max(line.get_xdata()) for line in axes.lines)  # a limit that is set holds for later curves
    axes.set_xlim(0, 1.05 * longest or 1)
    return axes


def memory(
    sizes: Mapping[str, Mapping[int, float]],
    axes: "Axes | None" = None,
    *,
    looks: Mapping[str, Mapping[str, Any]] | None = None,
    ideal: bool = True,
) -> "Axes":
    """Bytes on each device against the number of devices, and the line along which they would fall as 1/P.

    Args:
      sizes: by name, bytes by the number of devices; :func:`dho2_optax.programs.memory` reads them off a program.
      axes: of matplotlib. None: new ones.
      looks: by name, arguments of ``axes.plot``.
      ideal: draw that line, for what falls most.

    Returns:
      The axes.

    Raises:
      ValueError: if there are no sizes.
      ImportError: matplotlib is not installed.

    Example:
      >>> memory({"dho2": {1: 4e6, 2: 2e6}}).get_xlabel()
      'devices P'
    """
    if not any(sizes.values()):
        raise ValueError(f"`sizes` must have at least one number of bytes, got {dict(sizes)!r}.")
    axes = _axes(axes)
    from matplotlib.ticker import FuncFormatter, NullFormatter

    steepest, whole = 1.0, 0.0
    for name, points in sizes.items():
        known = sorted(points)
        if not known:
            continue
        y = [points[count] for count in known]
        look = {"marker": "o", "linewidth": 1.8, "label": name, **(looks or {}).get(name, {})}
        axes.plot(known, y, **look)
        if y[-1] and y[0] / y[-1] > steepest:
            steepest, whole = y[0] / y[-1], y[0] * known[0]
    counts = sorted({count for points in sizes.values() for count in points})
    if ideal and whole:
        line = [whole / count for count in counts]
        axes.plot(counts, line, color="#222222", linestyle=":", label="ideal 1/P", zorder=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: megabytes(size)))
    axes.yaxis.set_minor_formatter(FuncFormatter(minor(axes.get_ylim, megabytes)))
    axes.set(xlabel="devices P", ylabel="bytes on each device")
    return axes


def minor(limits: Callable[[], tuple[float, float]], show: Callable[[float], str]) -> Callable[[float, float], str]:
    """Labels for 2 and 5 between the decades, where an axis spans few of them."""

    def label(value: float, _: float) -> str:
        low, high = limits()
        return show(value) if high / low < 300 and f"{value:.0e}"[0] in "25" else ""

    return label


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Average the loss over the last twentieth of the run so far, infinite before the first.

    A single batch may be lucky; its loss reaches no target.

    Example:
      >>> smoothed([4.0] * 20 + [2.0] * 20)[[0, 1, 20, 39]].tolist()
      [inf, 4.0, 3.0, 2.0]
    """
    values = np.asarray(losses, np.float64)
    window = max(1, values.size // 20)
    # A window is the end of a block and the beginning of the next, of sums within each: in one running sum a spike
    # would leave its rounding behind in all that come later.
    blocks = np.pad(values, (0, -values.size % window)).reshape(-1, window)
    to_end = np.cumsum(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    from_begin = np.cumsum(blocks, axis=1).ravel()
    first = np.arange(max(values.size - window + 1, 0))
    last = first + window - 1
    sums = np.where(first % window == 0, from_begin[last], to_end[first] + from_begin[last])
    return np.concatenate([np.full(window - 1, np.inf), sums / window])


def megabytes(size: float) -> str:
    """Write a number of bytes for a reader.

    Example:
      >>> megabytes(812), megabytes(51_300), megabytes(7_250_000)
      ('812 B', '51.3 kB', '7.25 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def _axes(axes: "Axes | None") -> "Axes":
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is missing: pip install "dho2_optax[monitor]"') from error
    return Figure(layout="constrained").subplots()


def _is_eigenvalue(name: str) -> bool:
    return name.startswith("eigenvalue_") and name[11:].isdigit()


def _number(value: Any) -> float:
    return math.nan if value is None else float(jax.device_get(value))
