"""Whole pipelines: a folder as diffusers writes it, or an original single file, ready for `jaxdiff.pipelines`.

    pipe = pretrained.pipelines.load("stable-diffusion-v1-5")               and 2, XL, 3, 3.5, FLUX.1; DiT
    prompt, negative = pipe.tokenize(["a cat"], [""])                       host: ids
    cond = pipe.encode(pipe.params, prompt)                                 inside your jit: tokens, vector, sizes ...
    times = pipe.times(20)

What a network is told of texts is in `families`. Read are unet/ or transformer/, vae/, text_encoder/, tokenizer/ (each
also _2 and _3), scheduler/ and model_index.json; of the original single files, those of Stable Diffusion 1, 2 and XL.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.nets.sd_unet import SDUNet
from jaxdiff.nets.vae import AutoencoderKL
from jaxdiff.pipelines import LatentDiffusion
from jaxdiff.pretrained import families, files, schedulers, single_file, transformer, unet, vae
from jaxdiff.pretrained import text as encoders
from jaxdiff.pretrained.families import CLASSES, Family
from jaxdiff.pretrained.layout import Shardings
from jaxdiff.text.clip import CLIPText
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.text.prompts import Chunks, chunk
from jaxdiff.text.prompts import encode as encode_chunks
from jaxdiff.text.published import PublishedTokenizer, open_tokenizer
from jaxdiff.text.t5 import T5Encoder
from jaxdiff.types import Array, PyTree

INDEX = "model_index.json"
PATCH = 2
"""Height and width of the latents that are one token of every published transformer."""


class Prompts(NamedTuple):
    """Texts as arrays: the chunks for each text encoder, and 0 for each text that is to count as nothing, else 1."""

    chunks: tuple[Chunks, ...]
    present: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model, its text encoders, tokenizers and chain. `params` has "unet" (any network), "vae", "text_0", ...

    size: height and width of the pictures that it was trained on. empty_is_zero: XL's, whose empty text is zeros.
    """

    family: Family
    model: LatentDiffusion
    text: tuple[CLIPText | T5Encoder, ...]
    tokenizers: tuple[PublishedTokenizer, ...]
    chain: schedulers.Chain
    params: PyTree
    size: tuple[int, int]
    empty_is_zero: bool

    def times(self, num_steps: int, solver: str | None = None, *, size: tuple[int, int] | None = None) -> np.ndarray:
        """The grid of the chain for pictures of `size` (default: as trained), which FLUX's times depend on."""
        h, w = size or self.size
        tokens = h * w // (PATCH * self.model.vae.factor) ** 2
        return self.chain.times(num_steps, solver or self.chain.solver, tokens)

    def tokenize(self, prompts: Sequence[str], negatives: Sequence[str]) -> tuple[Prompts, Prompts]:
        """Prompts and negative prompts, as many of each, cut into chunks of one number: `text.prompts` has the syntax.

        Raises ConfigError for bare strings, numbers that differ, or a pipeline that draws classes.
        """
        if not self.text:
            raise ConfigError('this pipeline draws classes, not texts: give {"labels": ...} in place of encoded texts.')
        if isinstance(negatives, str) or len(prompts) != len(negatives):
            raise ConfigError(f"give a negative prompt for each prompt, got {negatives!r:.60}. Use [''] * n for none.")
        n = len(prompts)
        both = [chunk(tokenizer, [*prompts, *negatives]) for tokenizer in self.tokenizers]
        clips = [isinstance(encoder, CLIPText) for encoder in self.text]  # laid side by side, so of one number
        count = max(part.ids.shape[1] for part, clip in zip(both, clips, strict=True) if clip)
        both = [
            chunk(tokenizer, [*prompts, *negatives], chunks=count if clip else None)
            for tokenizer, clip in zip(self.tokenizers, clips, strict=True)
        ]
        zero = np.asarray([self.empty_is_zero and text == "" for text in negatives])
        present = np.concatenate([np.ones(n, np.float32), 1 - zero.astype(np.float32)])
        halves = (slice(None, n), slice(n, None))
        first, second = (
            Prompts(tuple(Chunks(part.ids[half], part.weights[half]) for part in both), present[half])
            for half in halves
        )
        return first, second

    def encode(
        self,
        params: PyTree,
        prompts: Prompts,
        *,
        size: tuple[int, int] | None = None,
        skip: int = 0,
        guidance: Any = 3.5,
    ) -> dict[str, Array]:
        """What the network is told of the texts. Works inside jit: prompts are arrays.

        size: that of the pictures, which XL is told (default: as trained). skip: leave out so many more of the last
        layers of CLIP (clip skip). guidance: a number or (b,), which FLUX dev is told in place of being guided.
        """

        def features(i: int) -> TextFeatures:
            def apply(ids: Array) -> Any:
                net, inner = self.text[i], self.family.inner
                settings = {"skip": skip + inner, "final_norm": not inner} if isinstance(net, CLIPText) else {}
                return net.apply(params[f"text_{i}"], ids, **settings)

            return encode_chunks(apply, prompts.chunks[i])

        present = jnp.asarray(prompts.present)[:, None]
        parts = [features(i) for i in range(len(self.text))]
        parts = [TextFeatures(p.tokens * present[:, None], p.mask, p.pooled * present) for p in parts]
        return self.family.told(parts, self.model.unet, size or self.size, guidance)


