"""Benchmarks: correctness first, then interleaved timing, then rows with the percent of a measured roof."""
