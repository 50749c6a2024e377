"""What comes from outside, damaged at random: only our own errors come out, at once, and little memory is asked for.

Each kind of file is damaged a few hundred times by a seeded choice of: bytes changed, cut, doubled, zeroed; numbers
replaced by extreme ones; and headers that lie on purpose. A damaged file may still be read, where it makes sense.
"""

import gzip
import io
import json
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from experiments import check, cli, inputs, model, workdir
from jaxdiff import data, text
from jaxdiff.data import files
from jaxdiff.errors import DataError, JaxdiffError, UnsafeFileError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
NUMBERS = [b"0", b"-1", b"99999999999", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"x"', b"true", b"1" * 400]


def damage(content, rng):
    """Change a few things at random places."""
    body = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        i, length = int(rng.integers(len(body) or 1)), int(rng.integers(1, 16))
        kind = rng.integers(7)
        if kind == 0:
            body[i : i + 1] = bytes([int(rng.integers(256))])
        elif kind == 1:
            del body[i:]
        elif kind == 2:
            body[i : i + length] = bytes(rng.integers(0, 256, length, dtype=np.uint8))
        elif kind == 3:
            body[i:i] = body[i : i + length]
        elif kind == 4:
            body[i : i + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
        elif kind == 5:
            body[i : i + length] = NUMBERS[rng.integers(len(NUMBERS))]
        else:
            del body[i : i + length]
    return bytes(body)


def fuzz(write, read, content, count, prefix=0):
    """Read `count` damaged versions: how many were refused. Half of them are damaged in the first `prefix` bytes only.

    Fails for an error that is not ours, for more than 2 s, or for more memory than four times that of the whole file.
    """
    rng, refused = np.random.default_rng(1), 0
    write(content)
    allowed = 4 * peak(read) + 2**20
    for i in range(count):
        edge = prefix if prefix and i % 2 else len(content)
        broken = damage(content[:edge], rng) + content[edge:]
        write(broken)
        began = time.process_time()
        try:
            assert peak(read) <= allowed, broken[:300]
        except JaxdiffError:
            refused += 1
        assert time.process_time() - began < 2, broken[:300]
    return refused


def peak(read):
    """The largest sum of Python's and NumPy's memory while it reads."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_is_asked_of_reading_can_fail(tmp_path):
    path, content = tmp_path / "a.json", json.dumps(list(range(50))).encode()
    with pytest.raises(ValueError, match=r"Expecting|Extra|Invalid|delimiter|decode"):
        fuzz(path.write_bytes, lambda: json.loads(path.read_bytes()), content, 50)

    def greedy():
        np.zeros(2**22 if path.read_bytes() != content else 1)

    with pytest.raises(AssertionError):
        fuzz(path.write_bytes, greedy, content, 5)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def test_npy(tmp_path):
    path = tmp_path / "a.npy"
    for images in (PICTURES, PICTURES.astype(np.float32)):
        assert fuzz(path.write_bytes, lambda: data.array_file(path), npy(images), 300, prefix=128) > 100


def test_npz(tmp_path):
    path = tmp_path / "a.npz"
    content = npz(images=PICTURES, labels=np.arange(8), captions=list("abcdefgh"), label_names=list("abcdefgh"))
    assert fuzz(path.write_bytes, lambda: data.array_file(path), content, 600) > 300
    stored = io.BytesIO()
    np.savez(stored, images=PICTURES, labels=np.arange(8), captions=list("abcdefgh"))
    tail = stored.getvalue()
    assert fuzz(path.write_bytes, lambda: data.array_file(path), tail, 300, prefix=200) > 100


def test_a_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    text.train(["a red rose", "a blue bird"], 200).save(path)
    assert fuzz(path.write_bytes, lambda: text.load(path).encode(["a rose"], 4), path.read_bytes(), 300) > 100
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="damaged"):
        text.load(path)
    with path.open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(DataError, match="no tokenizer has more"):
        text.load(path)


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    content = b"\0\0\x08\x03" + struct.pack(">3I", 8, 8, 8) + PICTURES[..., 0].tobytes()
    labels = b"\0\0\x08\x01" + struct.pack(">I", 8) + bytes(range(8))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    name = "train-images-idx3-ubyte" + (".gz" if packed else "")
    whole = gzip.compress(content) if packed else content
    assert fuzz((tmp_path / name).write_bytes, lambda: data.idx(tmp_path), whole, 500, prefix=20) > 200


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_pictures(tmp_path, suffix):
    """A damaged picture is an error of ours, for which it is skipped, or is still read; never anything else."""
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(PICTURES[0]).save(file)
    pictures = data.open_folder(tmp_path, 8)
    count = 500 if suffix == "png" else 120
    assert fuzz(file.write_bytes, lambda: pictures[0], file.read_bytes(), count, prefix=100) > 10


def test_metadata(tmp_path):
    for i, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"number {i}", "size": [8, {"of": 8}]} for i in range(8)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    refused = fuzz((tmp_path / "metadata.jsonl").write_bytes, lambda: data.open_folder(tmp_path, 8), content, 600)
    assert refused > 200


def test_the_config_of_a_workdir(tmp_path):
    """Read as sampling does: the config, its ranges, the network and the sampler that it names."""
    config = cli.load_config("swissroll")
    config.data.points, config.net.width = 20, 8
    (tmp_path / "data.json").write_text(json.dumps(inputs.describe(inputs.load(config))))
    whole = json.dumps(config.to_dict(), indent=1).encode()

    def read():
        loaded, info = workdir.load(tmp_path)
        check.config(loaded)
        made = model.build(loaded, info, None)
        model.sampler(made, loaded.sample)
        model.optimizer(loaded)

    assert fuzz((tmp_path / "config.json").write_bytes, read, whole, 1000) > 500
    info = (tmp_path / "data.json").read_bytes()
    (tmp_path / "config.json").write_bytes(whole)
    assert fuzz((tmp_path / "data.json").write_bytes, read, info, 300) > 100


# --- headers that lie


def lying_npy(shape, descr="|u1"):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        lying_npy((2**40, 8, 8, 3)),
        lying_npy((2**63, 2**63)),
        lying_npy((8, 9)),
        lying_npy((0,) * 40),
        lying_npy((64,), "|V1"),
        lying_npy((8,), "<M8"),
        lying_npy((1,), "<U" + "9" * 9),
        lying_npy("(" * 5000),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"x" * 64,
        b"\x93NUMPY\x03\x00" + bytes(64),
        b"",
    ],
)
def test_npy_headers_that_lie(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError):
        files.read_npy(tmp_path / "a.npy")
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_arrays_are_what_numpy_saved(tmp_path):
    wanted = [
        PICTURES, np.asfortranarray(PICTURES[0]), np.float32(3), np.zeros((0, 3)), np.arange(3.0),
        np.array(["é", "bc"]), np.array([True, False]), np.arange(4, dtype=">i2"),
    ]  # fmt: skip
    for array in wanted:
        np.save(tmp_path / "a.npy", array)
        np.savez(tmp_path / "a.npz", b=array)
        for found in (files.read_npy(tmp_path / "a.npy"), files.read_npz(tmp_path / "a.npz")["b"]):
            np.testing.assert_array_equal(found, array)
            assert found.dtype == np.asarray(array).dtype


def test_archives_that_grow(tmp_path):
    """A gigabyte of zeros in a megabyte, claimed or not: more than deflate can hold, or of no array."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("images.npy", bytes(2**24))
    with pytest.raises(DataError, match="claims"):
        files.read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(200):
            archive.writestr(f"{i}.npy", npy(np.zeros(1)))
    with pytest.raises(DataError, match="200 arrays"):
        files.read_npz(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", lying_npy((2**30,)) + bytes(2**20))
    with pytest.raises(DataError, match="are not the"):
        files.read_npz(path)
    packed = gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**15, 2**8, 2**8))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(DataError, match="claims 32768 x 256 x 256 bytes"):
        data.idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x04" + bytes(2**24)))
    tracemalloc.start()
    with pytest.raises(DataError, match="damaged"):
        data.idx(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_pickle_inside_an_archive_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=PICTURES, labels=np.array([{}], dtype=object))
    with pytest.raises(UnsafeFileError, match="labels"):
        data.array_file(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.uint8(3)}, "single value"),
        ({"labels": np.full(8, 2**40)}, "below 2"),
        ({"captions": np.array("one")}, "list of texts"),
        ({"label_names": np.array([["a"]])}, "list of texts"),
        ({"images": PICTURES.astype(np.float64)}, "float64"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **({"images": PICTURES} | arrays))
    with pytest.raises(DataError, match=message):
        data.array_file(tmp_path / "a.npz")


