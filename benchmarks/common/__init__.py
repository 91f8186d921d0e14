"""Parts that the benchmarks share: clock, records, command lines, energy."""
