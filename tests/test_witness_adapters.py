"""Second witness of what is added to a Stable Diffusion: textual inversion, ControlNet, IP-Adapter of diffusers."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff import pipelines as functions
from jaxdiff import solver
from jaxdiff.pretrained import controlnet, inversion, ip_adapter, single_file, unet
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


# --- ControlNet

CONTROL = {"conditioning_embedding_out_channels": (4, 6)}  # a latent of the tiny autoencoder is 2 pixels
KEPT = ("out_channels", "up_block_types", "sample_size")
WIDE = {
    "block_out_channels": (320, 640), "layers_per_block": 1, "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
}  # fmt: skip
CONTROLS = {
    "sd1": tiny_sd.UNET | CONTROL,
    "sdxl, bgr": tiny_sd.UNET_XL | CONTROL | {"controlnet_conditioning_channel_order": "bgr"},
    "wide": WIDE,
}


def made(kind, settings, seed=0):
    """Their network, with no parameter at zero."""
    torch.manual_seed(seed)
    net = getattr(diffusers, kind)(**{k: v for k, v in settings.items() if k not in KEPT or kind != "ControlNetModel"})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.ndim == 1 or not p.any() else 0)
    return net.eval()


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def inputs(settings):
    """(ours, theirs): two rows for a conditional network."""
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
    return ours, theirs


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_net_gives_the_same(name, tmp_path):
    theirs = made("ControlNetModel", CONTROLS[name])
    theirs.save_pretrained(tmp_path)
    net, params = controlnet.load(tmp_path)
    x, picture = draw(2, 4, 6, 4), np.tanh(draw(2, 4 * net.factor, 6 * net.factor, 3, seed=3))
    ours, told = inputs(CONTROLS[name])
    with torch.no_grad():
        wanted = theirs(
            nchw(x), torch.from_numpy(TIMES), controlnet_cond=nchw((picture + 1) / 2), conditioning_scale=0.7, **told
        )
    residuals = jax.jit(net.apply)(params, x, TIMES, picture, 0.7, **ours)
    assert len(residuals.skips) == len(wanted.down_block_res_samples)
    for a, b in zip(
        [*residuals.skips, residuals.middle], [*wanted.down_block_res_samples, wanted.mid_block_res_sample], strict=True
    ):
        close(a, nhwc(b))


def test_an_exported_control_net_is_theirs(tmp_path):
    theirs = made("ControlNetModel", CONTROLS["sdxl, bgr"])
    theirs.save_pretrained(tmp_path / "theirs")
    controlnet.export(tmp_path / "ours", *controlnet.load(tmp_path / "theirs"))
    again, report = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    for key, value in theirs.state_dict().items():
        assert again.state_dict()[key].numpy().tobytes() == value.numpy().tobytes(), key
    plain = [{k: list(v) if isinstance(v, tuple) else v for k, v in net.config.items()} for net in (theirs, again)]
    changed = {k for k, v in plain[0].items() if plain[1].get(k) != v and k[0] != "_"}
    assert changed <= {"attention_head_dim", "transformer_layers_per_block"}


def test_our_names_of_the_original_control_net_are_those_of_their_converter():
    from diffusers.loaders import single_file_utils as convert

    theirs = made("ControlNetModel", WIDE | {"block_out_channels": (32, 64)})
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    original = single_file.original(tensors, single_file.control_places(controlnet.network(dict(theirs.config))))
    file = {single_file.CONTROL + other: torch.from_numpy(tensors[name]) for name, other in original.items()}
    back = convert.convert_controlnet_checkpoint(dict(file), dict(theirs.config))
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


def steps(pipe, **shown):
    """The latents after each of 10 guided steps of DDIM in diffusers, and the picture."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    path = []

    def note(pipe, step, time, values):
        path.append(values["latents"].numpy().copy())
        return values

    with torch.no_grad():
        result = pipe(
            tiny_sd.PROMPT, negative_prompt=tiny_sd.NEGATIVE, num_inference_steps=tiny_sd.STEPS, height=16, width=16,
            guidance_scale=tiny_sd.SCALE, output_type="np", callback_on_step_end=note,
            latents=nchw(draw(1, 8, 8, 4)), **shown,
        )  # fmt: skip
    return np.moveaxis(np.stack(path), 2, -1), 2 * result.images - 1, pipe.scheduler.timesteps.numpy()


# --- IP-Adapter


