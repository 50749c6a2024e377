"""How many programs JAX compiles while something runs."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """A list that grows by one name for each program compiled inside the block."""
    names: list[str] = []

    def listener(name: str, *_: object, **__: object) -> None:
        if "backend_compile" in name:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
