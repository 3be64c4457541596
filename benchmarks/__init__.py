"""Benchmarks of ddrf_fast against every peer, shape by shape; README.md has the method."""
