"""Second witness: diffusers' transformers with random weights, and whole pipelines of theirs, beside ours.

Everything in float32 at the highest precision: an output is at most 1e-5 apart, latents and pictures 1e-4.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdiff import pipelines, solver
from jaxdiff.pretrained import files, schedulers, transformer
from jaxdiff.pretrained import pipelines as published
from tests.oracles import tiny_flow, tiny_sd

torch = pytest.importorskip("torch", reason="needs the witness extra: torch, diffusers, transformers")
diffusers = pytest.importorskip("diffusers", reason="needs the witness extra: torch, diffusers, transformers")
diffusers.utils.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TIMES = np.float32([981, 20.5])
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
SD3 = TINY | {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 20, "caption_projection_dim": 16,
    "pooled_projection_dim": 12, "pos_embed_max_size": 6,
}  # fmt: skip
FLUX = TINY | {
    "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 20, "pooled_projection_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
FLUX_WIDE = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
DIT = TINY | {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 9}
NETS = {
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5": ("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    "flux dev": ("FluxTransformer2DModel", FLUX | {"guidance_embeds": True}),
    "flux schnell": ("FluxTransformer2DModel", FLUX),
    "dit": ("DiTTransformer2DModel", DIT),
    "dit without variance": ("DiTTransformer2DModel", DIT | {"out_channels": 4, "norm_eps": 1e-6}),
    # Blocks of the real widths, as they were published; of FLUX a fourth of the heads. All 24: `oracles/full_width`.
    "sd3 wide": ("SD3Transformer2DModel", {
        "num_layers": 2, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
        "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 12, "sample_size": 16,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }),
    "flux wide": ("FluxTransformer2DModel", FLUX_WIDE | {"num_attention_heads": 6}),
    "dit wide": ("DiTTransformer2DModel", {"num_layers": 1, "out_channels": 8}),
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


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def both(net, theirs, height=6, width=10):
    """(inputs of ours, what theirs answers to the same), channels last."""
    if isinstance(net, transformer.LatentDiT):
        width = height  # theirs knows squares only
    x = draw(2, height, width, net.in_channels)
    ours = {"x": x, "time": TIMES}
    with torch.no_grad():
        if isinstance(net, transformer.LatentDiT):
            ours["labels"] = np.int32([3, net.num_classes])
            made = theirs(nchw(x), torch.from_numpy(TIMES), torch.from_numpy(ours["labels"]).long()).sample.numpy()
            return ours, np.moveaxis(made, 1, -1)
        ours |= {"tokens": draw(2, 7, net.token_dim, seed=1), "vector": draw(2, net.vector_dim, seed=2)}
        told = {
            "encoder_hidden_states": torch.from_numpy(ours["tokens"]),
            "pooled_projections": torch.from_numpy(ours["vector"]),
        }
        if isinstance(net, transformer.MMDiT):
            return ours, np.moveaxis(theirs(nchw(x), timestep=torch.from_numpy(TIMES), **told).sample.numpy(), 1, -1)
        if net.guided:
            ours["guidance"] = np.float32([3.5, 1.0])
            told["guidance"] = torch.from_numpy(ours["guidance"])
        pipe = diffusers.FluxPipeline
        told["img_ids"] = pipe._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32)
        packed = pipe._pack_latents(nchw(x), 2, net.in_channels, height, width)
        made = theirs(packed, timestep=torch.from_numpy(TIMES / 1000), txt_ids=torch.zeros(7, 3), **told).sample
        return ours, np.moveaxis(pipe._unpack_latents(made, height * 8, width * 8, 8).numpy(), 1, -1)


def apart(net, params, inputs, wanted):
    """The largest difference of an output; there is something to compare."""
    assert np.abs(wanted).max() > 0.1
    return np.abs(np.asarray(jax.jit(net.apply)(params, **inputs)) - wanted).max()


@pytest.mark.parametrize("name", NETS)
def test_a_transformer_gives_the_same(name, tmp_path):
    difference, count = compare(*NETS[name], tmp_path)
    print(f"{name}: {count:,} parameters, up to {difference:.1e} apart")
    assert difference < 1e-5


def compare(kind, settings, folder):
    """(largest difference, number of parameters); one of the two networks is in memory at a time."""
    theirs = random(kind, settings)
    theirs.save_pretrained(folder)
    count = sum(tensor.numel() for tensor in theirs.state_dict().values())
    inputs, wanted = both(transformer.network(files.config(folder)), theirs)
    del theirs
    net, params = transformer.load(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    return apart(net, params, inputs, wanted), count


def test_the_comparison_sees_wrong_settings(tmp_path):
    wrong = {
        "sd3": [{"heads": 4, "head_dim": 4}],
        "sd3.5": [{"qk_norm": False}],
        "flux dev": [{"axes": (4, 2, 2)}],
        "dit": [{"eps": 1e-2}, {"sample_size": 16}],
    }
    for name, changes in wrong.items():
        theirs = random(*NETS[name])
        theirs.save_pretrained(tmp_path / name)
        net, params = transformer.load(tmp_path / name)
        inputs, wanted = both(net, theirs)
        for change in changes:
            assert apart(net.clone(**change), params, inputs, wanted) > 1e-4, change


@pytest.mark.parametrize("name", [name for name in NETS if "wide" not in name])
def test_what_we_write_they_load_and_no_bit_changes(name, tmp_path):
    kind, settings = NETS[name]
    theirs = random(kind, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    transformer.export(tmp_path / "ours", *transformer.load(tmp_path / "theirs"))
    again, report = getattr(diffusers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    ours, wanted = again.state_dict(), theirs.state_dict()
    assert set(ours) == set(wanted)
    for key, value in wanted.items():
        assert ours[key].numpy().tobytes() == value.numpy().tobytes(), key
    plain = [{k: list(v) if isinstance(v, tuple) else v for k, v in net.config.items()} for net in (theirs, again)]
    changed = {k for k, v in plain[0].items() if plain[1].get(k) != v and k[0] != "_"}
    assert changed <= {"out_channels"}  # null there stands for in_channels


def test_a_new_mmdit_has_the_positions_of_theirs():
    theirs = random("SD3Transformer2DModel", SD3 | {"sample_size": 10, "pos_embed_max_size": 7})
    net = transformer.network({**theirs.config, "_class_name": "SD3Transformer2DModel"})
    params = net.init(jax.random.key(0), **jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), transformer.example(net)))
    wanted = theirs.state_dict()["pos_embed.pos_embed"].numpy()
    np.testing.assert_allclose(params["params"]["pos_embed"]["embedding"], wanted, rtol=0, atol=1e-6)


def test_the_published_config_of_the_dit_is_read():
    """facebook/DiT-XL-2-256 names an older class, and keys of it that are null or off."""
    config = {
        "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "activation_fn": "gelu-approximate",
        "attention_bias": True, "attention_head_dim": 72, "cross_attention_dim": None, "dropout": 0.0,
        "in_channels": 4, "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero",
        "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28, "num_vector_embeds": None,
        "only_cross_attention": False, "out_channels": 8, "patch_size": 2, "sample_size": 32,
        "upcast_attention": False, "use_linear_projection": False,
    }  # fmt: skip
    assert transformer.network(config) == transformer.LatentDiT()


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},
        {"shift": 1.0},
        {"use_dynamic_shifting": True, "shift": 3.0},
        {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 1.0, "max_image_seq_len": 8192},
    ],
)
@pytest.mark.parametrize("flux", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_times_of_a_flow_are_theirs(config, flux, steps):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    used = scheduler.config
    mu = calculate_shift(1500, used.base_image_seq_len, used.max_image_seq_len, used.base_shift, used.max_shift)
    sigmas = np.linspace(1.0, 1 / steps, steps) if flux else None
    scheduler.set_timesteps(steps, sigmas=sigmas, **({"mu": mu} if used.use_dynamic_shifting else {}))
    chain = schedulers.read(json.loads(scheduler.to_json_string()), to_last=flux)
    np.testing.assert_allclose(chain.times(steps, "euler", 1500), scheduler.sigmas, rtol=0, atol=1e-6)
    told = chain.time_input(chain.schedule, chain.times(steps, "euler", 1500)[:-1])
    np.testing.assert_allclose(told, scheduler.timesteps, rtol=1e-6)


@pytest.fixture(scope="module", params=tiny_flow.KINDS)
def drawn(request, tmp_path_factory):
    """(folder of a tiny pipeline of diffusers, what it draws, the pipeline, its kind)."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    pipe = tiny_flow.pipeline(folder, request.param)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe", tiny_flow.draw(pipe, request.param), pipe, request.param


