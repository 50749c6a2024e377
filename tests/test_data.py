"""Examples in memory, their order, pixels, augmentation and picture files."""

import collections
import importlib.resources
import json
import math
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff import data
from jaxdiff.errors import ConfigError, DataError

SHARED_EMOJI = Path(__file__).parents[2] / "shared" / "data" / "emoji" / "emoji64.zip"


@pytest.fixture(scope="module")
def emoji():
    return data.emoji()


# --- the embedded emoji


def test_emoji_are_complete_small_and_credited(emoji):
    assert emoji.images.shape == (1906, 32, 32, 3)
    assert emoji.num_classes == 9
    assert len(set(emoji.captions)) == 1906
    assert all(caption == caption.lower() and caption.strip() == caption != "" for caption in emoji.captions)
    folder = importlib.resources.files("jaxdiff.data") / "embedded"
    assert sum(len(file.read_bytes()) for file in folder.iterdir() if file.is_file()) < 3_000_000
    notice = (folder / "NOTICE").read_text()
    for credit in ("Noto Emoji", "Google", "emoji-datasource-google@16.0.0", "Apache License", "scaled", "emojibase"):
        assert credit in notice


def test_emoji_captions_belong_to_their_pictures(emoji):
    japan = emoji.images[emoji.captions.index("flag: japan")].astype(int)
    assert japan[15, 15, 0] > 150 > 80 > japan[15, 15, 2]  # a red disc
    assert (japan[0, 0] == 255).all()  # on white
    heart = emoji.images[emoji.captions.index("blue heart")][12, 10].astype(int)
    assert heart[2] > heart[0] + 60
    assert emoji.label_names[emoji.labels[emoji.captions.index("flag: japan")]] == "flags"


def test_emoji_were_scaled_with_premultiplied_alpha(emoji):
    if not SHARED_EMOJI.exists():
        pytest.skip("needs the original pictures, emoji64.zip")
    with zipfile.ZipFile(SHARED_EMOJI) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        rows = [row for row in rows if row["style"] == "noto"]
        for i in range(0, 1906, 211):
            with archive.open(rows[i]["file_name"]) as file:
                rgba = np.asarray(Image.open(file).convert("RGBA"), np.float64)
            alpha = rgba[..., 3:] / 255
            white = rgba[..., :3] * alpha + 255 * (1 - alpha)
            box = white.reshape(32, 2, 32, 2, 3).mean((1, 3))
            assert rows[i]["name"].lower().replace("’", "'") == emoji.captions[i]
            assert abs(box.mean() - emoji.images[i].mean()) < 1.0  # Lanczos keeps the mean, but for clipping
            assert abs(box - emoji.images[i]).mean() < 6.0


def test_emoji_at_a_smaller_size_are_block_means(emoji):
    small = data.emoji(8)
    block = emoji.images[700, :4, 4:8].astype(np.float64).mean((0, 1))
    np.testing.assert_allclose(small.images[700, 0, 1], block, atol=0.51)
    with pytest.raises(ConfigError, match="8, 16 or 32, got 64"):
        data.emoji(64)


# --- Dataset


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "empty"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"\(2, 4, 4\)"),
        ({"images": np.zeros((2, 4, 4, 3))}, "float64"),
        ({"images": np.full((2, 2), np.nan, np.float32)}, "NaN"),
        ({"labels": np.zeros(3, np.int32)}, "labels"),
        ({"labels": np.zeros(2, np.int64)}, "int64"),
        ({"labels": np.array([0, 2], np.int32), "label_names": ("a", "b")}, "below 2"),
        ({"labels": np.array([0, -1], np.int32)}, "-1"),
        ({"captions": ("one",)}, "1 for 2 images"),
    ],
)
def test_dataset_refuses_what_does_not_fit(kwargs, message):
    with pytest.raises(DataError, match=message):
        data.Dataset(**({"images": np.zeros((2, 4, 4, 3), np.uint8)} | kwargs))


# --- order


def test_every_example_comes_once_an_epoch_though_batches_straddle_epochs():
    stream = np.concatenate([data.order(3, step, batch_size=4, num_examples=10) for step in range(10)])
    epochs = stream.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream.dtype == np.int32


def test_a_batch_may_exceed_the_data_set():
    batch = data.order(0, 5, batch_size=25, num_examples=10)
    assert set(collections.Counter(batch.tolist()).values()) <= {2, 3}


def test_order_is_a_function_of_seed_and_step():
    at_once = data.orders(1, 6, 3, batch_size=4, num_examples=50)
    one_by_one = [data.order(1, step, batch_size=4, num_examples=50) for step in (8, 7, 6)][::-1]
    np.testing.assert_array_equal(at_once, one_by_one)
    assert (data.order(2, 6, batch_size=4, num_examples=50) != at_once[0]).any()


