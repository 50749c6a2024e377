"""Fine-tuning by the job, on a tiny pipeline: each method learns, moves what it should alone, resumes, is written."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import check, cli, export, finetune, pretrained, sample, trained, tuning, workdir
from experiments import model as models
from experiments import train as job
from jaxdiff import train
from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.pretrained import inversion, lora
from jaxdiff.pretrained import pipelines as published
from jaxdiff.text import prompts
from jaxdiff.train import checkpoint

TINY = Path(__file__).parent / "fixtures" / "tiny_sd"
STEPS = 12
RATES = {"full": 3e-3, "lora": 3e-2, "textual_inversion": 0.3}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Of the eight there are: what is asked here has nothing to do with their number, and they take long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "mesh", lambda config: train.mesh.make(devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The command line of a run on eight pictures with captions; eight more have none."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"a (small) <cat> {i % 2}"}) for i in range(8)]
    for part in ("cats", "class"):
        (folder / part).mkdir()
        for i in range(8):
            picture = np.broadcast_to(rng.integers(0, 255, 3), (16, 16, 3)).astype(np.uint8)
            Image.fromarray(picture).save(folder / part / f"{i}.png")
    (folder / "cats" / "metadata.jsonl").write_text("\n".join(lines))
    settings = {
        "pretrained": TINY, "tune.variant": "fp16", "tune.rank": 2, "tune.alpha": 4, "tune.token": "<cat>",
        "tune.like": "a", "data.path": folder / "cats", "data.size": 16, "frozen.cache": folder / "cache",
        "train.batch_size": 8, "train.steps": STEPS, "train.log_every": 1, "train.checkpoint_every": STEPS // 2,
        "train.sample_every": 0, "train.remat": "none", "optimizer.warmup": 0, "sample.steps": 1, "sample.num": 1,
        "train.ema": "constant(decay=0.5)",
    }  # fmt: skip
    return ["--config=finetune", *(f"--config.{key}={value}" for key, value in settings.items())]


def begun(argv, directory, **changes):
    """A job that is ready to take its first step."""
    parser = cli.Parser()
    parser.add_argument("--config")
    config = cli.parse(parser, argv)[0]
    for key, value in changes.items():
        cli.override(config, key.replace("__", "."), str(value))
    made = finetune.Tuning(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    made.prepare()
    return made


def of(method):
    return [f"--config.tune.method={method}", f"--config.optimizer.learning_rate={RATES[method]}"]


@pytest.fixture(scope="module", params=RATES)
def run(request, base, tmp_path_factory):
    """(method, workdir, command line) of an uninterrupted run."""
    directory = tmp_path_factory.mktemp(request.param) / "run"
    argv = [*base, *of(request.param)]
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "lora":
            patch.setattr(job, "save_grid", lambda *_: None)
        assert job.run([*argv, f"--workdir={directory}"]) == 0
    assert len([*(directory / "samples").iterdir()]) == (request.param == "lora")
    return request.param, directory, argv


def state_of(directory, step=None):
    """(pipeline, method, what trained at first, the state saved at `step`)."""
    config = workdir.load(directory)[0]
    pipe = finetune.open_pipeline(config)
    method = tuning.method(config, pipe)
    first = method.first(jax.random.split(jax.random.key(config.seed))[0], pipe)
    template = jax.eval_shape(lambda: models.begin(first, config))
    carry, _ = checkpoint.Checkpoints(directory / "checkpoints").restore(template, step)
    return pipe, method, first, carry["state"]


def leaves(tree):
    """Path -> array."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in flat}


def test_it_learns_and_nothing_moves_but_what_trains(run, tmp_path):
    name, directory, argv = run
    pipe, method, first, state = state_of(directory)
    made = begun(argv, tmp_path / "again")
    batch = {key: jnp.asarray(np.tile(rows, (8,) + (1,) * (rows.ndim - 1))) for key, rows in made.rows.items()}
    measure = jax.jit(lambda trained: made.model.loss(trained, jax.random.key(0), batch, made.model.frozen)[0].mean())
    before, after = float(measure(first)), float(measure(state.params))
    assert after < before
    old, new = leaves(pipe.params), leaves(method.complete(state.params, pipe.params))
    changed = [path for path in old if np.any(old[path] != new[path])]
    if name == "full":
        assert changed == [path for path in old if path.startswith("unet/")]
    elif name == "lora":
        assert len(changed) == 32
        assert all("/attn" in path and path.endswith("/kernel") for path in changed)
    else:
        (table,) = changed
        assert table == "text_0/params/token_embedding/embedding"
        np.testing.assert_array_equal(old[table][:-1], new[table][:-1])
    # Adam has two moments of what trains, and of nothing else.
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.opt_state, first)]
    assert sizes[0] - 2 * sizes[1] < 8


def test_a_resumed_run_is_bit_identical(run, tmp_path, monkeypatch):
    _, directory, argv = run
    monkeypatch.setattr(job, "save_grid", lambda *_: None)
    other = shutil.copytree(directory, tmp_path / "run")
    shutil.rmtree(other / "checkpoints" / str(STEPS))
    assert job.run([*argv, f"--workdir={other}"]) == 0
    assert (other / "metrics.jsonl").read_bytes() == (directory / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, state_of(other)[3], state_of(directory)[3])


