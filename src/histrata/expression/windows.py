"""Windows of spots for models: read from the pyramids while training, augmented alike at all levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from histrata.expression.sections import Section

Batch = tuple[list[torch.Tensor], torch.Tensor]


class Spots(Dataset[Batch], ABC):
    """The spots of some sections, with what a network is given of them; fetched in whole batches (`__getitems__`).

    Parameters
    ----------
    sections
        Where the spots lie.
    mpp
        um/px of each level, finest first.
    size
        Side of the windows in px.
    targets
        float32 (spots, genes) of all sections one after the other; None for prediction.
    seed
        With the epoch, what the order of the spots is drawn from.

    Attributes
    ----------
    section_of
        (spots,) index of each spot's section.
    centres
        (spots, 2) in level-0 px.
    epoch
        Set by the training.
    """

    def __init__(
        self, sections: Sequence[Section], mpp: Sequence[float], size: int, targets: np.ndarray | None, seed: int
    ) -> None:
        self.sections, self.mpp, self.size = list(sections), tuple(mpp), size
        self.section_of = np.repeat(np.arange(len(sections)), [len(s.centres) for s in sections])
        self.centres = np.concatenate([s.centres for s in sections])
        self.targets, self.seed, self.epoch = targets, seed, 0

    def __len__(self) -> int:
        """Return the number of spots."""
        return len(self.centres)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a tensor (n, ...) for each level, and the targets (n, genes)."""
        chosen = np.asarray(indices, dtype=np.int64)
        levels = [torch.from_numpy(level) for level in self._levels(chosen)]
        empty = np.empty((len(chosen), 0), dtype=np.float32)
        targets = empty if self.targets is None else self.targets[chosen]
        return levels, torch.from_numpy(targets)

    @abstractmethod
    def _levels(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Return an array (n, ...) for each level of the chosen spots."""

    def by_section(self, chosen: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Give the index of each section that has some of the chosen spots, and which of them."""
        sections = self.section_of[chosen]
        for i in np.unique(sections):
            yield int(i), np.flatnonzero(sections == i)


class SpotWindows(Spots):
    """Windows around the spots of some sections, at each level's um/px: uint8 (n, 3, size, size).

    The windows of a batch are grouped by slide and read together, by threads that leave the GIL, so that a loader
    needs no worker processes.

    Parameters
    ----------
    sections, mpp, size, targets
        See `Spots`.
    augment
        Whether windows are flipped and turned (the same way at all levels of a spot) and jittered in colour.
    jitter
        Largest relative change of each colour channel's scale, drawn for each level.
    seed
        See `Spots`; with the epoch and the spot, an augmentation is drawn from it, too.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        mpp: Sequence[float],
        size: int,
        *,
        targets: np.ndarray | None = None,
        augment: bool = False,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(sections, mpp, size, targets, seed)
        self.augment, self.jitter = augment, jitter

    def _levels(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Return uint8 (n, 3, size, size) windows for each level."""
        levels = [self.read(chosen, mpp) for mpp in self.mpp]
        if self.augment:
            for row, index in enumerate(chosen):
                self._augment(levels, row, int(index))
        return levels

    def read(self, chosen: np.ndarray, mpp: float) -> np.ndarray:
        """Return uint8 (n, 3, size, size) windows of the chosen spots at `mpp` um/px, as they are on the slide."""
        windows = np.empty((len(chosen), 3, self.size, self.size), dtype=np.uint8)
        for i, rows in self.by_section(chosen):
            windows[rows], _ = self.sections[i].pyramid.windows(self.centres[chosen[rows]], mpp, self.size)
        return windows

    def _augment(self, levels: list[np.ndarray], row: int, index: int) -> None:
        """Flip and turn the windows of one spot alike, and change the colours of each a little."""
        rng = np.random.default_rng((self.seed, self.epoch, index))
        quarter_turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        for level in levels:
            window = np.rot90(level[row], quarter_turns, axes=(1, 2))
            window = window[:, :, ::-1] if flip else window
            if self.jitter:
                scale = rng.uniform(1 - self.jitter, 1 + self.jitter, (3, 1, 1)).astype(np.float32)
                window = np.rint(np.clip(window * scale, 0, 255)).astype(np.uint8)
            level[row] = window


class EpochSampler(Sampler[int]):
    """A new order of the spots in each epoch that depends on the seed and the epoch alone.

    So a run that was stopped and resumed sees the same batches as one that was not.

    Parameters
    ----------
    spots
        What is sampled.
    balanced
        Whether every slide gives about as many spots to an epoch, drawn with replacement, or every spot comes once.
    """

    def __init__(self, spots: Spots, *, balanced: bool = False) -> None:
        self.spots, self.balanced = spots, balanced

    def __len__(self) -> int:
        """Return the number of spots of this process."""
        _, processes = _process()
        return (len(self.spots) + processes - 1) // processes

    def __iter__(self) -> Iterator[int]:
        """Go through the spots of this process in the order of the current epoch."""
        process, processes = _process()
        order = self._order()
        # Every process has as many, or the others would wait for it.
        padded = np.resize(order, len(self) * processes)
        return iter(padded[process::processes].tolist())

    def _order(self) -> np.ndarray:
        rng = np.random.default_rng((self.spots.seed, self.spots.epoch))
        if not self.balanced:
            return rng.permutation(len(self.spots))
        slides, of, counts = np.unique(self.spots.section_of, return_inverse=True, return_counts=True)
        chances = 1 / (len(slides) * counts[of])
        return rng.choice(len(self.spots), len(self.spots), p=chances)


def _process() -> tuple[int, int]:
    """Return the number of this process, and that of those that share a training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
