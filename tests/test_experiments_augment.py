"""The study of synthetic pictures: its arms, its intervals, and that it tells help from harm and from nothing."""

import jax
import numpy as np
import pytest

from experiments import augment
from experiments import train as job
from jaxdiff.errors import ConfigError, DataError
from jaxdiff.metrics import classify


def test_the_arms_hold_what_their_names_say():
    real = augment.Pictures(np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int64))
    made = augment.Pictures(np.ones((4, 2, 2, 1), np.uint8), np.ones(4, np.int64))
    arms = augment.arms(real, made, [2])
    found = {name: (len(p.images), int(p.labels.sum()), augmented) for name, (p, augmented) in arms.items()}
    assert found == {
        "real": (3, 0, False),
        "real, augmented": (3, 0, True),
        "real + 2 synthetic": (5, 2, False),
        "real + 2 synthetic, augmented": (5, 2, True),
        "2 synthetic alone": (2, 2, False),
    }


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [augment.interval(rng.normal(1.0, 2.0, 5)) for _ in range(2000)]
    assert 0.935 < np.mean([low < 1 < high for low, high in intervals]) < 0.965


def test_help_harm_and_nothing_are_told_apart():
    base = [0.70, 0.71, 0.69, 0.70, 0.72]
    for change, word in ((0.05, "helps"), (-0.05, "hurts"), (0.0, "no difference")):
        noise = [0.01, -0.01, 0.005, 0.0, -0.005]
        values = [b + change + n for b, n in zip(base, noise, strict=True)]
        said = augment.verdict({"real, augmented": base, "real + 5 synthetic, augmented": values, "real": base})
        assert word in said
        assert said.count(".") == 1
    lines = augment.table({"real, augmented": base, "real": [b + 0.05 for b in base]}).splitlines()
    assert lines[2] == "| real, augmented | 70.40 ± 1.14 |  |"
    assert lines[3] == "| real | 75.40 ± 1.14 | +5.00 (+5.00 to +5.00) |"


def test_the_usual_augmentation_reaches_the_classifier():
    rng = np.random.default_rng(0)
    images = np.zeros((64, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 2, 64)
    images[np.arange(64), 3, 3 + labels] = 255  # the class is the place of one dot
    net = classify.Classifier(2, width=8)

    def learned(change):
        params = classify.fit(jax.random.key(0), net, images, labels, steps=30, batch_size=32, augment=change)
        return classify.accuracy(net, params, images, labels)

    assert learned(None) > learned(lambda key, x: jax.numpy.zeros_like(x)) == max(labels.mean(), 1 - labels.mean())


def test_the_command_makes_its_table_and_refuses_what_it_cannot_measure(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, count in (("few", 24), ("test", 30)):
        labels = np.arange(count) % 2
        images = (rng.integers(0, 40, (count, 8, 8, 1)) + 200 * labels[:, None, None, None]).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
    folder = tmp_path / "run"
    job.run([
        "--config=mnist", f"--config.data.path={tmp_path / 'few.npz'}", "--config.data.size=8", f"--workdir={folder}",
        "--config.optimizer.warmup=1",
        "--config.net.channels=32", "--config.net.multipliers=1", "--config.net.attention_levels=0",
        "--config.net.num_blocks=1", "--config.train.batch_size=8", "--config.train.steps=2", "--config.sample.num=2",
        "--config.train.steps_per_call=1", "--config.sample.steps=2",
    ])  # fmt: skip
    words = [f"--workdir={folder}", "--synthetic", "8", "--seeds=2", "--classifier-steps=3", "--batch=8"]
    capsys.readouterr()
    with pytest.raises(DataError, match="no held-out pictures"):
        augment.run(words)
    with pytest.raises(ConfigError, match="--seeds at least 2"):
        augment.run([*words, "--seeds=1"])
    assert augment.run([*words, f"--held-out={tmp_path / 'test.npz'}"]) == 0
    printed = capsys.readouterr().out
    assert "24 real pictures of few, 30 held out; 2 seeds, 3 steps each; model at step 2" in printed
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][1:] == [
        "real", "real, augmented", "real + 8 synthetic", "real + 8 synthetic, augmented", "8 synthetic alone",
    ]  # fmt: skip
    assert (folder / "augment.md").read_text() in printed
