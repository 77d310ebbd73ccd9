"""Damaged slides of every family: never a crash, a hang, an error that is no sentence, or a wrong pixel called good.

Bytes of small slides are damaged, more often where their structure lies than their pixels, and every slide is then
read in all ways; what other decoders show of the same damaged file says what is right. All of a case follows from its
name, such as `aperio-17`: `python tests/fuzzing.py FOLDER aperio-17` repeats it, in any folder, and leaves the damaged
slide there.

`HISTRATA_FUZZ` is the number of cases, 2,048 where it is not set; 20,000 take about ten minutes on two cores.
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
from pathlib import Path
from typing import Any

import imagecodecs
import pytest

import fuzzing
from fuzzing import Outcome
from histrata.slides.openslide_reader import OpenSlideReader

CASES = int(os.environ.get("HISTRATA_FUZZ", "2048"))
WORKERS = 2
LIMIT_S = 40  # for one case, which takes some hundredths of a second; the first waits for the imports, too


def run_cases(command: Sequence[Any], cases: range, limit: float = LIMIT_S) -> dict[int, Outcome]:
    """Examine cases in a process of their own; after one that ends it, go on in another with the next.

    `command` is given first, stop and step of the cases, and prints what `fuzzing.main` prints.
    """
    outcomes: dict[int, Outcome] = {}
    while cases:
        words = [str(word) for word in (*command, cases.start, cases.stop, cases.step)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            ended = _follow(process, outcomes, limit)
        if ended is None:
            assert process.returncode == 0, f"the process ended between two cases, with {process.returncode}"
            break
        case, how = ended
        outcomes[case] = Outcome(faults=[how or f"the process ended ({_name(process.returncode)})"])
        cases = range(case + cases.step, cases.stop, cases.step)
    return outcomes


def _follow(process: subprocess.Popen[str], outcomes: dict[int, Outcome], limit: float) -> tuple[int, str] | None:
    """Gather outcomes until the process ends; return the case that was under way, if any, and whether it hung."""
    current, hung = None, threading.Event()

    def stop() -> None:
        hung.set()
        process.kill()

    assert process.stdout is not None
    timer = threading.Timer(limit, stop)
    timer.start()
    for line in process.stdout:
        timer.cancel()
        case, outcome = json.loads(line)
        current = case if outcome is None else None
        if outcome is not None:
            outcomes[case] = Outcome(**outcome)
        timer = threading.Timer(limit, stop)
        timer.start()
    timer.cancel()
    return None if current is None else (current, f"it took more than {limit} s" if hung.is_set() else "")


def _name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sound slides."""
    folder = tmp_path_factory.mktemp("fuzz")
    fuzzing.make_slides(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(slides: Path) -> dict[int, Outcome]:
    """What came of every case, by its number."""
    command = [sys.executable, fuzzing.__file__, slides]
    with ThreadPoolExecutor(WORKERS) as pool:
        shares = pool.map(lambda first: run_cases(command, range(first, CASES, WORKERS)), range(WORKERS))
        return {case: outcome for share in shares for case, outcome in share.items()}


@pytest.mark.parametrize("name", fuzzing.NAMES)
def test_damage_is_told_or_missing(outcomes: dict[int, Outcome], name: str) -> None:
    index, step = fuzzing.NAMES.index(name), len(fuzzing.NAMES)
    of = {case // step: outcomes[case] for case in range(index, CASES, step)}
    faults = [f"{name}-{number}: {fault}" for number, outcome in of.items() for fault in outcome.faults]
    assert not faults, "\n" + "\n".join(faults)
    # Else nothing was found because nothing was looked at; checksums leave of a PNG nothing to compare.
    assert any(outcome.refused for outcome in of.values())
    assert any(outcome.compared for outcome in of.values()) or name == "png"


# --- The test itself


def test_pixels_that_are_made_up_would_be_found(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decoder that fills up what is cut off, as most do, a tile is shown that OpenSlide fails at."""
    sound, path = slides / "tiff" / "slide.tif", tmp_path / "slide.tif"
    content = bytearray(sound.read_bytes())
    end = content.index(b"\xff\xd9")
    middle = (content.index(b"\xff\xd8") + end) // 2
    content[middle : end + 2] = b"\xff\xd9" + bytes(end - middle)
    path.write_bytes(content)
    strict = fuzzing.examine(path, sound, deep=False)
    assert strict.missing
    assert strict.faults == []
    monkeypatch.setattr("histrata.slides.jpeg.decode", lambda stream, *_: imagecodecs.jpeg8_decode(stream))
    assert any("the oracle fails" in fault for fault in fuzzing.examine(path, sound, deep=False).faults)


def test_pixels_in_the_wrong_place_would_be_found(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = slides / "aperio" / "slide.svs"
    assert fuzzing.examine(path, path, deep=False).faults == []
    read = OpenSlideReader.read
    monkeypatch.setattr(OpenSlideReader, "read", lambda self, x, *rest: read(self, x + 1, *rest))
    assert any("px wrong" in fault for fault in fuzzing.examine(path, path, deep=False).faults)


FAKE = """
import json, os, sys, time
for case in range(*map(int, sys.argv[1:])):
    print(json.dumps([case, None]), flush=True)
    if case == 3:
        os.abort()
    if case == 7:
        time.sleep(60)
    print(json.dumps([case, {"compared": case}]), flush=True)
"""


def test_cases_that_end_their_process_are_told_and_the_others_go_on() -> None:
    outcomes = run_cases([sys.executable, "-c", FAKE], range(1, 12, 2), limit=3)
    assert outcomes.pop(3).faults == ["the process ended (SIGABRT)"]
    assert outcomes.pop(7).faults == ["it took more than 3 s"]
    assert outcomes == {case: Outcome(compared=case) for case in (1, 5, 9, 11)}
