"""Dask: tasks run on threads here, or on a cluster of `distributed`, with a progress bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
from dask.callbacks import Callback
from tqdm import tqdm

from histrata.errors import HistrataError

Place = tuple[int, int]

_CONNECT_S = 30
_BATCH = 256  # Tasks in one graph: the graph of a whole slide would grow with it.


def run(
    function: Callable[[int, int], None], places: Sequence[Place], threads: int, scheduler: str | None, label: str
) -> None:
    """Call a function with each of some places; the first call that fails ends the run.

    Parameters
    ----------
    function
        What a task does; it travels to the workers of a cluster, with what is bound to it.
    places
        Row and column for each task.
    threads
        Tasks at once, without a scheduler (decoders and codecs release the GIL).
    scheduler
        Address of a Dask scheduler, such as "tcp://host:8786", whose workers see the same files; None runs here.
    label
        What the progress bar is called.

    Raises
    ------
    HistrataError
        Where the scheduler does not answer, or its workers were lost.
    """
    # Bound once: of arguments, Dask would take apart each anew for every task.
    task = dask.delayed(function, pure=False, traverse=False)
    with tqdm(desc=label, total=len(places), unit="shard", disable=None) as bar:
        batches = ([task(*place) for place in places[at : at + _BATCH]] for at in range(0, len(places), _BATCH))
        if scheduler is None:
            # Where a task fails, leaving the pool waits for those that still run: nobody writes once it is left.
            with ThreadPoolExecutor(threads) as pool, Callback(posttask=lambda *_: bar.update()):
                for batch in batches:
                    dask.compute(*batch, scheduler="threads", pool=pool)
        else:
            _run_on_cluster(batches, scheduler, bar)


def _run_on_cluster(batches: Any, scheduler: str, bar: Any) -> None:
    from distributed import Client, KilledWorker, as_completed  # a second to import

    try:
        client = Client(scheduler, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        told = f"no Dask scheduler answers at {scheduler} ({error})"
        raise HistrataError(f"{told}: start one, or correct the address") from error
    with client, client.as_current():
        for batch in batches:
            futures = client.compute(batch)
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except KilledWorker as error:
                raise HistrataError(f"the workers of {scheduler} were lost ({error}): give them more memory") from error
            finally:
                client.cancel(futures)
