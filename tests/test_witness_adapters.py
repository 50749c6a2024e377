"""Second witness of what is added to a Stable Diffusion: textual inversion, ControlNet, IP-Adapter of diffusers."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.pretrained import inversion
from jaxdiff.pretrained import pipelines as published
from tests.oracles import tiny_sd

torch = pytest.importorskip("torch", reason="needs the witness extra: torch, diffusers, transformers")
diffusers = pytest.importorskip("diffusers", reason="needs the witness extra: torch, diffusers, transformers")
diffusers.utils.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXTS = ["a <cat> by the sea", "my<cat>s, <CAT>-like", "<cat>", "cat", "style <cat>, style", "a\u00a0 <cat>\n🙂", ""]


@pytest.fixture(autouse=True)
def exact():
    """As in test_witness_pretrained."""
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(ours, theirs):
    assert np.abs(theirs).max() > 0.1  # there is something to compare
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipelines(request, tmp_path_factory):
    """(theirs, ours, folder) of one tiny pipeline."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = tiny_sd.pipeline(folder, xl=request.param == "sdxl")
    theirs.set_progress_bar_config(disable=True)
    if request.param == "sdxl":
        theirs.tokenizer_2 = copy.deepcopy(theirs.tokenizer)
    theirs.save_pretrained(folder / "pipe")
    return theirs, published.load(folder / "pipe"), folder


# --- textual inversion


def words(folder, widths):
    """Two words, of three vectors and of one, as files; for XL the layout of the web interface."""
    rows = [{f"text_{i}": draw(n, width, seed=i + n) for i, width in enumerate(widths)} for n in (3, 1)]
    for token, vectors in zip(("<cat>", "style"), rows, strict=True):
        names = [token] if len(widths) == 1 else ["clip_l", "clip_g"]
        save_file(dict(zip(names, vectors.values(), strict=True)), folder / f"{token}.safetensors")
    return rows


def test_the_ids_and_embeddings_of_learned_words_are_theirs(pipelines):
    theirs, ours, folder = pipelines
    widths = [encoder.width for encoder in ours.text]
    words(folder, widths)
    for token in ("<cat>", "style"):
        path = folder / f"{token}.safetensors"
        ours = inversion.add(ours, inversion.load(path))
        tensors = {name: torch.from_numpy(array) for name, array in load_file(path).items()}
        for i, tensor in enumerate(tensors[name] for name in ("clip_l", "clip_g", token) if name in tensors):
            parts = {name: getattr(theirs, name + "_2" * i) for name in ("tokenizer", "text_encoder")}
            theirs.load_textual_inversion({token: tensor}, token=token, **parts)
    for i, encoder in enumerate(ours.text):
        tokenizer, network = (getattr(theirs, name + "_2" * i) for name in ("tokenizer", "text_encoder"))
        table = network.get_input_embeddings().weight.detach().numpy()
        np.testing.assert_array_equal(inversion._table(ours.params, f"text_{i}"), table)
        assert len(table) == encoder.vocab_size == 514 + 4
        # Theirs types the further tokens by their names, in the case of the word.
        prompts = [text.replace("<CAT>", "<cat>") for text in TEXTS]
        prompts = theirs.maybe_convert_prompt(prompts, tokenizer)
        ids = np.asarray(tokenizer(prompts, padding="max_length", max_length=77).input_ids)
        np.testing.assert_array_equal(ours.tokenizers[i].encode(TEXTS).ids, ids)
        assert (ids >= 514).sum() > 15
        with torch.no_grad():
            wanted = network(torch.from_numpy(ids)).last_hidden_state.numpy()
        close(jax.jit(encoder.apply)(ours.params[f"text_{i}"], jnp.asarray(ids)).tokens, wanted)


def test_what_we_write_they_load(pipelines, tmp_path):
    theirs, ours, _ = pipelines
    rows = {f"text_{i}": jnp.asarray(draw(2, encoder.width, seed=9 + i)) for i, encoder in enumerate(ours.text)}
    inversion.export(tmp_path, inversion.Inversion("<dog>", rows))
    for i in range(len(ours.text)):
        parts = {name: getattr(theirs, name + "_2" * i) for name in ("tokenizer", "text_encoder")}
        theirs.load_textual_inversion(str(tmp_path), weight_name=inversion.NAMES[i], **parts)
        ids = parts["tokenizer"].convert_tokens_to_ids(["<dog>", "<dog>_1"])
        table = parts["text_encoder"].get_input_embeddings().weight.detach().numpy()
        np.testing.assert_array_equal(table[ids], rows[f"text_{i}"])
