"""Whole Stable Diffusions: a folder as diffusers writes it, or an original single file, ready for `jaxdiff.pipelines`.

    pipe = pretrained.pipelines.load("stable-diffusion-v1-5")
    prompt, negative = pipe.tokenize(["a cat"], [""])                       host: ids
    cond = pipe.encode(pipe.params, prompt)                                 inside your jit: tokens, vector, sizes

    SD 1, SD 2    tokens of the text encoder
    SDXL          [tokens of encoder 1, of encoder 2], both before the last layer; vector: pooled text of encoder 2;
                  sizes: (height, width, 0, 0, height, width)

Read are unet/, vae/, text_encoder/ (and _2), tokenizer/ (and _2), scheduler/ and model_index.json.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.nets.vae import AutoencoderKL
from jaxdiff.pipelines import LatentDiffusion
from jaxdiff.pretrained import files, schedulers, single_file, unet, vae
from jaxdiff.pretrained import text as encoders
from jaxdiff.text.clip import CLIPText
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.text.prompts import Chunks, chunk
from jaxdiff.text.prompts import encode as encode_chunks
from jaxdiff.text.published import PublishedTokenizer, open_tokenizer
from jaxdiff.types import Array, PyTree

INDEX = "model_index.json"
CLASSES = {
    "StableDiffusionPipeline": 1, "StableDiffusionImg2ImgPipeline": 1, "StableDiffusionInpaintPipeline": 1,
    "StableDiffusionXLPipeline": 2, "StableDiffusionXLImg2ImgPipeline": 2, "StableDiffusionXLInpaintPipeline": 2,
}  # fmt: skip
"""The pipelines of diffusers that are read, and how many text encoders they have."""


class Prompts(NamedTuple):
    """Texts as arrays: the chunks for each text encoder, and 0 for each text that is to count as nothing, else 1."""

    chunks: tuple[Chunks, ...]
    present: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model, its text encoders, tokenizers and chain. `params` has "unet", "vae", "text_0" and perhaps "text_1".

    size: height and width of the pictures that it was trained on. empty_is_zero: XL's, whose empty text is zeros.
    """

    model: LatentDiffusion
    text: tuple[CLIPText, ...]
    tokenizers: tuple[PublishedTokenizer, ...]
    chain: schedulers.Chain
    params: PyTree
    size: tuple[int, int]
    empty_is_zero: bool

    def tokenize(self, prompts: Sequence[str], negatives: Sequence[str]) -> tuple[Prompts, Prompts]:
        """Prompts and negative prompts, as many of each, cut into chunks of one number: `text.prompts` has the syntax.

        Raises ConfigError for bare strings, or numbers that differ.
        """
        if isinstance(negatives, str) or len(prompts) != len(negatives):
            raise ConfigError(f"give a negative prompt for each prompt, got {negatives!r:.60}. Use [''] * n for none.")
        n = len(prompts)
        both = [chunk(tokenizer, [*prompts, *negatives]) for tokenizer in self.tokenizers]
        count = max(part.ids.shape[1] for part in both)
        both = [chunk(tokenizer, [*prompts, *negatives], chunks=count) for tokenizer in self.tokenizers]
        zero = np.asarray([self.empty_is_zero and text == "" for text in negatives])
        present = np.concatenate([np.ones(n, np.float32), 1 - zero.astype(np.float32)])
        halves = (slice(None, n), slice(n, None))
        first, second = (
            Prompts(tuple(Chunks(part.ids[half], part.weights[half]) for part in both), present[half])
            for half in halves
        )
        return first, second

    def encode(
        self, params: PyTree, prompts: Prompts, *, size: tuple[int, int] | None = None, skip: int = 0
    ) -> dict[str, Array]:
        """What the network is told of the texts. Works inside jit: prompts are arrays.

        size: that of the pictures, which XL is told (default: as trained). skip: leave out so many more of the last
        layers of the text encoders (clip skip).
        """
        xl = len(self.text) > 1

        def features(i: int) -> TextFeatures:
            def apply(ids: Array) -> Any:
                return self.text[i].apply(params[f"text_{i}"], ids, skip=skip + xl, final_norm=not xl)

            return encode_chunks(apply, prompts.chunks[i])

        present = jnp.asarray(prompts.present)
        parts = [features(i) for i in range(len(self.text))]
        tokens = jnp.concatenate([part.tokens for part in parts], axis=-1) * present[:, None, None]
        if not xl:
            return {"tokens": tokens}
        h, w = size or self.size
        sizes = jnp.asarray([[h, w, 0, 0, h, w]], jnp.float32)
        sizes = jnp.broadcast_to(sizes, (tokens.shape[0], sizes.shape[1]))
        return {"tokens": tokens, "vector": parts[-1].pooled * present[:, None], "sizes": sizes}


