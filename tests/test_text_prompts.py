"""Published tokenizers, weighted prompts in chunks, and embeddings on the disk."""

import json
import unicodedata
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import text
from jaxdiff.errors import ConfigError, DataError
from jaxdiff.text import cache, prompts
from tests.oracles.bpe import clip_ids
from tests.oracles.strings import strings, write_clip_vocabulary

MINILM = Path(__file__).parents[2] / "shared" / "data" / "weights" / "all-minilm-l6-v2"
CORPUS = "the cat sat on the mat with a red hat and the dog ran to the park in the rain " * 5
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip_vocabulary(folder, CORPUS, merges=60)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return text.open_tokenizer(folder)


@pytest.fixture(scope="module")
def vocabulary(folder):
    return json.loads((folder / "vocab.json").read_text())


# --- the published tokenizers


def test_clip_ids_by_hand(tokenizer, vocabulary):
    tokens = tokenizer.encode(["  The\n\tCAT!", "", "x1"])
    begin, end = vocabulary[BEGIN], vocabulary[END]
    words = [vocabulary["the</w>"], vocabulary["cat</w>"], vocabulary["!</w>"]]
    assert tokens.ids.dtype == np.int32
    assert tokens.ids[0].tolist() == [begin, *words, *[end] * 6]
    assert tokens.ids[1].tolist() == [begin, *[end] * 9]
    assert tokens.ids[2].tolist() == [begin, vocabulary["x</w>"], vocabulary["1</w>"], *[end] * 7]
    assert tokens.mask.sum(axis=1).tolist() == [5, 2, 4]  # begin and end with them
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.max_len) == (begin, end, end, 10)


def test_clip_ids_are_those_of_another_program(folder, tokenizer, vocabulary):
    """Of every string whose code points this Python's Unicode knows."""
    merges = (folder / "merges.txt").read_text(encoding="utf-8")
    known = [s for s in strings(400, megabyte=False) if not {"Cn", "Co"} & set(map(unicodedata.category, s))]
    assert len(known) > 200
    assert tokenizer.pieces(known) == [clip_ids(string, vocabulary, merges) for string in known]


def test_the_padding_of_stable_diffusion_2(folder, tmp_path, vocabulary):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    tokenizer = text.open_tokenizer(tmp_path, max_len=6)
    assert tokenizer.encode(["cat"]).ids[0, -1] == vocabulary["!"]
    assert tokenizer.encode(["!"]).ids[0, 1] == vocabulary["!"]  # and not "!</w>": it has become a special token


def test_what_is_cut_is_said(tokenizer):
    long = "cat " * 9
    with pytest.warns(UserWarning, match=r"1 of 2 captions have more than max_len=8 tokens \(up to 9\)"):
        tokens = tokenizer.encode([long, "cat " * 8])
    assert tokens.ids[0].tolist() == tokens.ids[1].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode([long], 11).mask.all()


def test_any_string_has_ids(tokenizer):
    made = [*strings(300, megabyte=False), "\ud800 lone"]
    assert [len(p) for p in tokenizer.pieces(["the cat " * 20_000])] == [40_000]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = tokenizer.encode(made)
    assert (tokens.ids[:, 0] == tokenizer.bos).all()
    assert ((tokens.ids >= 0) & (tokens.ids < tokenizer.vocab_size)).all()


def test_wrong_calls_of_a_tokenizer(tokenizer, folder):
    with pytest.raises(ConfigError, match="bare string"):
        tokenizer.encode("cat")
    with pytest.raises(ConfigError, match="leave room"):
        tokenizer.encode(["cat"], 2)
    with pytest.raises(ConfigError, match="do not fit"):
        tokenizer.frame([1, 2, 3], 4)


