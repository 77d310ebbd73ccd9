"""Training steps of PIBD, against the published arrangement written down plainly (plain_pibd.py).

A step goes forward, backward and through the optimisers for 16 patients with 4,096 instances of 768 features each and
331 gene sets (their sizes from shared/data where that is there). Both sides get the same tensors in memory.

Prints one JSON line: median seconds of a step, sides in turn; their ratio (median over neighbouring passes), also with
`pibd_reference`, which has the published widths, in place of `pibd`; the peak memory of each, in a process of
its own, and their ratio, as it is and above what the process had once everything was imported, which leaves the 192 MiB
of the batch; and of a prediction from a bag of 100,000 instances that lies in a file (float16), and from one of 10,000,
the seconds and the memory that it adds, pages of the file (14 and 146 MiB) counted in. Targets: 5 times the speed, less
than half the memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_pibd import PlainPIBD
from timing import CORES, use_cores

from histrata import create_model
from histrata.survival.hazards import Bins
from histrata.survival.networks import Inputs
from histrata.survival.training import train_step

INSTANCES, FEATURES, BATCH, GENES = 4096, 768, 16, 4999
LARGE, SMALL = 100_000, 10_000
DATA = Path(os.environ.get("HISTRATA_DATA", Path(__file__).parents[2] / "shared" / "data"))


def gene_sets() -> list[list[int]]:
    """Return the gene sets that the field uses, or 331 of such sizes."""
    path = DATA / "survival" / "tcga" / "pathways" / "combine_signatures.csv"
    if path.is_file():
        with path.open(newline="") as stream:
            _, *rows = csv.reader(stream)
        columns = [[cell for cell in column if cell] for column in zip(*rows, strict=True)]
        index = {gene: i for i, gene in enumerate(sorted({gene for column in columns for gene in column}))}
        return [sorted({index[gene] for gene in column}) for column in columns]
    rng = np.random.default_rng(0)
    sizes = np.clip(np.exp(rng.normal(2.6, 1.1, 331)), 5, 200).astype(int)
    return [sorted(rng.choice(GENES, size, replace=False).tolist()) for size in sizes]


def peak() -> float:
    """Return the most memory that this process ever had, in MiB."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def prepare(side: str) -> Callable[[], object]:
    """Return what takes a step."""
    sets, rng = gene_sets(), np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    instances = torch.randn(BATCH, INSTANCES, FEATURES, generator=generator)
    rna = torch.randn(BATCH, 1 + max(map(max, sets)), generator=generator)
    labels = Bins.fit(rng.exponential(size=BATCH), np.arange(BATCH) % 2 == 0, 4).label(
        rng.exponential(size=BATCH), np.arange(BATCH) % 2 == 0
    )
    torch.manual_seed(0)
    if side == "plain":
        plain = PlainPIBD(FEATURES, sets)
        adam = torch.optim.Adam(plain.parameters(), 5e-4)
        mask = torch.ones(BATCH, INSTANCES, dtype=torch.bool)

        def step() -> None:
            loss = plain(instances, mask, rna, labels.bin, labels.event)
            adam.zero_grad()
            loss.backward()
            adam.step()

        return step
    network: Any = create_model(side, n_features=FEATURES, n_genes=rna.shape[1], pathways=sets)
    estimator = network.estimator()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    own = torch.optim.AdamW(estimator.parameters(), 1e-3)
    inputs = Inputs(list(instances), rna)
    return lambda: train_step(network, inputs, labels, optimizer, estimator, own)


def alone(side: str) -> None:
    """Take two steps, and print the peak before and after."""
    before = peak()
    step = prepare(side)
    step()
    step()
    print(json.dumps([before, peak()]))


def predict(path: str, n: int) -> None:
    """Predict from a bag in a file, and print seconds, and the peak before and after."""
    bag = np.load(path, mmap_mode="r")[:n]
    sets = gene_sets()
    genes = 1 + max(map(max, sets))
    network: Any = create_model("pibd", n_features=FEATURES, n_genes=genes, pathways=sets).eval()
    with torch.no_grad():
        network(Inputs([bag[:100]], torch.zeros(1, genes)))
        before, start = peak(), time.perf_counter()
        network(Inputs([bag], torch.zeros(1, genes)))
    # Pages of the file are the system's to keep or drop: what is counted is the process's own.
    print(json.dumps([time.perf_counter() - start, before, peak()]))


def call(*words: str, cores: int) -> list[float]:
    """Run this script in a process of its own and return what it printed."""
    command = [sys.executable, __file__, "--cores", str(cores), "--side", *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])


def compare(repeats: int) -> dict[str, float]:
    """Time the sides in turn, after a round that is not counted."""
    steps = {side: prepare(side) for side in ("pibd", "pibd_reference", "plain")}
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(1 + repeats):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - start)
    counted = {side: values[1:] for side, values in seconds.items()}
    figures = {f"{side}_seconds": round(statistics.median(values), 3) for side, values in counted.items()}
    for side in ("pibd", "pibd_reference"):
        ratios = [plain / ours for ours, plain in zip(counted[side], counted["plain"], strict=True)]
        figures["ratio" if side == "pibd" else "ratio_of_reference"] = round(statistics.median(ratios), 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=CORES, help="1 where others use the machine, too")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    use_cores(options.cores)
    torch.set_num_threads(options.cores)
    if options.side:
        alone(options.side[0]) if len(options.side) == 1 else predict(options.side[0], int(options.side[1]))
        return
    figures: dict[str, float] = compare(options.repeats)
    peaks = {side: call(side, cores=options.cores) for side in ("pibd", "pibd_reference", "plain")}
    for side, (_, after) in peaks.items():
        figures[f"{side}_peak_mib"] = round(after)
    figures["memory_ratio"] = round(peaks["pibd"][1] / peaks["plain"][1], 3)
    figures["memory_ratio_above_start"] = round(
        (peaks["pibd"][1] - peaks["pibd"][0]) / (peaks["plain"][1] - peaks["plain"][0]), 3
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bag.npy"
        rng = np.random.default_rng(0)
        bag = np.lib.format.open_memmap(path, "w+", np.float16, (LARGE, FEATURES))
        for start in range(0, LARGE, SMALL):
            bag[start : start + SMALL] = rng.standard_normal((SMALL, FEATURES), dtype=np.float32)
        bag.flush()
        del bag
        for n in (SMALL, LARGE):
            seconds, before, after = call(str(path), str(n), cores=options.cores)
            figures |= {f"predict_{n}_seconds": round(seconds, 2), f"predict_{n}_added_mib": round(after - before)}
    told = {"batch": BATCH, "instances": INSTANCES, "features": FEATURES, "gene_sets": len(gene_sets())}
    print(json.dumps({"benchmark": "survival_train", "cores": options.cores} | told | figures))


if __name__ == "__main__":
    main()
