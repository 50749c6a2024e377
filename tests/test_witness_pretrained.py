"""Second witness: diffusers' networks with random weights, written by it and read by us, and the other way round.

Everything in float32 at the highest precision: the largest difference of an output is below 1e-5.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdiff import pipelines, solver
from jaxdiff.pretrained import ddpm, files, single_file, unet, vae
from jaxdiff.pretrained import pipelines as published
from tests.oracles import tiny_sd

torch = pytest.importorskip("torch", reason="needs the witness extra: torch, diffusers, transformers")
diffusers = pytest.importorskip("diffusers", reason="needs the witness extra: torch, diffusers, transformers")
diffusers.utils.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TIMES = np.float32([981, 20])
LEVELS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
}
XL = LEVELS | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24, "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}  # fmt: skip
UNETS = {
    "sd1": LEVELS | CROSS | {"attention_head_dim": 8},
    "sd2": LEVELS | CROSS | {"attention_head_dim": (2, 4), "use_linear_projection": True, "layers_per_block": 2},
    "sdxl": XL,
    "inpainting": LEVELS | CROSS | {"in_channels": 9},
    "classes": LEVELS | CROSS | {"num_class_embeds": 7, "resnet_time_scale_shift": "scale_shift"},
    # One block of the real widths, as SD 1.5 and SDXL have them.
    "sd1 wide": CROSS | {"block_out_channels": (320, 640), "layers_per_block": 1, "cross_attention_dim": 768},
    "sdxl wide": XL | {
        "block_out_channels": (320, 640), "norm_num_groups": 32, "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10), "transformer_layers_per_block": (1, 2), "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
DDPM = LEVELS | {"norm_eps": 1e-6, "layers_per_block": 2}
DDPMS = {
    "cifar10": DDPM | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None,
    },
    "heads": DDPM | {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": 8, "num_class_embeds": 3,
    },
}  # fmt: skip
KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 64, 64], "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
VAES = {
    "sd": KL,
    "sd3": KL | {
        "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "no attention": KL | {"mid_block_add_attention": False},
    "wide": KL | {"block_out_channels": [128, 256, 512], "norm_num_groups": 32},
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact():
    """The products of float32 as exact as the machine has them, and JAX's default promotion, as diffusers' users do."""
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        yield


def random(kind, settings):
    """Their network with random weights, biases and scales too, ready to answer."""
    torch.manual_seed(0)
    net = getattr(diffusers, kind)(**settings)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(ours, theirs):
    assert np.abs(theirs).max() > 0.1  # there is something to compare
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def conditions(settings):
    """(inputs of ours, inputs of theirs) of a conditional U-Net."""
    tokens = draw(2, 7, settings["cross_attention_dim"], seed=1)
    ours, theirs = {"tokens": tokens}, {"encoder_hidden_states": torch.from_numpy(tokens)}
    if "addition_embed_type" in settings:
        width = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        vector, sizes = (
            draw(2, width, seed=2),
            np.float32([[512, 768, 0, 16, 512, 768], [1024, 1024, 0, 0, 1024, 1024]]),
        )
        ours |= {"vector": vector, "sizes": sizes}
        added = {"text_embeds": torch.from_numpy(vector), "time_ids": torch.from_numpy(sizes)}
        theirs["added_cond_kwargs"] = added
    if "num_class_embeds" in settings:
        ours["labels"] = np.int32([2, 5])
        theirs["class_labels"] = torch.tensor([2, 5])
    return ours, theirs


@pytest.mark.parametrize("name", UNETS)
def test_a_conditional_unet_gives_the_same(name, tmp_path):
    theirs = random("UNet2DConditionModel", UNETS[name])
    theirs.save_pretrained(tmp_path)
    net, params = unet.load(tmp_path)
    x = draw(2, 6, 10, net.in_channels)
    ours, inputs = conditions(UNETS[name])
    with torch.no_grad():
        wanted = theirs(nchw(x), torch.from_numpy(TIMES), **inputs).sample
    close(jax.jit(net.apply)(params, x, TIMES, **ours), nhwc(wanted))


@pytest.mark.parametrize("name", DDPMS)
def test_an_unconditional_unet_gives_the_same(name, tmp_path):
    theirs = random("UNet2DModel", DDPMS[name])
    theirs.save_pretrained(tmp_path)
    net, params = ddpm.load(tmp_path)
    x = draw(2, 12, 8, 3)
    labels = np.int32([2, 0])
    ours, inputs = ({}, {}) if name == "cifar10" else ({"labels": labels}, {"class_labels": torch.from_numpy(labels)})
    with torch.no_grad():
        wanted = theirs(nchw(x), torch.from_numpy(TIMES), **inputs).sample
    close(jax.jit(net.apply)(params, x, TIMES, **ours), nhwc(wanted))


@pytest.mark.parametrize("name", VAES)
def test_an_autoencoder_gives_the_same(name, tmp_path):
    theirs = random("AutoencoderKL", VAES[name])
    theirs.save_pretrained(tmp_path)
    net, params = vae.load(tmp_path)
    x, z = 0.5 * draw(2, 20, 28, 3), draw(2, 6, 7, net.latent_channels)
    with torch.no_grad():
        posterior, pictures = theirs.encode(nchw(x)).latent_dist, theirs.decode(nchw(z)).sample
    ours = jax.jit(lambda p, x: net.apply(p, x, method="encode"))(params, x)
    close(ours.mean, nhwc(posterior.mean))
    close(ours.log_variance, nhwc(posterior.logvar))
    close(jax.jit(lambda p, z: net.apply(p, z, method="decode"))(params, z), nhwc(pictures))
    assert net.scale == theirs.config.scaling_factor
    assert net.shift == (theirs.config.shift_factor or 0)


def test_a_tiny_autoencoder_gives_the_same(tmp_path):
    theirs = random("AutoencoderTiny", {})
    theirs.save_pretrained(tmp_path)
    net, params = vae.load(tmp_path)
    x, z = 0.5 * draw(1, 16, 24, 3), draw(1, 3, 2, 4)
    with torch.no_grad():
        latents, pictures = theirs.encode(nchw(x)).latents, theirs.decode(nchw(z)).sample
    close(jax.jit(lambda p, x: net.apply(p, x, method="encode").mean)(params, x), nhwc(latents))
    close(jax.jit(lambda p, z: net.apply(p, z, method="decode"))(params, z), nhwc(pictures))


WRITTEN = {
    "unet": (unet, "UNet2DConditionModel", UNETS["sd1"]),
    "unet xl": (unet, "UNet2DConditionModel", UNETS["sdxl"]),
    "ddpm": (ddpm, "UNet2DModel", DDPMS["cifar10"]),
    "ddpm with heads": (ddpm, "UNet2DModel", DDPMS["heads"]),
    "kl": (vae, "AutoencoderKL", VAES["sd3"]),
    "tiny": (vae, "AutoencoderTiny", {}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_they_load_and_no_bit_changes(name, tmp_path):
    module, kind, settings = WRITTEN[name]
    theirs = random(kind, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    module.export(tmp_path / "ours", *module.load(tmp_path / "theirs"))
    again, report = getattr(diffusers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    ours, wanted = again.state_dict(), theirs.state_dict()
    assert set(ours) == set(wanted)
    for key, value in wanted.items():
        assert ours[key].numpy().tobytes() == value.numpy().tobytes(), key
    plain = [{k: list(v) if isinstance(v, tuple) else v for k, v in net.config.items()} for net in (theirs, again)]
    changed = {k for k, v in plain[0].items() if plain[1].get(k) != v and k[0] != "_"}
    assert changed <= {"attention_head_dim", "transformer_layers_per_block"}  # one number for all levels, written out


def test_the_comparison_sees_a_wrong_epsilon(tmp_path):
    theirs = random("UNet2DConditionModel", UNETS["sd1"])
    theirs.save_pretrained(tmp_path)
    net, params = unet.load(tmp_path)
    x = draw(2, 6, 10, 4)
    ours, inputs = conditions(UNETS["sd1"])
    with torch.no_grad():
        wanted = nhwc(theirs(nchw(x), torch.from_numpy(TIMES), **inputs).sample)
    for wrong in (
        {"eps": 1e-3},
        {"heads": (4, 4)},
        {"sines_first": True},
        {"time_endpoint": True},
        {"down_padding": 0},
    ):
        made = jax.jit(net.clone(**wrong).apply)(params, x, TIMES, **ours)
        with pytest.raises(AssertionError, match="Mismatched"):
            close(made, wanted)


def test_sizes_that_do_not_halve_evenly(tmp_path):
    theirs = random("UNet2DConditionModel", UNETS["sd1"])
    theirs.save_pretrained(tmp_path)
    net, params = unet.load(tmp_path)
    x = draw(2, 7, 5, 4)
    ours, inputs = conditions(UNETS["sd1"])
    with torch.no_grad():
        wanted = theirs(nchw(x), torch.from_numpy(TIMES), **inputs).sample
    close(jax.jit(net.apply)(params, x, TIMES, **ours), nhwc(wanted))


@pytest.fixture(scope="module", params=["sd1", "sdxl", "sd2 v"])
def drawn(request, tmp_path_factory):
    """(folder of a tiny pipeline of diffusers, what it draws, the pipeline)."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    linear = {"use_linear_projection": True} if request.param == "sd2 v" else {}
    pipe = tiny_sd.pipeline(folder, xl=request.param == "sdxl", **linear)
    if request.param == "sd2 v":
        zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}
        pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, **zero)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe", tiny_sd.draw(pipe, height=16, width=16), pipe


