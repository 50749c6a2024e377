"""The networks that a run stands on and does not train, and what they make of its data: once, kept on the disk.

    frozen.autoencoder    DIR or DIR/vae as diffusers writes it, and as a finished run of emoji_autoencoder holds it
    frozen.text           DIR with text_encoder/ and tokenizer/, or with the files of both: a CLIP or a T5

    z = (mean - shift) scale,   q(z | picture) = N(mean, ...)        the data of a run in latents
    tokens, mask, pooled of each caption                             what its network is told

    coder = open_coder(DIR)                    dataset = encode(dataset, coder, CACHE)     a Dataset of float32 latents
    texts = open_texts(DIR, CACHE, max_len=32) rows = texts.rows(captions)                 (n, L, d), (n, L), (n, d)

In CACHE names are hashes of every weight and of the data or caption, so that others never meet; what a killed run has
encoded is found again. A run remembers the hashes in frozen.json, and is refused other weights than its own.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import features, inputs, workdir
from experiments.configs import Config
from jaxdiff import data, pretrained, text
from jaxdiff.data.dataset import not_finite
from jaxdiff.errors import CheckpointError, ConfigError, DataError
from jaxdiff.text.cache import Cache, fingerprint
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.types import Array, PyTree

CACHE = Path.home() / ".cache" / "jaxdiff" / "frozen"
PARTS = 16  # batches in each file of latents


@dataclasses.dataclass(frozen=True)
class Coder:
    """An `AutoencoderKL` or `AutoencoderTiny` with its parameters, which `encode` and `decode` take as an argument."""

    net: Any
    params: PyTree

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of its settings and of every bit of its parameters."""
        return fingerprint(self.net, self.params)

    def shape(self, pictures: Sequence[int]) -> tuple[int, ...]:
        """The shape of the latents of pictures of shape (h, w, c). Raises ConfigError where these do not fit."""
        factor, channels = self.net.factor, self.net.image_channels
        if len(pictures) != 3 or pictures[2] != channels or pictures[0] % factor or pictures[1] % factor:
            raise ConfigError(
                f"this autoencoder is for pictures of {channels} channels whose sides are multiples of {factor}, and "
                f"the examples are of shape {tuple(pictures)}. Give others, or another --config.frozen.autoencoder."
            )
        return pictures[0] // factor, pictures[1] // factor, self.net.latent_channels

    def encode(self, params: PyTree, x: Array) -> Array:
        """Pictures (b, h, w, c) in [-1, 1] -> latents as the diffusion sees them: the mean, nothing is drawn."""
        return self.net.normalize(self.net.apply(params, x, method="encode").mean)

    def decode(self, params: PyTree, z: Array) -> Array:
        """Those latents -> pictures, clipped to [-1, 1]."""
        return jnp.clip(self.net.apply(params, self.net.unnormalize(z), method="decode"), -1, 1)


def open_coder(path: str | Path) -> Coder:
    """The autoencoder in `path` or `path`/vae: of diffusers, or a tiny one as its author publishes it.

    Raises CheckpointError where there is none, or it is damaged.
    """
    folder = Path(path).expanduser()
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if (folder / "encoder.safetensors").is_file():
        return Coder(*pretrained.vae.tiny(folder))
    if not (folder / "config.json").is_file() or (folder / "checkpoints").is_dir():
        raise CheckpointError(
            f"there is no autoencoder in {folder}: a folder with vae/config.json. Train one to its end first: "
            "python -m experiments.train --config=emoji_autoencoder, or give --config.frozen.autoencoder=DIR."
        )
    return Coder(*pretrained.vae.load(folder))