def test_it_is_written_out_and_read_again(run, tmp_path, capsys):
    name, directory, _ = run
    out = tmp_path / "out"
    assert export.run([f"--workdir={directory}", f"--out={out}"]) == 0
    pipe, method, _, state = state_of(directory)
    wanted = leaves(method.complete(state.ema_params["ema"], pipe.params))
    if name == "full":
        found = published.load(out).params
    elif name == "lora":
        found = lora.merge(pipe.params, lora.load(out, pipe.params))
    else:
        plain = published.load(TINY, variant="fp16")
        found = inversion.add(plain, inversion.load(out)).params
    found = leaves(found)
    assert set(found) == set(wanted)
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-6 if name == "lora" else 0)
    with pytest.raises(ConfigError, match=r"experiments\.export"):
        trained.load(directory)


def test_a_lora_is_drawn_with(tmp_path, monkeypatch):
    pipe = published.load(TINY, variant="fp16")
    start = lora.split(lora.init(jax.random.key(0), pipe.params, rank=2))
    one = lora.join(jax.tree.map(jnp.ones_like, start[0]), start[1])
    lora.export(tmp_path / "x.safetensors", one, pipe.params)
    seen = {}

    def in_batches(draw, pipe, prompts, *rest):
        seen.update(params=pipe.params)
        return np.zeros((len(prompts), 8, 8, 3), np.float32)

    monkeypatch.setattr(pretrained, "in_batches", in_batches)
    words = ["--lora", str(tmp_path / "x.safetensors"), "--lora_scale", "0.5", "--prompt", "a", "--num=2"]
    words += [f"--out={tmp_path / 'a.png'}", f"--each={tmp_path / 'each'}"]
    assert sample.run(["--pretrained", str(TINY), "--variant=fp16", *words]) == 0
    wanted = leaves(lora.merge(pipe.params, one, 0.5))
    jax.tree.map(np.testing.assert_array_equal, leaves(seen["params"]), wanted)
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == ["00000_seed0.png", "00001_seed1.png"]


def test_the_loss_is_of_the_instance_and_the_class(base, tmp_path):
    """It is linear in the weight of the class; without one it is that of the pictures alone, as LoRA's at its start."""
    plain = begun([*base, *of("full")], tmp_path / "a")
    folder = plain.config.data.path.replace("cats", "class")
    both = begun([*base, *of("lora")], tmp_path / "b", tune__class_path=folder, tune__class_prompt="a photo")
    pipe = finetune.open_pipeline(plain.config)
    batch = {key: jnp.asarray(rows) for key, rows in plain.rows.items()}

    def measure(made, **changes):
        model = dataclasses.replace(made.model, times=lambda key, b: jnp.full(b, 0.5), dropout=0.0, **changes)
        first = model.method.first(made.key_init, pipe)
        return np.asarray(model.loss(first, jax.random.key(0), batch, model.frozen)[0])

    alone, zero, one, two = measure(plain), *(measure(both, prior_weight=w) for w in (0.0, 1.0, 2.0))
    np.testing.assert_allclose(zero, alone, rtol=1e-5)
    np.testing.assert_allclose(two - zero, 2 * (one - zero), rtol=1e-4)
    assert (one - zero > 0.1).all()
    assert both.model.frozen["prior"]["image"].shape == (8, 8, 8, 4)
    assert set(map(int, both.model.frozen["prior"]["text"])) == {int(both.model.row["a photo"])}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune__method": "lorra"}, r"unknown tune.method 'lorra'. Did you mean 'lora'"),
        ({"diffusion__target": "v"}, "--config.diffusion.target=published"),
        ({"data__flip": "true"}, "latents are made once"),
        ({"tune__method": "textual_inversion", "tune__prompt": "a dog"}, "no caption has the word '<cat>'"),
        ({"tune__method": "lora", "tune__alpha": 0}, "tune.alpha must be > 0"),
        ({"tune__rank": 0}, "tune.rank must be at least 1"),
        ({"tune__class_path": "data"}, "class_prompt='a photo of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(base, tmp_path, changes, words):
    argv = [*base, *of("full")]
    if "tune__class_path" in changes:
        folder = next(word for word in argv if word.startswith("--config.data.path=")).partition("=")[2]
        changes = {"tune__class_path": folder.replace("cats", "class")}
    with pytest.raises(ConfigError, match=words):
        begun(argv, tmp_path / "x", **changes)


def test_captions_are_taken_as_they_stand():
    pieces = prompts.parse(finetune.plain(r"a (small) [cat] \ (dog:2)"))
    assert pieces == [[(r"a (small) [cat] \ (dog:2)", 1.0)]]


def test_a_run_goes_on_with_the_weights_it_began_from_alone(base, tmp_path):
    made = begun([*base, *of("lora")], tmp_path / "run")
    made.write_header()
    begun([*base, *of("lora")], tmp_path / "run")
    (tmp_path / "run" / finetune.WEIGHTS).write_text('"other"')
    with pytest.raises(CheckpointError, match="are not those that the run"):
        begun([*base, *of("lora")], tmp_path / "run")