def test_damaged_tokenizers(tmp_path, folder):
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        text.open_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"Convert spiece\.model"):
        text.open_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text((folder / "merges.txt").read_text())
    for damaged in ("", "{", "[]", '{"a": "b"}', "{}"):
        (tmp_path / "vocab.json").write_text(damaged)
        with pytest.raises(DataError, match=r"damaged|not one of CLIP's"):
            text.open_tokenizer(tmp_path)
    for damaged in ("", "{}", "[" * 10_000, '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(DataError, match="damaged"):
            text.open_tokenizer(tmp_path)
    whole = text.open_tokenizer(folder)._backend.to_str()
    (tmp_path / "tokenizer.json").write_text(whole)
    text.open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "\\ud800"}')
    with pytest.raises(DataError, match="UnicodeEncodeError"):
        text.open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is damaged"):
        text.open_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_named_and_an_interrupt_is_left(tokenizer, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 has it."""

    class Backend:
        raises = PanicException("range end index 18446744073709551607 out of range")

        def encode_batch(self, *_, **__):
            raise self.raises

    monkeypatch.setattr(tokenizer, "_backend", Backend())
    with pytest.raises(DataError, match="damaged: PanicException: range end"):
        tokenizer.pieces(["a"])
    monkeypatch.setattr(Backend, "raises", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.pieces(["a"])


def test_a_folder_without_a_length_asks_for_one(tmp_path, folder):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    with pytest.raises(ConfigError, match="give max_len"):
        text.open_tokenizer(tmp_path).encode(["cat"])


@pytest.mark.skipif(not MINILM.is_dir(), reason="needs the folder shared/data/weights beside the checkout")
def test_the_published_similarities_of_minilm():
    """The example of sentence-transformers' README; their float32 digits, our int8 file of the same weights."""
    from jaxdiff import pretrained

    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    tokens = text.open_tokenizer(MINILM, max_len=16).encode(sentences)
    model, params = pretrained.text.bert(MINILM, variant="int8")
    pooled = jax.jit(model.apply)(params, tokens.ids, tokens.mask).pooled
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(pooled @ pooled.T, published, atol=5e-3)


# --- weights


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((red))", [("red", 1.1**2)]),
        ("(red:1.5) cat", [("red", 1.5), (" cat", 1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("([red])", [("red", 1.1 / 1.1)]),
        (r"\(red\) \[x\] \\", [(r"(red) [x] " + "\\", 1)]),
        ("(open", [("open", 1.1)]),
        ("close) here]", [("close) here]", 1)]),
        ("a:b (c:d) e:1.2)", [("a:b ", 1), ("c:d", 1.1), (" e:1.2)", 1)]),
        ("(a: -1.5 )", [("a", -1.5)]),
        ("a) (b", [("a) ", 1), ("b", 1.1)]),
        ("\\", [("\\", 1)]),
        ("(a)(b)", [("ab", 1.1)]),
    ],
)
def test_weights_by_hand(prompt, pieces):
    (found,) = prompts.parse(prompt)
    assert [t for t, _ in found] == [t for t, _ in pieces]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in pieces], rtol=1e-12)


def test_break_begins_a_new_part():
    assert prompts.parse("a BREAK (b BREAK c) BREAKS") == [[("a", 1)], [("b", 1.1)], [("c", 1.1), (" BREAKS", 1)]]


@pytest.mark.parametrize("prompt", ["(a:1.2.3)", "(a:.)", "(a:" + "9" * 400 + ")", "(" * 10_000 + "a"])
def test_weights_that_are_no_numbers(prompt):
    with pytest.raises(ConfigError, match=r"is not a number|multiply to infinity"):
        prompts.parse(prompt)


def test_a_hundred_thousand_brackets_are_read():
    (pieces,) = prompts.parse("(a" * 3000 + "[b]" * 10_000 + "(x:1)" * 10_000)
    assert sum(len(t) for t, _ in pieces) == 3000 + 20_000


# --- chunks


