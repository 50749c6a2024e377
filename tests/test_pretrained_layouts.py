"""One model in every layout that is published: half precision, shards, old names, an original single file."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff import schedule, target
from jaxdiff.errors import CheckpointError, ConfigError, UnsafeFileError
from jaxdiff.nets import AutoencoderKL, SDUNet
from jaxdiff.pretrained import ddpm, files, schedulers, single_file, unet, vae
from jaxdiff.pretrained import pipelines as published
from tests.oracles import tiny_sd

FOLDER = Path(__file__).parent / "fixtures" / "tiny_sd"
DATA = Path(__file__).parents[2] / "shared" / "data"


def read(part):
    """The tensors of a part of the fixture, in memory."""
    return {name: np.asarray(tensor) for name, tensor in files.read(FOLDER / part, variant="fp16").items()}


def same(a, b):
    """Whether two trees are equal, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.fixture(scope="module")
def pipe():
    return published.load(FOLDER, variant="fp16")


def test_half_precision_and_shards(pipe, tmp_path):
    tensors = {name: x.astype(np.float32) for name, x in read("unet").items()}
    names = sorted(tensors)
    shards = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({n: tensors[n] for n in names if shards[n] == shard}, tmp_path / shard)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    shutil.copy(FOLDER / "unet" / "config.json", tmp_path)
    same(unet.load(tmp_path)[1], pipe.params["unet"])


def test_the_old_names_of_an_autoencoder(pipe):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, x in read("vae").items():
        for now, before in old.items():
            name = name.replace(f"attentions.0.{now}", f"attentions.0.{before}")
        tensors[name] = x
    assert sum("proj_attn" in name for name in tensors) == 4
    net, params = vae.load(tensors, files.config(FOLDER / "vae"))
    same(params, pipe.params["vae"])
    assert net == pipe.model.vae


@pytest.fixture
def original(pipe, tmp_path):
    """The fixture as an original single file, with the optimiser's leftovers that such files carry."""
    merged = {"model_ema.decay": np.float32([1]), "alphas_cumprod": np.ones(1000, np.float32)}
    for part, prefix, places, coder in (
        ("unet", single_file.UNET, single_file.unet_places(pipe.model.unet), False),
        ("vae", single_file.VAE, single_file.vae_places(pipe.model.vae), True),
    ):
        tensors = read(part)
        for name, other in single_file.original(tensors, places, autoencoder=coder).items():
            x = tensors[name]
            points = coder and x.ndim == 2
            merged[prefix + other] = x[:, :, None, None] if points else x
    for name, x in read("text_encoder").items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        merged[f"cond_stage_model.transformer.{name}"] = x
    path = tmp_path / "original.safetensors"
    save_file(merged, path)
    return path, merged


def test_an_original_single_file(pipe, original):
    path, tensors = original
    names = set(tensors)
    for name in (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "first_stage_model.decoder.up.1.upsample.conv.weight",
    ):
        assert name in names
    again = published.load(path, configs=FOLDER)
    same(again.params, pipe.params)


def test_every_key_of_a_single_file_must_have_its_place(original):
    path, tensors = original
    save_file(tensors | {"model.diffusion_model.hat.weight": np.ones(1, np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected: hat.weight"):
        published.load(path, configs=FOLDER)
    save_file({k: v for k, v in tensors.items() if not k.startswith("first_stage")}, path)
    with pytest.raises(CheckpointError, match="nothing below first_stage_model"):
        published.load(path, configs=FOLDER)
    with pytest.raises(ConfigError, match="give configs="):
        published.load(path)


def test_a_round_trip_changes_no_bit(pipe, tmp_path):
    published.export(tmp_path, pipe, FOLDER, dtype=np.float16)
    again = published.load(tmp_path)
    same(again.params, pipe.params)
    for part in ("unet", "vae"):
        theirs, ours = read(part), files.read(tmp_path / part)
        assert set(theirs) == set(ours)
        for name, x in theirs.items():
            assert x.tobytes() == np.asarray(ours[name]).tobytes()
    assert again.model == pipe.model


def test_half_precision_can_stay(pipe):
    params = unet.load(FOLDER / "unet", variant="fp16", param_dtype=np.float16)[1]
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float16)}
    same(jax.tree.map(lambda x: x.astype(np.float32), params), pipe.params["unet"])


CONFIG = files.config(FOLDER / "unet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn must be 'silu'"),
        ({"something_new": 3}, "something_new must be absent"),
        ({"block_out_channels": [8]}, "down_block_types must be 1 of"),
        ({"block_out_channels": "8, 16"}, "block_out_channels must be integers"),
        ({"block_out_channels": [8, True]}, "block_out_channels"),
        ({"attention_head_dim": [1, 2, 3]}, "attention_head_dim must be integers"),
        ({"layers_per_block": 10**9}, "layers_per_block must be an integer from 1 to 64"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types"),
        ({"norm_eps": float("nan")}, "norm_eps must be a number"),
        ({"only_cross_attention": True}, "only_cross_attention must be absent"),
        ({"freq_shift": 2}, "freq_shift"),
    ],
)
def test_a_config_that_is_not_understood_is_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        unet.network(CONFIG | change)


