"""The errors that jaxdiff raises: each says what was wrong, what is allowed, and what to type instead.

All of them are ValueErrors, so `except ValueError` works, and all are JaxdiffErrors, so `except JaxdiffError` catches
exactly what this package raises on purpose.
"""

from numbers import Integral
from typing import Any


class JaxdiffError(ValueError):
    """Base class of every error that jaxdiff raises on purpose."""


class ConfigError(JaxdiffError):
    """A setting or an argument is not usable: unknown name, wrong type, wrong shape, out of range."""


class DataError(JaxdiffError):
    """A data set is missing, empty, damaged, or not of the shape that was asked for."""


class CheckpointError(JaxdiffError):
    """A checkpoint is missing, damaged, of another model, or cannot be written."""


class UnsafeFileError(JaxdiffError):
    """A file from outside is of a kind that could run code (pickle); only safetensors and JSON are read."""


class NonFiniteError(JaxdiffError):
    """Numbers have become NaN or infinite where they must not."""


class HostError(JaxdiffError):
    """Another process of this run is dead, slow or gone, or has not come."""


def check_count(name: str, value: Any, hint: str, *, least: int = 1) -> int:
    """`value` as an int. Raises ConfigError, ending with `hint`, unless it is an integer (Python or NumPy) >= least."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}. {hint}")
    return int(value)
