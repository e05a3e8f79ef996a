"""What benchmarks/gpu.py measures: a module for each stage, and the journal that keeps the figures."""
