"""Text and picture encoders against transformers, with random weights written by it and read by us."""

import json
import unicodedata
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.pretrained import files, text
from jaxdiff.text import clip, open_tokenizer
from jaxdiff.text import t5 as t5_room
from tests.oracles.strings import strings, write_clip_vocabulary

torch = pytest.importorskip("torch", reason="needs the witness extra: torch, transformers")
transformers = pytest.importorskip("transformers", reason="needs the witness extra: torch, transformers")

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder shared/data beside the checkout")

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 57, "eos_token_id": 58, **TINY}
CLIP_TEXT = {
    "tiny": {**TEXT, "num_hidden_layers": 3},
    "old eos": {**TEXT, "num_hidden_layers": 2, "eos_token_id": 2, "hidden_act": "gelu"},
    "one block of ViT-L/14": {
        "vocab_size": 60, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 1, "hidden_act": "quick_gelu", "eos_token_id": 2,
    },
    "one block of OpenCLIP H": {
        "vocab_size": 60, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 1, "hidden_act": "gelu", "eos_token_id": 2,
    },
    "one block of OpenCLIP bigG": {
        "vocab_size": 60, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
        "num_hidden_layers": 1, "hidden_act": "gelu", "projection_dim": 1280, "eos_token_id": 58,
    },
}  # fmt: skip
VISION = {
    "tiny": {**TINY, "num_hidden_layers": 2, "image_size": 12, "patch_size": 4, "projection_dim": 24},
    "one block of ViT-L/14": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 1,
        "image_size": 28, "patch_size": 14, "projection_dim": 768,
    },
    "one block of ViT-H/14": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 1,
        "image_size": 28, "patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024,
    },
}  # fmt: skip
T5 = {
    "tiny v1.1": {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4},
    "tiny first": {
        "d_model": 32, "d_kv": 4, "d_ff": 40, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "relu",
    },
    "one block of XXL": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 1, "num_heads": 64},
}  # fmt: skip
BERT = {
    "tiny": {**TINY, "num_hidden_layers": 2, "vocab_size": 60},
    "one block of MiniLM": {
        "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 1,
        "vocab_size": 60,
    },
}  # fmt: skip
TOLERANCE = 1e-5