def test_every_guided_step_and_the_picture_are_the_same(drawn):
    folder, expected, _ = drawn
    pipe = published.load(folder)
    encode = jax.jit(pipe.encode)
    cond, null = (encode(pipe.params, t) for t in pipe.tokenize([tiny_sd.PROMPT], [tiny_sd.NEGATIVE]))
    for name in tiny_sd.SOLVERS:
        times = tiny_sd.times(expected[f"{name}/indices"], name)

        @jax.jit
        def draw(params, x, cond, null, times, name=name):
            used = solver.ALL[name](pipe.model.schedule)
            settings = {"times": times, "solver": used, "scale": tiny_sd.SCALE, "return_trajectory": True}
            z, path = pipelines.generate(jax.random.key(0), pipe.model, params, x, cond, null, **settings)
            return path[1:], pipelines.decode(pipe.model, params, z)

        path, picture = draw(pipe.params, expected["noise"], cond, null, times)
        np.testing.assert_allclose(path, expected[f"{name}/latents"], rtol=0, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(picture, expected[f"{name}/picture"], rtol=0, atol=1e-4, err_msg=name)


def test_an_exported_pipeline_draws_the_same_there(drawn, tmp_path):
    folder, expected, pipe = drawn
    published.export(tmp_path, published.load(folder), folder)
    safety = {} if "XL" in type(pipe).__name__ else {"safety_checker": None, "requires_safety_checker": False}
    again = type(pipe).from_pretrained(tmp_path, **safety)
    again.set_progress_bar_config(disable=True)
    made = tiny_sd.draw(again, height=16, width=16)
    for name in tiny_sd.SOLVERS:
        np.testing.assert_array_equal(made[f"{name}/picture"], expected[f"{name}/picture"])


def test_the_committed_fixture_is_what_its_script_makes(tmp_path):
    tiny_sd.write(tmp_path)
    committed = Path(__file__).parent / "fixtures" / "tiny_sd"
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (files.read(folder / part, variant="fp16") for folder in (committed, tmp_path))
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    ours, theirs = (files.read(folder / "expected.safetensors") for folder in (committed, tmp_path))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-4)


