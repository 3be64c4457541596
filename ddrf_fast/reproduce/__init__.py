"""`ddrf-fast reproduce`: the paper's tables, from the weights and from what other methods made of the images.

Each table is a file of its own with ``run(settings) -> str``, Markdown for people; values of each image and
pictures go to the output folder. `paper.py` holds the figures that the paper prints.
"""

from collections.abc import Callable

from ddrf_fast.reproduce import ablations, table2, table3, table4
from ddrf_fast.reproduce.settings import Settings

TABLES: dict[str, Callable[[Settings], str]] = {
    "table2": table2.run,
    "table3": table3.run,
    "table4": table4.run,
    "static-dynamic": ablations.static_dynamic,
    "losses": ablations.losses,
}
"""The tables by the name that the command gives them."""

__all__ = ["TABLES", "Settings"]
