"""Benchmarks of ops: one file an op, marked gpu. Rows go to results.csv.

Whole runs are `pab bench`. A file here may import everything, and nothing imports it.
"""