def test_every_guided_step_and_the_picture_are_the_same(drawn):
    folder, expected, _, kind = drawn
    pipe = published.load(folder)
    flux = kind.startswith("flux")
    times = pipe.times(tiny_sd.STEPS, "euler", size=(16, 16))
    np.testing.assert_allclose(times, expected["times"], rtol=0, atol=1e-6)

    @jax.jit
    def run(params, x, prompt, negative, scale, times):
        cond, null = (pipe.encode(params, text, guidance=scale) for text in (prompt, negative))
        settings = {"times": times, "solver": solver.ALL[pipe.chain.solver](pipe.model.schedule)}
        settings |= {"scale": 1 if flux else scale, "return_trajectory": True}
        z, path = pipelines.generate(jax.random.key(0), pipe.model, params, x, cond, null, **settings)
        return path[1:], pipelines.decode(pipe.model, params, z)

    texts = pipe.tokenize([tiny_sd.PROMPT], [tiny_sd.NEGATIVE])
    scale = tiny_flow.GUIDANCE if flux else tiny_flow.SCALE
    path, picture = run(pipe.params, expected["noise"], *texts, scale, times)
    differences = [np.abs(a - b).max() for a, b in ((path, expected["latents"]), (picture, expected["picture"]))]
    print(f"{kind}: latents up to {differences[0]:.1e} apart, picture {differences[1]:.1e}")
    assert np.abs(expected["latents"]).max() > 1
    assert np.std(expected["picture"]) > 0.05
    assert max(differences) < 1e-4


