"""Which parameters of a table are in the fast suite."""

import pytest


def slow_unless(fast, values):
    """The values as parameters, those for which `fast(value)` is false marked slow; a tuple is a value for each argument."""
    spread = lambda value: value if isinstance(value, tuple) else (value,)
    return [pytest.param(*spread(value), marks=[] if fast(value) else pytest.mark.slow) for value in values]


def every_other(values):
    """The values as parameters, the second, fourth and so on marked slow."""
    values = list(values)
    return slow_unless(lambda value: values.index(value) % 2 == 0, values)


def checkerboard(rows, columns):
    """The pairs of two axes as parameters, fast and slow in turn along both, so that each value of either is fast somewhere."""
    rows, columns = list(rows), list(columns)
    fast = lambda pair: (rows.index(pair[0]) + columns.index(pair[1])) % 2 == 0
    return slow_unless(fast, [(row, column) for row in rows for column in columns])
