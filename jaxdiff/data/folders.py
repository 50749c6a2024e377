"""Folders of pictures, with sub-folder names as labels and captions from `metadata.jsonl`.

    folder/metadata.jsonl     {"file_name": "a/1.png", "text": "a red heart"}     one JSON object a line
    folder/a/1.png            label "a"

Every picture is turned upright, laid on white where it is transparent, cropped to its centre square and scaled.
"""

import concurrent.futures
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jaxdiff.data.dataset import Dataset
from jaxdiff.errors import ConfigError, DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_FIELDS = ("text", "caption", "name")


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
            with Image.open(path) as picture:
                return fit(picture, self.size, self.channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"the picture {path} cannot be read: {error}. Repair or remove it.") from error

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one picture."""
        return self.size, self.size, self.channels

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels."""
        return len(self.label_names or ())

    def in_memory(self) -> Dataset:
        """Decode everything once."""
        images = np.empty((len(self), *self.shape), np.uint8)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for i, image in enumerate(pool.map(self.__getitem__, range(len(self)))):
                images[i] = image
        return Dataset(images, self.labels, self.label_names, self.captions, self.name)


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
    """A picture of any kind -> uint8 (size, size, channels): upright, on white, centre-cropped, scaled (Lanczos)."""
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB" if channels == 3 else "L")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(size, size, channels)


def _find(root: Path) -> list[Path]:
    found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _read_metadata(root: Path, metadata: Path) -> tuple[list[Path], tuple[str, ...] | None]:
    files, captions = [], []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{metadata} line {number}"
        try:
            row = json.loads(line)
            name = str(row["file_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{where} must be a JSON object with "file_name": {error!r}.') from error
        files.append(_inside(root, name, where))
        captions.append(next((row[field] for field in CAPTION_FIELDS if isinstance(row.get(field), str)), None))
    missing = captions.count(None)
    if missing == len(captions):
        return files, None
    if missing:
        raise DataError(f"{metadata}: {missing} of {len(captions)} lines have no {' / '.join(CAPTION_FIELDS)}.")
    return files, tuple(captions)


def _inside(root: Path, name: str, where: str) -> Path:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where}: the file name {name!r} leads out of the folder. Use paths inside it.")
    if not path.is_file():
        raise DataError(f"{where}: there is no file {path}.")
    return path


def _labels(root: Path, files: list[Path]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    parts = [path.relative_to(root).parts for path in files]
    if not all(len(part) > 1 for part in parts):
        return None, None
    names = sorted({part[0] for part in parts})
    return np.asarray([names.index(part[0]) for part in parts], np.int32), tuple(names)
