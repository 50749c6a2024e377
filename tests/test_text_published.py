"""CLIP, T5 and BERT against what transformers made of the same weights, written down in tests/fixtures/text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff import text
from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.pretrained import files, keys
from jaxdiff.pretrained import text as pretrained
from jaxdiff.text import clip, layers
from jaxdiff.train import mesh

FOLDER = Path(__file__).parent / "fixtures" / "text"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def expected():
    return {name: np.asarray(tensor) for name, tensor in files.read(FOLDER / "expected.safetensors").items()}


def run(read, name, *inputs, **options):
    model, params = read(FOLDER / name)
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, *x: model.apply(p, *x, **options))(params, *map(jnp.asarray, inputs))


def close(ours, theirs):
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_clip_text(expected):
    tokenizer = text.open_tokenizer(FOLDER / "clip")
    tokens = tokenizer.encode(["a red cat", "the dog ran to the park in the rain", ""])
    np.testing.assert_array_equal(tokens.ids, expected["clip.ids"])
    features = run(pretrained.clip_text, "clip", tokens.ids)
    close(features.tokens[:, :12], expected["clip.tokens"])
    close(features.pooled, expected["clip.pooled"])
    raw = run(pretrained.clip_text, "clip", tokens.ids, skip=1, final_norm=False)
    close(raw.tokens[:, :12], expected["clip.penultimate"])
    close(raw.pooled, expected["clip.pooled"])


def test_ids_are_the_reference_s():
    rows = json.loads((FOLDER / "clip" / "ids.json").read_text(encoding="utf-8"))
    assert len(rows) == 150
    tokenizer = text.open_tokenizer(FOLDER / "clip")
    assert tokenizer.pieces([string for string, _ in rows]) == [ids for _, ids in rows]


def test_clip_vision(expected):
    features = run(pretrained.clip_vision, "vision", expected["vision.pixels"].transpose(0, 2, 3, 1))
    close(features.tokens, expected["vision.tokens"])
    close(features.pooled, expected["vision.pooled"])


def test_t5_and_bert(expected):
    mask = expected["mask"]
    assert mask.dtype == bool
    ids = expected["ids"].astype(np.int32)
    close(run(pretrained.t5, "t5", ids, mask).tokens, expected["t5.tokens"])
    features = run(pretrained.bert, "bert", ids, mask)
    close(features.tokens, expected["bert.tokens"])
    mean = (expected["bert.tokens"] * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    close(features.pooled, mean / np.linalg.norm(mean, axis=1, keepdims=True))


@pytest.mark.parametrize("name", ["clip", "vision", "t5", "bert"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_round_trip_changes_no_bit(tmp_path, name, dtype):
    read = {"clip": pretrained.clip_text, "vision": pretrained.clip_vision}.get(name) or getattr(pretrained, name)
    before = {key: np.asarray(t) for key, t in files.read(FOLDER / name).items()}
    left = ("position_ids", "pooler", "embed_tokens")  # no parameters, not used, there twice
    before = {key: t.astype(dtype) for key, t in before.items() if not any(word in key for word in left)}
    model, params = read(before, files.config(FOLDER / name))
    pretrained.export(tmp_path, model, params, dtype=dtype)
    after = files.read(tmp_path)
    assert {key: np.asarray(t).tobytes() for key, t in after.items()} == {k: t.tobytes() for k, t in before.items()}
    again, _ = read(tmp_path)
    assert again == model


def test_weights_of_another_network_are_named(tmp_path):
    tensors = {name: np.asarray(t) for name, t in files.read(FOLDER / "clip").items()}
    config = files.config(FOLDER / "clip")
    with pytest.raises(CheckpointError, match=r"1 unexpected: encoder\.layers\.2"):
        pretrained.clip_text(tensors | {"text_model.encoder.layers.2.mlp.fc1.weight": np.ones((2, 2))}, config)
    with pytest.raises(CheckpointError, match=r"missing: final_layer_norm\.bias"):
        pretrained.clip_text({n: t for n, t in tensors.items() if "final_layer_norm.bias" not in n}, config)
    with pytest.raises(CheckpointError, match=r"1 shape: final_layer_norm\.bias has \(3,\)"):
        pretrained.clip_text(tensors | {"text_model.final_layer_norm.bias": np.ones(3)}, config)
    with pytest.raises(ConfigError, match="give config="):
        pretrained.clip_text(tensors)
    with pytest.raises(ConfigError, match="can be exported"):
        pretrained.export(tmp_path, text.TextEncoder(3), {})


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "16"}, {"hidden_size": -16}, {"hidden_size": 2**40}, {"num_hidden_layers": 0},
        {"num_attention_heads": True}, {"num_attention_heads": None}, {"layer_norm_eps": []}, {"text_config": 3},
        {"hidden_act": 7},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_config_is_named(change):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        pretrained.clip_text(files.read(FOLDER / "clip"), files.config(FOLDER / "clip") | change)


@pytest.mark.parametrize("change", [{"hidden_act": "gelu_9"}, {"num_attention_heads": 3}], ids=str)
def test_settings_that_no_network_has(change):
    with pytest.raises(ConfigError, match=r"not known|must divide"):
        pretrained.clip_text(files.read(FOLDER / "clip"), files.config(FOLDER / "clip") | change)


def test_wrong_inputs_are_refused(expected):
    model, params = pretrained.clip_text(FOLDER / "clip")
    with pytest.raises(ConfigError, match="<= 77"):
        model.apply(params, jnp.zeros((1, 78), jnp.int32))
    with pytest.raises(ConfigError, match="between 0 and depth=2"):
        model.apply(params, jnp.zeros((1, 7), jnp.int32), skip=3)
    vision, params = pretrained.clip_vision(FOLDER / "vision")
    with pytest.raises(ConfigError, match="Use preprocess"):
        vision.apply(params, jnp.zeros((1, 3, 12, 12)))
    t5, params = pretrained.t5(FOLDER / "t5")
    with pytest.raises(ConfigError, match="mask must be bool"):
        t5.apply(params, jnp.zeros((1, 7), jnp.int32), jnp.ones((1, 7)))
    bert, params = pretrained.bert(FOLDER / "bert")
    with pytest.raises(ConfigError, match="mask must be bool"):
        bert.apply(params, jnp.zeros((1, 7), jnp.int32), jnp.ones((1, 6), bool))
    with pytest.raises(ConfigError, match="buckets must be >= 4"):
        t5.clone(buckets=3).init(jax.random.key(0), jnp.zeros((1, 7), jnp.int32))


def test_a_large_encoder_is_born_divided_over_devices(expected):
    """T5 in eighths: the same outputs, and no device holds more than its share of what can be divided."""
    grid = mesh.make(data=1, fsdp=8)

    def place(shapes):
        return jax.tree.map(
            lambda leaf: jax.sharding.NamedSharding(
                grid, jax.sharding.PartitionSpec("fsdp") if leaf.shape[0] % 8 == 0 else jax.sharding.PartitionSpec()
            ),
            shapes,
        )

    model, params = pretrained.t5(FOLDER / "t5", shardings=place)
    kernel = params["params"]["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    tokens = jax.jit(model.apply)(params, expected["ids"].astype(np.int32), expected["mask"]).tokens
    close(tokens, expected["t5.tokens"])
    _, params = pretrained.t5(FOLDER / "t5", shardings=lambda shapes: mesh.state_sharding(grid, shapes))
    assert all(leaf.sharding.mesh == grid for leaf in jax.tree.leaves(params))


def test_the_sizes_of_published_encoders():
    """Parameters of the real configurations, counted without making them; the counts are those of the model cards."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def size(model, *inputs):
        shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        return sum(np.prod(leaf.shape, dtype=np.int64) for leaf in jax.tree.leaves(shapes))

    def count(model, *inputs):
        """All layers are alike."""
        one, two = (size(model.clone(depth=depth), *inputs) for depth in (1, 2))
        return one + (model.depth - 1) * (two - one)

    assert count(text.CLIPText(), ids) == 123_060_480  # Stable Diffusion 1.5's text encoder
    big = text.CLIPText(width=1280, depth=32, heads=20, hidden=5120, act="gelu", projection=1280)
    assert count(big, ids) == 694_659_840  # SDXL's second
    assert count(text.CLIPVision(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)) == 303_966_208
    assert count(text.T5Encoder(), ids) == 4_762_310_656  # XXL's encoder
    assert count(text.Bert(), ids, jax.ShapeDtypeStruct((1, 8), bool)) == 22_713_216 - 147_840  # its pooler


