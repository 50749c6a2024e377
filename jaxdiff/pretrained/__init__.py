"""Other people's weights: read from safetensors, checked key by key, and written back for their libraries."""

from jaxdiff.pretrained import files, keys

__all__ = ["files", "keys"]
