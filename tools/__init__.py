"""Benchmarks, measurements and differential runs."""
