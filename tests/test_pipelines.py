"""Pictures from latents, with a tiny Stable Diffusion that diffusers made and ran: the fixture of `oracles/tiny_sd`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import experiments.sample
from jaxdiff import pipelines, sample, solver, target
from jaxdiff.errors import ConfigError
from jaxdiff.pretrained import files
from jaxdiff.pretrained import pipelines as published
from tests.oracles import compiles, tiny_sd

FOLDER = Path(__file__).parent / "fixtures" / "tiny_sd"
SIZE = (16, 16)


@pytest.fixture(scope="module")
def pipe():
    return published.load(FOLDER, variant="fp16")


@pytest.fixture(scope="module")
def expected():
    return {name: np.asarray(tensor) for name, tensor in files.read(FOLDER / "expected.safetensors").items()}


@pytest.fixture(scope="module")
def conditions(pipe):
    prompt, negative = pipe.tokenize([tiny_sd.PROMPT], [tiny_sd.NEGATIVE])
    encode = jax.jit(pipe.encode)
    return encode(pipe.params, prompt), encode(pipe.params, negative)


@pytest.mark.parametrize("name", tiny_sd.SOLVERS)
def test_every_step_and_the_picture_are_those_of_diffusers(pipe, expected, conditions, name):
    """Prompt to picture: text encoder, ten guided steps, decoder; float32, latents and picture to 1e-4."""
    times = tiny_sd.times(expected[f"{name}/indices"], name)

    @jax.jit
    def draw(params, x, cond, null, times):
        used = solver.ALL[name](pipe.model.schedule)
        settings = {"times": times, "solver": used, "scale": tiny_sd.SCALE, "return_trajectory": True}
        z, path = pipelines.generate(jax.random.key(0), pipe.model, params, x, cond, null, **settings)
        return path, pipelines.decode(pipe.model, params, z)

    path, picture = draw(pipe.params, jnp.asarray(expected["noise"]), *conditions, times)
    assert np.abs(expected[f"{name}/latents"]).max() > 1
    assert np.std(expected[f"{name}/picture"]) > 0.1
    np.testing.assert_allclose(path[1:], expected[f"{name}/latents"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(picture, expected[f"{name}/picture"], rtol=0, atol=1e-4)


def test_the_times_of_the_scheduler_are_those_of_diffusers(pipe, expected):
    for name in ("ddim", "euler"):
        np.testing.assert_allclose(pipe.chain.times(10, name), tiny_sd.times(expected[f"{name}/indices"], name))
    assert pipe.chain.solver == "plms"


@pytest.fixture(scope="module")
def draw(pipe):
    """One jitted program from ids to pictures, as the README has it."""
    used = solver.unipc(pipe.model.schedule)

    @jax.jit
    def draw(params, key, prompt, negative, scale, times):
        cond, null = (pipe.encode(params, texts) for texts in (prompt, negative))
        settings = {"times": times, "solver": used, "scale": scale, "size": SIZE}
        return pipelines.text_to_image(key, pipe.model, params, cond, null, **settings)

    return draw


def test_one_compilation_serves_every_prompt_seed_scale_and_set_of_weights(pipe, draw):
    times = pipe.chain.times(3, "unipc_2")
    first = draw(pipe.params, jax.random.key(0), *pipe.tokenize(["a cat"], [""]), 5.0, times)
    other = jax.tree.map(lambda w: w * 1.01, pipe.params)
    grid = sample.karras_grid(pipe.model.schedule, 3)
    keys = [jax.random.key(seed) for seed in (1, 0, 0, 0, 0)]
    with compiles.counted() as programs:
        made = [
            draw(params, key, *pipe.tokenize(*texts), scale, used)
            for key, (params, texts, scale, used) in zip(
                keys,
                (
                    (pipe.params, (["a cat"], [""]), 5.0, times),
                    (pipe.params, (["two dogs"], ["rain"]), 5.0, times),
                    (pipe.params, (["a cat"], [""]), 2.5, times),
                    (other, (["a cat"], [""]), 5.0, times),
                    (pipe.params, (["a cat"], [""]), 5.0, grid),
                ),
                strict=True,
            )
        ]
    assert programs == []
    for pictures in made:
        assert np.abs(pictures - first).max() > 1e-3  # each is an argument that is heard


def test_a_picture_is_the_same_alone_and_in_a_batch(pipe, draw):
    times = pipe.chain.times(3, "unipc_2")
    keys = jax.vmap(jax.random.key)
    both = draw(pipe.params, keys(jnp.arange(2)), *pipe.tokenize(["a cat", "a dog"], ["", ""]), 5.0, times)
    alone = draw(pipe.params, keys(jnp.array([1])), *pipe.tokenize(["a dog"], [""]), 5.0, times)
    assert both.shape == (2, *SIZE, 3)
    assert np.abs(both).max() <= 1
    np.testing.assert_allclose(alone[0], both[1], atol=1e-4)


def test_a_long_prompt_is_two_chunks_and_so_is_its_negative(pipe):
    prompt, negative = pipe.tokenize(["word " * 40], [""])
    assert prompt.chunks[0].ids.shape == negative.chunks[0].ids.shape == (1, 3, 77)
    assert jax.eval_shape(pipe.encode, pipe.params, prompt)["tokens"].shape == (1, 231, 12)


def test_little_strength_changes_little_and_full_strength_all(pipe, conditions):
    image = jax.random.uniform(jax.random.key(5), (1, *SIZE, 3), minval=-0.5, maxval=0.5)
    used = solver.ddim(pipe.model.schedule)

    @jax.jit
    def again(params, image, times):
        z = pipelines.encode(pipe.model, params, image)
        made = pipelines.image_to_image(
            jax.random.key(0), pipe.model, params, image, *conditions, times=times, solver=used, scale=2.0
        )
        return made, pipelines.decode(pipe.model, params, z)

    made, same = again(pipe.params, image, np.float32([1e-5, 0.0]))
    np.testing.assert_allclose(made, same, atol=0.05)
    assert np.abs(again(pipe.params, image, np.float32([1.0, 0.0]))[0] - same).mean() > 0.1


def test_the_last_part_of_a_grid():
    times = np.linspace(1, 0, 11)
    np.testing.assert_allclose(pipelines.last_part(times, 0.3), times[7:])
    np.testing.assert_allclose(pipelines.last_part(times, 0.01), times[9:])
    np.testing.assert_allclose(pipelines.last_part(times, 1), times)
    with pytest.raises(ConfigError, match="strength"):
        pipelines.last_part(times, 0)


def test_inpainting_by_guidance_keeps_what_is_known(pipe, conditions):
    image = jax.random.uniform(jax.random.key(5), (1, *SIZE, 3), minval=-0.5, maxval=0.5)
    mask = jnp.zeros((1, *SIZE, 1)).at[:, :, 5:].set(1.0)
    used, times = solver.ddim(pipe.model.schedule), np.float32([1.0, 0.5, 0.0])

    @jax.jit
    def paint(params, image, mask):
        arguments = (jax.random.key(0), pipe.model, params, image, mask, *conditions)
        return pipelines.inpaint(*arguments, times=times, solver=used, scale=2.0)

    made = paint(pipe.params, image, mask)
    np.testing.assert_array_equal(made[:, :, :5], image[:, :, :5])
    assert np.abs(made - image)[:, :, 5:].mean() > 0.1
    other = paint(pipe.params, image.at[:, :, 5:].add(0.2), mask)
    # What is under the mask is not looked at, beyond the first column of latents and what its decoding touches.
    assert np.abs(other - made).max() < np.abs(made - image).max()


def test_an_inpainting_network_is_told_the_mask_and_what_is_known(pipe, conditions):
    """A stand-in of 9 channels that answers the latents it is told."""

    class Told:
        in_channels = 9

        def apply(self, params, x, time, tokens):
            return x[..., 5:]

    model = pipelines.LatentDiffusion(Told(), pipe.model.vae, pipe.model.schedule, target.x0)
    image = jax.random.uniform(jax.random.key(5), (1, *SIZE, 3), minval=-0.5, maxval=0.5)
    mask = jnp.zeros((1, *SIZE, 1)).at[:, 2:4, 5].set(1.0)
    params = pipe.params | {"unet": {}}
    settings = {"times": np.float32([1.0, 0.0]), "solver": solver.ddim(model.schedule), "scale": 2.0}
    made = pipelines.inpaint(jax.random.key(0), model, params, image, mask, *conditions, **settings)
    latents = pipelines.encode(model, params, image * (1 - mask))
    wanted = jnp.where(mask > 0, pipelines.decode(model, params, latents), image)
    np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_tiles_decode_a_large_picture(pipe):
    z = jax.random.normal(jax.random.key(0), (1, 16, 24, 4))
    whole = pipelines.decode(pipe.model, pipe.params, z)
    parts = pipelines.decode(pipe.model, pipe.params, z, tile=12)
    assert parts.shape == whole.shape == (1, 32, 48, 3)
    assert 0 < np.abs(parts - whole).mean() < 0.2


def test_wrong_arguments_are_named(pipe, conditions):
    settings = {"times": [1.0, 0.0], "solver": solver.ddim(pipe.model.schedule), "scale": 2.0}
    with pytest.raises(ConfigError, match="multiples of 2, got"):
        pipelines.text_to_image(jax.random.key(0), pipe.model, pipe.params, *conditions, **settings, size=(15, 16))
    image = jnp.zeros((1, *SIZE, 3))
    with pytest.raises(ConfigError, match="mask must have shape"):
        pipelines.inpaint(jax.random.key(0), pipe.model, pipe.params, image, image, *conditions, **settings)
    with pytest.raises(ConfigError, match="negative prompt for each"):
        pipe.tokenize(["a", "b"], [""])


def test_the_command_draws_the_picture_of_the_functions(pipe, draw, tmp_path):
    out = tmp_path / "x.png"
    words = ["--prompt", "a cat", "--solver", "unipc", "--steps", "3", "--scale", "5", "--seed", "7", "--out", str(out)]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        assert experiments.sample.run(["--pretrained", str(FOLDER), "--variant", "fp16", *words]) == 0
    times = pipe.chain.times(3, "unipc")
    picture = draw(pipe.params, jax.random.key(7)[None], *pipe.tokenize(["a cat"], [""]), 5.0, times)
    with Image.open(out) as written:
        assert json.loads(written.info["seeds"]) == [7]
        np.testing.assert_allclose(np.asarray(written), (np.asarray(picture[0]) + 1) * 127.5, atol=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --workdir"),
        (["--workdir", "a", "--pretrained", "b"], "give either --workdir"),
        (["--pretrained", "b"], "needs a --prompt"),
        (["--pretrained", "b", "--prompt", "a", "--label", "1"], "--label is for"),
        (["--pretrained", "b", "--prompt", "a", "--size", "7", "8"], "--size"),
        (["--pretrained", "b", "--prompt", "a", "--steps", "0"], "--steps"),
    ],
)
def test_wrong_commands_are_answered_before_anything_is_read(words, message):
    with pytest.raises(ConfigError, match=message):
        experiments.sample.run(words)
