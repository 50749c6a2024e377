"""The main job end to end, tiny: it learns, resumes bit for bit, stops on a signal, and its pictures are repeatable."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import cli, evaluate, inputs, pictures, sample, trained, workdir
from experiments import export as exporting
from experiments import train as job
from jaxdiff import data
from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.train import hosts

EMOJI = [
    "--config=emoji", "--config.data.size=8", "--config.net.channels=16", "--config.net.groups=8",
    "--config.net.multipliers=(1,2)", "--config.net.attention_levels=(1,)", "--config.net.cross_levels=(1,)",
    "--config.net.num_blocks=1", "--config.net.head_channels=16", "--config.net.patch_size=1", "--config.text.dim=16",
    "--config.text.depth=1", "--config.text.heads=2", "--config.train.batch_size=32", "--config.train.steps=30",
    "--config.train.log_every=10", "--config.optimizer.warmup=5", "--config.optimizer.learning_rate=3e-3",
    "--config.sample.num=4", "--config.sample.steps=2", "--config.train.sample_every=20",
]  # fmt: skip
ROLL = [
    "--config=swissroll", "--config.net.width=16", "--config.net.depth=1", "--config.train.batch_size=16",
    "--config.train.steps_per_call=5", "--config.train.log_every=20", "--config.train.sample_every=0",
    "--config.sample.num=16", "--config.sample.steps=2", "--config.data.points=100", "--config.train.steps=60",
    "--config.train.checkpoint_every=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    directory = tmp_path_factory.mktemp("emoji") / "run"
    assert job.run([*EMOJI, f"--workdir={directory}"]) == 0
    return directory


@pytest.fixture(scope="module")
def roll(tmp_path_factory):
    """An uninterrupted run, against which the interrupted ones are held."""
    directory = tmp_path_factory.mktemp("roll") / "run"
    assert job.run([*ROLL, f"--workdir={directory}"]) == 0
    return directory


def assert_same_run(one: Path, other: Path):
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    first, second = trained.load(one), trained.load(other)
    assert first.step == second.step
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_thirty_steps_on_the_embedded_default_lower_the_loss(emoji):
    run = trained.load(emoji)
    first = jax.jit(run.model.init)(jax.random.split(jax.random.key(run.config.seed))[0])
    dataset = inputs.load(run.config)
    rows = inputs.arrays(dataset, "caption", run.model.tokenizer, run.model.max_len)
    batch = {name: jnp.asarray(row[:64]) for name, row in rows.items()}
    loss = jax.jit(lambda params: run.model.loss(params, jax.random.key(1), batch)[0].mean())
    before, after = float(loss(first)), float(loss(run.params))
    assert after < 0.9 * before, (before, after)


def test_a_run_leaves_what_it_promises(emoji):
    lines = [json.loads(line) for line in (emoji / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert set(lines[0]) == {"step", "loss", "grad_norm", "bad_steps", "loss_per_logsnr"}
    assert json.loads((emoji / "config.json").read_text())["train"]["steps"] == 30
    assert "jax" in json.loads((emoji / "versions.json").read_text())["packages"]
    first, picture = sorted((emoji / "samples").iterdir())
    assert first.name == "step_00000020.png"
    assert data.read_metadata(first)["step"] == "20"
    assert picture.name == "step_00000030.png"
    text = data.read_metadata(picture)
    assert text["step"] == "30"
    words = ast.literal_eval(text["conditions"])
    assert Image.open(picture).size == pictures.sheet(np.zeros((4, 8, 8, 3), np.float32), words).size


def test_a_run_leaves_its_curves_for_tensorboard(emoji):
    pytest.importorskip("tensorboardX", reason="needs jaxdiff[tensorboard]")
    (events,) = (emoji / "tensorboard").iterdir()
    assert b"loss_per_logsnr/4" in events.read_bytes()


def test_a_resumed_run_leaves_its_vocabulary_alone(emoji):
    before = (emoji / "tokenizer.json").stat()
    job.Job(trained.load(emoji).config, emoji).write_header()
    after = (emoji / "tokenizer.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_same_seed_is_the_same_picture_at_any_batch_size(emoji, tmp_path):
    argv = [f"--workdir={emoji}", "--prompt", "red heart", "--steps=3", f"--out={tmp_path / 'a.png'}"]
    assert sample.run([*argv, "--num=5", "--seed=3", f"--each={tmp_path / 'five'}"]) == 0
    assert sample.run([*argv, "--seeds", "7", "5", f"--each={tmp_path / 'two'}", "--batch=1"]) == 0
    five = {data.read_metadata(p)["seed"]: np.asarray(Image.open(p), int) for p in (tmp_path / "five").iterdir()}
    for path in (tmp_path / "two").iterdir():
        info = data.read_metadata(path)
        assert info["prompt"] == "red heart"
        assert info["solver"] == "unipc_2"
        assert info["steps"] == "3"
        assert info["nfe"] == "6"  # with the prompt and without
        assert np.abs(five[info["seed"]] - np.asarray(Image.open(path), int)).max() <= 1
    assert np.abs(five["3"] - five["4"]).max() > 1


def test_prompts_and_negatives_reach_the_picture(emoji, tmp_path):
    run = trained.load(emoji)
    settings = sample.settings(sample._parser().parse_args([f"--workdir={emoji}", "--prompt", "a"]), run.config)
    cond, null = run.model.captions(["red heart"]), run.model.null(1)
    base = trained.draw(run, settings, cond, null, [0], 1)
    assert np.abs(base - trained.draw(run, settings, run.model.captions(["blue circle"]), null, [0], 1)).max() > 1e-4
    assert np.abs(base - trained.draw(run, settings, cond, run.model.captions(["cat"]), [0], 1)).max() > 1e-4


def test_the_command_line_draws_a_row_per_prompt_away_from_the_negative_one(emoji, tmp_path, monkeypatch):
    asked = {}

    def draw(run, settings, cond, null, seeds, batch):
        asked.update(cond=cond["ids"], null=null["ids"], seeds=seeds)
        return np.zeros((len(seeds), *run.model.shape), np.float32)

    monkeypatch.setattr(trained, "draw", draw)
    out = tmp_path / "a.png"
    argv = ["--prompt", "red heart", "cat", "--negative=dog", "--num=2", "--seed=4", "--scale=2", f"--out={out}"]
    assert sample.run([f"--workdir={emoji}", *argv]) == 0
    words = ["red heart", "red heart", "cat", "cat"]
    tokenizer = trained.load(emoji).model.tokenizer
    np.testing.assert_array_equal(asked["cond"], tokenizer.encode(words, asked["cond"].shape[1]))
    np.testing.assert_array_equal(asked["null"], tokenizer.encode(["dog"] * 4, asked["null"].shape[1]))
    assert asked["seeds"] == [4, 5, 4, 5]
    text = data.read_metadata(out)
    assert json.loads(text["prompts"]) == words
    assert json.loads(text["seeds"]) == [4, 5, 4, 5]
    assert (text["negative"], text["scale"]) == ("dog", "2.0")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps=0"], "--steps"),
        (["--scale=nan", "--prompt", "a"], "finite"),
        (["--solver=hein", "--prompt", "a"], "'heun'"),
        (["--label", "3"], "it takes --prompt"),
        (["--num=0"], "--num"),
        (["--num=1000000000000"], "at most 100000"),
        (["--seed=1.5"], "invalid int value: '1.5'"),
        (["--out=nowhere/a.png"], "does not exist"),
        (["--out=a.jpg"], ".png"),
        (["--negative=cat", "--scale=1", "--prompt", "a"], "--scale 4"),
        (["--seeds", "-1"], "seed"),
        (["--promt", "a"], "'--prompt'"),
        (["--checkpoint=7"], "no checkpoint of step 7"),
    ],
)
def test_bad_sampling_requests_are_refused(emoji, argv, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        sample.run([f"--workdir={emoji}", *argv])
    assert not list(tmp_path.iterdir())


def test_sampling_needs_a_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"experiments\.train"):
        sample.run([f"--workdir={tmp_path}"])


def test_evaluate_writes_the_figure_of_the_prompts(emoji, capsys):
    argv = [f"--workdir={emoji}", "--num=66", "--batch=64", "--steps=1", "--prompts=4", "--top=3"]
    assert evaluate.run([*argv, "--reference=500"]) == 0
    figure = json.loads((emoji / "evaluate.json").read_text())["prompts"]
    assert figure["chance"] == 3 / 1906
    assert len(figure["ranks"]) == 4
    assert figure["recall_at_3"] == sum(rank < 3 for rank in figure["ranks"]) / 4
    assert f"own picture in the top 3: {figure['recall_at_3']:.1%} of 4 prompts" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--top=0"], ["--top=1907"], []])
def test_evaluate_refuses_before_it_draws(emoji, argv, monkeypatch):
    if not argv:
        monkeypatch.setattr(cli.tempfile, "NamedTemporaryFile", _read_only)
    monkeypatch.setattr(evaluate.Evaluation, "floors", lambda *_: pytest.fail("measuring began"))
    with pytest.raises((ConfigError, OSError), match=argv[0].split("=")[0] if argv else "Read-only"):
        evaluate.run([f"--workdir={emoji}", *argv])


# Runs the code of the README beside it, where nothing of ours and no flax can be imported.
ALONE = """
import sys

