import errno
import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from dho2_optax.poc import data, tasks

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def _idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def _pixels(rng, count, shape=(5, 4)):
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "train_images": _pixels(rng, 12),
        "train_labels": np.arange(12, dtype=np.uint8) % 3,
        "test_images": _pixels(rng, 6),
        "test_labels": np.arange(6, dtype=np.uint8) % 3,
    }


def _write(folder, arrays, *, zipped):
    for key, array in arrays.items():
        content = _idx(array)
        name = NAMES[key] + (".gz" if zipped else "")
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)


@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(0)
    written = {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (tmp_path / name).write_bytes(records.tobytes())
        written[name] = records
    return tmp_path, written


def test_digits_are_complete_split_and_the_same_every_time():
    first, second = data.load("digits"), data.load("digits")
    assert len(first.train_labels) + len(first.test_labels) == 1797
    assert first.image_shape == (8, 8, 1)
    assert first.num_classes == 10
    assert first.train_images.max() == 1.0
    assert first.train_images.dtype == np.float32
    np.testing.assert_array_equal(first.train_images, second.train_images)
    # The classes of a mixed split are about equally frequent in both parts.
    assert np.bincount(first.test_labels).min() > 20


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read_as_written(tmp_path, arrays, zipped):
    _write(tmp_path, arrays, zipped=zipped)
    loaded = data.load(str(tmp_path))
    assert loaded.image_shape == (5, 4, 1)
    assert loaded.num_classes == 3
    np.testing.assert_allclose(loaded.train_images[..., 0] * 255, arrays["train_images"], atol=1e-4)
    np.testing.assert_array_equal(loaded.test_labels, arrays["test_labels"])


def test_a_folder_that_is_called_digits_does_not_hold_the_digits(tmp_path, arrays):
    folder = tmp_path / "digits"
    folder.mkdir()
    _write(folder, arrays, zipped=False)
    found, digits = data.load(str(folder)), data.load("digits")
    assert (found.name, found.is_digits, digits.is_digits) == ("digits", False, True)
    assert tasks.from_dataset("mlp", found).target is None
    assert tasks.from_dataset("mlp", digits).target is not None


@pytest.mark.parametrize("key", list(NAMES))
def test_a_missing_idx_file_is_named(tmp_path, arrays, key):
    _write(tmp_path, arrays, zipped=True)
    (tmp_path / f"{NAMES[key]}.gz").unlink()
    with pytest.raises(data.DataError, match=rf"{NAMES[key]} .* is missing"):
        data.load(str(tmp_path))


def _truncate(content):
    return content[:-3]


def _cut_in_header(content):
    return content[:5]


def _lengthen(content):
    return content + b"\0"


def _wrong_magic(content):
    return b"\0\0\x0d\x03" + content[4:]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_truncate, "is truncated"),
        (_cut_in_header, "is truncated"),
        (_lengthen, "is malformed"),
        (_wrong_magic, "is not an IDX file"),
    ],
)
def test_a_malformed_idx_file_is_named(tmp_path, arrays, spoil, complaint):
    _write(tmp_path, arrays, zipped=False)
    path = tmp_path / NAMES["train_images"]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(data.DataError, match=rf"{path} {complaint}"):
        data.load(str(tmp_path))


def test_a_truncated_gzip_file_is_named(tmp_path, arrays):
    _write(tmp_path, arrays, zipped=True)
    path = tmp_path / f"{NAMES['test_images']}.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(data.DataError, match=rf"{path} is truncated"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("content", [b"no gzip at all", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + 40 * b"x"])
def test_a_file_that_is_no_gzip_is_named(tmp_path, arrays, content):
    _write(tmp_path, arrays, zipped=True)
    path = tmp_path / f"{NAMES['test_labels']}.gz"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=rf"{path} is not a valid gzip file"):
        data.load(str(tmp_path))


def test_labels_that_do_not_match_the_images(tmp_path, arrays):
    arrays["train_labels"] = arrays["train_labels"][:-1]
    _write(tmp_path, arrays, zipped=True)
    with pytest.raises(data.DataError, match=r"train-labels.*has 11 labels for the 12 images"):
        data.load(str(tmp_path))


def test_images_of_two_sizes(tmp_path, arrays):
    arrays["test_images"] = _pixels(np.random.default_rng(1), 6, (3, 3))
    _write(tmp_path, arrays, zipped=True)
    with pytest.raises(data.DataError, match="5 x 4 but test images 3 x 3"):
        data.load(str(tmp_path))


def test_an_idx_file_without_samples(tmp_path, arrays):
    arrays["test_images"] = arrays["test_images"][:0]
    _write(tmp_path, arrays, zipped=False)
    with pytest.raises(data.DataError, match=r"t10k-images.*is empty"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("nested", [True, False])
def test_cifar_is_read_channel_by_channel(cifar, nested):
    folder, written = cifar
    if nested:
        inner = folder / "cifar-10-batches-bin"
        inner.mkdir()
        for name in written:
            (folder / name).rename(inner / name)
    loaded = data.load(str(folder))
    assert loaded.image_shape == (32, 32, 3)
    assert len(loaded.train_labels) == 20
    record = written["data_batch_2.bin"][1]
    assert loaded.train_labels[5] == record[0]
    # Green, row 2, column 7 of the second record of the second file.
    green = record[1 + 1024 + 2 * 32 + 7]
    assert loaded.train_images[5, 2, 7, 1] == pytest.approx(green / 255)


def test_a_truncated_cifar_file_is_named(cifar):
    folder, _ = cifar
    path = folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match=rf"{path} is truncated"):
        data.load(str(folder))


def test_a_missing_cifar_file_is_named(cifar):
    folder, _ = cifar
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(data.DataError, match=r"data_batch_4\.bin is missing"):
        data.load(str(folder))


def test_a_cifar_label_out_of_range_is_named(cifar):
    folder, written = cifar
    records = written["test_batch.bin"].copy()
    records[2, 0] = 200
    (folder / "test_batch.bin").write_bytes(records.tobytes())
    with pytest.raises(data.DataError, match=r"test_batch.bin: record 2 has the label 200"):
        data.load(str(folder))


def test_a_folder_without_data(tmp_path):
    with pytest.raises(data.DataError, match="holds neither"):
        data.load(str(tmp_path))


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(data.DataError, match=f"no data at {tmp_path}/nowhere"):
        data.load(f"{tmp_path}/nowhere")


def test_a_file_in_place_of_a_folder(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(data.DataError, match="is a file"):
        data.load(str(path))


def test_a_directory_with_the_name_of_a_data_file(tmp_path, arrays):
    _write(tmp_path, arrays, zipped=False)
    (tmp_path / NAMES["train_labels"]).unlink()
    (tmp_path / NAMES["train_labels"]).mkdir()
    with pytest.raises(data.DataError, match=r"train-labels-idx1-ubyte cannot be read"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_a_device_with_the_name_of_a_data_file_is_not_waited_for(tmp_path, arrays, make):
    _write(tmp_path, arrays, zipped=False)
    path = tmp_path / NAMES["test_images"]
    path.unlink()
    make(path)
    with pytest.raises(data.DataError, match=f"{path} cannot be read: it is not a file"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("source", ["x" * 300, "x/" * 3000, "a\0b", "\ud800", "/dev/null", "/dev/null/x", ""])
def test_a_path_that_the_system_refuses(source):
    with pytest.raises(data.DataError):
        data.load(source)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(self, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refuse)  # root may read everything
    with pytest.raises(data.DataError, match=f"^{tmp_path} cannot be read: Permission denied$"):
        data.load(str(tmp_path))