def ip_file(path, unet, dim=20):
    """A random IP-Adapter for their U-Net, in the published layout: numbered as its attention processors."""
    width = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": draw(4 * width, dim) / dim**0.5,
        "image_proj.proj.bias": draw(4 * width, seed=1),
    }
    tensors |= {"image_proj.norm.weight": 1 + 0.1 * draw(width, seed=2), "image_proj.norm.bias": draw(width, seed=3)}
    places = [name.removesuffix(".processor") for name in unet.attn_processors]
    for i, name in enumerate(places):
        if name.endswith("attn2"):
            shape = unet.get_submodule(name).to_k.weight.shape
            for j, kind in enumerate("kv"):
                tensors[f"ip_adapter.{i}.to_{kind}_ip.weight"] = draw(*shape, seed=2 * i + j) / width**0.5
    save_file(tensors, path)


def test_a_unet_with_an_ip_adapter_gives_the_same_at_real_widths(tmp_path):
    settings = {name: value for name, value in WIDE.items() if not name.startswith("conditioning")}
    theirs = made("UNet2DConditionModel", settings | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")})
    theirs.save_pretrained(tmp_path / "unet")
    ip_file(tmp_path / "ip.safetensors", theirs, dim=1024)
    net, params = unet.load(tmp_path / "unet")
    adapter, weights = ip_adapter.load(tmp_path / "ip.safetensors", net)
    x, image = draw(2, 4, 6, 4), draw(2, 1024, seed=4)
    ours, told = inputs(settings)

    @jax.jit
    def apply(params, weights, x, image):
        return net.apply(params, x, TIMES, **ours, images=adapter.apply(weights, image, 0.6))

    tensors = {name: torch.from_numpy(value) for name, value in load_file(tmp_path / "ip.safetensors").items()}
    parts = {
        part: {name.removeprefix(part + "."): value for name, value in tensors.items() if name.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    theirs._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.6]
    added = {"added_cond_kwargs": {"image_embeds": [torch.from_numpy(image)[:, None]]}}
    with torch.no_grad():
        wanted = theirs(nchw(x), torch.from_numpy(TIMES), **told, **added).sample
    close(apply(params, weights, x, image), nhwc(wanted))


# --- both, guided


def test_guided_steps_with_two_control_nets_and_an_ip_adapter_are_theirs(pipelines, tmp_path):
    theirs, ours, _ = pipelines
    xl = len(ours.text) > 1
    nets = [made("ControlNetModel", (tiny_sd.UNET_XL if xl else tiny_sd.UNET) | CONTROL, seed) for seed in (0, 1)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
        ours = controlnet.add(ours, tmp_path / str(i))
    ip_file(tmp_path / "ip.safetensors", theirs.unet)
    ours = ip_adapter.add(ours, tmp_path / "ip.safetensors")
    kind = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    pipe = kind(**theirs.components, controlnet=nets)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.6)
    pictures, embedding = [np.tanh(draw(1, 16, 16, 3, seed=seed)) for seed in (5, 6)], draw(1, 20, seed=7)
    scales = np.float32([0.8, 0.3, 0.6])
    path, picture, indices = steps(
        pipe,
        image=[nchw((shown + 1) / 2) for shown in pictures],
        controlnet_conditioning_scale=scales[:2].tolist(),
        ip_adapter_image_embeds=[torch.from_numpy(np.stack([np.zeros_like(embedding), embedding]))],
    )
    pipe.unload_ip_adapter()
    used, times = solver.ddim(ours.model.schedule), tiny_sd.times(indices, "ddim")

    @jax.jit
    def run(params, texts, scales):
        told = [ours.encode(params, text, size=(16, 16)) for text in texts]
        told = functions.with_control(*told, pictures, scales[:2])
        told = functions.with_image(*told, embedding, scales[2])
        settings = {"times": times, "solver": used, "scale": tiny_sd.SCALE, "return_trajectory": True}
        z, path = functions.generate(jax.random.key(0), ours.model, params, draw(1, 8, 8, 4), *told, **settings)
        return path[1:], functions.decode(ours.model, params, z)

    texts = ours.tokenize([tiny_sd.PROMPT], [tiny_sd.NEGATIVE])
    latents, drawn = run(ours.params, texts, scales)
    print(f"latents {np.abs(latents - path).max():.1e} of {np.abs(path[-1]).max():.0f}, ", end="")
    print(f"pictures {np.abs(drawn - picture).max():.1e}")
    np.testing.assert_allclose(latents, path, rtol=0, atol=1e-4)
    np.testing.assert_allclose(drawn, picture, rtol=0, atol=1e-4)
    for i in range(3):  # each of them is heard
        assert np.abs(run(ours.params, texts, scales * (np.arange(3) != i))[0] - path).max() > 0.01
