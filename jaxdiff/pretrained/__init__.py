"""Other people's weights: read from safetensors, checked key by key, and written back for their libraries."""

from jaxdiff.pretrained import files, keys, text

__all__ = ["files", "keys", "text"]
