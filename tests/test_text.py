"""The tokenizer and the text encoder."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxdiff import data, text
from jaxdiff.errors import ConfigError, DataError

CAPTIONS = ("red heart", "Blue heart", "a red, red rose", "o'clock")
TRAIN = """
import sys
from jaxdiff import data, text
text.train(data.emoji().captions).save(sys.argv[1])
"""


@pytest.fixture(scope="module")
def tokenizer():
    return text.train(CAPTIONS)


# --- tokenizer


def test_the_file_is_the_same_in_every_process(tmp_path):
    files = []
    for seed in ("0", "1"):
        files.append(tmp_path / f"{seed}.json")
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", TRAIN, str(files[-1])], check=True, env=environment)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_full_disk_leaves_the_old_file_whole(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path / "tokenizer.json")
    before = (tmp_path / "tokenizer.json").read_bytes()

    def fill_up(path, *_, **__):
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_up)
    with pytest.raises(OSError, match="No space"):
        tokenizer.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_every_word_of_the_emoji_is_one_token():
    captions = data.emoji().captions
    tokenizer = text.train(captions)
    assert tokenizer.vocab_size < 2048
    assert not any(tokenizer.unknown_words(caption) for caption in captions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenizer.encode(captions, 16)
    assert len(np.unique(ids, axis=0)) == len(captions)  # no two captions look the same to the network


def test_encode_by_hand(tokenizer):
    vocabulary = json.loads(tokenizer._backend.to_str())["model"]["vocab"]
    ids = tokenizer.encode(["RED  heart", "", "hot!"], 4)
    assert ids.dtype == np.int32
    assert ids[0].tolist() == [vocabulary["red"], vocabulary["heart"], 0, 0]
    assert ids[1].tolist() == [0, 0, 0, 0]
    assert ids[2].tolist() == [vocabulary["h"], vocabulary["##o"], vocabulary["##t"], vocabulary["[UNK]"]]
    assert vocabulary["[PAD]"] == 0
    assert vocabulary["red"] < vocabulary["heart"] < vocabulary["blue"]  # 3 and 2 times and once


def test_the_most_frequent_words_are_kept():
    small = text.train(CAPTIONS, vocab_size=2 + 2 * 38 + 2)  # letters, digits, comma, apostrophe; two words
    assert small.vocab_size == 80
    assert small.unknown_words("red heart blue blue") == ("blue",)
    with pytest.raises(ConfigError, match="at least 78"):
        text.train(CAPTIONS, vocab_size=77)


@pytest.mark.parametrize(
    "caption",
    ["❤️ heart", "\x00\x07\u200b", "\ud800", "x" * 1_000_000, "a b " * 250_000, "日本語", "[PAD]", "\n\t", "é" * 70],
    ids=["emoji", "control", "surrogate", "long word", "long", "kanji", "special", "space", "accents"],
)
def test_no_caption_crashes(tokenizer, caption):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = tokenizer.encode([caption], 8)
    assert ids.shape == (1, 8)
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_an_unknown_character_does_not_take_its_word_along(tokenizer):
    heart = tokenizer.encode(["heart"], 1)[0, 0]
    assert heart in tokenizer.encode(["heart❤"], 2)[0]
    assert tokenizer.unknown_words("red heart❤ wow") == ("❤", "wow")


def test_cutting_is_never_silent(tokenizer):
    with pytest.warns(UserWarning, match=r"1 of 2 captions have more than max_len=3 tokens \(up to 5\)"):
        ids = tokenizer.encode(["a red, red rose", "red"], 3)
    assert (ids[0] != 0).all()


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = text.load(path)
    np.testing.assert_array_equal(loaded.encode(CAPTIONS, 8), tokenizer.encode(CAPTIONS, 8))
    assert loaded.vocab_size == tokenizer.vocab_size
    with pytest.raises(DataError, match="Train one"):
        text.load(tmp_path / "none.json")
    path.write_text(path.read_text()[:200])
    with pytest.raises(DataError, match="damaged"):
        text.load(path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(DataError, match=r"not a tokenizer|another kind"):
        text.load(path)


def test_encode_refuses(tokenizer):
    with pytest.raises(ConfigError, match="bare string"):
        tokenizer.encode("red heart", 4)
    with pytest.raises(ConfigError, match="max_len"):
        tokenizer.encode(["red heart"], 0)


# --- encoder

IDS = np.array([[5, 3, 7, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]], np.int32)


def encoder(**kwargs):
    module = text.TextEncoder(vocab_size=9, dim=8, heads=2, max_len=6, **kwargs)
    return module, jax.jit(module.init)(jax.random.key(0), IDS)


@pytest.fixture(scope="module")
def deep():
    module, params = encoder(depth=2)
    return jax.jit(module.apply), params


def test_depth_0_is_the_normalised_embedding():
    module, params = encoder(depth=0)
    tokens, mask, pooled = module.apply(params, IDS)
    x = np.asarray(params["params"]["embed"]["embedding"], np.float64)[IDS]
    x = x + np.asarray(params["params"]["positions"], np.float64)[:5]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(tokens, x, atol=1e-4)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_allclose(pooled, [x[0, :3].mean(0), x[1, 0], x[2].mean(0)], atol=1e-4)


def test_padding_changes_nothing():
    # In float64, since float32 rounds sums of another length otherwise: there is nothing but rounding between the two.
    module, params = encoder(depth=2)
    longer = np.pad(IDS, ((0, 0), (0, 1)))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # Flax's norm mixes in float32
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        short, long = (jax.jit(module.clone(dtype=jnp.float64).apply)(wide, ids) for ids in (IDS, longer))
        assert short.pooled.dtype == jnp.float64
    np.testing.assert_allclose(short.pooled, long.pooled, atol=1e-13)
    for i, length in enumerate((3, 1, 5)):
        np.testing.assert_allclose(short.tokens[i, :length], long.tokens[i, :length], atol=1e-13)


def test_what_stands_at_padded_places_changes_no_bit(deep):
    apply, params = deep
    other = jax.tree.map(lambda leaf: leaf, params)
    other["params"]["positions"] = params["params"]["positions"].at[3:].add(1.0)  # row 0 is 3 words long, row 1 one
    before, after = apply(params, IDS), apply(other, IDS)
    np.testing.assert_array_equal(before.pooled[:2], after.pooled[:2])
    np.testing.assert_array_equal(before.tokens[0, :3], after.tokens[0, :3])
    assert (before.pooled[2] != after.pooled[2]).any()  # all five words of row 2 count


def test_rows_are_independent_and_order_matters(deep):
    apply, params = deep
    changed = IDS.copy()
    changed[0] = [7, 3, 5, 0, 0]  # the words of row 0 in another order
    before, after = apply(params, IDS), apply(params, changed)
    np.testing.assert_array_equal(before.pooled[1:], after.pooled[1:])
    assert abs(before.pooled[0] - after.pooled[0]).max() > 1e-3


def test_the_empty_caption_is_finite_and_learned(deep):
    apply, params = deep
    empty = np.zeros((2, 5), np.int32)

    def total(params):
        out = apply(params, empty)
        return (out.pooled**3).sum() + (out.tokens[:, 0] ** 3).sum()

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    assert jnp.isfinite(value)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    rows = jnp.abs(grads["params"]["embed"]["embedding"]).max(axis=1)
    assert rows[0] > 0
    assert (rows[1:] == 0).all()


def test_bfloat16_keeps_float32_parameters():
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention promotes bfloat16 with float32
        module, params = encoder(depth=1, dtype=jnp.bfloat16)
        out = jax.jit(module.apply)(params, IDS)
    assert out.tokens.dtype == out.pooled.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_encoder_refuses():
    module, params = encoder(depth=0)
    with pytest.raises(ConfigError, match="max_len=6"):
        module.apply(params, np.zeros((1, 7), np.int32))
    with pytest.raises(ConfigError, match="divide dim=9"):
        text.TextEncoder(vocab_size=9, dim=9, heads=2).init(jax.random.key(0), IDS)
