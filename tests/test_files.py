"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from histrata import __version__
from histrata.errors import HistrataError
from histrata.files import digest, provenance, whole, write_tsv

WRITER = """
import os, signal, sys, time
from pathlib import Path
from histrata.files import whole
with whole(Path(sys.argv[1])) as part:
    if sys.argv[2] == "folder":
        part.mkdir()
        (part / "half").write_text("half")
    else:
        part.write_text("half")
    print("written", flush=True)
    if sys.argv[3] == "exit":
        os._exit(1)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("death", ["exit", "kill"])
def test_a_killed_run_leaves_nothing_finished_and_the_next_cleans_up(tmp_path: Path, kind: str, death: str) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out), kind, death], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    if death == "kill":
        process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = names(tmp_path)
    assert "out" not in left
    assert len(left) == 1
    assert left[0].startswith(".")
    with whole(out) as part:
        part.write_text("whole")
    assert names(tmp_path) == ["out"]
    assert out.read_text() == "whole"


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out), "file", "wait"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    with whole(out) as part:
        part.write_text("mine")
    assert len(names(tmp_path)) == 2
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_dead_run_of_another_output_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.tsv.{socket.gethostname()}~999999999~abc.part"
    other.write_text("")
    with whole(tmp_path / "out") as part:
        part.write_text("x")
    assert other.exists()


def test_what_another_machine_writes_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".out.elsewhere.example~999999999~abc.part"
    other.write_text("")
    with whole(tmp_path / "out") as part:
        part.write_text("x")
    assert other.exists()


RACER = """
import sys, time
from pathlib import Path
from histrata.files import whole
for turn in range(30):
    with whole(Path(sys.argv[1])) as part:
        part.mkdir()
        for name in "abc":
            (part / name).write_text(sys.argv[2])
"""


def test_runs_that_write_one_folder_at_once_leave_one_of_theirs_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(out), str(k)]) for k in range(3)]
    assert [racer.wait() for racer in racers] == [0, 0, 0]
    assert names(tmp_path) == ["out"]
    assert len({(out / name).read_text() for name in "abc"}) == 1


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    out.write_text("old")
    with suppress(RuntimeError), whole(out) as part:
        part.write_text("new")
        raise RuntimeError
    assert out.read_text() == "old"
    assert names(tmp_path) == ["out.txt"]


def test_an_error_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    with suppress(RuntimeError), whole(out) as part:
        part.mkdir()
        (part / "a").write_text("new")
        raise RuntimeError
    assert (out / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_folder_replaces_a_folder_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for name in ("a", "b"):
        with whole(out) as part:
            part.mkdir()
            (part / name).write_text(name)
    assert names(out) == ["b"]
    assert names(out.parent) == ["out"]


def test_names_with_brackets_are_cleaned_up_too(tmp_path: Path) -> None:
    left = tmp_path / f".a[1].tsv.{socket.gethostname()}~999999999~abc.part"
    left.write_text("")
    with whole(tmp_path / "a[1].tsv") as part:
        part.write_text("x")
    assert names(tmp_path) == ["a[1].tsv"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HistrataError, match=r"file.*cannot be made.*name another"), whole(tmp_path / "file" / "x.tsv"):
        pass


def test_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "f").write_bytes(content)
    assert digest(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_digest_of_a_folder_tells_names_bytes_and_borders(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return digest(tmp_path / name)

    first = folder("one", {"a": "12", "b/c": "3"})
    assert first == folder("same", {"b/c": "3", "a": "12"})
    others = [
        folder("bytes", {"a": "12", "b/c": "4"}),
        folder("names", {"a": "12", "b/d": "3"}),
        folder("moved", {"a": "1", "b/c": "23"}),
        folder("border", {"a": "12b/c3"}),
    ]
    assert len({first, *others}) == 5


def test_provenance_names_what_an_artefact_was_made_from(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    made = provenance({"mpp": 0.5, "stain": None}, {"slide": tmp_path / "f"})
    assert made["parameters"] == {"mpp": 0.5}
    assert made["inputs"] == {"slide": hashlib.sha256(b"x").hexdigest()}
    assert made["histrata_version"] == __version__
    assert made["schema_version"]


def test_tsv_reads_back(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": ["x", None], "b": [1 / 3, np.nan], "c": [1, 2]})
    write_tsv(table, tmp_path / "t.tsv")
    assert (tmp_path / "t.tsv").read_text() == "a\tb\tc\nx\t0.333333\t1\n\t\t2\n"


def test_two_writers_at_once_both_finish(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with whole(out) as one, whole(out) as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert out.read_text() == "1"
    assert names(tmp_path) == ["out"]
