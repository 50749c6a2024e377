"""ControlNet and IP-Adapter: what they add, to which rows, by how much; files; the command. Parity: the witness."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import experiments.pretrained
import experiments.sample
from experiments import pictures
from jaxdiff import pipelines, solver
from jaxdiff.errors import CheckpointError, ConfigError, DataError, UnsafeFileError
from jaxdiff.nets import ControlNet, IPAdapter, SDUNet
from jaxdiff.nets.sd_unet import Residuals, places
from jaxdiff.pretrained import controlnet, files, ip_adapter, single_file
from jaxdiff.pretrained import pipelines as published
from jaxdiff.pretrained import text as encoders
from jaxdiff.text import clip

FOLDER = Path(__file__).parent / "fixtures" / "tiny_sd"
VISION = Path(__file__).parent / "fixtures" / "text" / "vision"
EMBEDDING = 12
WIDTHS = (4, 6)  # a latent of the tiny autoencoder is 2 pixels
SIZE = (16, 16)


def away_from_zero(params, seed=0):
    """Every parameter random: also those that begin at zero."""
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(
        [jnp.float32(rng.normal(size=x.shape) / max(np.prod(x.shape[:-1]), 9) ** 0.5) for x in leaves]
    )


@pytest.fixture(scope="module")
def pipe():
    return published.load(FOLDER, variant="fp16")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """A ControlNet and an IP-Adapter for the tiny pipeline, written down."""
    folder = tmp_path_factory.mktemp("adapters")
    net, params = controlnet.init(jax.random.key(0), pipe.model.unet, pipe.params["unet"], picture_widths=WIDTHS)
    controlnet.export(folder / "control", net, away_from_zero(params))
    adapter = IPAdapter(tuple(places(pipe.model.unet).items()), 12, EMBEDDING)
    shapes = jax.eval_shape(adapter.init, jax.random.key(0), jnp.zeros((1, EMBEDDING)))
    ip_adapter.export(folder / "ip.safetensors", away_from_zero(shapes))
    return folder


@pytest.fixture(scope="module")
def more(pipe, folder):
    return ip_adapter.add(controlnet.add(pipe, folder / "control"), folder / "ip.safetensors")


@pytest.fixture(scope="module")
def told():
    """Inputs of the network, two rows of them."""
    shapes = {"x": (2, 8, 8, 4), "tokens": (2, 3, 12), "picture": (2, *SIZE, 3), "image": (2, EMBEDDING)}
    made = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    return made | {"time": jnp.float32([981, 20]), "control": jnp.float32([0.7, 0.2]), "amount": jnp.float32([1, 0.5])}


@pytest.fixture(scope="module")
def answer(more):
    """The network with its ControlNet and its IP-Adapter, jitted."""

    @jax.jit
    def answer(params, x, time, tokens, picture, control, image, amount):
        cond, _ = pipelines.with_control({"tokens": tokens}, {}, [picture], control[:, None])
        cond, _ = pipelines.with_image(cond, {}, image, amount)
        return pipelines.network(more.model, params)(x, time, **cond)

    return answer


def test_nothing_of_them_is_nothing_to_the_bit(pipe, more, told, answer):
    zeros = {"control": jnp.zeros(2), "amount": jnp.zeros(2)}
    plain = jax.jit(pipe.model.unet.apply)(pipe.params["unet"], told["x"], told["time"], tokens=told["tokens"])
    np.testing.assert_array_equal(answer(more.params, **told | zeros), plain)
    assert np.abs(answer(more.params, **told) - plain).max() > 1e-2


@pytest.mark.parametrize("name", ["picture", "control", "image", "amount"])
def test_each_row_listens_to_its_own(more, told, answer, name):
    y = answer(more.params, **told)
    changed = answer(more.params, **told | {name: told[name].at[0].multiply(0.5)})
    assert np.abs(changed[0] - y[0]).max() > 1e-4
    np.testing.assert_array_equal(changed[1], y[1])


def test_the_gradient_reaches_them(more, told, answer):
    def loss(added):
        return jnp.square(answer({**more.params, **added}, **told)).mean()

    added = {name: more.params[name] for name in ("control_0", "ip_adapter")}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(added)):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_two_control_nets_are_the_sum_of_their_additions(pipe, folder, told):
    both = controlnet.add(controlnet.add(pipe, folder / "control"), folder / "control")
    both.params["control_1"] = away_from_zero(both.params["control_1"], seed=1)
    net = both.model.controls[0]

    @jax.jit
    def together(params, x, time, tokens, pictures, scales):
        cond, _ = pipelines.with_control({"tokens": tokens}, {}, pictures, scales)
        return pipelines.network(both.model, params)(x, time, **cond)

    @jax.jit
    def by_hand(params, x, time, tokens, pictures, scales):
        each = [net.apply(params[f"control_{i}"], x, time, pictures[i], scales[i], tokens=tokens) for i in range(2)]
        summed = jax.tree.map(jnp.add, *each)
        return pipe.model.unet.apply(params["unet"], x, time, tokens=tokens, residuals=summed)

    shown = [told["picture"], -0.5 * told["picture"]]
    arguments = (both.params, told["x"], told["time"], told["tokens"], shown, jnp.float32([0.3, 0.9]))
    np.testing.assert_allclose(together(*arguments), by_hand(*arguments), atol=1e-5)


def test_a_new_control_net_is_half_of_its_unet_and_adds_nothing(pipe, told):
    unet, params = pipe.model.unet, pipe.params["unet"]
    net, made = controlnet.init(jax.random.key(0), unet, params, picture_widths=WIDTHS)
    for name in ("conv_in", "time_embedding", "down_blocks_0", "down_blocks_1", "mid_block"):
        jax.tree.map(np.testing.assert_array_equal, made["params"][name], params["params"][name])
    assert not any(name.startswith("up_blocks") for name in made["params"])
    residuals = jax.jit(net.apply)(made, told["x"], told["time"], told["picture"], tokens=told["tokens"])
    assert [skip.shape for skip in residuals.skips] == [(2, 8, 8, 8)] * 2 + [(2, 4, 4, 8), (2, 4, 4, 16)]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(residuals))


def test_pictures_are_drawn_through_them(more):
    """Guided, by `text_to_image`: what is told is heard, and the `null` of the adapter is no picture."""
    texts = more.tokenize(["a cat"], [""])
    times, used = np.float32([1.0, 0.5, 0.0]), solver.ddim(more.model.schedule)

    @jax.jit
    def draw(params, prompt, negative, picture, image, control, amount):
        told = (more.encode(params, text) for text in (prompt, negative))
        cond, null = pipelines.with_image(*pipelines.with_control(*told, [picture], control), image, amount)
        settings = {"times": times, "solver": used, "scale": 3.0, "size": SIZE}
        return pipelines.text_to_image(jax.random.key(0), more.model, params, cond, null, **settings)

    picture, image = jnp.ones((1, *SIZE, 3)), jnp.ones((1, EMBEDDING))
    plain = draw(more.params, *texts, picture, image, 0.0, 0.0)
    for scales in ((1.0, 0.0), (0.0, 1.0)):
        assert np.abs(draw(more.params, *texts, picture, image, *scales) - plain).max() > 1e-3
    cond, null = pipelines.with_image({}, {}, image, 0.6)
    assert not np.any(null["image"])
    assert cond["image_scale"] == null["image_scale"] == np.float32(0.6)


def test_the_published_sizes():
    """ControlNet's 361 million parameters for SD 1.5, as its cards say, and IP-Adapter's 22 million (its paper)."""

    def count(shapes):
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    net = ControlNet()
    shapes = jax.eval_shape(net.init, jax.random.key(0), **controlnet.example(net))
    assert round(count(shapes) / 1e6) == 361
    adapter = IPAdapter(tuple(places(SDUNet()).items()))
    shapes = jax.eval_shape(adapter.init, jax.random.key(0), jnp.zeros((1, 1024)))["params"]
    assert round(count(shapes) / 1e6) == 22
    assert {name for name in shapes if name != "image_proj"} == {f"ip_adapter_{i}" for i in range(1, 32, 2)}
    assert shapes["ip_adapter_31"]["to_k_ip"]["kernel"].shape == (768, 1280)  # the last is the middle


def test_a_round_trip_changes_no_bit(folder, more, tmp_path):
    net, params = controlnet.load(folder / "control")
    controlnet.export(tmp_path / "control", net, params)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "control" / name).read_bytes() == (folder / "control" / name).read_bytes()
    ip_adapter.export(tmp_path / "ip.safetensors", more.params["ip_adapter"])
    assert (tmp_path / "ip.safetensors").read_bytes() == (folder / "ip.safetensors").read_bytes()


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_an_original_file_gives_the_same(folder, tmp_path, prefix):
    tensors = {name: np.asarray(tensor) for name, tensor in files.read(folder / "control").items()}
    net, params = controlnet.load(folder / "control")
    original = single_file.original(tensors, single_file.control_places(net))
    assert {"zero_convs.0.0.weight", "input_hint_block.0.bias", "middle_block_out.0.weight"} <= set(original.values())
    save_file({prefix + original[name]: array for name, array in tensors.items()}, tmp_path / "x.safetensors")
    again, same = controlnet.load(tmp_path / "x.safetensors", files.config(folder / "control"))
    assert again == net
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_what_does_not_fit_is_named(pipe, more, folder, told, tmp_path):
    config = files.config(folder / "control")
    with pytest.raises(CheckpointError, match="global_pool_conditions must be absent"):
        controlnet.network(config | {"global_pool_conditions": True})
    with pytest.raises(CheckpointError, match="must be 'rgb' or 'bgr', got 'xyz'"):
        controlnet.network(config | {"controlnet_conditioning_channel_order": "xyz"})
    other = dataclasses.replace(pipe.model, unet=pipe.model.unet.clone(channels=(8, 8)))
    with pytest.raises(CheckpointError, match=r"its channels is \(8, 16\), not \(8, 8\)"):
        controlnet.add(dataclasses.replace(pipe, model=other), folder / "control")
    with pytest.raises(CheckpointError, match="no IP-Adapter for CLIP's global embedding"):
        ip_adapter.load({"image_proj.latents": np.zeros((1, 16, 8))}, pipe.model.unet)
    with pytest.raises(CheckpointError, match="missing"):
        ip_adapter.load(files.read(folder / "ip.safetensors"), pipe.model.unet.clone(num_blocks=2))
    with pytest.raises(ConfigError, match="must end in"):
        ip_adapter.export(tmp_path / "x.bin", more.params["ip_adapter"])
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(UnsafeFileError):
        ip_adapter.add(pipe, tmp_path / "x.bin")


def test_wrong_inputs_are_named(pipe, more, told):
    def call(model, **cond):
        return jax.eval_shape(
            pipelines.network(model, more.params), told["x"], told["time"], tokens=told["tokens"], **cond
        )

    with pytest.raises(ConfigError, match="give 1 pictures by with_control, and with_image"):
        call(more.model)
    with pytest.raises(ConfigError, match="give 0 pictures"):
        call(pipe.model, control=(told["picture"],), control_scale=jnp.ones((2, 1)))
    with pytest.raises(ConfigError, match=r"picture must have shape \(2, 16, 16, 3\)"):
        call(
            dataclasses.replace(more.model, adapter=None),
            control=(told["picture"][:, 1:],),
            control_scale=jnp.ones((2, 1)),
        )
    with pytest.raises(ConfigError, match=r"image must have shape \(b, 12\), got \(2, 9\)"):
        call(dataclasses.replace(more.model, controls=()), image=jnp.zeros((2, 9)), image_scale=jnp.ones(2))

    def plain(**added):
        def apply(params, x, time, tokens):
            return pipe.model.unet.apply(params, x, time, tokens=tokens, **added)

        return jax.eval_shape(apply, more.params["unet"], told["x"], told["time"], told["tokens"])

    with pytest.raises(ConfigError, match="images must be of the blocks"):
        plain(images={"x": ()})
    maps = [jnp.zeros((2, 4, 4, 8))] * 4
    with pytest.raises(ConfigError, match="residuals must have the shapes"):
        plain(residuals=Residuals(tuple(maps), maps[0]))


# --- the command


@pytest.fixture
def words(folder, tmp_path):
    """The options of the command that add both, with a CLIP beside the adapter whose embedding has 8 numbers."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / "x.png")
    clip_folder = folder / "image_encoder"
    if not clip_folder.is_dir():
        net, params = encoders.clip_vision(VISION)
        encoders.export(clip_folder, net, params, dtype=np.float16)
        (clip_folder / "model.safetensors").rename(clip_folder / "model.fp16.safetensors")
    words = [
        "--pretrained",
        str(FOLDER),
        "--variant",
        "fp16",
        "--steps",
        "2",
        "--prompt",
        "a",
        "--out",
        str(tmp_path / "y.png"),
    ]
    words += ["--controlnet", str(folder / "control"), "--control", str(tmp_path / "x.png"), "--control_scale", "0.5"]
    return [
        *words,
        "--ip_adapter",
        str(folder / "ip.safetensors"),
        "--image",
        str(tmp_path / "x.png"),
        "--ip_scale",
        "0.6",
    ]