def test_chunks_by_hand(tokenizer, vocabulary):
    the, cat = vocabulary["the</w>"], vocabulary["cat</w>"]
    begin, end = tokenizer.bos, tokenizer.eos
    made = prompts.chunk(tokenizer, ["cat " * 9 + "(the:2)", "the [cat]", ""])
    assert made.ids.shape == (3, 2, 10)
    assert made.ids[0].tolist() == [[begin, *[cat] * 8, end], [begin, cat, the, *[end] * 7]]
    assert made.weights[0].tolist() == [[1] * 10, [1, 1, 2, *[1] * 7]]
    assert made.ids[1].tolist() == [[begin, the, cat, *[end] * 7], [begin, *[end] * 9]]
    np.testing.assert_allclose(made.weights[1, 0, :4], [1, 1, 1 / 1.1, 1], rtol=1e-6)
    assert made.ids[2, 0].tolist() == [begin, *[end] * 9]
    parts = prompts.chunk(tokenizer, ["cat BREAK the"])
    assert parts.ids[0].tolist() == [[begin, cat, *[end] * 8], [begin, the, *[end] * 8]]


def test_a_prompt_that_fits_is_what_the_tokenizer_says(tokenizer):
    captions = ["the cat sat", "", "a red hat!"]
    made = prompts.chunk(tokenizer, captions)
    np.testing.assert_array_equal(made.ids[:, 0], tokenizer.encode(captions).ids)
    assert (made.weights == 1).all()
    literal = prompts.chunk(tokenizer, ["(the)"], weighted=False)
    np.testing.assert_array_equal(literal.ids[:, 0], tokenizer.encode(["(the)"]).ids)


