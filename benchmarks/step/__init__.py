"""Benchmarks of one update: time, memory, bytes, and the accuracy of its gradient."""
