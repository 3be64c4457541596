"""`ddrf-fast demo`: a page to try the network (`page.py`), or the sample pair fused into a folder."""

from ddrf_fast.demo.sample import run_demo, side_by_side

__all__ = ["run_demo", "side_by_side"]