# --- names


@pytest.mark.parametrize("name", ["..", "../a.png", "/etc/passwd", "a\0b", "x" * 5000, "\ud800.png", "sub", "", "."])
def test_names_in_metadata_stay_inside(tmp_path, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        data.open_folder(tmp_path, 8)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"file_name": 3}', '"' + "a" * 2**21 + '"', "\x00", '{"a": 1'])
def test_lines_of_metadata_that_are_none(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1"):
        data.open_folder(tmp_path, 8)


def test_captions_may_hold_any_separator(tmp_path):
    """JSON allows them inside a text; they end no line."""
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "one\u2028two\x85three\x0bfour"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert data.open_folder(tmp_path, 8).captions == (row["text"],)


def test_links_that_lead_out_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    Image.fromarray(PICTURES[0]).save(tmp_path / "secret.png")
    Image.fromarray(PICTURES[0]).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "b.png").symlink_to("a.png")
    assert len(data.open_folder(tmp_path / "set", 8)) == 2
    (tmp_path / "set" / "c.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"c\.png leads out"):
        data.open_folder(tmp_path / "set", 8)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "c.png").unlink()
    assert len(data.open_folder(tmp_path / "link", 8)) == 2


def test_a_picture_whose_text_is_a_bomb_is_skipped(tmp_path):
    """8 MB of text in a compressed chunk of 8 kB."""
    file = io.BytesIO()
    Image.fromarray(PICTURES[0]).save(file, "PNG")
    chunk = b"zTXt" + b"a\0\0" + zlib.compress(bytes(2**23))
    bomb = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = file.getvalue()
    (tmp_path / "a.png").write_bytes(content[:33] + bomb + content[33:])
    Image.fromarray(PICTURES[0]).save(tmp_path / "b.png")
    with pytest.warns(UserWarning, match="too large"):
        assert list(data.folder(tmp_path, 8).skipped) == [0]