def ids(length, seed=0, rows=3):
    """Random ids with the end somewhere inside and padding after it."""
    random = np.random.default_rng(seed)
    out = random.integers(3, 57, (rows, length))
    for row, end in zip(out, random.integers(length // 2, length, rows), strict=True):
        row[end:] = 58
    return out


def build(kind, config, seed=0):
    """A model whose every parameter, norms and biases too, is random, and its activations of the order of 1."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "class_embedding" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" in name or "shared" in name or "relative" in name:
                parameter.normal_(0, 1 if "shared" not in name else 0.5)
    return model


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def ours(read, folder, *inputs, **options):
    model, params = read(folder)
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, *x: model.apply(p, *x, **options))(params, *map(jnp.asarray, inputs))


def close(a, b, tolerance=TOLERANCE):
    b = b.detach().numpy()
    assert np.abs(b).max() > 0.1  # a comparison of zeros would say nothing
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def clip_models(tmp_path_factory):
    made = {}
    for name, config in CLIP_TEXT.items():
        model = build(transformers.CLIPTextModelWithProjection, transformers.CLIPTextConfig(**config))
        made[name] = model, save(model, tmp_path_factory.mktemp("clip"))
    return made


@pytest.mark.parametrize("name", CLIP_TEXT)
def test_clip_text(clip_models, name):
    model, folder = clip_models[name]
    tokens = ids(12)
    theirs = model(torch.from_numpy(tokens), output_hidden_states=True)
    features = ours(text.clip_text, folder, tokens)
    close(features.tokens, theirs.last_hidden_state)
    close(features.pooled, theirs.text_embeds)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_as_diffusers_takes_it(clip_models, skip):
    model, folder = clip_models["tiny"]
    tokens = ids(12, seed=1)
    states = model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
    inner = model.text_model
    close(ours(text.clip_text, folder, tokens, skip=skip).tokens, inner.final_layer_norm(states[-(skip + 1)]))  # SD 1.x
    if skip:  # SDXL: hidden_states[-2] and before, no final norm
        raw = ours(text.clip_text, folder, tokens, skip=skip, final_norm=False)
        close(raw.tokens, states[-(skip + 1)])
        close(raw.pooled, model(torch.from_numpy(tokens)).text_embeds)


def test_pooled_without_an_end_and_with_many():
    """Their `argmax` of no hit at all is position 0; of many it is the first."""
    model = build(transformers.CLIPTextModel, transformers.CLIPTextConfig(**CLIP_TEXT["tiny"]))
    tensors = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    tokens = np.asarray([[1, 2, 3, 4], [1, 58, 3, 58]])
    features = ours(lambda _: text.clip_text(tensors, CLIP_TEXT["tiny"]), None, tokens)
    close(features.pooled, model(torch.from_numpy(tokens)).pooler_output)


@pytest.mark.parametrize("name", VISION)
def test_clip_vision(tmp_path, name):
    config = transformers.CLIPVisionConfig(**VISION[name])
    model = build(transformers.CLIPVisionModelWithProjection, config)
    pixels = np.random.default_rng(0).standard_normal((2, config.image_size, config.image_size, 3)).astype(np.float32)
    theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    features = ours(text.clip_vision, save(model, tmp_path), pixels)
    close(features.pooled, theirs.image_embeds)
    close(features.tokens, theirs.last_hidden_state)
    close(ours(text.clip_vision, tmp_path, pixels, skip=1).tokens, theirs.hidden_states[-2])


@pytest.mark.parametrize("name", T5)
def test_t5(tmp_path, name):
    config = transformers.T5Config(**{"vocab_size": 60, "feed_forward_proj": "gated-gelu"} | T5[name])
    model = build(transformers.T5EncoderModel, config)
    folder, tokens, mask = save(model, tmp_path), ids(40), ids(40) != 58
    close(ours(text.t5, folder, tokens).tokens, model(torch.from_numpy(tokens)).last_hidden_state)
    theirs = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state
    close(ours(text.t5, folder, tokens, mask).tokens, theirs)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64), (32, 100)])
def test_the_buckets_of_t5(buckets, distance):
    position = torch.arange(1200)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(t5_room.relative_buckets(1200, buckets, distance), theirs.numpy())


@pytest.mark.parametrize("name", BERT)
def test_bert(tmp_path, name):
    model = build(transformers.BertModel, transformers.BertConfig(**BERT[name]))
    tokens = ids(20)
    mask = tokens != 58
    theirs = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state
    features = ours(text.bert, save(model, tmp_path), tokens, mask)
    close(features.tokens, theirs)
    weights = torch.from_numpy(mask)[..., None].float()
    mean = (theirs * weights).sum(1) / weights.sum(1)
    close(features.pooled, torch.nn.functional.normalize(mean))


@pytest.mark.parametrize("shape", [(90, 131), (131, 90), (64, 64), (40, 47)])
def test_preprocessing(shape):
    """Their Pillow processor rounds to 8 bits after scaling; ours does not: within 1.5 levels of 255."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (8, 9, 3), np.uint8)
    picture = Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC)
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    theirs = transformers.CLIPImageProcessorPil(**size)(picture, return_tensors="np")["pixel_values"]
    ours = clip.preprocess(jnp.asarray(np.asarray(picture), jnp.float32)[None] / 127.5 - 1, 56)
    assert ours.shape == (1, 56, 56, 3)
    assert np.abs(np.asarray(ours).transpose(0, 3, 1, 2) - theirs).max() < 1.5 / 255 / min(clip.STD)


# --- layouts


def state(model):
    return {name: p.detach().numpy() for name, p in model.state_dict().items()}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_published_layouts_of_clip_are_one_model(clip_models, tmp_path):
    model, folder = clip_models["tiny"]
    _, params = text.clip_text(folder)
    config = model.config.to_dict()
    legacy = state(model) | {"text_model.embeddings.position_ids": np.arange(12)[None]}
    bare = {name.removeprefix("text_model."): t for name, t in state(model).items()}
    for name, tensors in {"legacy": legacy, "bare": bare}.items():
        files.write(tmp_path / name, tensors, config)
        same(text.clip_text(tmp_path / name)[1], params)
    save(model, tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    same(text.clip_text(tmp_path / "parts")[1], params)
    save(build(type(model), model.config).half(), tmp_path / "half", variant="fp16")
    _, half = text.clip_text(tmp_path / "half", variant="fp16")
    same(half, jax.tree.map(lambda p: p.astype(jnp.float16).astype(jnp.float32), params))
    single = {f"cond_stage_model.transformer.{name}": t for name, t in legacy.items()} | {"model.x": np.ones(1)}
    files.write(tmp_path / "single", single, {})
    tensors = text.keys.select(files.read(tmp_path / "single"), "cond_stage_model.transformer.")
    same(text.clip_text(tensors, config)[1], params)


def open_clip(model, extra_layers=0):
    """The same weights under OpenCLIP's names, as single files of SD 2 and SDXL hold them."""
    s = {name.removeprefix("text_model."): t for name, t in state(model).items()}
    out = {
        "token_embedding.weight": s["embeddings.token_embedding.weight"],
        "positional_embedding": s["embeddings.position_embedding.weight"],
        "ln_final.weight": s["final_layer_norm.weight"],
        "ln_final.bias": s["final_layer_norm.bias"],
        "text_projection": s["text_projection.weight"].T,
        "logit_scale": np.ones(()),
    }
    pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    layers = model.config.num_hidden_layers
    for i in range(layers + extra_layers):
        theirs, here = f"encoder.layers.{min(i, layers - 1)}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            out |= {f"{here}.{a}.{kind}": s[f"{theirs}.{b}.{kind}"] for a, b in pairs.items()}
            out[f"{here}.attn.in_proj_{kind}"] = np.concatenate(
                [s[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
    return out


@pytest.mark.parametrize("extra", [0, 1])
def test_the_layout_of_open_clip(clip_models, extra):
    model, folder = clip_models["tiny"]
    same(text.clip_text(open_clip(model, extra), model.config.to_dict())[1], text.clip_text(folder)[1])


def test_a_whole_clip_holds_both(tmp_path):
    config = transformers.CLIPConfig(text_config=CLIP_TEXT["tiny"], vision_config=VISION["tiny"], projection_dim=24)
    model = build(transformers.CLIPModel, config)
    folder = save(model, tmp_path)
    tokens, pixels = ids(12, rows=2), np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
    theirs = model(torch.from_numpy(tokens), torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    words, picture = ours(text.clip_text, folder, tokens), ours(text.clip_vision, folder, pixels)
    close(words.pooled / np.linalg.norm(words.pooled, axis=1, keepdims=True), theirs.text_embeds)
    close(picture.pooled / np.linalg.norm(picture.pooled, axis=1, keepdims=True), theirs.image_embeds)
    cosines = theirs.logits_per_text.diagonal() / model.logit_scale.exp()
    np.testing.assert_allclose(
        clip.score(words.pooled, picture.pooled), 100 * cosines.detach().numpy().clip(0), atol=1e-3
    )


CASES = {
    "clip": (transformers.CLIPTextModelWithProjection, transformers.CLIPTextConfig, CLIP_TEXT["tiny"], text.clip_text),
    "clip without projection": (
        transformers.CLIPTextModel, transformers.CLIPTextConfig, CLIP_TEXT["old eos"], text.clip_text,
    ),
    "vision": (
        transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig, VISION["tiny"], text.clip_vision,
    ),
    "t5": (
        transformers.T5EncoderModel, transformers.T5Config,
        {"vocab_size": 60, "feed_forward_proj": "gated-gelu"} | T5["tiny v1.1"], text.t5,
    ),
    "first t5": (transformers.T5EncoderModel, transformers.T5Config, {"vocab_size": 60} | T5["tiny first"], text.t5),
    "bert": (transformers.BertModel, transformers.BertConfig, BERT["tiny"], text.bert),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("half", [False, True])
def test_what_we_write_transformers_loads(tmp_path, name, half):
    kind, config, settings, read = CASES[name]
    first = build(kind, config(**settings))
    first = first.half() if half else first
    model, params = read(save(first, tmp_path / "theirs"))
    text.export(tmp_path / "ours", model, params, dtype=np.float16 if half else None)
    second, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"pooler"}
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    again = transformers.AutoConfig.from_pretrained(tmp_path / "theirs").to_dict()
    assert {key: value for key, value in settings.items() if again[key] != value} == {}
    written, read = files.read(tmp_path / "ours"), files.read(tmp_path / "theirs")
    prefix = "text_model." if name == "clip without projection" else ""  # as published; theirs is bare today
    pairs = {key: (tensor, read.get(key.removeprefix(prefix))) for key, tensor in written.items()}
    assert len(pairs) == len([key for key in read if not key.startswith("pooler.")])  # a sentence encoder has none
    for key, (mine, their) in pairs.items():
        assert (mine.dtype, np.asarray(mine).tobytes()) == (their.dtype, np.asarray(their).tobytes()), key
    a, b = first.state_dict(), second.state_dict()
    for key in a:
        assert key.startswith("pooler.") or torch.equal(a[key], b[key].to(a[key].dtype)), key


# --- tokenizers: every id of 10,000 strings


def equal_ids(reference, tokenizer, made, length):
    assert reference(made, add_special_tokens=False)["input_ids"] == tokenizer.pieces(made)
    theirs = reference(made, padding="max_length", truncation=True, max_length=length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is cut, as it should be
        tokens = tokenizer.encode(made, length)
    np.testing.assert_array_equal(tokens.ids, theirs["input_ids"])
    np.testing.assert_array_equal(tokens.mask, np.asarray(theirs["attention_mask"], bool))


@needs_shared
@pytest.mark.parametrize("settings", [{}, {"pad_token": "!"}], ids=["SD 1", "SD 2"])
def test_ids_of_clip(tmp_path, settings):
    corpus = (SHARED / "text" / "tiny_shakespeare.txt").read_text()
    write_clip_vocabulary(tmp_path, corpus)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77} | settings))
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    equal_ids(reference, open_tokenizer(tmp_path), strings(), 77)
    reference.save_pretrained(tmp_path / "one file")
    assert not (tmp_path / "one file" / "vocab.json").exists()
    equal_ids(reference, open_tokenizer(tmp_path / "one file"), strings(500, seed=1), 77)


@needs_shared
def test_ids_of_minilm():
    folder = SHARED / "weights" / "all-minilm-l6-v2"
    reference = transformers.BertTokenizer.from_pretrained(folder)
    equal_ids(reference, open_tokenizer(folder), strings(), 128)


@needs_shared
def test_ids_of_minilm_in_pure_python(tmp_path):
    """The old reference is another program; the two differ where the versions of Unicode do."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    folder = SHARED / "weights" / "all-minilm-l6-v2"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    reference = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    known = [s for s in strings(1000, megabyte=False) if not {"Cn", "Co"} & set(map(unicodedata.category, s))]
    assert len(known) > 500
    ids = [reference.encode(string, add_special_tokens=False) for string in known]
    assert sum(a != b for a, b in zip(open_tokenizer(folder).pieces(known), ids, strict=True)) <= len(known) // 500


@needs_shared
def test_ids_of_t5(tmp_path):
    """No T5 vocabulary is at hand: one of 1,000 pieces is trained, and their class writes its tokenizer.json."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=1000, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train([str(SHARED / "text" / "tiny_shakespeare.txt")], trainer)
    vocabulary = [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"]]
    reference = transformers.T5Tokenizer(vocab=vocabulary)
    reference.save_pretrained(tmp_path)
    equal_ids(reference, open_tokenizer(tmp_path), strings(), 64)