def test_our_names_of_the_original_layout_are_those_of_their_converter():
    from diffusers.loaders import single_file_utils as convert

    net = random("UNet2DConditionModel", UNETS["sdxl"] | {"layers_per_block": 2})
    tensors = {name: value.numpy() for name, value in net.state_dict().items()}
    ours = unet.network(net.config)
    original = single_file.original(tensors, single_file.unet_places(ours))
    file = {single_file.UNET + other: torch.from_numpy(tensors[name]) for name, other in original.items()}
    back = convert.convert_ldm_unet_checkpoint(dict(file), dict(net.config))
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)
    coder = random("AutoencoderKL", VAES["sd"])
    tensors = {name: value.numpy() for name, value in coder.state_dict().items()}
    original = single_file.original(tensors, single_file.vae_places(vae.network(coder.config)), autoencoder=True)
    file = {}
    for name, other in original.items():
        points = ".attn_1." in other and tensors[name].ndim == 2
        file[single_file.VAE + other] = torch.from_numpy(tensors[name][:, :, None, None] if points else tensors[name])
    back = convert.convert_ldm_vae_checkpoint(dict(file), dict(coder.config))
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


DATA = Path(__file__).parents[2] / "shared" / "data"


def taef2(parts):
    """TAEF2 in torch, straight from the names of its files: x (b, 3, h, w) in [0, 1] -> (latents, x again)."""
    import torch.nn.functional as F

    def conv(x, w, name, **settings):
        return F.conv2d(
            x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=w[f"{name}.weight"].shape[-1] // 2, **settings
        )

    def run(x, w, up):
        last = max(int(name.split(".")[0]) for name in w)
        for i in range(last + 1):
            if f"{i}.conv.0.weight" in w:
                if f"{i}.pool.0.weight" in w:
                    h = F.group_norm(conv(x, w, f"{i}.pool.0"), 4, w[f"{i}.pool.1.weight"], w[f"{i}.pool.1.bias"])
                    x = x + conv(F.relu(h), w, f"{i}.pool.3")
                h = F.relu(conv(x, w, f"{i}.conv.0"))
                x = F.relu(x + conv(F.relu(conv(h, w, f"{i}.conv.2")), w, f"{i}.conv.4"))
            elif f"{i}.weight" in w:
                x = conv(x, w, str(i), stride=1 if up or f"{i}.bias" in w else 2)
            else:  # in the decoder: the clamp, the first relu, and the up-samplings
                x = [lambda x: 3 * torch.tanh(x / 3), None, F.relu][i](x) if i < 3 else F.interpolate(x, scale_factor=2)
        return x

    def both(x):
        z = run(x, parts["encoder"], False)
        return z, run(z, parts["decoder"], True)

    return both


