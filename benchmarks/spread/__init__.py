"""How far the gradients of a step are spread: benchmarks/variance.py is its command."""
