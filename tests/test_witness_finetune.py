"""Second witness: what was trained here is loaded by diffusers and peft, which then compute the same."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import cli, export, finetune
from jaxdiff.pretrained import lora
from jaxdiff.pretrained import pipelines as published
from jaxdiff.train import checkpoint

torch = pytest.importorskip("torch", reason="needs the witness extra: torch, diffusers, transformers")
diffusers = pytest.importorskip("diffusers", reason="needs the witness extra: torch, diffusers, transformers")
peft = pytest.importorskip("peft", reason="needs the witness extra: peft")
diffusers.utils.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

FOLDER = Path(__file__).parent / "fixtures" / "tiny_sd"


@pytest.fixture(autouse=True)
def exact():
    """The products of float32 as exact as the machine has them, and JAX's default promotion, as diffusers' users do."""
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def pipe():
    return published.load(FOLDER, variant="fp16")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """The fixture in full precision, as diffusers reads it without being told a variant."""
    path = tmp_path_factory.mktemp("tiny") / "sd"
    published.export(path, pipe, FOLDER)
    return path


@pytest.fixture(scope="module")
def trained(pipe):
    """A LoRA that is away from zero, of attention and convolutions, with a scale of its own."""
    start = lora.init(jax.random.key(0), pipe.params, rank=2, alpha=3.0, match=".*(to_q|to_out_0|conv1)/kernel")
    rng = np.random.default_rng(0)
    factors, fixed = lora.split(start)
    return lora.join(jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), factors), fixed)


def ours(pipe, params):
    rng = np.random.default_rng(1)
    x, tokens = (np.float32(rng.normal(size=shape)) for shape in ((1, 8, 8, 4), (1, 7, 12)))
    y = pipe.model.unet.apply(params["unet"], x, jnp.float32([500]), tokens=tokens)
    return x, tokens, np.asarray(y)


def theirs(net, x, tokens):
    with torch.no_grad():
        y = net(
            torch.from_numpy(np.moveaxis(x, -1, 1).copy()),
            torch.tensor([500]),
            encoder_hidden_states=torch.from_numpy(tokens),
        )
    return np.moveaxis(y.sample.numpy(), 1, -1)


@pytest.mark.parametrize("layout", lora.LAYOUTS)
def test_a_lora_is_theirs_in_every_layout(pipe, folder, trained, layout, tmp_path):
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    name = "adapter_model.safetensors" if layout == "peft" else "pytorch_lora_weights.safetensors"
    lora.export(tmp_path / name, trained, pipe.params, layout=layout)
    x, tokens, wanted = ours(pipe, lora.merge(pipe.params, trained))
    plain = theirs(loaded.unet, x, tokens)
    if layout == "peft":
        net = peft.PeftModel.from_pretrained(loaded.unet, tmp_path)
    else:
        loaded.load_lora_weights(tmp_path, weight_name=name)
        net = loaded.unet
    found = theirs(net, x, tokens)
    assert np.abs(found - plain).max() > 0.1  # the addition is heard
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def written(folder, tmp_path, method):
    """What is written out of a run of `method` whose parameters have moved, and its command line's config."""
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    settings = {
        "pretrained": folder, "tune.method": method, "tune.prompt": "a <cat>", "tune.token": "<cat>", "tune.like": "a",
        "tune.rank": 2, "tune.alpha": 3, "data.path": tmp_path / "pictures", "data.size": 16, "train.batch_size": 8,
    }  # fmt: skip
    config = cli.load_config("finetune")
    for key, value in settings.items():
        cli.override(config, key, str(value))
    run = finetune.Tuning(config, tmp_path / "run")
    (tmp_path / "run").mkdir()
    run.write_header()
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        run.fresh(),
    )
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(moved, 1, run.meta)
    assert export.run([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 0
    pipe = finetune.open_pipeline(config)
    whole = run.model.method.complete(moved["state"].ema_params["ema"], pipe.params)
    return tmp_path / "out", pipe, whole


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_is_written_as_they_load_it(folder, tmp_path, method):
    out, pipe, whole = written(folder, tmp_path, method)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(out if method == "full" else folder)
    if method == "lora":
        loaded.load_lora_weights(out)
    x, tokens, wanted = ours(pipe, whole)
    assert np.abs(wanted - ours(pipe, pipe.params)[2]).max() > 0.1
    np.testing.assert_allclose(theirs(loaded.unet, x, tokens), wanted, rtol=0, atol=1e-5)


def test_a_learned_word_is_theirs(folder, tmp_path):
    out, pipe, whole = written(folder, tmp_path, "textual_inversion")
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    loaded.load_textual_inversion(out)
    prompt, _ = pipe.tokenize(["a <cat> on a mat"], [""])
    found = loaded.encode_prompt("a <cat> on a mat", "cpu", 1, False)[0].detach().numpy()
    np.testing.assert_allclose(found, pipe.encode(whole, prompt)["tokens"], rtol=0, atol=1e-5)
    assert np.abs(found - pipe.encode(pipe.params, prompt)["tokens"]).max() > 1e-2
