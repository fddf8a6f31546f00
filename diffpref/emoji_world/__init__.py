"""The embedded default: a small, real text-to-image world with known preferences. See README.md beside this file."""
