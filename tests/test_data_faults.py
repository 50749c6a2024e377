"""Records that cannot be used: converted or skipped, replaced by a function of (seed, step, record), and listed."""

import collections
import json
import os
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff import data
from jaxdiff.data import faults
from jaxdiff.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


class Records:
    """Examples of which some are bad: kept free of closures, so that a worker can be sent it."""

    def __init__(self, count, bad=(), after=None):
        self.count, self.bad, self.reads = count, frozenset(bad), after

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise DataError(f"record {index} is bad.")
        return np.full((2, 2, 3), index % 256, np.uint8)


def take(count, source, **kwargs):
    """The first batches of a stream, closed after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = data.stream(source, **{"seed": 3, "batch_size": 8, "threads": 2} | kwargs)
        found = [next(stream) for _ in range(count)]
        stream.close()
    return found


def assert_same(one, other):
    for (i, x), (j, y) in zip(one, other, strict=True):
        np.testing.assert_array_equal(i, j)
        np.testing.assert_array_equal(x, y)


# --- replacements


@pytest.mark.parametrize("count", [*range(1, 66), 1000])
def test_replacements_are_others_each_once(count):
    for record in range(min(count, 3)):
        found = list(faults.replacements(0, 5, record, count))
        assert record not in found
        assert len(set(found)) == len(found) >= min(count, 64) - 1
        assert all(0 <= other < count for other in found)


def test_replacements_are_spread_over_all_records():
    counts = collections.Counter(next(faults.replacements(1, step, 3, 10)) for step in range(9000))
    assert 3 not in counts
    chi2 = sum((counts[i] - 1000) ** 2 / 1000 for i in range(10) if i != 3)
    assert chi2 < 26.1  # the 0.999 quantile at 8 degrees of freedom


def test_order_replaces_what_is_skipped_and_nothing_else():
    sizes = {"batch_size": 16, "num_examples": 40}
    plain = data.orders(2, 7, 4, **sizes)
    replaced = data.orders(2, 7, 4, **sizes, skipped={3: "", 8: ""})
    bad = np.isin(plain, (3, 8))
    assert bad.any()
    np.testing.assert_array_equal(replaced[~bad], plain[~bad])
    assert not np.isin(replaced, (3, 8)).any()
    with pytest.raises(DataError, match="cannot be used"):
        data.order(0, 0, **sizes, skipped=range(40))


@pytest.mark.parametrize("bad", [(), (0,), (1, 5, 6, 10)])
def test_a_stream_replaces_as_the_order_does_and_resumes(bad):
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    ledger = data.Faults(11)
    whole = take(9, Records(11, bad), faults=ledger)
    assert sorted(ledger.found) == list(bad)
    for step, (indices, examples) in enumerate(whole):
        np.testing.assert_array_equal(
            indices, data.order(3, step, batch_size=8, num_examples=11, skipped=frozenset(bad))
        )
        assert (examples == indices.astype(np.uint8)[:, None, None, None]).all()
    assert_same(take(4, Records(11, bad), step=5, ahead=1), whole[5:])


def test_a_stream_without_a_good_record_is_an_error():
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    with pytest.raises(DataError, match="Nor can 3 others"):
        take(1, Records(4, range(4)))


def test_float_records_that_are_not_finite_are_replaced():
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    points = RNG.normal(size=(12, 2)).astype(np.float32)
    points[4, 1], points[9, 0] = np.nan, np.inf
    found = take(3, points)
    with pytest.warns(UserWarning, match="2 of 12 records skipped"):
        memory = data.arrays(points)
    assert list(memory.skipped) == [4, 9]
    for step, (indices, examples) in enumerate(found):
        wanted = data.order(3, step, batch_size=8, num_examples=12, skipped=memory.skipped)
        np.testing.assert_array_equal(indices, wanted)
        np.testing.assert_array_equal(examples, memory.images[indices])


# --- counted and listed


@pytest.mark.parametrize(("total", "most"), [(10, 4), (5_000, 5), (12_345, 12)])
def test_one_in_a_thousand_but_at_least_five_stop(total, most):
    ledger = data.Faults(total)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for record in range(most):
            ledger.add({record: "why"})
        ledger.add({0: "again"})
        with pytest.raises(DataError, match=rf"{most + 1} of {total:,} records cannot be used(.|\n)*0: why"):
            ledger.add({most: "why"})
    assert len(ledger.found) == most + 1


def test_all_records_are_too_many():
    with pytest.raises(DataError, match="2 of 2 records"):
        data.Faults(2, known={0: "a", 1: "b"})


def test_faults_are_listed_and_told_at_each_doubling(tmp_path):
    path = tmp_path / "skipped_records.jsonl"
    ledger = data.Faults(10_000, path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for record in (7, 5, 7, 6, 3):
            ledger.add({record: f"fault {record}"})
    assert [str(w.message).split(",")[0] for w in said] == ["1 of 10", "2 of 10", "4 of 10"]
    assert str(path) in str(said[0].message)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"record": i, "fault": f"fault {i}"} for i in (7, 5, 6, 3)]


def test_a_resumed_run_knows_what_is_still_bad(tmp_path):
    path = tmp_path / "skipped_records.jsonl"
    path.write_text('{"record": 2, "fault": "x"}\n[[[[\n{"record": 99}\n{"record": true}\n{"record": 3}\n{"rec')
    known = data.still_bad(Records(10, bad=(2, 5)), path)
    assert known == {2: "record 2 is bad."}
    data.Faults(10, path, known).write()
    assert [json.loads(line)["record"] for line in path.read_text().splitlines()] == [2]
    assert data.still_bad(Records(10), tmp_path / "none.jsonl") == {}


# --- pictures of every kind


def folder_of(tmp_path, **pictures):
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / name.replace("_", "."), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.folder(tmp_path, 4)


def test_kinds_that_are_converted(tmp_path):
    """Each is a flat picture whose colour is known."""
    sixteen = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    clear = palette.copy()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    found = folder_of(
        tmp_path,
        a_png=(Image.new("1", (8, 8), 1), {}),
        b_png=(Image.new("LA", (8, 8), (0, 0)), {}),
        c_png=(palette, {}),
        d_png=(clear, {"transparency": 1}),
        e_png=(sixteen, {}),
        f_tiff=(sixteen, {}),
        g_tiff=(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}),
        h_gif=(frames[0], {"save_all": True, "append_images": frames[1:]}),
        i_webp=(frames[0], {"save_all": True, "append_images": frames[1:], "lossless": True}),
        j_png=(frames[0], {"save_all": True, "append_images": frames[1:]}),
        k_png=(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), {}),
    )
    assert found.skipped == {}
    colors = found.images[:, 2, 2].tolist()
    assert colors[:7] == [[255] * 3, [255] * 3, [10, 20, 30], [255] * 3, [128] * 3, [128] * 3, [255, 0, 0]]
    assert colors[7:10] == [[255, 0, 0]] * 3
    assert colors[10][0] == 255
    assert colors[10][1:] == [127, 127]
    assert (found.images == found.images[:, :1, :1]).all()


def test_sixteen_bit_greys_keep_their_order(tmp_path):
    """Pillow alone turns all above 255 white."""
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(data.folder(tmp_path, 16).images[0, ..., 0].ravel(), np.arange(256))


def png_of_size(width, height):
    """A PNG whose header claims a size, with nothing behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\x09IDAT"