def load(
    path: str | os.PathLike,
    *,
    configs: str | os.PathLike | None = None,
    variant: str | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Pipeline:
    """A Stable Diffusion 1, 2 or XL from its folder, or from an original single file and the folder of its `configs`.

    variant: "fp16" reads such files. dtype: that of the computation, of U-Net and autoencoder; param_dtype: that in
    which their parameters are kept. Raises CheckpointError, UnsafeFileError or DataError, naming the file.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else Path(configs or "").expanduser()
    if not path.is_dir() and configs is None:
        raise ConfigError(f"{path} is one file (or nothing): give configs=, the folder with its JSON and tokenizer.")
    index = files.config(folder, INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise CheckpointError(f"{folder / INDEX}: _class_name must be one of {', '.join(CLASSES)}, got {kind!r:.60}.")
    sources = _folders(folder, CLASSES[kind], variant) if path.is_dir() else _single(path, folder, CLASSES[kind])
    chain = schedulers.read(files.config(folder / "scheduler", "scheduler_config.json"))
    settings = {"dtype": dtype, "param_dtype": param_dtype}
    params: dict[str, Any] = {}
    net, params["unet"] = unet.load(*sources["unet"], **settings)
    coder, params["vae"] = vae.load(*sources["vae"], **settings)
    text = []
    for i in range(CLASSES[kind]):
        encoder, params[f"text_{i}"] = encoders.clip_text(*sources[f"text_{i}"])
        text.append(encoder)
    names = ["tokenizer", "tokenizer_2"][: len(text)]
    tokenizers = tuple(open_tokenizer(folder / name, max_len=e.max_len) for name, e in zip(names, text, strict=True))
    model = LatentDiffusion(net, coder, chain.schedule, chain.target, chain.time_input)
    side = unet.sample_size(sources["unet"][1]) * coder.factor
    zero = bool(index.get("force_zeros_for_empty_prompt"))
    return Pipeline(model, tuple(text), tokenizers, chain, params, (side, side), zero)


def export(folder: str | os.PathLike, pipe: Pipeline, configs: str | os.PathLike, *, dtype: Any = None) -> None:
    """Write `pipe` as a folder that diffusers loads; JSON and tokenizers that are not ours come from `configs`.

    `configs` is the folder that it was loaded from; of it are copied model_index.json, scheduler/ and tokenizer/.
    """
    folder, configs = Path(folder), Path(configs)
    unet.export(folder / "unet", pipe.model.unet, pipe.params["unet"], dtype=dtype)
    vae.export(folder / "vae", pipe.model.vae, pipe.params["vae"], dtype=dtype)
    for i, encoder in enumerate(pipe.text):
        name = "text_encoder" if i == 0 else f"text_encoder_{i + 1}"
        encoders.export(folder / name, encoder, pipe.params[f"text_{i}"], dtype=dtype)
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        if (configs / name).is_dir():
            shutil.copytree(configs / name, folder / name, dirs_exist_ok=True)
    index = files.config(configs, INDEX)
    kept = {k: v for k, v in index.items() if k not in ("safety_checker", "feature_extractor", "image_encoder")}
    (folder / INDEX).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


Sources = Mapping[str, tuple[Any, Mapping[str, Any]]]


def _folders(folder: Path, count: int, variant: str | None) -> Sources:
    """part -> (tensors, config), of a diffusers folder."""
    names = {"unet": "unet", "vae": "vae", "text_0": "text_encoder", "text_1": "text_encoder_2"}
    wanted = ["unet", "vae", *[f"text_{i}" for i in range(count)]]
    return {p: (files.read(folder / names[p], variant=variant), files.config(folder / names[p])) for p in wanted}


def _single(path: Path, folder: Path, count: int) -> Sources:
    """The same of an original single file."""
    tensors = files.read(path)
    configs = {p: files.config(folder / p) for p in ("unet", "vae")}
    coder = vae.network(configs["vae"])
    if not isinstance(coder, AutoencoderKL):
        raise CheckpointError(f"{folder}/vae/config.json must be of an AutoencoderKL: an original file holds no other.")
    found: dict[str, tuple[Any, Any]] = {
        "unet": (single_file.unet(tensors, unet.network(configs["unet"])), configs["unet"]),
        "vae": (single_file.vae(tensors, coder), configs["vae"]),
    }  # fmt: skip
    for i in range(count):
        config = files.config(folder / ("text_encoder" if i == 0 else f"text_encoder_{i + 1}"))
        found[f"text_{i}"] = (single_file.text(tensors, i), config)
    return found
