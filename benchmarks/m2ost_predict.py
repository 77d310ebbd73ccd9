"""Prediction with M2OST, against the published arrangement written down plainly (plain_m2ost.py).

Reads the windows of the spots batch by batch and predicts them. Both sides have the same weights, and their outputs
were seen to be equal first. A whole slide: --spots 20000 --times 8 --repeats 1.

Prints one JSON line with medians of passes over the spots, the sides in turn on two cores: spots a second; the ratio
(median over neighbouring passes), also of CPU time, which suffers less where others use the machine; the ratio of the
networks alone, on windows that are in memory; achieved GFLOP/s, counted on the plain network, so that work left out
counts as done; the share of the time spent waiting for data; peak memory of the process, or of the GPU where there is
one (float32 there for the plain side, bf16 for ours). Target: 2 times the speed on a CPU, 4 times on a GPU.

With --pitch-patches, spots lie on a grid of so many patches of the finest level, and the whole prediction is timed
against itself without sharing patches that coincide, after their outputs were seen to be equal; that line has the share
of the patches which is saved, too. A CPU only: on a GPU nothing is shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from m2ost_sides import N_GENES, Batch, Sides, Step, compare_sides, gflop_of, options_of, prepare

from histrata.expression.model import TrainedModel, scaled
from histrata.expression.patches import SharedPatches
from histrata.expression.targets import Targets


def step_of(network: Any, device: torch.device, *, bf16: bool) -> Step:
    """Return what predicts a batch, as `histrata.expression.model.TrainedModel` does."""
    network.eval()

    def step(batch: Batch) -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            network(scaled(batch[0], device)).float().cpu().numpy()

    return step


def share_saved(sides: Sides, batch_size: int) -> float:
    """Return the share of all patches that is not embedded."""
    shared, everything, embedded = SharedPatches(sides.windows, sides.model.config), 0, 0
    order = shared.order(batch_size)
    for batch in np.split(order, range(batch_size, len(order), batch_size)):
        found = shared.find(batch, sides.windows.__getitems__(batch.tolist())[0])
        cells = (sides.model.config.size // sides.model.config.patch_size) ** 2 * len(batch)
        for level in range(3):
            for j in range(level + 1):
                distinct = found[level][j] if found else None
                everything, embedded = everything + cells, embedded + (len(distinct.first) if distinct else cells)
    return 1 - embedded / everything


def compare_sharing(sides: Sides, options: argparse.Namespace) -> None:
    """Time prediction with and without sharing in turn, after a round that is not counted, and print the figures."""
    targets = Targets("mse", np.full(N_GENES, 9, np.float32), np.ones(N_GENES, np.float32), 1e4)
    genes = [f"gene{i}" for i in range(N_GENES)]
    model = TrainedModel(sides.model, genes, targets, sides.windows.mpp, sides.windows.size, {})
    seconds: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    outputs: dict[bool, np.ndarray] = {}
    for _ in range(1 + options.repeats):
        for share in (True, False):
            start, used = time.perf_counter(), time.process_time()
            outputs[share], _ = model.predict(
                sides.windows.sections, batch_size=options.batch_size, device="cpu", share=share
            )
            seconds[share].append(time.perf_counter() - start)
            cpu[share].append(time.process_time() - used)
    np.testing.assert_allclose(outputs[True], outputs[False], atol=1e-4)
    told = {"benchmark": "m2ost_predict", "model": options.model, "spots": options.spots, "batch": options.batch_size}
    told |= {"cores": options.cores, "pitch_patches": options.pitch_patches}
    for name, share in (("shared", True), ("unshared", False)):
        told[f"{name}_spots_per_s"] = round(options.spots / statistics.median(seconds[share][1:]), 1)
    for name, of in (("ratio", seconds), ("ratio_of_cpu_time", cpu)):
        told[name] = round(statistics.median(b / a for a, b in zip(of[True][1:], of[False][1:], strict=True)), 3)
    print(json.dumps(told | {"share_of_patches_saved": round(share_saved(sides, options.batch_size), 3)}))


def main() -> None:
    pitch = {"type": float, "help": "spots on a grid of so many patches, against the same without sharing (on a CPU)"}
    options = options_of(__doc__.splitlines()[0], 512, pitch_patches=pitch)
    with tempfile.TemporaryDirectory() as folder:
        sides: Sides = prepare(Path(folder), options, augment=False, pitch_patches=options.pitch_patches)
        if options.pitch_patches:
            compare_sharing(sides, options)
            return
        device = sides.device
        gflop = gflop_of(sides.plain_model, device, backward=False)
        ours = step_of(sides.model, device, bf16=device.type == "cuda")
        plain = step_of(sides.plain_model, device, bf16=False)
        order = range(options.spots)
        compare_sides("m2ost_predict", sides, ours, plain, order, gflop, options)


if __name__ == "__main__":
    main()
