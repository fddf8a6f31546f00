"""The preference loss by itself, timed and checked: benchmarks/loss.py is its command."""