def test_kinds_that_are_skipped(tmp_path):
    good = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for i in range(20):
        good.save(tmp_path / f"good{i}.png")
    good.save(tmp_path / "whole.jpg")
    bytes_of = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(bytes_of[: len(bytes_of) // 2])
    (tmp_path / "huge.png").write_bytes(png_of_size(9_000, 8_000))
    (tmp_path / "real.tiff").write_bytes(b"")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "real.tiff")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.warns(UserWarning, match="skipped"):
        found = data.folder(tmp_path, 4)
    said = {Path(fault.split(" cannot")[0]).name: fault for fault in found.skipped.values()}
    assert set(said) == {"cut.jpg", "huge.png", "real.tiff", "script.png"}
    assert "9000 x 8000 pixels are more than 67,108,864" in said["huge.png"]
    assert "32 bits" in said["real.tiff"]
    assert "cannot identify" in said["script.png"]
    (tmp_path / "fifth.png").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="5 of 26 records cannot be used"):
            data.folder(tmp_path, 4)


def test_a_bomb_is_not_decoded(tmp_path):
    """8,193 x 8,192 white pixels in 200 kB: refused by its header, without the 201 MB."""
    Image.new("RGB", (8193, 8192), "white").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    code = f"""
import resource, warnings
from jaxdiff import data
warnings.simplefilter("ignore")
data.folder({str(tmp_path / "b.png").rsplit("/", 1)[0]!r}, 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = data.folder({str(tmp_path)!r}, 4)
print(list(found.skipped), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    skipped, grown = done.stdout.rsplit(" ", 1)
    assert skipped == "[0]"
    assert int(grown) < 50_000


def test_a_system_short_of_something_is_no_fault_of_the_data(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    calls = []

    def fail(error, times):
        def open_(path, **kwargs):
            calls.append(path)
            if len(calls) <= times:
                raise OSError(error, os.strerror(error))
            return real(path, **kwargs)

        return open_

    real = Image.open
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    source = data.open_folder(tmp_path, 4)
    for error, times, wanted in ((5, 2, None), (5, 3, DataError), (24, 3, OSError), (2, 1, DataError)):
        calls.clear()
        monkeypatch.setattr(Image, "open", fail(error, times))
        if wanted is None:
            assert source[0].shape == (4, 4, 3)
        else:
            with pytest.raises(wanted) as caught:
                source[0]
            assert type(caught.value) is wanted


# --- workers


def children(pid="self"):
    """The processes that read for this one, by id."""
    pid = os.getpid() if pid == "self" else pid
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (folder / "cmdline").read_text()
        except OSError:
            continue
        if parent == pid and "spawn_main" in words:
            found.append(int(folder.name))
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@linux
def test_workers_make_the_same_batches_and_are_started_again():
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    bad, ledger = (2, 30), data.Faults(50)
    wanted = take(30, Records(50, bad))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stream = data.stream(Records(50, bad), seed=3, batch_size=8, ahead=2, workers=2, faults=ledger)
        found = [next(stream)]
        assert len(children()) == 2
        os.kill(children()[-1], signal.SIGKILL)
        found += [next(stream) for _ in range(29)]
        stream.close()
    assert_same(found, wanted)
    assert sorted(ledger.found) == list(bad)
    assert sum("started again" in str(w.message) for w in said) == 1
    assert children() == []


class Deadly(Records):
    """Its reader dies of the first record, but not in this process."""

    def __getitem__(self, index):
        if os.getpid() != self.reads:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@linux
def test_workers_that_always_die_are_an_error(monkeypatch):
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    monkeypatch.setattr(data.batches, "_DEATHS", 2)
    with pytest.raises(DataError, match=r"died 2 times before step 4(.|\n)*fewer workers"):
        take(1, Deadly(50, after=os.getpid()), step=4, workers=1)
    assert children() == []


PARENT = """
import numpy as np
from jaxdiff import data
if __name__ == "__main__":
    stream = data.stream(np.zeros((50, 2), np.float32), seed=0, batch_size=4, workers=2)
    next(stream)
    print("reading", flush=True)
    while True:
        next(stream)
"""


@linux
def test_no_worker_outlives_a_killed_parent(tmp_path):
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout.readline() == b"reading\n"
    workers = children(parent.pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(workers) == 2
    until = time.monotonic() + 5
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert [pid for pid in workers if alive(pid)] == []


def alive(pid):
    """Whether a process runs: one that has ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("bad", [{"ahead": 0}, {"threads": 0}, {"workers": -1}])
def test_a_stream_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        data.stream(Records(5), seed=0, batch_size=1, **bad)
