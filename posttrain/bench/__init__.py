"""Benchmarks of every op and training loop: `posttrain bench`."""