def test_chunks_that_are_cut_are_said(tokenizer):
    with pytest.warns(UserWarning, match="1 of 2 prompts need up to 3 chunks of 8 tokens and were cut to 1"):
        made = prompts.chunk(tokenizer, ["cat " * 17, "the"], chunks=1)
    assert made.ids.shape == (2, 1, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompts.chunk(tokenizer, ["cat " * 17], chunks=4).ids.shape == (1, 4, 10)
    with pytest.raises(ConfigError, match="bare string"):
        prompts.chunk(tokenizer, "cat")
    with pytest.raises(ConfigError, match="chunks must be"):
        prompts.chunk(tokenizer, ["cat"], chunks=0)


def lookup(width=5):
    """An encoder of which everything is known: a row of a table for each id."""
    table = np.random.default_rng(0).standard_normal((4096, width)).astype(np.float32) + 0.5

    def apply(ids):
        tokens = jnp.asarray(table)[ids]
        return text.TextFeatures(tokens, jnp.ones(ids.shape, bool), tokens[:, 0] + ids[:, 1:2].astype(jnp.float32))

    return table, apply


def test_encoding_by_hand(tokenizer):
    table, apply = lookup()
    made = prompts.chunk(tokenizer, ["cat " * 9 + "(the:2)", "the (cat:0.5)"])
    features = jax.jit(lambda c: prompts.encode(apply, c))(made)
    assert features.tokens.shape == (2, 20, 5)
    for row, ids, weights in zip(features.tokens, made.ids.reshape(2, 20), made.weights.reshape(2, 20), strict=True):
        z = table[ids].astype(np.float64)
        scaled = z * weights[:, None]
        np.testing.assert_allclose(row, scaled * z.mean() / scaled.mean(), rtol=2e-5)
    np.testing.assert_array_equal(features.pooled, table[made.ids[:, 0, 0]] + made.ids[:, 0, 1:2].astype(np.float32))
    assert features.mask.shape == (2, 20)


def test_one_prompt_does_not_change_another(tokenizer):
    _, apply = lookup()
    both = prompts.encode(apply, prompts.chunk(tokenizer, ["the (cat:1.7)", "(dog:0.2)"]))
    alone = prompts.encode(apply, prompts.chunk(tokenizer, ["the (cat:1.7)"]))
    np.testing.assert_array_equal(both.tokens[:1], alone.tokens)


def test_weights_of_one_change_no_bit_and_a_mean_of_zero_is_left(tokenizer):
    table, apply = lookup()
    made = prompts.chunk(tokenizer, ["the cat", "(the cat:1.0)"])
    np.testing.assert_array_equal(prompts.encode(apply, made).tokens[0], table[made.ids[0, 0]])

    def balanced(ids):
        tokens = jnp.stack([jnp.ones(ids.shape), -jnp.ones(ids.shape)], axis=-1)
        return text.TextFeatures(tokens, jnp.ones(ids.shape, bool), tokens[:, 0])

    tokens = prompts.encode(balanced, prompts.chunk(tokenizer, ["the (cat:1.5)"])).tokens
    np.testing.assert_array_equal(tokens[0, 2], [1.5, -1.5])
    zeros = prompts.encode(balanced, prompts.Chunks(made.ids, np.zeros_like(made.weights))).tokens
    np.testing.assert_array_equal(zeros, 0)


# --- the cache


def counting():
    calls = []

    def encode(captions):
        calls.append(list(captions))
        rows = np.asarray([[len(c), sum(map(ord, c))] for c in captions], np.float32)
        return text.TextFeatures(rows[:, None, :], np.ones((len(rows), 1), bool), rows)

    return calls, encode


def test_each_caption_is_encoded_once(tmp_path):
    calls, encode = counting()
    first = cache.Cache(tmp_path, "a", batch=2).get(["x", "yy", "x", "zzz"], encode)
    assert calls == [["x", "yy"], ["zzz", ""]]
    again = cache.Cache(tmp_path, "a").get(["zzz", "x", "yy", "x"], encode)
    assert len(calls) == 2
    np.testing.assert_array_equal(first.tokens[[3, 0, 1, 2]], again.tokens)
    assert again.mask.dtype == bool
    assert first.pooled[1].tolist() == [2, 242]
    cache.Cache(tmp_path, "b").get(["x"], encode)  # another encoder does not see it
    assert len(calls) == 3


def test_a_damaged_entry_is_made_again(tmp_path):
    calls, encode = counting()
    store = cache.Cache(tmp_path, "a", batch=1)
    store.get(["x"], encode)
    (file,) = tmp_path.rglob("*.safetensors")
    for damage in (b"", file.read_bytes()[:-3], b"\x80\x04."):
        file.write_bytes(damage)
        assert store.get(["x"], encode).pooled[0, 0] == 1
    assert len(calls) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_odd_captions_and_types_keep_apart(tmp_path):
    _, encode = counting()

    def half(captions):
        return text.TextFeatures(*(u if u.dtype == bool else u.astype(jnp.bfloat16) for u in encode(captions)))

    store = cache.Cache(tmp_path, "a")
    odd = ["", "\ud800", "a/../b", "\0", "a" * 300]
    for _ in range(2):
        assert store.get(odd, half).tokens.dtype == jnp.bfloat16
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    with pytest.raises(ConfigError, match="one or more strings"):
        store.get("x", encode)
    with pytest.raises(ConfigError, match="batch must be"):
        cache.Cache(tmp_path, "a", batch=0)


def test_the_fingerprint_sees_every_bit():
    model = text.TextEncoder(10)
    params = {"a": {"b": np.ones(3, np.float32)}}
    other = {"a": {"b": np.nextafter(np.ones(3, np.float32), 2)}}
    prints = [
        cache.fingerprint(model, params),
        cache.fingerprint(model, other),
        cache.fingerprint(model, {"a": {"c": params["a"]["b"]}}),
        cache.fingerprint(text.TextEncoder(11), params),
        cache.fingerprint(model, params, {"skip": 1}),
    ]
    assert len(set(prints)) == 5
    assert cache.fingerprint(model, {"a": {"b": jnp.ones(3)}}) == prints[0]


def test_captions_of_two_lengths_in_one_call(tmp_path):
    def encode(captions):
        n = len(captions[0])
        return text.TextFeatures(np.ones((1, n, 2)), np.ones((1, n), bool), np.ones((1, 2)))

    with pytest.raises(ConfigError, match="one length"):
        cache.Cache(tmp_path, "a", batch=1).get(["x", "yy"], encode)
