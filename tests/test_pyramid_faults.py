"""Pyramids under faults: a full disk, a kill, several runs at once, a damaged store, a cluster."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from histrata.errors import HistrataError
from histrata.files import digest
from histrata.pyramid import Pyramid
from histrata.pyramid.blocks import write_block
from histrata.pyramid.layout import plan
from histrata.pyramid.writer import write_pyramid
from histrata.slides import open_slide
from vendors import write_aperio

WRITER = """
import sys
from pathlib import Path
from histrata.errors import HistrataError
from histrata.pyramid.blocks import write_block
from histrata.pyramid.layout import plan
from histrata.pyramid.writer import write_pyramid
from histrata.slides import open_slide
if sys.argv[3:]:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
print("ready", flush=True)
try:
    write_pyramid(Path(sys.argv[1]), Path(sys.argv[2]), threads=2)
except HistrataError as error:
    print(error)
    sys.exit(2)
"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of several shards, copied and made levels, and one tile that is left out."""
    path = tmp_path_factory.mktemp("slide") / "s.svs"
    rgb = np.random.default_rng(0).integers(0, 256, (2300, 2500, 3), dtype=np.uint8)
    write_aperio(path, rgb, factors=(1, 4), missing={0: [(3, 3)]})
    return path


@pytest.fixture(scope="module")
def expected(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("whole") / "p.zarr"
    write_pyramid(slide, out, threads=2)
    return digest(out)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def start(slide: Path, out: Path, *limit: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WRITER, str(slide), str(out), *map(str, limit)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(slide: Path, tmp_path: Path) -> None:
    # The system refuses to make any file larger than this, as a full disk does.
    said, _ = start(slide, tmp_path / "p.zarr", 100_000).communicate()
    assert "p.zarr cannot be written" in said
    assert "make room there" in said
    assert names(tmp_path) == []


def test_a_kill_at_any_moment_leaves_nothing_finished(slide: Path, expected: str, tmp_path: Path) -> None:
    out = tmp_path / "p.zarr"
    killed = 0
    for wait in (0.0, 0.01, 0.03, 0.1, 0.3):  # seconds; a fast machine has written it all after some of them
        process = start(slide, out)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += not out.exists()
        assert not out.exists() or digest(out) == expected
    assert killed
    write_pyramid(slide, out, threads=2)
    assert digest(out) == expected
    assert names(tmp_path) == ["p.zarr"]


def test_two_runs_at_once_leave_one_whole_pyramid(slide: Path, expected: str, tmp_path: Path) -> None:
    runs = [start(slide, tmp_path / "p.zarr") for _ in range(2)]
    for run in runs:
        run.communicate()
    assert [run.returncode for run in runs] == [0, 0]
    assert names(tmp_path) == ["p.zarr"]
    assert digest(tmp_path / "p.zarr") == expected


def test_the_number_of_threads_changes_nothing(slide: Path, expected: str, tmp_path: Path) -> None:
    write_pyramid(slide, tmp_path / "p.zarr", threads=1)
    assert digest(tmp_path / "p.zarr") == expected


def test_a_cluster_writes_the_same_bytes(slide: Path, expected: str, tmp_path: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        write_pyramid(slide, tmp_path / "p.zarr", scheduler=cluster.scheduler_address)
        assert digest(tmp_path / "p.zarr") == expected


def test_a_worker_that_does_not_see_the_store_writes_nothing(slide: Path, tmp_path: Path) -> None:
    with open_slide(slide) as source:
        store = tmp_path / "elsewhere"
        layout = plan(source, store, codec="auto", quality=85, levels=None, tile=256, shard=8)
    with pytest.raises(HistrataError, match=r"elsewhere: this worker does not see the folder"):
        write_block(layout, *layout.passes()[0], 0, 0)
    assert not store.exists()


def test_a_scheduler_that_does_not_answer_is_one_sentence(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histrata.pyramid.tasks._CONNECT_S", 1)
    with pytest.raises(HistrataError, match=r"tcp://127.0.0.1:9.*start one, or correct"):
        write_pyramid(slide, tmp_path / "p.zarr", scheduler="tcp://127.0.0.1:9")
    assert names(tmp_path) == []


def test_a_damaged_store_is_told_and_never_shown(slide: Path, tmp_path: Path) -> None:
    """Cut shards, damaged indices and damaged tiles are errors, not white or wrong pixels."""
    write_pyramid(slide, tmp_path / "p.zarr", threads=2)
    shard = tmp_path / "p.zarr" / "0" / "c" / "0" / "0" / "0"
    sound = shard.read_bytes()
    centre = np.array([[1000.0, 1000.0]])
    good, _ = Pyramid(tmp_path / "p.zarr").windows(centre, 0.499, 1500)
    half = len(sound) // 2
    for damaged, told in {
        sound[:half]: "index is damaged",
        b"": "cut off",
        sound[:-9] + b"\x01" + sound[-8:]: "index is damaged",
        bytes(half) + sound[half:]: "cannot be decoded",
    }.items():
        shard.write_bytes(damaged)
        with pytest.raises(HistrataError, match=told):
            Pyramid(tmp_path / "p.zarr").windows(centre, 0.499, 1500)
    shard.write_bytes(sound)
    np.testing.assert_array_equal(Pyramid(tmp_path / "p.zarr").windows(centre, 0.499, 1500)[0], good)


def test_plain_zarr_refuses_damaged_jpeg_too(slide: Path, tmp_path: Path) -> None:
    write_pyramid(slide, tmp_path / "p.zarr", threads=2)
    shard = tmp_path / "p.zarr" / "0" / "c" / "0" / "0" / "0"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:3000] + bytes(3000) + sound[6000:])
    with pytest.raises(ValueError, match=r".+"):
        np.asarray(zarr.open_group(tmp_path / "p.zarr", mode="r")["0"])
