"""Damaged slides of every family: never a crash, a hang, an error that is no sentence, or a wrong pixel called good.

Bytes of small slides are damaged, more often where their structure lies than their pixels, and every slide is then
read in all ways; what other decoders show of the same damaged file says what is right. Cases are told by a name such
as `aperio-17`, from which all of a case follows: `python tests/fuzzing.py FOLDER aperio-17` repeats it, in a folder
with the sound slides that `fuzzing.make_slides(FOLDER)` writes.

`HISTRATA_FUZZ` is the number of cases, 2,560 where it is not set; 20,000 take some ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fuzzing

CASES = int(os.environ.get("HISTRATA_FUZZ", "2560"))
WORKERS = 2
LIMIT_S = 30  # for one case, which takes some hundredths of a second; the first waits for the imports, too


@dataclass(frozen=True)
class Ended:
    """A case whose process did not outlive it."""

    faults: list[str]


def run_cases(command: Sequence[Any], cases: range, limit: float = LIMIT_S) -> dict[int, Any]:
    """Examine cases in a process of their own, and in another one from the case on that ends it.

    `command` is given first, stop and step of the cases, and prints what `fuzzing.main` prints.
    """
    outcomes: dict[int, Any] = {}
    while cases:
        words = map(str, (*command, cases.start, cases.stop, cases.step))
        process = subprocess.Popen([*words], stdout=subprocess.PIPE, text=True)
        current, told = _follow(process, outcomes, limit)
        if process.returncode == 0 and current is None:
            break
        assert current is not None, f"no case was examined (exit status {process.returncode})"
        outcomes[current] = Ended([told])
        cases = range(current + cases.step, cases.stop, cases.step)
    return outcomes


def _follow(process: subprocess.Popen[str], outcomes: dict[int, Any], limit: float) -> tuple[int | None, str]:
    """Gather outcomes until the process ends; return the case that was under way, and how it ended."""
    current = None
    assert process.stdout is not None
    timer = threading.Timer(limit, process.kill)
    timer.start()
    for line in process.stdout:
        timer.cancel()
        case, outcome = json.loads(line)
        current = case if outcome is None else None
        if outcome is not None:
            outcomes[case] = fuzzing.Outcome(**outcome)
        timer = threading.Timer(limit, process.kill)
        timer.start()
    late = timer.finished.is_set()
    timer.cancel()
    status = process.wait()
    return current, f"hung for {limit} s" if late else f"crashed ({_name(status)})"


def _name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What came of every case, by its number."""
    folder = tmp_path_factory.mktemp("fuzz")
    fuzzing.make_slides(folder)
    command = [sys.executable, fuzzing.__file__, folder]
    with ThreadPoolExecutor(WORKERS) as pool:
        shares = pool.map(lambda first: run_cases(command, range(first, CASES, WORKERS)), range(WORKERS))
        return {case: outcome for share in shares for case, outcome in share.items()}


def of_family(outcomes: dict[int, Any], name: str) -> dict[str, Any]:
    index, step = fuzzing.NAMES.index(name), len(fuzzing.NAMES)
    return {f"{name}-{case // step}": outcomes[case] for case in sorted(outcomes) if case % step == index}


@pytest.mark.parametrize("name", fuzzing.NAMES)
def test_damage_is_told_or_missing(outcomes: dict[int, Any], name: str) -> None:
    of = of_family(outcomes, name)
    assert len(of) >= CASES // len(fuzzing.NAMES)
    faults = [f"{case}: {fault}" for case, outcome in of.items() for fault in outcome.faults]
    assert not faults, "\n" + "\n".join(faults)
