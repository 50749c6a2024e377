"""Folders of pictures, with sub-folder names as labels and captions from `metadata.jsonl`.

    folder/metadata.jsonl     {"file_name": "a/1.png", "text": "a red heart"}     one JSON object a line
    folder/a/1.png            label "a"

Every picture is turned upright, laid on white where it is transparent, cropped to its centre square and scaled.
Palettes, CMYK and the other 8-bit kinds are converted as Pillow does; of 16 bits the upper 8 are kept, of an animation
the first picture. Not read, and so skipped (see `faults`): pixels of 32 bits, whose range nobody states; more than
MAX_PIXELS or MAX_BYTES, which is asked before anything is decoded; whatever is damaged, or of another format.
"""

import concurrent.futures
import dataclasses
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jaxdiff.data import faults
from jaxdiff.data.dataset import Dataset
from jaxdiff.data.image import UNREADABLE
from jaxdiff.errors import ConfigError, DataError

MAX_PIXELS, MAX_BYTES = 2**26, 2**28  # of a picture: 8192 x 8192, and of its file
MAX_LINE = 2**20  # bytes of a line of metadata.jsonl
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow would hand others to programs such as Ghostscript
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_FIELDS = ("text", "caption", "name")
# Errors of the system that are there the next time too; a machine that is short of something is no fault of the data.
LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Pictures on disk, decoded when asked for: `pictures[i]` is uint8 (size, size, channels)."""

    files: tuple[Path, ...]
    size: int
    channels: int = 3
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    name: str = "folder"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.files[index]
        try:
            return _read(path, self.size, self.channels)
        except UNREADABLE as error:
            if getattr(error, "errno", None) in SHORT:
                raise
            raise DataError(f"the picture {path} cannot be read: {error!s:.300}. Repair or remove it.") from error

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one picture."""
        return self.size, self.size, self.channels

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels."""
        return len(self.label_names or ())

    def in_memory(self) -> Dataset:
        """Decode everything once. Pictures that cannot be read are black and in `skipped`: see `faults`."""
        images = np.zeros((len(self), *self.shape), np.uint8)
        found = faults.Faults(len(self))

        def decode(index: int) -> str | None:
            try:
                images[index] = self[index]
            except DataError as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            for i, fault in enumerate(pool.map(decode, range(len(self)))):
                if fault:
                    found.add({i: fault})
        return Dataset(images, self.labels, self.label_names, self.captions, self.name, found.found)


def folder(path: str | os.PathLike, size: int, *, channels: int = 3) -> Dataset:
    """Read a folder of pictures into memory as uint8 (n, size, size, channels); see `open_folder`."""
    return open_folder(path, size, channels=channels).in_memory()


def open_folder(path: str | os.PathLike, size: int, *, channels: int = 3) -> ImageFolder:
    """List a folder of pictures without decoding them: those of `metadata.jsonl`, else all, in order of their paths.

    First-level sub-folders are the labels. Captions are the fields text, caption or name of metadata.jsonl. Raises
    DataError for a missing or empty folder, a damaged metadata line, or a file name that leads out of the folder.
    """
    if size < 1 or channels not in (1, 3):
        raise ConfigError(f"size must be >= 1 and channels 1 or 3, got size={size}, channels={channels}.")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}. Name a directory of pictures.")
    metadata = root / "metadata.jsonl"
    files, captions = _read_metadata(root, metadata) if metadata.is_file() else (_find(root), None)
    if not files:
        raise DataError(f"the folder {root} holds no pictures. Known endings: {', '.join(SUFFIXES)}.")
    labels, label_names = _labels(root, files)
    return ImageFolder(tuple(files), size, channels, labels, label_names, captions, root.resolve().name)


def fit(picture: Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """A picture of any kind -> uint8 (size, size, channels): `plain`, centre-cropped, scaled (Lanczos)."""
    picture = plain(picture, channels)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(size, size, channels)


def plain(picture: Image.Image, channels: int = 3) -> Image.Image:
    """A picture of any kind in colours, or for one channel in grey: upright, on white, of 8 bits.

    Raises DataError for one of more than MAX_PIXELS, or of 32-bit pixels.
    """
    if picture.width * picture.height > MAX_PIXELS:
        raise DataError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS:,}; scale it down")
    if picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG"):
        raise DataError(f"pixels of mode {picture.mode!r} have 32 bits and no known range; save it with 8")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB" if channels == 3 else "L")


def _read(path: Path, size: int, channels: int) -> np.ndarray:
    """Three times where the system and not the picture is at fault: a network drive may stumble."""
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"it has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}; make it smaller")
    for pause in (0.1, 1.0, None):
        try:
            with Image.open(path, formats=FORMATS) as picture:
                return fit(picture, size, channels)
        except OSError as error:
            if pause is None or error.errno in (None, *LASTING):
                raise
            time.sleep(pause)
    raise AssertionError("the last of three tries returns or raises")


def _find(root: Path) -> list[Path]:
    found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    inside = root.resolve()
    paths = sorted(found, key=lambda p: p.relative_to(root).as_posix())
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise DataError(
                f"the link {path} leads out of the folder. Put the picture itself there: cp -rL makes copies."
            )
    return paths


def _read_metadata(root: Path, metadata: Path) -> tuple[list[Path], tuple[str, ...] | None]:
    files, captions = [], []
    for where, line in _lines(metadata):
        try:
            row = json.loads(line)
            name = row["file_name"]
            if not isinstance(name, str):
                raise TypeError(f"file_name is {type(name).__name__}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f'{where} must be a JSON object with "file_name": {error!r:.200}.') from error
        files.append(_inside(root, name, where))
        captions.append(next((row[field] for field in CAPTION_FIELDS if isinstance(row.get(field), str)), None))
    missing = captions.count(None)
    if missing == len(captions):
        return files, None
    if missing:
        raise DataError(f"{metadata}: {missing} of {len(captions)} lines have no {' / '.join(CAPTION_FIELDS)}.")
    return files, tuple(captions)


def _lines(metadata: Path) -> Iterator[tuple[str, str]]:
    """(where, line) for each line that is not empty, none of them read whole before it is known to be short."""
    with metadata.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"{metadata} line {number}"
            if len(line) > MAX_LINE:
                raise DataError(f"{where} is longer than {MAX_LINE:,} bytes. Shorten its caption.")
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8: {error}. Save the file as UTF-8.") from error
            if text:
                yield where, text


def _inside(root: Path, name: str, where: str) -> Path:
    path = root / name
    try:
        inside, there = path.resolve().is_relative_to(root.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, of bytes that no name has, a loop of links
        raise DataError(f"{where}: the file name {name[:200]!r} cannot be used: {error!r:.200}.") from error
    if not inside:
        raise DataError(f"{where}: the file name {name!r} leads out of the folder. Use paths inside it.")
    if not there:
        raise DataError(f"{where}: there is no file {path}.")
    return path


def _labels(root: Path, files: list[Path]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    parts = [path.relative_to(root).parts for path in files]
    if not all(len(part) > 1 for part in parts):
        return None, None
    names = sorted({part[0] for part in parts})
    return np.asarray([names.index(part[0]) for part in parts], np.int32), tuple(names)