def test_all_permutations_are_equally_likely():
    counts = collections.Counter(tuple(data.order(seed, 0, batch_size=4, num_examples=4)) for seed in range(2400))
    chi2 = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert len(counts) == math.factorial(4)
    assert chi2 < 49.7  # the 0.999 quantile at 23 degrees of freedom


@pytest.mark.parametrize("bad", [{"seed": -1}, {"step": -1}, {"batch_size": 0}, {"num_examples": 0}])
def test_order_refuses(bad):
    arguments = {"seed": 0, "step": 0, "batch_size": 2, "num_examples": 5} | bad
    with pytest.raises(ConfigError, match=next(iter(bad))):
        data.order(**arguments)
    with pytest.raises(ConfigError, match="count"):
        data.orders(0, 0, 0, batch_size=2, num_examples=5)


# --- pixels


def test_every_pixel_value_survives_the_round_trip():
    values = np.arange(256, dtype=np.uint8)
    x = jax.jit(data.decode)(values)
    assert x.dtype == jnp.float32
    assert float(x[0]) == -1.0
    assert float(x[255]) == 1.0
    np.testing.assert_array_equal(jax.jit(data.encode)(x), values)


def test_encode_rounds_and_clips():
    x = np.array([-7.0, 7.0, np.nan, np.inf, -np.inf, 0.6 / 127.5 - 1], np.float32)
    np.testing.assert_array_equal(data.encode(x), [0, 255, 0, 255, 0, 1])


def test_decode_leaves_scaled_examples():
    points = data.swissroll(5).images
    np.testing.assert_array_equal(data.decode(points), points)


# --- augmentation


@pytest.mark.parametrize("augment", [data.augment.flip, lambda key, x: data.augment.crop(key, x, pad=2)])
def test_augmentation_is_a_function_of_the_key_of_the_example(augment):
    x = np.random.default_rng(0).standard_normal((6, 5, 4, 2)).astype(np.float32)
    together = jax.jit(augment)(jax.random.key(1), x)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(6))
    for i in range(6):
        np.testing.assert_array_equal(together[i], jax.jit(augment)(keys[i : i + 1], x[i : i + 1])[0])


def test_flip_mirrors_about_half():
    x = np.random.default_rng(0).standard_normal((200, 1, 4, 1)).astype(np.float32)
    y = np.asarray(jax.jit(data.augment.flip)(jax.random.key(0), x))
    kept, mirrored = (y == x).all((1, 2, 3)), (y == x[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 70 <= kept.sum() <= 130  # 4.2 standard deviations


def test_crop_shifts_each_way():
    x = np.random.default_rng(0).standard_normal((64, 4, 4, 1)).astype(np.float32)
    y = np.asarray(jax.jit(lambda key, x: data.augment.crop(key, x, pad=1))(jax.random.key(0), x))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifts = {(i, j): (padded[:, i : i + 4, j : j + 4] == y).all((1, 2, 3)) for i in range(3) for j in range(3)}
    assert (sum(shifts.values()) == 1).all()
    assert all(hit.any() for hit in shifts.values())
    with pytest.raises(ConfigError, match="between 1 and 3"):
        data.augment.crop(jax.random.key(0), x, pad=4)


# --- pictures


def test_grid_lays_out_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    picture = np.asarray(data.grid(images, 2, gap=1))
    assert picture.shape == (3 * 2 + 2, 2 * 3 + 1, 3)
    assert (picture[3, 4] == 3).all()  # second row, second column: example 3
    assert (picture[2] == 255).all()  # a gap
    assert (picture[6:, 4:] == 255).all()  # the place of example 5, which is not there
    assert data.grid(images[..., :1]).mode == "L"
    with pytest.raises(DataError, match="float32"):
        data.grid(images.astype(np.float32))
    with pytest.raises(ConfigError, match="columns"):
        data.grid(images, 0)


def test_png_carries_its_settings(tmp_path):
    picture = data.grid(data.emoji().images[:4])
    settings = {"prompt": "naïve ❤\nsecond line", "seed": 3}
    data.save_png(tmp_path / "a.png", picture, settings)
    assert data.read_metadata(tmp_path / "a.png") == {"prompt": "naïve ❤\nsecond line", "seed": "3"}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture))
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    for name in ("a.png", "none.png"):
        with pytest.raises(DataError, match=name):
            data.read_metadata(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    picture = data.grid(data.emoji().images[:4])
    data.save_png(tmp_path / "a.png", picture)
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        data.save_png(tmp_path / "a.png", picture)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before
