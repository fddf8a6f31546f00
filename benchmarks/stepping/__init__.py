"""Parts of benchmarks/step.py and benchmarks/memory.py."""
