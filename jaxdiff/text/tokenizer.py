"""Captions -> token ids: a WordPiece tokenizer whose vocabulary comes from the captions themselves.

    vocabulary = [PAD] (id 0), [UNK], every character c and its continuation ##c, then whole words, most frequent first

Text is put in lower case, without accents and control characters, and split into words and single punctuation marks.
A word of the vocabulary is one token, any other is spelled; characters never seen become [UNK]. Counting whole words
(rather than merging pairs) makes the file a function of the captions alone, the same in every process and version.
"""

import collections
import contextlib
import json
import os
import string
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from jaxdiff.atomic import replacing
from jaxdiff.errors import ConfigError, DataError, JaxdiffError

PAD, UNKNOWN = "[PAD]", "[UNK]"
MAX_BYTES = 2**26  # of a tokenizer file; the largest published ones have a third of it


class Tokenizer:
    """Captions to ids with id 0 for padding. Made by `train` or `load`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    @property
    def vocab_size(self) -> int:
        """The number of ids, [PAD] and [UNK] included."""
        return self._backend.get_vocab_size()

    def encode(self, captions: Sequence[str], max_len: int) -> np.ndarray:
        """n captions -> int32 (n, max_len), padded with 0; "" gives zeros only, the null prompt.

        Captions of more than `max_len` tokens are cut, with a UserWarning that says how many. Raises ConfigError for
        a bare string or for `max_len` below 1.
        """
        if isinstance(captions, str):
            raise ConfigError(f"captions must be a sequence of strings, got a bare string. Write [{captions[:40]!r}].")
        if max_len < 1:
            raise ConfigError(f"max_len must be an integer >= 1, got {max_len}.")
        encoded = [e.ids for e in self._backend.encode_batch([clean(c) for c in captions], add_special_tokens=False)]
        ids = np.zeros((len(encoded), max_len), np.int32)
        for row, tokens in zip(ids, encoded, strict=True):
            row[: min(max_len, len(tokens))] = tokens[:max_len]
        warn_of_cuts([len(tokens) for tokens in encoded], max_len)
        return ids

    def unknown_words(self, caption: str) -> tuple[str, ...]:
        """The words of a caption that are not in the vocabulary and so will be spelled or lost."""
        words = _words(self._backend, clean(caption))
        return tuple(dict.fromkeys(word for word in words if self._backend.token_to_id(word) is None))

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json (the format of Hugging Face's `tokenizers`): it appears whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self._backend.to_str(pretty=True) + "\n", encoding="utf-8")


def train(captions: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """A tokenizer with the most frequent words of `captions`, at most `vocab_size` ids; ties in alphabetical order.

    Raises ConfigError when `vocab_size` does not even hold the characters.
    """
    empty = _build({PAD: 0, UNKNOWN: 1})
    counts = collections.Counter(word for caption in captions for word in _words(empty, clean(caption)))
    characters = sorted(set(string.ascii_lowercase + string.digits).union(*counts))
    pieces = [PAD, UNKNOWN, *characters, *("##" + c for c in characters)]
    if vocab_size < len(pieces):
        raise ConfigError(f"vocab_size must be at least {len(pieces)} to hold the characters, got {vocab_size}.")
    frequent = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces += frequent[: vocab_size - len(pieces)]
    return Tokenizer(_build({piece: i for i, piece in enumerate(pieces)}))


def load(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer.json that `save` wrote. Raises DataError when it is missing, damaged or not one of ours."""
    try:
        check_size(Path(path))
        text = Path(path).read_text(encoding="utf-8")
        model = json.loads(text)["model"]
        ours = model["type"] == "WordPiece" and model["vocab"][PAD] == 0
    except FileNotFoundError as error:
        raise DataError(f"there is no tokenizer at {path}. Train one with jaxdiff.text.train(captions).") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer.json or is damaged: {error!r}.") from error
    if not ours:
        raise DataError(f"{path} is another kind of tokenizer; this reads WordPiece with id 0 for {PAD}.")
    with named_damage(f"the tokenizer {path}"):
        return Tokenizer(tokenizers.Tokenizer.from_str(text))


@contextlib.contextmanager
def named_damage(what: str) -> Iterator[None]:
    """Whatever the library raises for a damaged file becomes a DataError: it knows Exception, and panics of Rust."""
    try:
        yield
    except JaxdiffError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"{what} is damaged: {type(error).__name__}: {error}. Get its files again.") from error
        raise


def check_size(path: Path) -> None:
    """Raise DataError for a file that is larger than any tokenizer."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{path} has {size:,} bytes; no tokenizer has more than {MAX_BYTES:,}.")


def _build(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=64))
    backend.normalizer = normalizers.BertNormalizer(strip_accents=True, lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    return backend


def _words(backend: tokenizers.Tokenizer, text: str) -> list[str]:
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]


def clean(caption: str) -> str:
    """Lone surrogates, which file names may hold, cannot be encoded: they become '?'."""
    return caption.encode("utf-8", "replace").decode("utf-8")


def warn_of_cuts(lengths: list[int], max_len: int) -> None:
    """Warn of captions that have more tokens than there is room for."""
    cut = sum(length > max_len for length in lengths)
    if cut:
        message = f"{cut} of {len(lengths)} captions have more than max_len={max_len} tokens (up to {max(lengths)})"
        warnings.warn(f"{message} and were cut. Raise max_len to keep them whole.", stacklevel=3)
