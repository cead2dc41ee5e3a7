"""Benchmarks: one file an op, marked gpu. Rows go to results.csv."""