def load(
    path: str | os.PathLike,
    *,
    configs: str | os.PathLike | None = None,
    variant: str | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> Pipeline:
    """A pipeline from its folder, or from an original single file and the folder of its `configs`.

    variant: "fp16" reads such files. dtype: that of the computation, of network and autoencoder; param_dtype: that in
    which their parameters and T5's are kept. shardings: from the shapes of a part, such as `train.mesh.state_sharding`.
    Raises CheckpointError, UnsafeFileError or DataError, naming the file.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else Path(configs or "").expanduser()
    if not path.is_dir() and configs is None:
        raise ConfigError(f"{path} is one file (or nothing): give configs=, the folder with its JSON and tokenizer.")
    index = files.config(folder, INDEX)
    family = _family(folder, index)
    present = [i for i, name in enumerate(_names(family)) if i < 2 or index.get(name) != [None, None]]
    sources = _folders(folder, family, present, variant) if path.is_dir() else _single(path, folder, family)
    chain = schedulers.read(
        files.config(folder / "scheduler", "scheduler_config.json"), to_last=family is families.FLUX
    )
    settings = {"dtype": dtype, "param_dtype": param_dtype, "shardings": shardings}
    params: dict[str, Any] = {}
    module = unet if family.net is SDUNet else transformer
    if not isinstance(module.network(sources["unet"][1]), family.net):
        raise CheckpointError(
            f"{folder}: its {family.folder}/ is not of the class that {INDEX} asks for. Get it again."
        )
    net, params["unet"] = module.load(*sources["unet"], **settings)
    coder, params["vae"] = vae.load(*sources["vae"], **settings)
    text = []
    for i in present:
        read = partial(encoders.t5, param_dtype=param_dtype) if family.text[i] == "t5" else encoders.clip_text
        encoder, params[f"text_{i}"] = read(*sources[f"text_{i}"], shardings=shardings)
        text.append(encoder)
    tokenizers = tuple(_tokenizer(folder, i, encoder, net) for i, encoder in zip(present, text, strict=True))
    learned = family is families.DIT and net.out_channels == 2 * net.in_channels
    model = LatentDiffusion(net, coder, chain.schedule, chain.target, chain.time_input, learned_range=learned)
    side = module.sample_size(sources["unet"][1]) * coder.factor
    zero = bool(index.get("force_zeros_for_empty_prompt"))
    return Pipeline(family, model, tuple(text), tokenizers, chain, params, (side, side), zero)


def export(folder: str | os.PathLike, pipe: Pipeline, configs: str | os.PathLike, *, dtype: Any = None) -> None:
    """Write `pipe` as a folder that diffusers loads; JSON and tokenizers that are not ours come from `configs`.

    `configs` is the folder that it was loaded from; of it are copied model_index.json, scheduler/ and tokenizer/.
    """
    folder, configs = Path(folder), Path(configs)
    module = unet if pipe.family.net is SDUNet else transformer
    module.export(folder / pipe.family.folder, pipe.model.unet, pipe.params["unet"], dtype=dtype)
    vae.export(folder / "vae", pipe.model.vae, pipe.params["vae"], dtype=dtype)
    for i, encoder in enumerate(pipe.text):
        encoders.export(folder / _names(pipe.family)[i], encoder, pipe.params[f"text_{i}"], dtype=dtype)
    for name in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        if (configs / name).is_dir():
            shutil.copytree(configs / name, folder / name, dirs_exist_ok=True)
    index = files.config(configs, INDEX)
    kept = {k: v for k, v in index.items() if k not in ("safety_checker", "feature_extractor", "image_encoder")}
    (folder / INDEX).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _family(folder: Path, index: Mapping[str, Any]) -> Family:
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise CheckpointError(f"{folder / INDEX}: _class_name must be one of {', '.join(CLASSES)}, got {kind!r:.60}.")
    return CLASSES[kind]


def _names(family: Family) -> list[str]:
    """The folders of the text encoders."""
    return ["text_encoder" if i == 0 else f"text_encoder_{i + 1}" for i in range(len(family.text))]


def _tokenizer(folder: Path, i: int, encoder: CLIPText | T5Encoder, net: Any) -> PublishedTokenizer:
    name = "tokenizer" if i == 0 else f"tokenizer_{i + 1}"
    if isinstance(encoder, CLIPText):
        return open_tokenizer(folder / name, max_len=encoder.max_len)
    tokenizer = open_tokenizer(folder / name)
    tokenizer.max_len = families.t5_len(net)  # its folder names the most that T5 was trained on
    return tokenizer


Sources = Mapping[str, tuple[Any, Mapping[str, Any]]]


def _folders(folder: Path, family: Family, present: Sequence[int], variant: str | None) -> Sources:
    """part -> (tensors, config), of a diffusers folder."""
    names = {"unet": family.folder, "vae": "vae"} | {f"text_{i}": _names(family)[i] for i in present}
    return {
        part: (files.read(folder / name, variant=variant), files.config(folder / name)) for part, name in names.items()
    }


def _single(path: Path, folder: Path, family: Family) -> Sources:
    """The same of an original single file."""
    if family.net is not SDUNet:
        raise CheckpointError(f"{path}: of single files only Stable Diffusion 1, 2 and XL are known. Name its folder.")
    tensors = files.read(path)
    configs = {p: files.config(folder / p) for p in ("unet", "vae")}
    coder = vae.network(configs["vae"])
    if not isinstance(coder, AutoencoderKL):
        raise CheckpointError(f"{folder}/vae/config.json must be of an AutoencoderKL: an original file holds no other.")
    found: dict[str, tuple[Any, Any]] = {
        "unet": (single_file.unet(tensors, unet.network(configs["unet"])), configs["unet"]),
        "vae": (single_file.vae(tensors, coder), configs["vae"]),
    }  # fmt: skip
    for i, name in enumerate(_names(family)):
        found[f"text_{i}"] = (single_file.text(tensors, i), files.config(folder / name))
    return found
