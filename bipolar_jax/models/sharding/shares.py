"""What each device has of an axis: equally many elements, the last of them zeros where the axis does not divide."""

from __future__ import annotations

import dataclasses
from typing import Self


@dataclasses.dataclass(frozen=True)
class Share:
    """Each device's range of an axis.

    Attributes:
      total: elements of the axis.
      size: elements that each device has, those of its range and zeros behind them.
      starts, counts: of each device's range.
    """

    total: int
    size: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, total: int, parts: int, unit: int = 1) -> Self:
        """Ranges of whole units, of which the first devices have one more than the last, or none is left for those."""
        size = -(-total // (parts * unit)) * unit
        starts = tuple(min(i * size, total) for i in range(parts))
        return cls(total, size, starts, tuple(min(size, total - start) for start in starts))

    @property
    def is_even(self) -> bool:
        """Whether the ranges are the equal parts that a mesh axis cuts an array into."""
        return all((start, count) == (i * self.size, self.size) for i, (start, count) in enumerate(self._ranges))

    @property
    def is_padded(self) -> bool:
        """Whether a device has zeros."""
        return min(self.counts) < self.size

    @property
    def is_shorter(self) -> bool:
        """Whether a device has less than all."""
        return self.size < self.total

    def times(self, numbers: int) -> Share:
        """The ranges of an axis that has so many numbers for each element of this one."""
        scaled = (tuple(numbers * each for each in values) for values in (self.starts, self.counts))
        return Share(numbers * self.total, numbers * self.size, *scaled)

    @property
    def _ranges(self) -> tuple[tuple[int, int], ...]:
        return tuple(zip(self.starts, self.counts, strict=True))


def shares_of_heads(heads: int, kv_heads: int, parts: int) -> tuple[Share, Share]:
    """Ranges of heads of queries, and of the heads of keys and values that these attend to.

    Where devices are fewer than heads of keys, they divide those, and queries go with their keys. Else as many devices
    as possible share each head of keys, repeat it, and divide its queries; devices that are left over have zeros.
    """
    per_key = heads // kv_heads
    if kv_heads >= parts:
        keys = Share.of(kv_heads, parts)
        return keys.times(per_key), keys
    sharing = parts // kv_heads
    own = Share.of(per_key, sharing)
    busy = range(sharing * kv_heads)
    idle = (0,) * (parts - len(busy))
    starts = tuple(i // sharing * per_key + own.starts[i % sharing] for i in busy)
    counts = tuple(own.counts[i % sharing] for i in busy)
    queries = Share(heads, own.size, (*starts, *idle), (*counts, *idle))
    keys = tuple(i // sharing for i in busy)
    return queries, Share(kv_heads, 1, (*keys, *idle), (*(1 for _ in busy), *idle))