def encode(dataset: inputs.Examples, coder: Coder, cache: str | Path = CACHE, *, batch: int = 16) -> data.Dataset:
    """The latents of a set of pictures, float32 in memory, with its labels and captions; made once, kept below `cache`.

    Pictures that cannot be read are `skipped`, as in `data.Dataset`. Raises ConfigError for pictures that do not fit.
    """
    coder.shape(dataset.shape)
    known = dataset.skipped if isinstance(dataset, data.Dataset) else {}
    key = features.digest([coder.fingerprint, _fingerprint(dataset)])
    apply, count = jax.jit(coder.encode), len(dataset)
    size = batch * min(PARTS, -(-count // batch))
    bar = tqdm(total=count, desc="encoding", unit="picture", dynamic_ncols=True)

    def make(rows: np.ndarray) -> np.ndarray:
        parts = []
        for some in rows.reshape(-1, batch):
            images, bad = _read(dataset, some)
            z = np.array(apply(coder.params, data.decode(images)))
            z[bad] = np.nan
            parts.append(z)
            bar.update(len(some))
        return np.concatenate(parts)

    with bar:
        z = features.in_parts(Path(cache).expanduser() / f"latents-{key}", count, size, make)
    skipped = {i: known.get(i, f"record {i} of {dataset.name} cannot be read.") for i in not_finite(z)}
    return data.Dataset(z, dataset.labels, dataset.label_names, dataset.captions, dataset.name, skipped)


def _read(dataset: inputs.Examples, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `rows`, and which of them cannot be used."""
    if isinstance(dataset, data.Dataset):
        return dataset.images[rows], np.isin(rows, [*dataset.skipped])
    images, bad = np.zeros((len(rows), *dataset.shape), np.uint8), np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        try:
            images[i] = dataset[int(row)]
        except DataError:
            bad[i] = True
    return images, bad


def _fingerprint(dataset: inputs.Examples) -> Any:
    """What names the content of a set: a hash of its pictures, or the names, sizes and times of its files."""
    if isinstance(dataset, data.Dataset):
        return [features.digest(dataset.images), sorted(dataset.skipped)]
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in dataset.files]
    return [dataset.size, dataset.channels, files]


@dataclasses.dataclass(frozen=True)
class Texts:
    """A `CLIPText` or `T5Encoder` with its tokenizer: captions to what a network is told, through a cache on disk."""

    model: Any
    params: PyTree
    tokenizer: text.PublishedTokenizer
    max_len: int
    cache: Path

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the encoder, its parameters, and what texts become before it."""
        return fingerprint(self.model, self.params, self.max_len, self.tokenizer.vocab_size)

    @functools.cached_property
    def _apply(self) -> Any:
        def apply(params: PyTree, ids: Array, mask: Array) -> TextFeatures:
            seen = (mask,) if isinstance(self.model, text.T5Encoder) else ()  # CLIP is causal: it needs none
            found: Any = self.model.apply(params, ids, *seen)
            return TextFeatures(found.tokens, mask, found.pooled)

        return jax.jit(apply)

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of a token and of `pooled`."""
        ids = jnp.zeros((1, self.max_len), jnp.int32)
        found = jax.eval_shape(self._apply, self.params, ids, ids > 0)
        return found.tokens.shape[-1], found.pooled.shape[-1]

    def rows(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """{'tokens': (n, max_len, d), 'mask': (n, max_len), 'pooled': (n, d)}, in float32, of n captions."""
        if not any(captions):  # which is asked for within programs too, where nothing is encoded
            return {name: np.repeat(row, len(captions), 0) for name, row in self.empty.items()}
        return self._encode(captions)

    @functools.cached_property
    def empty(self) -> dict[str, np.ndarray]:
        """The row of the empty caption."""
        return self._encode([""])

    def _encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        texts = [*captions, ""]  # with which batches are filled up
        tokens = self.tokenizer.encode(texts, self.max_len)  # all at once, so that one warning says how many are cut
        place = {caption: row for row, caption in enumerate(texts)}

        def encode(some: list[str]) -> TextFeatures:
            rows = [place[caption] for caption in some]
            return self._apply(self.params, tokens.ids[rows], tokens.mask[rows])

        return Cache(self.cache / "texts", self.fingerprint).get(captions, encode)._asdict()

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """None: what is no word of it is spelled."""
        del prompt
        return ()


def open_texts(path: str | Path, cache: str | Path = CACHE, *, max_len: int) -> Texts:
    """The text encoder and tokenizer in `path`. Raises CheckpointError, DataError or ConfigError where they are none.

    Texts are cut after `max_len` tokens, with a warning; CLIP takes up to 77.
    """
    folder = Path(path).expanduser()
    encoder, words = (folder / n if (folder / n).is_dir() else folder for n in ("text_encoder", "tokenizer"))
    if not (encoder / "config.json").is_file():
        raise CheckpointError(f"there is no text encoder in {folder}. Give --config.frozen.text=DIR.")
    kind = str(pretrained.files.config(encoder).get("model_type"))
    load = pretrained.text
    loaders = {"clip": load.clip_text, "clip_text_model": load.clip_text, "t5": load.t5}
    if kind not in loaders:
        raise ConfigError(f"{encoder}: a text encoder must be one of {', '.join(loaders)}, got {kind!r:.60}.")
    model, params = loaders[kind](encoder)
    tokenizer = text.open_tokenizer(words, max_len=max_len)
    most = getattr(model, "max_len", max_len)
    if max_len > most:
        raise ConfigError(f"text.max_len must be at most {most} for {encoder}, got {max_len}.")
    made = Texts(model, params, tokenizer, max_len, Path(cache).expanduser())
    made.rows([""])
    return made


def cache_of(config: Config) -> Path:
    """Where the config keeps what frozen networks made."""
    return Path(config.frozen.cache).expanduser() if config.frozen.cache else CACHE


def coder_of(config: Config) -> Coder | None:
    """The autoencoder of a config, None where it is of pixels."""
    return open_coder(config.frozen.autoencoder) if config.frozen.autoencoder else None


def texts_of(config: Config) -> Texts | None:
    """The published text encoder of a config, None where it trains its own or has no captions."""
    if not config.frozen.text:
        return None
    if config.condition != "caption":
        raise ConfigError(f"frozen.text is for captions, and condition={config.condition}: --config.frozen.text=''.")
    return open_texts(config.frozen.text, cache_of(config), max_len=config.text.max_len)


def remember(directory: Path, coder: Coder | None, texts: Any) -> None:
    """Write frozen.json: which weights this run stands on, where there are any."""
    if _hashes(coder, texts):
        workdir.write_json(directory / "frozen.json", _hashes(coder, texts))


def check(directory: Path, coder: Coder | None, texts: Any) -> None:
    """Raise CheckpointError where the run in `directory` stands on other weights than these."""
    path = directory / "frozen.json"
    known = workdir.load_json(path) if path.exists() else {}
    for name, value in _hashes(coder, texts).items():
        if isinstance(known, dict) and known.get(name, value) != value:
            raise CheckpointError(
                f"the frozen {name} is not the one that the run in {directory} stands on: its weights have changed. "
                f"Put them back, or train anew in another --workdir."
            )


def _hashes(coder: Coder | None, texts: Any) -> dict[str, str]:
    parts = {"autoencoder": coder, "text": texts if isinstance(texts, Texts) else None}
    return {name: part.fingerprint for name, part in parts.items() if part is not None}
