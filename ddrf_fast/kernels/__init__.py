"""Triton kernels: the files are in `kernels/` beside this package; an installed copy has them here."""

import pathlib

__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "kernels")]
