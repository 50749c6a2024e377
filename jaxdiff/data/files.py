"""Array files from outside: read without running code, and never more allocated than the file can hold.

    .npy   magic, version, length of the header, {'descr': '|u1', 'fortran_order': False, 'shape': (7, 6, 3), }, values
    .npz   a zip archive of .npy files, stored or deflated
    IDX    0, 0, type (8 = uint8), rank, then big-endian sizes, then the values; plain or gzipped

The sizes that a header claims are held against the bytes that are there before anything of that size is made: deflate
makes at most 1,032 bytes of one.
"""

import contextlib
import gzip
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxdiff.errors import DataError, UnsafeFileError

DEFLATE = 1032  # its largest ratio
MAX_MEMBERS, MAX_HEADER = 100, 10_000
_HEADER = re.compile(
    r"\{'descr': '(?P<descr>[<>|=]?[A-Za-z]\d{0,9})', 'fortran_order': (?P<fortran>False|True), "
    r"'shape': \((?P<shape>(?:\d{1,18}(?:, ?|(?=\))))*)\),? *\}\s*"
)
_DAMAGED = (
    OSError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, NotImplementedError, RuntimeError,
    struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


class _Bytes(Protocol):
    def read(self, size: int, /) -> bytes: ...


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Answer whatever a damaged file makes the standard library raise with DataError."""
    try:
        yield
    except (DataError, UnsafeFileError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}.") from error
    except MemoryError as error:
        raise DataError(
            f"{path} holds more than there is memory for. Split it, or give a folder of pictures."
        ) from error
    except _DAMAGED as error:
        raise DataError(f"{path} is damaged: {error!r:.300}. Write or fetch it again.") from error


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file. Raises UnsafeFileError for pickled content, DataError for a damaged file."""
    with _reading(path), path.open("rb") as file:
        return _npy(file, os.fstat(file.fileno()).st_size, str(path))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; raises as `read_npy`."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{path} holds {len(members)} arrays; at most {MAX_MEMBERS} are read.")
        arrays = {}
        for member in members:
            where = f"{member.filename[:100]!r} in {path}"
            packed, size = member.compress_size, member.file_size
            ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE}.get(member.compress_type, 0)
            if size > ratio * packed or packed > path.stat().st_size:
                raise DataError(
                    f"{where} claims {size:,} bytes out of {packed:,}: damaged, or not made by numpy.savez."
                )
            with archive.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = _npy(file, size, where)
        return arrays


def _npy(file: _Bytes, length: int, where: str) -> np.ndarray:
    """One array out of exactly `length` bytes."""
    magic = file.read(8)
    if magic[:1] == b"\x80":
        raise UnsafeFileError(f"refusing {where}: it is a pickle, which can run code. Save plain arrays by numpy.save.")
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise DataError(f"{where} is damaged or no .npy file. Save arrays by numpy.save or numpy.savez.")
    width = 2 * magic[6]
    size = int.from_bytes(file.read(width), "little")
    if size > min(MAX_HEADER, length):
        raise DataError(f"{where} is damaged: its header claims {size:,} bytes.")
    header = _HEADER.fullmatch(file.read(size).decode("latin-1"))
    if header is None:
        raise DataError(f"{where} is damaged, or an array of records. Save plain arrays of numbers or text.")
    dtype, shape = _dtype(header["descr"], where), tuple(int(n) for n in re.findall(r"\d+", header["shape"]))
    rest = length - 8 - width - size
    if math.prod(shape) * dtype.itemsize != rest or len(shape) > 32:
        raise DataError(f"{where} is damaged: {dtype} {shape} are not the {rest:,} bytes that it holds.")
    values = np.frombuffer(_exactly(file, rest, where), dtype) if rest else np.empty(0, dtype)
    return values.reshape(shape, order="F" if header["fortran"] == "True" else "C")


def _dtype(descr: str, where: str) -> np.dtype:
    if "O" in descr:
        raise UnsafeFileError(f"refusing {where}: pickled objects can run code. Save plain arrays of numbers or text.")
    dtype = np.dtype(descr)
    if dtype.kind not in "biufU" or dtype.itemsize == 0:
        raise DataError(f"{where} holds {dtype}; only numbers and text are read.")
    return dtype


def _exactly(file: _Bytes, length: int, where: str) -> bytes:
    content = file.read(length)
    if len(content) != length or file.read(1):
        raise DataError(f"{where} is damaged: it should hold {length:,} more bytes after its header.")
    return content


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The uint8 array of folder/name or folder/name.gz. Raises DataError for a missing or damaged file."""
    plain, packed = folder / name, folder / f"{name}.gz"
    path = packed if packed.exists() else plain
    if not path.exists():
        raise DataError(f"there is neither {plain} nor {packed.name} beside it.")
    with _reading(path), gzip.open(path) if path is packed else path.open("rb") as file:
        start = file.read(4)
        rank = start[3] if start[:3] == b"\0\0\x08" and len(start) == 4 else 0
        sizes = file.read(4 * rank)
        if not 1 <= rank <= 3 or len(sizes) != 4 * rank:
            raise DataError(f"{path} is damaged or is not an IDX file of bytes.")
        shape = struct.unpack(f">{rank}I", sizes)
        if math.prod(shape) > path.stat().st_size * (DEFLATE if path is packed else 1):
            raise DataError(f"{path} is damaged: it claims {' x '.join(map(str, shape))} bytes.")
        return np.frombuffer(_exactly(file, math.prod(shape), str(path)), np.uint8).reshape(shape)
