"""Prediction with M2OST, against the published arrangement written down plainly (plain_m2ost.py).

Reads the windows of the spots batch by batch and predicts them. Both sides have the same weights, and their outputs
were seen to be equal first. A whole slide: --spots 20000 --times 8 --repeats 1.

Prints one JSON line with medians of passes over the spots, the sides in turn on two cores: spots a second; the ratio
(median over neighbouring passes), also of CPU time, which suffers less where others use the machine; the ratio of the
networks alone, on windows that are in memory; achieved GFLOP/s, counted on the plain network, so that work left out
counts as done; the share of the time spent waiting for data; peak memory of the process, or of the GPU where there is
one (float32 there for the plain side, bf16 for ours). Target: 2 times the speed on a CPU, 4 times on a GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from m2ost_sides import Batch, Sides, Step, compare_sides, gflop_of, options_of, prepare

from histrata.expression.model import scaled


def step_of(network: Any, device: torch.device, *, bf16: bool) -> Step:
    """Return what predicts a batch, as `histrata.expression.model.TrainedModel` does."""
    network.eval()

    def step(batch: Batch) -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            network(scaled(batch[0], device)).float().cpu().numpy()

    return step


def main() -> None:
    options = options_of(__doc__.splitlines()[0], 512)
    with tempfile.TemporaryDirectory() as folder:
        sides: Sides = prepare(Path(folder), options, augment=False)
        device = sides.device
        gflop = gflop_of(sides.plain_model, device, backward=False)
        ours = step_of(sides.model, device, bf16=device.type == "cuda")
        plain = step_of(sides.plain_model, device, bf16=False)
        order = range(options.spots)
        compare_sides("m2ost_predict", sides, ours, plain, order, gflop, options)


if __name__ == "__main__":
    main()
