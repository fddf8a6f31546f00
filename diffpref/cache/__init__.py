"""What the encoders make of pictures and prompts, kept on disk."""

from diffpref.cache.disk import DiskCache, open_cache

__all__ = ["DiskCache", "open_cache"]
