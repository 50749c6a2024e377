"""One file a config: a function get_config(), and an opening docstring: the command, its cost, what to expect."""

from typing import Any, TypeAlias

Config: TypeAlias = Any
"""An `ml_collections.ConfigDict`; for type checkers anything, since its fields are known only when it runs."""