# --- pictures


def test_preprocessing_is_pillow_s(tmp_path):
    """Against Pillow's bicubic filter, which rounds to 8 bits in between: within 1.5 of 255 levels."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (9, 13, 3), np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((130, 90), Image.Resampling.BICUBIC))
    scaled = Image.fromarray(picture).resize((46, 32), Image.Resampling.BICUBIC).crop((7, 0, 39, 32))
    theirs = (np.asarray(scaled) / 255 - clip.MEAN) / clip.STD
    ours = clip.preprocess(jnp.asarray(picture, jnp.float32)[None] / 127.5 - 1, 32)
    assert ours.shape == (1, 32, 32, 3)
    assert np.abs(ours[0] - theirs).max() < 1.5 / 255 / min(clip.STD)


def test_the_score_by_hand():
    a = jnp.asarray([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]])
    b = jnp.asarray([[4.0, 3.0], [-1.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(clip.score(a, b), [96, 0, 0], atol=1e-5)


def test_bfloat16_stays_near_float32(expected):
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention does not run under the strict one
        model, params = pretrained.clip_text(FOLDER / "clip", dtype=jnp.bfloat16)
        features = jax.jit(model.apply)(params, expected["clip.ids"].astype(np.int32))
    assert features.tokens.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    error = np.abs(np.asarray(features.tokens[:, :12], np.float32) - expected["clip.tokens"])
    assert 1e-4 < error.max() < 0.2


def test_norm_by_hand():
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32) + 100
    for rms in (False, True):
        params = {"scale": jnp.arange(8.0)} | ({} if rms else {"bias": jnp.ones(8)})
        z = x.astype(np.float64) - (0 if rms else x.astype(np.float64).mean(-1, keepdims=True))
        truth = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * np.arange(8) + (0 if rms else 1)
        np.testing.assert_allclose(layers.Norm(rms=rms).apply({"params": params}, x), truth, atol=2e-4)


def test_the_prefix_of_published_files_is_no_accident():
    names = set(files.read(FOLDER / "clip"))
    assert "text_model.embeddings.position_ids" in names
    assert "embeddings.position_ids" in keys.strip(dict.fromkeys(names), "text_model.")


LOAD = """
import sys
class Refuse:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "diffusers", "tensorflow", "sentencepiece"):
            self.asked.append(name)
sys.meta_path.insert(0, Refuse())
from jaxdiff import pretrained, text
ids = text.prompts.chunk(text.open_tokenizer(sys.argv[1] + "/clip"), ["a (red:1.2) cat"])
model, params = pretrained.text.clip_text(sys.argv[1] + "/clip")
features = text.prompts.encode(lambda ids: model.apply(params, ids), ids)
pretrained.text.clip_vision(sys.argv[1] + "/vision")
pretrained.text.t5(sys.argv[1] + "/t5")
pretrained.text.bert(sys.argv[1] + "/bert")
print("heavy:", Refuse.asked, features.tokens.shape)
try:
    import torch
except ImportError:
    pass
print("asked:", Refuse.asked)
"""


def test_loading_and_encoding_ask_for_no_torch():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD, str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["heavy: [] (1, 77, 16)", "asked: ['torch']"]
