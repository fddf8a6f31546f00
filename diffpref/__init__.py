"""Preference fine-tuning for diffusers."""

__version__ = "0.1.0.dev0"
