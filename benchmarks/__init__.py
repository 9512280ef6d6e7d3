"""Latency, memory and throughput at full LLaVA-1.5 size, with random weights: `python -m benchmarks --help`."""