def test_an_exported_pipeline_is_the_same_there(drawn, tmp_path):
    folder, expected, pipe, kind = drawn
    published.export(tmp_path, published.load(folder), folder)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "without" in kind else {}
    again = type(pipe).from_pretrained(tmp_path, **absent)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(p, name).state_dict() for p in (again, pipe))
        assert set(ours) == set(theirs)
        assert all(ours[key].numpy().tobytes() == theirs[key].numpy().tobytes() for key in theirs), name
    again.set_progress_bar_config(disable=True)
    made = tiny_flow.draw(again, kind)
    np.testing.assert_allclose(made["picture"], expected["picture"], rtol=0, atol=1e-5)  # theirs is not always the same


def test_the_dit_draws_the_same_class(tmp_path):
    theirs = tiny_flow.pipeline(tmp_path, "dit")
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "pipe")
    expected = tiny_flow.draw_class(theirs)
    pipe = published.load(tmp_path / "pipe")
    times = pipe.times(tiny_sd.STEPS, "ddim")
    np.testing.assert_allclose(times[:-1], (expected["indices"] + 1) / 1000)

    @jax.jit
    def run(params, x, label, scale, times):
        settings = {"times": times, "solver": solver.ddim(pipe.model.schedule), "scale": scale}
        cond, null = {"labels": label}, {"labels": 0 * label - 1}
        z, path = pipelines.generate(
            jax.random.key(0), pipe.model, params, x, cond, null, return_trajectory=True, **settings
        )
        return path[1:], pipelines.decode(pipe.model, params, z)

    path, picture = run(pipe.params, expected["noise"], np.int32([tiny_flow.LABEL]), tiny_flow.SCALE, times)
    differences = [np.abs(a - b).max() for a, b in ((path, expected["latents"]), (picture, expected["picture"]))]
    print(f"dit: latents up to {differences[0]:.1e} apart, picture {differences[1]:.1e}", np.abs(path).max())
    assert max(differences) < 1e-4
    published.export(tmp_path / "ours", pipe, tmp_path / "pipe")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(tiny_flow.draw_class(again)["picture"], expected["picture"], rtol=0, atol=1e-5)


def test_the_committed_fixtures_are_what_their_script_makes(tmp_path):
    tiny_flow.write(tmp_path)
    for committed in (Path(__file__).parent / "fixtures" / name for name in ("tiny_sd3", "tiny_flux")):
        made = tmp_path / committed.name
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            ours, theirs = (files.read(folder / part, variant="fp16") for folder in (committed, made))
            assert set(ours) == set(theirs)
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key])
        ours, theirs = (files.read(folder / "expected.safetensors") for folder in (committed, made))
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-4)
