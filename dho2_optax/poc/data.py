"""Labelled images from disk: the vendored digits, IDX files and CIFAR-10 binaries."""

import gzip
import math
import struct
import zlib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dho2_optax.poc import system

__all__ = ["DIGITS", "DataError", "Dataset", "load"]

DIGITS = "digits"

_IDX_UNSIGNED_BYTE = 8
_IDX_NAMES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
_CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_CIFAR_TEST = "test_batch.bin"
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_CLASSES = 10
_DIGITS_TEST_FRACTION = 0.2


class DataError(ValueError):
    """A data file is missing, truncated or malformed; the message names it."""


class Dataset(NamedTuple):
    """Images and labels, split into a training and a test part."""

    name: str
    train_images: np.ndarray  # shape=(n, height, width, channels), dtype=float32, in [0, 1]
    train_labels: np.ndarray  # shape=(n,), dtype=int32
    test_images: np.ndarray
    test_labels: np.ndarray
    is_digits: bool = False  # those of the package; a folder may be called so, too

    @property
    def num_classes(self) -> int:
        """Number of classes, the largest label plus one."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels


def load(source: str) -> Dataset:
    """Load a data set.

    Args:
      source: "digits" for the vendored digits, or a folder that holds the four IDX files of MNIST
        (each gzipped or not), or the CIFAR-10 binary files (directly or in
        `cifar-10-batches-bin`).

    Returns:
      The data, the same on every call.

    Raises:
      DataError: naming the file, if one is missing, truncated or malformed.

    Example:
      >>> from dho2_optax.poc import data
      >>> digits = data.load("digits")
      >>> digits.image_shape, digits.num_classes, len(digits.train_labels)
      ((8, 8, 1), 10, 1438)
    """
    if source == DIGITS:
        return _digits()
    try:
        return _from_folder(Path(source))
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read: {system.reason(error)}") from None


def _from_folder(folder: Path) -> Dataset:
    if not folder.exists():
        raise DataError(f'no data at {folder}: give "digits" or a folder that exists')
    if not folder.is_dir():
        raise DataError(f"{folder} is a file: give the folder that holds the data files")
    for cifar in (folder, folder / _CIFAR_FOLDER):
        if any((cifar / name).exists() for name in (*_CIFAR_TRAIN, _CIFAR_TEST)):
            return _cifar(cifar)
    if any(_find_idx(folder, name) for name in _IDX_NAMES.values()):
        return _idx(folder)
    raise DataError(
        f"{folder} holds neither IDX files (such as {_IDX_NAMES['train images']}.gz) "
        f"nor CIFAR-10 binaries (such as {_CIFAR_TRAIN[0]})"
    )


def _digits() -> Dataset:
    text = (resources.files("dho2_optax.poc") / "assets" / "digits.csv.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(text).decode().splitlines(), delimiter=",", dtype=np.int32)
    images = (table[:, :-1].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = table[:, -1].astype(np.int32)
    # The file is ordered by writer: mix it, in the same way every time.
    order = np.random.default_rng(0).permutation(len(labels))
    num_test = math.floor(len(labels) * _DIGITS_TEST_FRACTION)
    test, train = order[:num_test], order[num_test:]
    return Dataset(DIGITS, images[train], labels[train], images[test], labels[test], is_digits=True)


def _find_idx(folder: Path, name: str) -> Path | None:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.exists():
            return candidate
    return None


def _idx(folder: Path) -> Dataset:
    arrays = {}
    for part in ("train", "test"):
        paths = {}
        for kind in ("images", "labels"):
            name = _IDX_NAMES[f"{part} {kind}"]
            path = _find_idx(folder, name)
            if path is None:
                raise DataError(f"{folder / name} (or {name}.gz) is missing")
            paths[kind] = path
        images = _read_idx(paths["images"], num_axes=3)
        labels = _read_idx(paths["labels"], num_axes=1)
        if len(images) != len(labels):
            raise DataError(
                f"{paths['labels']} has {len(labels)} labels for the {len(images)} images of {paths['images'].name}"
            )
        arrays[part] = (_scale(images[..., None]), labels.astype(np.int32))
    (train_images, train_labels), (test_images, test_labels) = arrays["train"], arrays["test"]
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{folder}: training images are {train_images.shape[1]} x {train_images.shape[2]} "
            f"but test images {test_images.shape[1]} x {test_images.shape[2]}"
        )
    name = folder.resolve().name
    return Dataset(name, train_images, train_labels, test_images, test_labels)


def _read_idx(path: Path, num_axes: int) -> np.ndarray:
    """Read an IDX file: magic 0 0 type axes, big-endian sizes, then the bytes."""
    content = _read(path)
    header = 4 + 4 * num_axes
    if len(content) < header:
        raise DataError(f"{path} is truncated: {len(content)} bytes, its header has {header}")
    zeros, kind, axes = struct.unpack(">HBB", content[:4])
    if (zeros, kind, axes) != (0, _IDX_UNSIGNED_BYTE, num_axes):
        expected = struct.pack(">HBB", 0, _IDX_UNSIGNED_BYTE, num_axes).hex()
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes with {num_axes} axes: "
            f"it starts with 0x{content[:4].hex()}, not 0x{expected}"
        )
    shape = struct.unpack(f">{num_axes}I", content[4:header])
    _check_size(path, len(content), header + math.prod(shape))
    if not math.prod(shape):
        raise DataError(f"{path} is empty: its header says {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _cifar(folder: Path) -> Dataset:
    train = [_read_cifar(folder / name) for name in _CIFAR_TRAIN]
    test_images, test_labels = _read_cifar(folder / _CIFAR_TEST)
    images = np.concatenate([images for images, _ in train])
    labels = np.concatenate([labels for _, labels in train])
    return Dataset("cifar-10", images, labels, test_images, test_labels)


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of a label byte and 3 x 32 x 32 pixels, channel by channel."""
    if not path.exists():
        raise DataError(f"{path} is missing")
    content = _read(path)
    if not content or len(content) % _CIFAR_RECORD:
        raise DataError(
            f"{path} is truncated or no CIFAR-10 binary: "
            f"{len(content)} bytes is not a whole number of records of {_CIFAR_RECORD}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= _CIFAR_CLASSES:
        row = int(labels.argmax())
        raise DataError(f"{path}: record {row} has the label {labels[row]}, not one of 0 to 9")
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _scale(pixels), labels


def _read(path: Path) -> bytes:
    if not path.is_file():  # a device or a pipe may never end
        raise DataError(f"{path} cannot be read: it is not a file")
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except EOFError:
        raise DataError(f"{path} is truncated: its gzip stream ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a valid gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {system.reason(error)}") from None


def _check_size(path: Path, size: int, expected: int) -> None:
    if size < expected:
        raise DataError(f"{path} is truncated: {size} bytes of the {expected} its header promises")
    if size > expected:
        raise DataError(f"{path} is malformed: {size} bytes where its header promises {expected}")


def _scale(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)
