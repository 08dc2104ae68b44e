"""Tables as plain text, for what is printed from shapes and counts alone."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Rows as lines of columns that are as wide as their widest cell and two spaces apart.

    Args:
      rows: the cells of each row, the header first.
      align: a letter for each column, `l` for left and `r` for right.

    >>> print(text_table([("path", "numbers"), ("kernel", "12"), ("b", "4")], "lr"))
    path    numbers
    kernel       12
    b             4
    """
    pads = [{"l": str.ljust, "r": str.rjust}[side] for side in align]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths)).rstrip() for row in rows)
