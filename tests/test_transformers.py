"""The published transformers: MMDiT (Stable Diffusion 3), FLUX.1 and DiT. Parity of whole networks: the witness.

Whole pipelines are held to what diffusers drew with the fixtures tiny_sd3 and tiny_flux (`oracles/tiny_flow`).
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import experiments.sample
from jaxdiff import pipelines, solver
from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.nets import Flux, LatentDiT, MMDiT
from jaxdiff.nets import flux as rooms
from jaxdiff.nets.joint import rotate
from jaxdiff.pretrained import files, schedulers, transformer
from jaxdiff.pretrained import pipelines as published
from tests.oracles import compiles, mutations, tiny_flow, tiny_sd

FIXTURES = Path(__file__).parent / "fixtures"
NETS = {
    "sd3": MMDiT(
        depth=2, heads=2, head_dim=8, in_channels=4, out_channels=4, token_dim=6, vector_dim=5, sample_size=8,
        max_positions=4, dual=(0,), qk_norm=True,
    ),
    "flux": Flux(
        depth=1, single_depth=1, heads=2, in_channels=4, out_channels=4, token_dim=6, vector_dim=5, guided=True,
        axes=(2, 2, 4),
    ),
    "dit": LatentDiT(depth=2, heads=2, head_dim=8, num_classes=3, sample_size=8),
}  # fmt: skip
TOLD = [
    ("sd3", "time"), ("sd3", "tokens"), ("sd3", "vector"), ("flux", "time"), ("flux", "tokens"), ("flux", "vector"),
    ("flux", "guidance"), ("dit", "time"), ("dit", "labels"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """name -> (network, parameters away from zero, inputs, jitted network)."""
    return {name: _make(net) for name, net in NETS.items()}


def _make(net):
    rng = np.random.default_rng(0)
    inputs = {"x": jnp.float32(rng.normal(size=(2, 4, 6, 4))), "time": jnp.float32([30.0, 900.0])}
    if isinstance(net, LatentDiT):
        inputs["labels"] = jnp.int32([1, 2])
    else:
        inputs |= {"tokens": jnp.float32(rng.normal(size=(2, 3, 6))), "vector": jnp.float32(rng.normal(size=(2, 5)))}
    if isinstance(net, Flux):
        inputs["guidance"] = jnp.float32([3.5, 1.0])
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), **inputs))
    leaves, tree = jax.tree.flatten(shapes)
    params = [jnp.float32(rng.normal(size=x.shape) / max(np.prod(x.shape[:-1]), 4) ** 0.5) for x in leaves]
    return net, tree.unflatten(params), inputs, jax.jit(net.apply)


@pytest.mark.parametrize(("name", "told"), TOLD)
def test_each_row_listens_to_its_own_conditioning(made, name, told):
    _, params, inputs, apply = made[name]
    value = inputs[told]
    y = apply(params, **inputs)
    changed = apply(params, **inputs | {told: value.at[0].set(0 if told == "labels" else value[0] * 0.9)})
    assert y.shape == (2, 4, 6, 8 if name == "dit" else 4)
    assert np.abs(changed[0] - y[0]).max() > 1e-4
    np.testing.assert_array_equal(changed[1], y[1])


def test_a_label_outside_is_no_class(made):
    _, params, inputs, apply = made["dit"]
    none, beyond, last = (apply(params, **inputs | {"labels": jnp.int32([i, i])}) for i in (-1, 3, 2))
    np.testing.assert_array_equal(none, beyond)
    assert np.abs(none - last).max() > 1e-4


def test_remat_is_by_block_and_changes_no_gradient(made):
    for net, params, inputs, _ in made.values():
        program = jax.make_jaxpr(net.clone(remat="full").apply)(params, **inputs)
        assert sum("remat" in str(equation.primitive) for equation in program.eqns) == 2  # each has two blocks
    net, params, inputs, _ = made["flux"]

    def gradient(net):
        return jax.jit(jax.grad(lambda x: jnp.square(net.apply(params, **inputs | {"x": x})).mean()))(inputs["x"])

    plain = gradient(net)
    np.testing.assert_allclose(gradient(net.clone(remat="full")), plain, rtol=1e-4, atol=1e-6)
    assert np.abs(plain).max() > 0


def test_half_precision_answers_in_the_precision_of_x(made):
    net, params, inputs, apply = made["flux"]
    with jax.numpy_dtype_promotion("standard"):
        half = jax.jit(net.clone(dtype=jnp.bfloat16).apply)(params, **inputs)
    y = apply(params, **inputs)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - y).max() < 0.2 * np.abs(y).max()


def test_the_middle_of_the_positions_is_taken_and_it_is_not_trained(made):
    net, params, inputs, apply = made["sd3"]
    table = params["params"]["pos_embed"]["embedding"]
    y = apply(params, **inputs)

    def changed(index):
        embedding = table.at[0, index].multiply(-1)  # a constant would vanish in the norm
        other = params["params"]["pos_embed"] | {"embedding": embedding}
        return np.abs(apply({"params": params["params"] | {"pos_embed": other}}, **inputs) - y).max() > 1e-5

    used = [changed(i) for i in range(16)]  # 2 x 3 patches of a table of 4 x 4: rows 1 and 2, columns 0 to 2
    assert used == [row in (1, 2) and column < 3 for row in range(4) for column in range(4)]
    gradient = jax.jit(jax.grad(lambda p: jnp.square(net.apply(p, **inputs)).mean()))(params)["params"]
    assert not np.any(gradient["pos_embed"]["embedding"])
    assert np.any(gradient["pos_embed"]["proj"]["kernel"])


def test_packing_is_undone_and_keeps_a_channel_together():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    packed = rooms.pack(x)
    assert packed.shape == (2, 6, 12)
    np.testing.assert_array_equal(packed[0, 1, 4:8], x[0, :2, 2:4, 1].ravel())
    np.testing.assert_array_equal(rooms.unpack(packed, 2, 3), x)


def test_a_rotated_product_depends_on_the_distance_only():
    """Su et al. 2024, eq. 11; and text stands at the origin."""
    cos, sin = rooms.angles(2, 4, 5, (2, 4, 6))
    assert cos.shape == (2 + 20, 6)
    np.testing.assert_array_equal((cos[:3], sin[:3]), (np.ones((3, 6)), np.zeros((3, 6))))
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 12)) for i in range(2))
    q, k = (rotate(jnp.broadcast_to(a, (1, 22, 1, 12)), (cos, sin))[0, 2:, 0].reshape(4, 5, 12) for a in (q, k))
    products = [np.vdot(q[i, j], k[i + 1, j + 2]) for i in range(3) for j in range(3)]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)
    assert abs(np.vdot(q[0, 0], k[0, 2]) - products[0]) > 1e-3
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), np.linalg.norm(q[0, 0]), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd3", {"tokens": jnp.zeros((2, 3, 5))}, r"tokens must have shape \(2, L, 6\), got \(2, 3, 5\)"),
        ("sd3", {"vector": jnp.zeros((1, 5))}, r"vector must have shape \(2, 5\), got \(1, 5\)"),
        ("sd3", {"vector": None}, r"vector must have shape \(2, 5\), got None"),
        ("sd3", {"x": jnp.zeros((2, 4, 4, 3))}, r"\(b, h, w, 4\)"),
        ("sd3", {"x": jnp.zeros((2, 5, 4, 4))}, "multiples of 2, got 5 x 4"),
        ("sd3", {"x": jnp.zeros((2, 10, 4, 4))}, "8 rows and columns at most, got 10 x 4"),
        ("sd3", {"time": jnp.zeros(())}, "one per example"),
        ("flux", {"guidance": None}, r"guidance must have shape \(2\), got None"),
        ("flux", {"x": jnp.zeros((2, 4, 3, 4))}, "multiples of 2, got 4 x 3"),
        ("dit", {"labels": jnp.zeros((2, 1), int)}, r"labels must have shape \(2\), got \(2, 1\)"),
    ],
)
def test_wrong_inputs_are_named(made, name, change, message):
    net, params, inputs, _ = made[name]
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(net.apply, params, **inputs | change)


def test_wrong_settings_are_named(made):
    with pytest.raises(ConfigError, match="heads \\* head_dim must be a multiple of 8"):
        MMDiT(heads=1, head_dim=4)
    with pytest.raises(ConfigError, match="dual must name blocks below 24"):
        MMDiT(dual=(24,))
    with pytest.raises(ConfigError, match="three even numbers"):
        Flux(axes=(2, 3, 4))
    with pytest.raises(ConfigError, match="depth must be an integer >= 1"):
        LatentDiT(depth=0)
    with pytest.raises(ConfigError, match="remat must be one of"):
        Flux(remat="some")
    _, params, inputs, _ = made["flux"]
    with pytest.raises(ConfigError, match="not told it"):
        jax.eval_shape(NETS["flux"].clone(guided=False).apply, params, **inputs)


CONFIGS = {name: transformer.config_of(net) for name, net in NETS.items()}


@pytest.mark.parametrize("name", NETS)
def test_a_config_is_written_and_read_again(name):
    assert transformer.network(CONFIGS[name]) == NETS[name]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd3", {"_class_name": "HunyuanDiT2DModel"}, "_class_name must be one of SD3Transformer2DModel"),
        ("sd3", {"_class_name": None}, "_class_name must be one of"),
        ("sd3", {"caption_projection_dim": 24}, "caption_projection_dim must be 16, got 24"),
        ("sd3", {"qk_norm": "layer_norm"}, "qk_norm must be 'none' or 'rms_norm'"),
        ("sd3", {"dual_attention_layers": [2]}, "dual_attention_layers must be numbers of blocks below 2"),
        ("sd3", {"dual_attention_layers": 1}, "dual_attention_layers must be numbers of blocks"),
        ("sd3", {"num_layers": 10**9}, "num_layers must be an integer from 1 to 256"),
        ("sd3", {"new_setting": 1}, "new_setting must be absent"),
        ("flux", {"axes_dims_rope": [4, 4]}, "axes_dims_rope three numbers"),
        ("flux", {"attention_head_dim": 16}, "attention_head_dim must be 8, got 16"),
        ("flux", {"in_channels": 18}, "multiples of 4"),
        ("flux", {"guidance_embeds": "yes"}, "guidance_embeds must be true or false"),
        ("flux", {"patch_size": 2}, "patch_size must be 1, got 2"),
        ("dit", {"norm_type": "ada_norm_single"}, "norm_type must be 'ada_norm_zero'"),
        ("dit", {"attention_bias": False}, "attention_bias must be True"),
        ("dit", {"norm_elementwise_affine": True}, "norm_elementwise_affine must be absent"),
    ],
)
def test_what_a_config_asks_and_is_not_known_is_refused_before_a_weight_is_read(name, change, message):
    with pytest.raises(CheckpointError, match=message):
        transformer.load({}, CONFIGS[name] | change)


@pytest.mark.parametrize("name", NETS)
def test_export_and_import_change_no_bit_and_every_key_is_accounted_for(made, name, tmp_path):
    net, params, _, _ = made[name]
    transformer.export(tmp_path, net, params)
    again, other = transformer.load(tmp_path)
    assert again == net
    assert jax.tree.structure(other) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    tensors, config = files.read(tmp_path), files.config(tmp_path)
    left = next(iter(tensors))
    with pytest.raises(CheckpointError, match=f"1 missing: {left}"):
        transformer.load({key: t for key, t in tensors.items() if key != left}, config)
    with pytest.raises(CheckpointError, match=r"1 unexpected: proj_extra\.weight"):
        transformer.load(tensors | {"proj_extra.weight": tensors[left]}, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 0.0}, r"shift must be in \(0, 10000\]"),
        ({"max_shift": 1e9}, "max_shift its logarithms"),
        ({"base_image_seq_len": 4096}, "differ from max_image_seq_len"),
        ({"time_shift_type": "linear"}, "time_shift_type must be 'exponential'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas must be absent"),
        ({"shift_terminal": 0.1}, "shift_terminal must be absent"),
        ({"use_dynamic_shifting": 1}, "use_dynamic_shifting must be true or false"),
    ],
)
def test_a_flow_with_settings_that_are_not_known_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        schedulers.read({"_class_name": "FlowMatchEulerDiscreteScheduler"} | change)


@pytest.mark.parametrize("name", NETS)
def test_damaged_configs_are_read_or_give_a_named_error(name):
    flow = files.config(FIXTURES / "tiny_flux" / "scheduler", "scheduler_config.json")
    refused = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        try:
            transformer.network(mutations.edit(random, CONFIGS[name]))
            schedulers.read(mutations.edit(random, flow), to_last=True).times(4)
        except (CheckpointError, ConfigError):
            refused += 1
    assert 50 < refused < 100


def test_the_times_of_a_flow():
    """Esser et al. 2024, eq. 23, by hand: 3 / (3 + 1 / u - 1) at u = 1/2 is 3/4."""
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    np.testing.assert_allclose(schedulers.read(flow | {"shift": 3.0}, to_last=True).times(2), [1, 0.75, 0])
    last = 3 * 0.003 / (1 + 2 * 0.001)  # u ends at the shifted 1 / 1000, which is shifted again
    last = last / (1 + 2 * last / 3)
    np.testing.assert_allclose(schedulers.read(flow | {"shift": 3.0}).times(2), [1, last, 0])
    dynamic = schedulers.read(flow | {"use_dynamic_shifting": True}, to_last=True)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        wanted = np.exp(mu) / (np.exp(mu) + 1)
        np.testing.assert_allclose(dynamic.times(2, "euler", tokens), [1, wanted, 0])
    with pytest.raises(ConfigError, match="num_steps"):
        dynamic.times(0)
    with pytest.raises(ConfigError, match="tokens must be about 256 to 4096"):
        dynamic.times(4, "euler", 10**6)


@pytest.fixture(scope="module", params=["tiny_sd3", "tiny_flux"])
def loaded(request):
    """(the pipeline of a fixture, what diffusers drew with it, one jitted program from noise to every latent)."""
    folder = FIXTURES / request.param
    pipe = published.load(folder, variant="fp16")
    told = isinstance(pipe.model.unet, Flux)

    @jax.jit
    def run(params, key, x, prompt, negative, scale, times):
        cond, null = (pipe.encode(params, text, guidance=scale) for text in (prompt, negative))
        settings = {"times": times, "solver": solver.euler(pipe.model.schedule)}
        settings |= {"scale": 1 if told else scale, "return_trajectory": True}
        z, path = pipelines.generate(key, pipe.model, params, x, cond, null, **settings)
        return path[1:], pipelines.decode(pipe.model, params, z)

    return pipe, {name: np.asarray(tensor) for name, tensor in files.read(folder / "expected.safetensors").items()}, run


def test_every_step_and_the_picture_are_those_of_diffusers(loaded):
    pipe, expected, run = loaded
    times = pipe.times(tiny_sd.STEPS, size=(16, 16))
    np.testing.assert_allclose(times, expected["times"], rtol=0, atol=1e-6)
    texts = pipe.tokenize([tiny_sd.PROMPT], [tiny_sd.NEGATIVE])
    scale = tiny_flow.GUIDANCE if isinstance(pipe.model.unet, Flux) else tiny_flow.SCALE
    path, picture = run(pipe.params, jax.random.key(0), expected["noise"], *texts, scale, times)
    assert np.abs(expected["latents"]).max() > 1
    assert np.std(expected["picture"]) > 0.05
    np.testing.assert_allclose(path, expected["latents"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(picture, expected["picture"], rtol=0, atol=1e-4)


def test_one_compilation_serves_every_prompt_scale_grid_and_set_of_weights(loaded):
    pipe, expected, run = loaded
    times = pipe.times(tiny_sd.STEPS, size=(16, 16))
    x, key = expected["noise"], jax.random.key(0)
    texts, others = pipe.tokenize(["a cat"], [""]), pipe.tokenize(["two dogs"], ["rain"])
    first = run(pipe.params, key, x, *texts, 3.0, times)[1]
    changed = jax.tree.map(lambda w: w * 1.01, pipe.params)
    with compiles.counted() as programs:
        made = [
            run(pipe.params, key, x, *others, 3.0, times)[1],
            run(pipe.params, key, x, *texts, 2.0, times)[1],
            run(changed, key, x, *texts, 3.0, times)[1],
            run(pipe.params, key, x, *texts, 3.0, np.linspace(1, 0, tiny_sd.STEPS + 1))[1],
        ]
    assert programs == []
    for picture in made:
        assert np.abs(picture - first).max() > 1e-4


def test_long_prompts_are_chunks_for_clip_and_for_t5(loaded):
    pipe, _, _ = loaded
    prompt, negative = pipe.tokenize(["word " * 100], [""])
    chunks = [part.ids.shape[1:] for part in prompt.chunks]
    assert chunks == [part.ids.shape[1:] for part in negative.chunks]
    t5 = (2, 256) if len(chunks) == 3 else (1, 512)
    assert chunks == [(6, 77)] * (len(chunks) - 1) + [t5]  # a letter is a token here
    told = jax.eval_shape(pipe.encode, pipe.params, prompt)
    assert told["tokens"].shape == (1, t5[0] * t5[1] + (6 * 77 if len(chunks) == 3 else 0), 32)


def test_the_exported_fixture_is_the_same_pipeline(loaded, tmp_path):
    pipe, _, _ = loaded
    folder = FIXTURES / ("tiny_flux" if isinstance(pipe.model.unet, Flux) else "tiny_sd3")
    published.export(tmp_path, pipe, folder)
    again = published.load(tmp_path)
    assert again.model == pipe.model
    assert again.text == pipe.text
    assert again.size == pipe.size
    for ours, theirs in zip(jax.tree.leaves(pipe.params), jax.tree.leaves(again.params), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_picture_is_drawn_anew_from_a_time_on(loaded):
    """SDEdit: almost at the end nothing is left to change, at the beginning nothing is known."""
    pipe, _, _ = loaded
    image = jax.random.uniform(jax.random.key(5), (1, 16, 16, 3), minval=-0.5, maxval=0.5)
    prompt, _ = pipe.tokenize(["a cat"], [""])

    @jax.jit
    def again(params, image, times):
        cond, used = pipe.encode(params, prompt), solver.euler(pipe.model.schedule)
        arguments = (jax.random.key(0), pipe.model, params, image, cond, cond)
        made = pipelines.image_to_image(*arguments, times=times, solver=used, scale=1)
        return made, pipelines.decode(pipe.model, params, pipelines.encode(pipe.model, params, image))

    made, same = again(pipe.params, image, np.float32([1e-4, 0.0]))
    np.testing.assert_allclose(made, same, atol=0.01)
    assert np.abs(again(pipe.params, image, np.float32([1.0, 0.0]))[0] - same).mean() > 0.05


def test_the_parameters_of_network_and_t5_can_be_kept_in_half_precision():
    folder = FIXTURES / "tiny_flux"
    kinds = {"unet": "bfloat16", "vae": "bfloat16", "text_0": "float32", "text_1": "bfloat16"}
    pipe = published.load(folder, variant="fp16", param_dtype=jnp.bfloat16)
    for part, kind in kinds.items():
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(pipe.params[part])} == {kind}
    prompt, _ = pipe.tokenize(["a cat"], [""])
    half = jax.jit(pipe.encode)(pipe.params, prompt)
    whole = jax.jit(pipe.encode)(published.load(folder, variant="fp16").params, prompt)
    np.testing.assert_array_equal(half["vector"], whole["vector"])
    assert 0 < np.abs(half["tokens"] - whole["tokens"]).max() < 0.05 * np.abs(whole["tokens"]).max()


def test_the_command_draws_with_flux(tmp_path):
    out = tmp_path / "x.png"
    command = ["--pretrained", str(FIXTURES / "tiny_flux"), "--variant", "fp16", "--prompt", "a cat", "--out", str(out)]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        assert (
            experiments.sample.run([*command, "--size", "16", "16", "--steps", "2", "--scale", "2", "--seed", "5"]) == 0
        )
    pipe = published.load(FIXTURES / "tiny_flux", variant="fp16")
    prompt, _ = pipe.tokenize(["a cat"], [""])

    @jax.jit
    def draw(params):
        settings = {
            "times": pipe.times(2, size=(16, 16)),
            "solver": solver.euler(pipe.model.schedule),
            "size": (16, 16),
        }
        cond = pipe.encode(params, prompt, guidance=2.0)
        return pipelines.text_to_image(jax.random.key(5)[None], pipe.model, params, cond, cond, scale=1, **settings)

    with Image.open(out) as written:
        np.testing.assert_allclose(np.asarray(written), (np.asarray(draw(pipe.params)[0]) + 1) * 127.5, atol=1)
    with pytest.raises(ConfigError, match="leave out --negative"):
        experiments.sample.run([*command, "--negative", "rain"])


def test_folders_that_do_not_fit_together_are_named(tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(FIXTURES / "tiny_sd3", folder)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(FIXTURES / "tiny_flux" / "transformer", folder / "transformer")
    with pytest.raises(CheckpointError, match="transformer/ is not of the class that"):
        published.load(folder, variant="fp16")
    index = json.loads((FIXTURES / "tiny_flux" / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "HunyuanDiTPipeline"}))
    with pytest.raises(CheckpointError, match=r"_class_name must be one of .*FluxPipeline"):
        published.load(folder, variant="fp16")
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only Stable Diffusion 1, 2 and XL"):
        published.load(folder / "x.safetensors", configs=folder)
