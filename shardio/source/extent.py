"""How a source lies, as far as a plan needs to know. Pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceExtent:
    """What the planner needs to know of a source.

    Attributes:
      shape: [date, variable, ensemble, cell] of the source.
      chunks: extent of one of its chunks along the same axes.
      itemsize: bytes of one stored value.
      dates: the dates wanted.
      variables: indices of the variables wanted.
      one_at_a_time: a task reads its source chunks one after the other, not on all threads.
      whole_dates: any range of cells takes all cells of a date, for they are put in another order.
    """

    shape: tuple[int, int, int, int]
    chunks: tuple[int, int, int, int]
    itemsize: int
    dates: range
    variables: tuple[int, ...]
    one_at_a_time: bool = False
    whole_dates: bool = False