def test_what_is_off_or_beside_the_point_is_passed_over():
    assert unet.network(CONFIG | {"new": None, "newer": False, "_hidden": 1}) == unet.network(CONFIG)


@pytest.mark.parametrize(
    ("module", "net"),
    [
        (unet, SDUNet()),
        (unet, SDUNet(heads=(5, 10, 20, 20), token_dim=1024, linear_projection=True)),
        (
            unet,
            SDUNet(
                channels=(320, 640, 1280), attention=("none", "cross", "cross"), heads=(5, 10, 20), depth=(1, 2, 10),
                token_dim=2048, vector_dim=1280, linear_projection=True,
            ),
        ),
        (
            ddpm,
            SDUNet(
                channels=(128, 256, 256, 256), attention=("none", "self", "none", "none"), mid_attention="self",
                heads=(1, 1, 1, 1), token_dim=None, in_channels=3, out_channels=3, eps=1e-6, down_padding=0,
                sines_first=True, time_endpoint=True,
            ),
        ),
        (vae, AutoencoderKL()),
        (vae, AutoencoderKL(latent_channels=16, quant=False, post_quant=False, scale=1.5305, shift=0.0609)),
    ],
)  # fmt: skip
def test_a_network_is_the_one_its_own_config_describes(module, net):
    assert module.network(module.config_of(net)) == net


def test_stable_diffusion_one_has_eight_heads():
    assert unet.network({"attention_head_dim": 8, "cross_attention_dim": 768}) == SDUNet()


def test_pickles_and_foreign_pipelines_are_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    shutil.copy(FOLDER / "unet" / "config.json", tmp_path / "unet")
    with pytest.raises(UnsafeFileError, match="pickle"):
        unet.load(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text('{"_class_name": "HunyuanDiTPipeline"}')
    with pytest.raises(CheckpointError, match="HunyuanDiTPipeline"):
        published.load(tmp_path)


def test_the_chain_of_a_scheduler_config():
    chain = schedulers.read({"_class_name": "PNDMScheduler", **tiny_sd.SCHEDULER})
    assert chain.schedule == schedule.scaled_linear()
    assert (chain.target, chain.solver, chain.clip) == (target.eps, "plms", None)
    np.testing.assert_allclose(chain.times(4), [0.752, 0.502, 0.252, 0.002, 0.001])
    np.testing.assert_allclose(chain.times(4, "unipc"), [0.752, 0.502, 0.252, 0.002, 0.0])
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    chain = schedulers.read({"_class_name": "DDIMScheduler", "clip_sample": False} | zero)
    assert chain.schedule == schedule.zero_terminal_snr(schedule.ddpm_table())
    assert chain.target is target.v
    np.testing.assert_allclose(chain.times(4), [1.0, 0.75, 0.5, 0.25, 0.0])
    assert schedulers.read({"_class_name": "DDPMScheduler"}).clip == 1.0
    for wrong, message in (
        ({"_class_name": "CogVideoXDDIMScheduler"}, "_class_name"),
        ({"beta_schedule": "odd"}, "beta_schedule"),
        ({"beta_end": 7}, "beta_end"),
        ({"trained_betas": ["a"]}, "trained_betas"),
        ({"prediction_type": "flow"}, "prediction_type"),
    ):
        with pytest.raises(CheckpointError, match=message):
            schedulers.read(wrong)


def test_the_index_of_a_time_is_whole_where_it_should_be():
    told = schedulers.whole_index(1000)
    t = np.float32((np.arange(1000) + 1) / 1000)
    np.testing.assert_array_equal(told(schedule.ddpm_table(), jax.numpy.asarray(t)), np.arange(1000))
    np.testing.assert_allclose(told(schedule.ddpm_table(), jax.numpy.float32(0.5005)), 499.5, atol=1e-3)


@pytest.mark.skipif(not (DATA / "weights" / "taef2").is_dir(), reason="the weights of TAEF2 are not beside the project")
def test_taef2_reads_and_restores_a_real_picture():
    from PIL import Image

    net, params = vae.tiny(DATA / "weights" / "taef2")
    assert (net.latent_channels, net.pool, net.factor) == (32, True, 8)
    with Image.open(sorted((DATA / "cifar10").glob("*.webp"))[0]) as sheet:
        x = np.asarray(sheet.convert("RGB").crop((0, 0, 128, 64)), np.float32)[None] / 127.5 - 1
    made = np.asarray(jax.jit(net.apply)(params, x))
    psnr = -10 * np.log10(np.mean(np.square((np.clip(made, -1, 1) - x) / 2)))
    assert psnr > 24  # the original's, within rounding: see test_witness_pretrained
