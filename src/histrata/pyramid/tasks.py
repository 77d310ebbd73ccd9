"""Dask: tasks run on threads here, or on a cluster of `distributed`, with a progress bar on a terminal."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
from tqdm import tqdm
from tqdm.dask import TqdmCallback

from histrata.errors import HistrataError

_CONNECT_S = 30


def run(tasks: list[Any], threads: int, scheduler: str | None, label: str) -> None:
    """Compute tasks that return nothing; the first that fails ends the run.

    Parameters
    ----------
    tasks
        `dask.delayed` calls. Their arguments should be small: they pass through the scheduler.
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
    if scheduler is not None:
        _run_on_cluster(tasks, scheduler, label)
        return
    # Where a task fails, leaving the pool waits for those that still run: nobody writes once this has returned.
    with TqdmCallback(desc=label, disable=None), ThreadPoolExecutor(threads) as pool:
        dask.compute(*tasks, scheduler="threads", pool=pool)


def _run_on_cluster(tasks: list[Any], scheduler: str, label: str) -> None:
    from distributed import Client, KilledWorker, as_completed  # a second to import

    try:
        client = Client(scheduler, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise HistrataError(
            f"no Dask scheduler answers at {scheduler} ({error}): start one, or correct the address"
        ) from error
    with client, client.as_current():
        futures = client.compute(tasks)
        try:
            for future in tqdm(as_completed(futures), label, total=len(futures), unit="task", disable=None):
                future.result()
        except KilledWorker as error:
            raise HistrataError(f"the workers of {scheduler} were lost ({error}): give them more memory") from error
        finally:
            client.cancel(futures)
