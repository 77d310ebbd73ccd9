"""Bags of instances: everything that is known of a patient's slides, patient after patient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def parts_of(instances: Any, size: int = 8192) -> Iterator[NDArray[np.float64]]:
    """Give instances (n, features) in parts of at most `size`: of a memory-mapped array, one is read at a time."""
    for start in range(0, len(instances), size):
        yield np.asarray(instances[start : start + size], np.float64)


@dataclass(frozen=True)
class Bags:
    """The instances (spots, patches, cores) of each patient of a cohort.

    Attributes
    ----------
    instances
        float (n, features): all instances, a patient's in one run; may be memory-mapped.
    ranges
        int64 (patients, 2): first row of each patient in `instances`, and the one after the last; equal where a
        patient has none.
    features
        Names of the columns.
    """

    instances: NDArray[np.floating]
    ranges: NDArray[np.int64]
    features: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(self.ranges)

    def __getitem__(self, patient: int) -> NDArray[np.float32]:
        """Return the instances of one patient, float32 (instances, features)."""
        start, stop = self.ranges[patient]
        return np.asarray(self.instances[start:stop], dtype=np.float32)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of instances of each patient, int64 (patients,)."""
        return self.ranges[:, 1] - self.ranges[:, 0]

    def take(self, rows: ArrayLike) -> Bags:
        """Return the bags of these patients alone, in this order."""
        return replace(self, ranges=self.ranges[np.asarray(rows, dtype=np.int64)])

    @classmethod
    def of(cls, bags: Sequence[ArrayLike], features: Sequence[str]) -> Bags:
        """Make bags of an array (instances, features) for each patient; one may have no rows."""
        arrays = [np.asarray(bag, dtype=np.float32).reshape(-1, len(features)) for bag in bags]
        ends = np.cumsum([0, *(len(a) for a in arrays)]).astype(np.int64)
        joined = np.concatenate(arrays) if arrays else np.zeros((0, len(features)), np.float32)
        return cls(joined, np.stack([ends[:-1], ends[1:]], axis=1), tuple(map(str, features)))
