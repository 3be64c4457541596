"""Whole networks that benchmarks are made of, where ddrf_fast has none."""