for name in ("jaxdiff", "experiments", "flax", "optax", "orbax", "ml_collections"):
    sys.modules[name] = None
exec(open("README.md").read().split("```python")[1].split("```")[0])
np.save("samples.npy", samples)
assert pictures.shape == samples.shape and pictures.dtype == np.uint8
assert set(sampler.platforms) == {"cpu", "cuda", "tpu"}
"""


def test_the_exported_sampler_runs_with_jax_alone(emoji, tmp_path):
    out = tmp_path / "sampler"
    assert exporting.run([f"--workdir={emoji}", f"--out={out}", "--batch=2", "--steps=2"]) == 0
    subprocess.run([sys.executable, "-c", ALONE], cwd=out, check=True)
    run = trained.load(emoji)
    wanted = trained.draw(run, run.config.sample, run.model.captions(["red heart"] * 2), run.model.null(2), [0, 1], 2)
    np.testing.assert_allclose(np.load(out / "samples.npy"), wanted, atol=1e-4)
    with pytest.raises(CheckpointError, match="exists already"):
        exporting.run([f"--workdir={emoji}", f"--out={out}"])


def test_an_export_that_cannot_be_written_leaves_nothing(emoji, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ConfigError, match=r"jaxdiff\[export\]"):
        exporting.run([f"--workdir={emoji}", f"--out={tmp_path / 'sampler'}"])
    assert not list(tmp_path.iterdir())


def test_another_config_in_the_same_workdir_is_refused(emoji):
    before = (emoji / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"optimizer\.b1: was 0\.9, now 0\.5"):
        job.run([*EMOJI, "--config.optimizer.b1=0.5", f"--workdir={emoji}"])
    assert (emoji / "config.json").read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused_though_it_has_the_same_shapes(roll, tmp_path):
    directory = shutil.copytree(roll, tmp_path / "run")
    config = json.loads((directory / "config.json").read_text())
    config["optimizer"]["b1"] = 0.5
    workdir.write_json(directory / "config.json", config)
    with pytest.raises(ConfigError, match=r"checkpoints holds a run with another config:\n  optimizer.b1: was 0.9"):
        job.run([*ROLL, "--config.optimizer.b1=0.5", f"--workdir={directory}"])


def test_a_checkpoint_from_before_a_setting_was_there_has_its_default(roll, tmp_path, monkeypatch):
    def without(config):
        return {key: value for key, value in lasting(config).items() if key != "optimizer.b1"}

    lasting, directory, other = workdir.lasting, tmp_path / "run", tmp_path / "other"
    monkeypatch.setattr(workdir, "lasting", without)  # as an older version, which did not have it
    assert job.run([*ROLL, f"--workdir={directory}"]) == 0
    monkeypatch.undo()
    config = json.loads((shutil.copytree(directory, other) / "config.json").read_text())
    config["optimizer"]["b1"] = 0.5
    workdir.write_json(other / "config.json", config)
    with pytest.raises(ConfigError, match=r"checkpoints holds a run with another config:\n  optimizer.b1: was 0.9"):
        job.run([*ROLL, "--config.optimizer.b1=0.5", f"--workdir={other}"])
    shutil.rmtree(directory / "checkpoints" / "60")
    assert job.run([*ROLL, f"--workdir={directory}"]) == 0
    assert_same_run(directory, roll)


def test_a_bad_step_is_left_out_of_the_averages():
    metrics = {"loss": [1.0, np.nan, 3.0], "grad_norm": [2.0, 5.0, 4.0], "bucket_sum": np.full((3, 10), 1.0)}
    metrics = {k: jnp.asarray(v) for k, v in (metrics | {"bucket_count": np.full((3, 10), 2.0)}).items()}
    window = {k: jnp.zeros(v.shape[1:]) for k, v in metrics.items()} | {"steps": jnp.zeros(())}
    line = job._line(job._accumulate(window, metrics), 1)
    assert line == {"loss": 2.0, "grad_norm": 3.0, "bad_steps": 1, "loss_per_logsnr": [0.5] * 10}
    assert job._line(window, 0)["loss"] is None


def test_a_finished_run_started_again_does_nothing(roll, capsys):
    log = (roll / "metrics.jsonl").read_bytes()
    assert job.run([*ROLL, f"--workdir={roll}"]) == 0
    assert "resuming from step 60 of 60" in capsys.readouterr().out
    assert (roll / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_rest_is_bit_identical(roll, tmp_path, monkeypatch, capsys, number, status):
    orders = data.orders

    def interrupting(seed, step, *args, **kwargs):
        if step == 25:  # between two checkpoints, and in the middle of a line of the log
            os.kill(os.getpid(), number)
        return orders(seed, step, *args, **kwargs)

    directory = tmp_path / "run"
    monkeypatch.setattr(data, "orders", interrupting)
    assert job.run([*ROLL, f"--workdir={directory}"]) == status
    assert f"stopped at step 30, saved in {directory}" in capsys.readouterr().out
    monkeypatch.setattr(data, "orders", orders)
    assert job.run([*ROLL, f"--workdir={directory}"]) == 0
    assert "resuming from step 30 of 60" in capsys.readouterr().out
    assert_same_run(roll, directory)


def test_kill_nine_and_restart_is_bit_identical(roll, tmp_path, capsys):
    """The run that is killed is a process of its own, so that nothing but its files can reach the one that resumes."""
    broken = tmp_path / "run"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    command = [sys.executable, "-m", "experiments.train", *ROLL, f"--workdir={broken}"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not (broken / "checkpoints" / "20").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    assert job.run([*ROLL, f"--workdir={broken}"]) == 0
    assert "resuming from step" in capsys.readouterr().out
    assert_same_run(roll, broken)


def test_two_trainings_in_one_workdir_are_refused(roll):
    before = (roll / "metrics.jsonl").read_bytes()
    with workdir.locked(roll), pytest.raises(CheckpointError, match="another training is running"):
        job.run([*ROLL, f"--workdir={roll}"])
    assert (roll / "metrics.jsonl").read_bytes() == before
    with workdir.locked(roll):  # the lock is gone with the one who held it
        pass


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a terminal has it, whatever process the tests run in."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_signal_acts_at_once():
    with job.Stop(hosts.Watch()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_resumed_at_any_step_reaches_its_intervals(tmp_path):
    argv = [
        *ROLL, f"--workdir={tmp_path / 'run'}", "--config.optimizer.decay=constant", "--config.train.steps_per_call=20",
    ]  # fmt: skip
    assert job.run([*argv, "--config.train.log_every=5", "--config.train.steps=15"]) == 0
    assert job.run([*argv, "--config.train.log_every=20", "--config.train.steps=40"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20, 40]


def test_a_run_killed_before_its_first_file_was_whole_begins_again(tmp_path):
    workdir.check(tmp_path, cli.load_config("swissroll"), {})
    (tmp_path / "config.json.17.42.tmp").write_text("{")
    workdir.check(tmp_path, cli.load_config("swissroll"), {})
    (tmp_path / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="no run of ours"):
        workdir.check(tmp_path, cli.load_config("swissroll"), {})


@pytest.mark.parametrize("bad", ["file", "foreign", "full", "read-only"])
def test_a_workdir_that_cannot_hold_the_run_is_refused(bad, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    if bad == "file":
        directory.write_text("mine")
    if bad == "foreign":
        directory.mkdir()
        (directory / "thesis.txt").write_text("mine")
    if bad == "full":
        monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: workdir.shutil._ntuple_diskusage(10, 10, 0))
    if bad == "read-only":
        monkeypatch.setattr(cli.tempfile, "NamedTemporaryFile", _read_only)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(job, "fit", lambda job: pytest.fail("training began"))
    with pytest.raises(CheckpointError, match="another --workdir"):
        job.run([*ROLL, f"--workdir={directory}"])
    assert sorted(tmp_path.rglob("*")) == before


def _read_only(**kwargs):
    raise OSError(30, "Read-only file system")


def test_tensorboard_gets_a_curve_per_bucket(tmp_path, monkeypatch):
    curves = {}

    class Board:
        def add_scalar(self, name, value, step):
            curves[name, step] = value

        def close(self):
            pass

    monkeypatch.setattr(workdir, "_tensorboard", lambda path, step: Board())
    with workdir.Log(tmp_path, 0) as log:
        log.write("metrics", 10, {"loss": 0.5, "grad_norm": None, "loss_per_logsnr": [1.5, None, 2.5]})
    assert curves == {("loss", 10): 0.5, ("loss_per_logsnr/0", 10): 1.5, ("loss_per_logsnr/2", 10): 2.5}


def test_the_log_drops_lines_after_the_restored_step_and_a_torn_one(tmp_path):
    value = 0.1 + 0.2
    log = workdir.Log(tmp_path, 0)
    for step in (10, 20, 30):
        log.write("metrics", step, {"loss": value})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    workdir.Log(tmp_path, 20).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "loss": value}, {"step": 20, "loss": value}]
