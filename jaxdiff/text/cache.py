"""Embeddings of captions on the disk, so that training runs the text encoder once for each.

    folder/ab/abcd...64 hex digits.safetensors      tokens (L, d), mask (L,), pooled (d,)
    the name is sha256(encoder, caption):  another encoder, or other weights, never meet

A file appears whole or not at all, so that processes may share a folder; one that is damaged is made again.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from jaxdiff.atomic import replacing
from jaxdiff.errors import ConfigError
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.types import PyTree


def fingerprint(model: nn.Module, params: PyTree, *more: object) -> str:
    """What names an encoder: its settings and every bit of its parameters; `more` e.g. clip-skip or the tokenizer."""
    digest = hashlib.sha256(repr((model, more)).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.ascontiguousarray(leaf)
        digest.update(repr((jax.tree_util.keystr(path), array.shape, str(array.dtype))).encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


class Cache:
    """`Cache(folder, fingerprint(...)).get(captions, encode)` -> TextFeatures of NumPy arrays, one row a caption.

    `encode` takes at most `batch` captions and returns their TextFeatures, all of one length L; the last batch is
    filled up with empty captions, so that it compiles once.
    """

    def __init__(self, folder: str | os.PathLike, encoder: str, *, batch: int = 32) -> None:
        if batch < 1:
            raise ConfigError(f"batch must be an integer >= 1, got {batch}.")
        self._folder, self._encoder, self._batch = Path(folder).expanduser(), encoder, batch

    def get(self, captions: Sequence[str], encode: Callable[[list[str]], TextFeatures]) -> TextFeatures:
        """The features of each caption: read where they are known, else made and written.

        Raises ConfigError for a bare string, or where captions of one call have features of different shapes.
        """
        if isinstance(captions, str) or not captions:
            raise ConfigError(f"captions must be a sequence of one or more strings, got {captions!r:.40}.")
        known = {caption: self._read(caption) for caption in dict.fromkeys(captions)}
        rows = {caption: row for caption, row in known.items() if row is not None}
        missing = [caption for caption, row in known.items() if row is None]
        for i in range(0, len(missing), self._batch):
            part = missing[i : i + self._batch]
            features = encode(part + [""] * (self._batch - len(part)))
            for j, caption in enumerate(part):
                rows[caption] = tuple(np.asarray(u[j]) for u in features)
                self._write(caption, rows[caption])
        if len({tuple(u.shape for u in row) for row in rows.values()}) > 1:
            raise ConfigError("the features of these captions differ in shape: encode all to one length.")
        return TextFeatures._make(np.stack(u) for u in zip(*(rows[c] for c in captions), strict=True))

    def _path(self, caption: str) -> Path:
        text = caption.encode("utf-8", "surrogatepass")
        name = hashlib.sha256(self._encoder.encode() + b"\0" + text).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

    def _read(self, caption: str) -> tuple[np.ndarray, ...] | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(caption), framework="np") as file:
                return tuple(file.get_tensor(name) for name in TextFeatures._fields)
        except (OSError, SafetensorError):
            return None

    def _write(self, caption: str, row: tuple[np.ndarray, ...]) -> None:
        from safetensors import numpy

        path = self._path(caption)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.array(u, order="C") for name, u in zip(TextFeatures._fields, row, strict=True)}
        with replacing(path) as temporary:
            numpy.save_file(arrays, temporary)
