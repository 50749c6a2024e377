"""Sources from files: tensorflow-datasets without TensorFlow, folders, arrays, IDX; and the stream."""

import gzip
import importlib
import io
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff import data
from jaxdiff.errors import ConfigError, DataError, UnsafeFileError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


# --- tensorflow-datasets


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A tiny prepared set, written from the published formats: tf.Example messages in an array_record file."""
    array_record = pytest.importorskip("array_record.python.array_record_module", reason="needs jaxdiff[tfds]")
    from tensorflow_datasets.proto import tf_example_pb2

    folder = tmp_path_factory.mktemp("tfds") / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    writer = array_record.ArrayRecordWriter(str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for i, image in enumerate(PICTURES):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(png(image))
        example.features.feature["label"].int64_list.value.append(i % 3)
        writer.write(example.SerializeToString())
    writer.close()
    python = "tensorflow_datasets.core.features."
    features = {
        "image": {
            "pythonClassName": python + "image_feature.Image",
            "image": {"shape": {"dimensions": ["6", "6", "3"]}, "dtype": "uint8"},
        },
        "label": {
            "pythonClassName": python + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
        },
    }
    top = {"pythonClassName": python + "features_dict.FeaturesDict", "featuresDict": {"features": features}}
    split = {"name": "train", "shardLengths": ["7"], "numBytes": "1000"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "features.json").write_text(json.dumps(top))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "label.labels.txt").write_text("ant\nbee\ncat\n")
    return folder.parents[1]


def test_tfds_is_read_without_tensorflow(tfds_dir, tmp_path, monkeypatch):
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('tensorflow was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match="was imported"):
        importlib.import_module("tensorflow")
    tiny = data.tfds("tiny", data_dir=tfds_dir)
    np.testing.assert_array_equal(tiny.images, PICTURES)
    assert tiny.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert tiny.label_names == ("ant", "bee", "cat")
    assert len(data.tfds("tiny", "train[2:5]", tfds_dir)) == 3
    assert data.tfds("tiny", data_dir=tfds_dir, size=3).images.shape == (7, 3, 3, 3)
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def captioned(tfds_dir, tmp_path_factory):
    """A set as coco_captions is: pictures of many sizes, several captions of each."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = shutil.copytree(tfds_dir / "tiny", tmp_path_factory.mktemp("coco") / "tiny") / "1.0.0"
    writer = ArrayRecordWriter(str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for i, picture in enumerate(PICTURES):
        example = tf_example_pb2.Example()
        wide = np.repeat(picture, 2, 1) if i % 2 else picture
        example.features.feature["image"].bytes_list.value.append(png(wide))
        texts = [] if i == 6 else [f"picture {i} \u00e9".encode(), b"another"]
        example.features.feature["captions/text"].bytes_list.value.extend(texts)
        example.features.feature["captions/id"].int64_list.value.extend(range(len(texts)))
        writer.write(example.SerializeToString())
    writer.close()
    features = json.loads((folder / "features.json").read_text())
    parts = features["featuresDict"]["features"]
    del parts["label"]
    parts["image"]["image"]["shape"]["dimensions"] = ["-1", "-1", "3"]
    python = "tensorflow_datasets.core.features."
    inner = {
        "id": {"pythonClassName": python + "tensor_feature.Tensor", "tensor": {"shape": {}, "dtype": "int64"}},
        "text": {"pythonClassName": python + "text_feature.Text", "text": {}},
    }
    inner = {"pythonClassName": python + "features_dict.FeaturesDict", "featuresDict": {"features": inner}}
    sequence = {"feature": inner, "length": "-1"}
    parts["captions"] = {"pythonClassName": python + "sequence_feature.Sequence", "sequence": sequence}
    (folder / "features.json").write_text(json.dumps(features))
    return folder.parents[1]


def test_tfds_gives_the_first_caption_of_each_picture(captioned):
    found = data.tfds("tiny", data_dir=captioned, size=3)
    assert found.captions == (*(f"picture {i} \u00e9" for i in range(6)), "")
    assert found.images.shape == (7, 3, 3, 3)
    assert found.labels is None
    with pytest.raises(DataError, match="differ in shape"):
        data.tfds("tiny", data_dir=captioned)


def test_tfds_skips_damaged_records(tfds_dir, tmp_path):
    """One whose picture is cut short, one that is no tf.Example at all."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    shutil.copytree(tfds_dir, tmp_path / "sets")
    shard = tmp_path / "sets" / "tiny" / "1.0.0" / "tiny-train.array_record-00000-of-00001"
    out = ArrayRecordWriter(str(shard), "group_size:1")
    for i, image in enumerate(PICTURES):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(png(image)[: 60 if i == 0 else None])
        example.features.feature["label"].int64_list.value.append(i % 3)
        out.write(b"\xff\xfe" if i == 4 else example.SerializeToString())
    out.close()
    with pytest.warns(UserWarning, match="records skipped"):
        found = data.tfds("tiny", data_dir=tmp_path / "sets")
    assert list(found.skipped) == [0, 4]
    good = [1, 2, 3, 5, 6]
    np.testing.assert_array_equal(found.images[good], PICTURES[good])
    assert found.labels[good].tolist() == [1, 2, 0, 2, 0]
    whole = shard.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        middle = whole.index(png(PICTURES[2])) + 50
        shard.write_bytes(whole[:middle] + bytes(20) + whole[middle + 20 :])
        assert list(data.tfds("tiny", data_dir=tmp_path / "sets").skipped) == [0, 2, 4]
        for broken in (whole[: len(whole) // 2], b"", b"text"):
            shard.write_bytes(broken)
            with pytest.raises(DataError, match="5 of 7 records"):
                data.tfds("tiny", data_dir=tmp_path / "sets")


@pytest.mark.parametrize("name", ["../tiny", "/etc/tiny", "tiny/../..", "a b", ""])
def test_tfds_takes_names_only(tfds_dir, name):
    with pytest.raises((ConfigError, DataError)):
        data.tfds(name, data_dir=tfds_dir)


def test_tfds_says_what_to_type(tfds_dir, tmp_path):
    with pytest.raises(
        DataError, match=r"not prepared(.|\n)*pip install(.|\n)*array_record(.|\n)*download_and_prepare"
    ):
        data.tfds("cifar10", data_dir=tmp_path)
    with pytest.raises(ConfigError, match="'cifar10'"):
        data.tfds("cifar_10", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"trian(.|\n)*train"):
        data.tfds("tiny", "trian", tfds_dir)


def test_real_cifar10():
    folder = Path(os.environ.get("JAXDIFF_TFDS_DIR", "~/tensorflow_datasets")).expanduser()
    if not (folder / "cifar10").is_dir():
        pytest.skip("needs a prepared cifar10 in $JAXDIFF_TFDS_DIR or ~/tensorflow_datasets")
    test = data.tfds("cifar10", "test", folder)
    assert test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert test.label_names[:3] == ("airplane", "automobile", "bird")
    mean = test.images.mean((0, 1, 2)) / 255  # as published for the test set: 0.4942, 0.4851, 0.4504
    np.testing.assert_allclose(mean, [0.4942, 0.4851, 0.4504], atol=2e-3)


# --- folders


@pytest.fixture
def pictures(tmp_path):
    for i, image in enumerate(PICTURES):
        path = tmp_path / ("bee" if i % 2 else "ant") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(image))
    return tmp_path


def write_metadata(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_folder_reads_pictures_and_labels(pictures):
    found = data.folder(pictures, 6)
    np.testing.assert_array_equal(found.images, PICTURES[[0, 2, 4, 6, 1, 3, 5]])
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert found.label_names == ("ant", "bee")
    assert found.captions is None


def test_folder_reads_captions_in_their_order(pictures):
    rows = [{"file_name": "bee/1.png", "text": "one"}, "", {"file_name": "ant/0.png", "caption": "zero", "name": 3}]
    write_metadata(pictures, *rows)
    found = data.folder(pictures, 6)
    np.testing.assert_array_equal(found.images, PICTURES[[1, 0]])
    assert found.captions == ("one", "zero")
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "../secret.png"}, "leads out of the folder"),
        ({"file_name": "/etc/passwd"}, "leads out of the folder"),
        ({"file_name": "link.png"}, "leads out of the folder"),
        ({"file_name": "ant/9.png"}, "there is no file"),
        ({"text": "no name"}, "line 2 must be"),
        ("not json", "line 2 must be"),
        ("[1]", "line 2 must be"),
        ({"file_name": "ant/2.png"}, "1 of 2 lines"),
    ],
)
def test_folder_refuses_bad_metadata(pictures, row, message):
    outside = pictures.parent / "secret.png"
    outside.write_bytes(png(PICTURES[0]))
    (pictures / "link.png").symlink_to(outside)
    write_metadata(pictures, {"file_name": "ant/0.png", "text": "zero"}, row)
    with pytest.raises(DataError, match=message):
        data.folder(pictures, 6)


@pytest.mark.parametrize("content", [png(PICTURES[2])[:60], b"text", b""])
def test_folder_skips_the_unreadable_picture_and_names_it(pictures, content):
    (pictures / "ant" / "2.png").write_bytes(content)
    with pytest.warns(UserWarning, match=r"1 of 7 records skipped(.|\n)*2\.png cannot be read"):
        found = data.folder(pictures, 6)
    assert list(found.skipped) == [1]
    assert "2.png" in found.skipped[1]
    np.testing.assert_array_equal(found.images[[0, 2, 3]], PICTURES[[0, 4, 6]])


def test_folder_missing_empty_or_wrong(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        data.folder(tmp_path / "none", 6)
    with pytest.raises(DataError, match="holds no pictures"):
        data.folder(tmp_path, 6)
    with pytest.raises(ConfigError, match="size=0"):
        data.folder(tmp_path, 0)


def test_pictures_of_any_kind_are_cropped_upright_on_white(tmp_path):
    wide = np.zeros((10, 30, 4), np.uint8)
    wide[:, 10:20] = (255, 0, 0, 255)  # the centre square is red, the rest transparent black
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((10, 10, 4), np.uint8)).save(tmp_path / "b.png")
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 255  # black left, white right; turned clockwise by its EXIF entry: black on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half).save(tmp_path / "c.png", exif=exif)
    red, white, turned = data.folder(tmp_path, 4).images
    assert (red == (255, 0, 0)).all()
    assert (white == 255).all()
    assert turned[0].max() < 30
    assert turned[3].min() > 225
    assert data.folder(tmp_path, 4, channels=1).images.shape == (3, 4, 4, 1)


# --- arrays, IDX, points


def test_arrays():
    found = data.arrays(PICTURES[..., 0], [0, 1, 0, 1, 0, 1, 1], list("abcdefg"), label_names=["x", "y"])
    assert found.images.shape == (7, 6, 6, 1)
    assert found.num_classes == 2
    with pytest.raises(DataError, match="integers"):
        data.arrays(PICTURES, np.ones(7))


def test_array_files(tmp_path):
    np.savez(tmp_path / "a.npz", images=PICTURES, labels=np.arange(7), captions=list("abcdefg"))
    np.save(tmp_path / "b.npy", PICTURES)
    first, second = data.array_file(tmp_path / "a.npz"), data.array_file(tmp_path / "b.npy")
    np.testing.assert_array_equal(first.images, second.images)
    assert first.labels.tolist() == list(range(7))
    assert first.captions == tuple("abcdefg")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("name", ["object.npy", "object.npz", "pickle.npy", "model.pkl"])
def test_pickles_are_refused(tmp_path, name):
    path = tmp_path / name
    array = np.array([Bomb()], dtype=object)
    if name == "object.npz":
        np.savez(path, images=array)
    elif name == "object.npy":
        np.save(path, array)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnsafeFileError, match="refusing"):
        data.array_file(path)


def test_damaged_array_files(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=PICTURES)
    with pytest.raises(DataError, match="no array 'images'"):
        data.array_file(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        data.array_file(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", PICTURES)
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged"):
        data.array_file(tmp_path / "b.npy")
    with pytest.raises(DataError, match="no file"):
        data.array_file(tmp_path / "c.npy")


def test_idx(tmp_path):
    images = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + bytes(range(24))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x02\x05\x09")
    found = data.idx(tmp_path)
    np.testing.assert_array_equal(found.images, np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1))
    assert found.labels.tolist() == [5, 9]
    for broken in (images[:-1], b"\0\0\x09" + images[3:], images[:6], b""):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(broken))
        with pytest.raises(DataError, match="damaged"):
            data.idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images)[:-9])
    with pytest.raises(DataError, match="damaged"):
        data.idx(tmp_path)
    with pytest.raises(DataError, match="neither"):
        data.idx(tmp_path, "test")
    with pytest.raises(ConfigError, match="valid"):
        data.idx(tmp_path, "valid")


def test_swissroll_lies_on_the_spiral():
    points = data.swissroll(500, seed=1, noise=0.0).images.astype(np.float64)
    radius, angle = np.hypot(*points.T) * 15, np.arctan2(points[:, 1], points[:, 0])
    turns = (radius - angle) / (2 * np.pi)
    np.testing.assert_allclose(turns, np.rint(turns), atol=1e-5)
    assert 1.5 * np.pi < radius.min() < radius.max() < 4.5 * np.pi
    np.testing.assert_array_equal(data.swissroll(9, 2).images, data.swissroll(9, 2).images)
    with pytest.raises(ConfigError, match="count"):
        data.swissroll(0)


# --- the stream


def test_the_stream_is_the_order_and_resumes(pictures):
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    source = data.open_folder(pictures, 6)
    memory = source.in_memory().images
    batches = data.stream(source, seed=4, batch_size=3)
    resumed = data.stream(source, seed=4, batch_size=3, step=2)
    for step in range(5):
        indices, images = next(batches)
        np.testing.assert_array_equal(indices, data.order(4, step, batch_size=3, num_examples=7))
        np.testing.assert_array_equal(images, memory[indices])
        if step >= 2:
            np.testing.assert_array_equal(next(resumed)[0], indices)
    with pytest.raises(ConfigError, match="batch_size"):
        data.stream(source, seed=4, batch_size=0)