@pytest.mark.skipif(not (DATA / "weights" / "taef2").is_dir(), reason="the weights of TAEF2 are not beside the project")
def test_taef2_is_as_good_as_the_original_on_real_pictures():
    from PIL import Image
    from safetensors.torch import load_file

    folder = DATA / "weights" / "taef2"
    parts = {name: load_file(folder / f"{name}.safetensors") for name in ("encoder", "decoder")}
    theirs = taef2({name: {key: value.float() for key, value in part.items()} for name, part in parts.items()})
    with Image.open(sorted((DATA / "cifar10").glob("*.webp"))[0]) as sheet:
        x = np.asarray(sheet.convert("RGB").crop((0, 0, 256, 128)), np.float32)[None] / 255
    with torch.no_grad():
        latents, wanted = (nhwc(part) for part in theirs(nchw(x)))
    net, params = vae.tiny(folder)
    ours = jax.jit(lambda p, x: net.apply(p, x, method="encode").mean)(params, 2 * x - 1)
    np.testing.assert_allclose(ours, latents, rtol=0, atol=1e-4)
    made = (np.asarray(jax.jit(net.apply)(params, 2 * x - 1)) + 1) / 2
    psnr = [-10 * np.log10(np.mean(np.square(np.clip(y, 0, 1) - x))) for y in (made, wanted)]
    print(f"PSNR {psnr[0]:.4f} dB, the original's {psnr[1]:.4f} dB, up to {np.abs(made - wanted).max():.1e} apart")
    assert abs(psnr[0] - psnr[1]) < 1e-3
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-4)