def test_the_command_shows_them_the_pictures(words, tmp_path, monkeypatch):
    found, real = [], experiments.pretrained.program

    def program(pipe, used, size):
        def draw(*arguments):
            found.append((pipe, arguments[-1]))
            made = jax.eval_shape(real(pipe, used, size), *arguments)  # all but the numbers: they are the functions'
            return np.zeros(made.shape, made.dtype)

        return draw

    monkeypatch.setattr(experiments.pretrained, "program", program)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        assert experiments.sample.run([*words, "--num", "3", "--batch", "2"]) == 0
    assert len(found) == 2  # batches
    pipe, shown = found[0]
    assert {"control_0", "ip_adapter"} <= set(pipe.params)
    (picture,), scale = shown["control"]
    wanted = np.asarray(Image.open(tmp_path / "x.png").resize(SIZE, Image.Resampling.LANCZOS), np.float32) / 127.5 - 1
    np.testing.assert_allclose(picture[0], wanted, atol=1e-6)
    assert scale.tolist() == [[0.5]]
    net, weights = encoders.clip_vision(VISION)
    x = clip.preprocess(jnp.asarray(pictures.read(tmp_path / "x.png")), net.size)
    np.testing.assert_allclose(shown["image"][0], jax.jit(net.apply)(weights, x).pooled, atol=0.02)  # from halves
    assert shown["image"][1] == np.float32(0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--control", "a.png"], "a --control picture for each --controlnet"),
        (["--controlnet", "a", "--control", "b", "--control_scale", "1", "2"], "one --control_scale or as many"),
        (["--ip_adapter", "x.safetensors"], "--ip_adapter and --image go together"),
    ],
)
def test_wrong_commands_are_answered_before_anything_is_read(change, message):
    with pytest.raises(ConfigError, match=message):
        experiments.sample.run(["--pretrained", "nowhere", "--prompt", "a", *change])
    with pytest.raises(ConfigError, match="is for --pretrained"):
        experiments.sample.run(["--workdir", "nowhere", "--controlnet", "a"])


def test_a_picture_that_is_none_is_named(tmp_path):
    (tmp_path / "x.png").write_text(json.dumps({}))
    with pytest.raises(DataError, match="cannot be read as a picture"):
        pictures.read(tmp_path / "x.png")
