"""Tables of scores: means, ranks, Markdown and CSV."""

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence

from ddrf_fast._files import replacing

Scores = Mapping[str, float]


def means(rows: Iterable[Scores]) -> dict[str, float]:
    """The mean of each column over rows of the same columns; of no rows, nothing."""
    rows = list(rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def mean_ranks(table: Mapping[str, Scores], lower_is_better: Iterable[str] = ()) -> dict[str, float]:
    """The rank of each row, in the mean over the columns: 1 is best, and equal values share their ranks.

    What is no number (NIQE of a flat image) ranks last.

    Args:
        table: rows by name, each with the same columns.
        lower_is_better: the columns where the least value ranks first.

    Example:
        >>> mean_ranks({"a": {"SSIM": 0.9, "NIQE": 5.0}, "b": {"SSIM": 0.7, "NIQE": 4.0}}, ["NIQE"])
        {'a': 1.5, 'b': 1.5}
    """
    ranks: dict[str, list[float]] = {row: [] for row in table}
    for column in next(iter(table.values()), {}):
        sign = 1 if column in lower_is_better else -1
        values = {row: sign * scores[column] for row, scores in table.items()}
        values = {row: math.inf if math.isnan(value) else value for row, value in values.items()}
        for row, value in values.items():
            better = sum(other < value for other in values.values())
            equal = sum(other == value for other in values.values())
            ranks[row].append(better + (equal + 1) / 2)
    return {row: sum(of_row) / len(of_row) for row, of_row in ranks.items()}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown that is aligned for reading as it is: text to the left, numbers to the right.

    Example:
        >>> print(markdown(["method", "SSIM"], [["gff", 0.72111], ["ours", 0.8]]))
        | method |   SSIM |
        | ------ | -----: |
        | gff    | 0.7211 |
        | ours   | 0.8000 |
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(header, *cells, strict=True)]
    widths = [max(width, 2) for width in widths]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + (":" if index else "-") for index, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in cells)])


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table with all digits, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with (
        replacing(path) as temporary,
        # Names of files need not be UTF-8.
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", r"\|").replace("\n", " ")
