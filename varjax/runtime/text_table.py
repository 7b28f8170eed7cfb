"""Formats tables of text."""

from collections.abc import Sequence


def table_lines(rows: Sequence[Sequence[str]], left: int | None = None) -> list[str]:
    """Aligns the cells of each column, and returns a line for each row.

    Args:
        rows: cells of each row, all of the same number of columns.
        left: number of columns, from the first on, that are aligned to the left, the others to the
            right; None for all.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if left is None or i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
