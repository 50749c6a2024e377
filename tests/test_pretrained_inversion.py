"""Textual inversion: every layout gives the same word; its tokens have the vectors of the file; it can be trained."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import experiments.pretrained
import experiments.sample
from jaxdiff.errors import CheckpointError, ConfigError, UnsafeFileError
from jaxdiff.pretrained import inversion
from jaxdiff.pretrained import pipelines as published
from jaxdiff.text import open_tokenizer, prompts

FOLDER = Path(__file__).parent / "fixtures" / "tiny_sd"
WIDTH, VOCABULARY = 12, 514
VECTORS = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
NARROW = VECTORS[:, :5].copy()


@pytest.fixture(scope="module")
def pipe():
    return published.load(FOLDER, variant="fp16")


@pytest.fixture(scope="module")
def more(pipe):
    return inversion.add(pipe, inversion.Inversion("<cat>", {"text_0": jnp.asarray(VECTORS)}))


@pytest.mark.parametrize(
    ("name", "tensors", "token"),
    [
        ("learned_embeds", {"<cat>": VECTORS}, "<cat>"),
        ("learned_embeds", {"<cat>": VECTORS[0]}, "<cat>"),
        ("my cat", {"emb_params": VECTORS}, "my cat"),
        ("style", {"clip_l": VECTORS, "clip_g": NARROW}, "style"),
    ],
)
def test_every_layout_is_read(name, tensors, token, tmp_path):
    save_file(tensors, tmp_path / f"{name}.safetensors")
    for source in (tmp_path / f"{name}.safetensors", tmp_path):
        read = inversion.load(source)
        assert read.token == token
        assert len(read.vectors) == len(tensors)
        for i, wanted in enumerate(tensors.values()):
            np.testing.assert_array_equal(read.vectors[f"text_{i}"], wanted.reshape(-1, wanted.shape[-1]))
    assert inversion.load(tmp_path, "dog").token == "dog"


def test_what_is_written_is_read_again(tmp_path):
    one = inversion.Inversion("<cat>", {"text_0": jnp.asarray(VECTORS), "text_1": jnp.asarray(VECTORS[:1, :5])})
    inversion.export(tmp_path, one)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(inversion.NAMES)
    again = inversion.load(tmp_path)
    assert again.token == "<cat>"
    jax.tree.map(np.testing.assert_array_equal, again.vectors, one.vectors)


def test_its_tokens_are_new_rows_with_the_vectors_of_the_file(pipe, more):
    assert more.text[0].vocab_size == VOCABULARY + 3
    table = more.params["text_0"]["params"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[VOCABULARY:], VECTORS)
    np.testing.assert_array_equal(table[:VOCABULARY], inversion._table(pipe.params, "text_0"))
    chunks = prompts.chunk(more.tokenizers[0], ["a (<cat>:1.5) b"])
    at = chunks.ids[0, 0].tolist().index(VOCABULARY)
    assert chunks.ids[0, 0, at : at + 3].tolist() == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    np.testing.assert_array_equal(chunks.weights[0, 0, at - 1 : at + 4], np.float32([1, 1.5, 1.5, 1.5, 1]))
    assert more.tokenizers[0].pieces(["my<CAT>s"]) == [[76, 344, 514, 515, 516, 338]]  # as diffusers': see the witness
    assert pipe.tokenizers[0].vocab_size == VOCABULARY  # the pipeline that was given is as it was


def test_a_text_still_ends_at_its_end(pipe, more):
    """Old configs take the largest id for the end; with a new word that would be the word."""
    old = inversion.add(
        published.dataclasses.replace(pipe, text=(pipe.text[0].clone(eos=2),)),
        inversion.Inversion("<cat>", {"text_0": jnp.asarray(VECTORS)}),
    )
    ids = old.tokenizers[0].encode(["a <cat> b"]).ids
    made, wanted = (jax.jit(p.text[0].apply)(p.params["text_0"], ids).pooled for p in (old, more))
    np.testing.assert_array_equal(made, wanted)
    assert old.text[0].eos == VOCABULARY - 1


def test_words_come_one_after_the_other(more):
    two = inversion.add(more, inversion.Inversion("style", {"text_0": jnp.asarray(VECTORS[:1])}))
    assert two.tokenizers[0].ids("style") == (VOCABULARY + 3,)
    assert two.tokenizers[0].pieces(["<cat> style"]) == [[VOCABULARY + i for i in range(4)]]
    table = inversion._table(two.params, "text_0")
    np.testing.assert_array_equal(table[VOCABULARY:], np.concatenate([VECTORS, VECTORS[:1]]))


def test_one_is_trained_by_its_gradient(pipe):
    start = inversion.init(pipe, "<cat>", "a", count=2)
    a = pipe.tokenizers[0].pieces(["a"])[0][0]
    np.testing.assert_array_equal(
        start.vectors["text_0"], np.repeat(inversion._table(pipe.params, "text_0")[a][None], 2, 0)
    )
    more = inversion.add(pipe, start)
    ids = jnp.asarray(more.tokenizers[0].encode(["<cat>"]).ids)

    @jax.jit
    def loss(vectors):
        params = inversion.merge(more, more.params, "<cat>", vectors)
        return jnp.sum(jnp.sin(more.text[0].apply(params["text_0"], ids).tokens))

    value, gradient = loss(start.vectors), jax.jit(jax.grad(loss))(start.vectors)
    assert (np.abs(gradient["text_0"]).max(axis=1) > 0).all()
    step = jax.tree.map(lambda v, g: v - 1e-3 * g, start.vectors, gradient)
    assert loss(step) < value


def test_the_command_knows_a_word(tmp_path, monkeypatch):
    save_file({"<cat>": VECTORS}, tmp_path / "learned_embeds.safetensors")
    told = []

    def program(pipe, *_):
        def draw(params, keys, prompt, *_):
            told.append((params["text_0"]["params"]["token_embedding"]["embedding"], prompt.chunks[0].ids[0, 0]))
            return np.zeros((1, 16, 16, 3))

        return draw

    monkeypatch.setattr(experiments.pretrained, "program", program)
    words = ["--pretrained", str(FOLDER), "--variant", "fp16", "--steps", "1", "--out", str(tmp_path / "x.png")]
    words += ["--prompt", "a <cat>", "--inversion", str(tmp_path / "learned_embeds.safetensors")]
    assert experiments.sample.run(words) == 0
    table, ids = told[0]
    np.testing.assert_array_equal(table[ids[2:5]], VECTORS)


def test_what_does_not_fit_is_named(pipe, more, tmp_path):
    one = inversion.Inversion("<cat>", {"text_0": jnp.asarray(VECTORS)})
    with pytest.raises(ConfigError, match="'<cat>' is blank or known"):
        inversion.add(more, one)
    with pytest.raises(ConfigError, match="'<cat>_2' is blank or known"):
        inversion.add(inversion.add(pipe, one._replace(token="<cat>_2")), one)
    with pytest.raises(ConfigError, match=r"vectors \(3, 5\) for text_0; the widths here are 12"):
        inversion.add(pipe, inversion.Inversion("x", {"text_0": jnp.zeros((3, 5))}))
    with pytest.raises(ConfigError, match="for text_1"):
        inversion.add(pipe, inversion.Inversion("x", {"text_1": jnp.zeros((3, WIDTH))}))
    with pytest.raises(ConfigError, match="has 76 vectors; a text has room for 75"):
        inversion.add(pipe, inversion.Inversion("x", {"text_0": jnp.zeros((76, WIDTH))}))
    with pytest.raises(ConfigError, match="was not added"):
        inversion.merge(more, more.params, "dog", one.vectors)
    with pytest.raises(ConfigError, match="a word to begin from"):
        inversion.init(pipe, "<dog>", " ")
    short = open_tokenizer(FOLDER / "tokenizer").extended("new")
    with pytest.raises(ConfigError, match="not of one model"):
        inversion.add(published.dataclasses.replace(pipe, tokenizers=(short,)), one)


def test_damaged_and_unsafe_files_are_named(tmp_path):
    for name in ("learned_embeds.bin", "cat.pt"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(UnsafeFileError, match=name):
            inversion.load(tmp_path / name)
    with pytest.raises(UnsafeFileError, match=r"cat\.pt"):
        inversion.load(tmp_path)
    path = tmp_path / "x.safetensors"
    for tensors, message in (
        ({"a": VECTORS, "b": VECTORS}, "must hold one tensor"),
        ({"a": VECTORS[None]}, "must be one vector or several"),
        ({}, "must hold one tensor"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            inversion.load(path)
