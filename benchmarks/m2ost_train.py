"""Training steps of M2OST, against the published arrangement written down plainly (plain_m2ost.py).

A step reads the windows of a batch, turns, flips and jitters them, and goes forward, backward and through AdamW. Both
sides start from the same weights, and their outputs and gradients were seen to be equal first.

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

import numpy as np
import torch
from m2ost_sides import Batch, Sides, Step, compare_sides, gflop_of, options_of, prepare

from histrata.expression.model import scaled


def step_of(network: Any, device: torch.device, *, bf16: bool, fused: bool) -> Step:
    """Return what learns from a batch, as `histrata.expression.training` does."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=fused or None)
    network.train()

    def step(batch: Batch) -> None:
        levels, targets = batch
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = network(scaled(levels, device))
        loss = torch.nn.functional.mse_loss(out.float(), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    options = options_of(__doc__.splitlines()[0], 256)
    with tempfile.TemporaryDirectory() as folder:
        sides: Sides = prepare(Path(folder), options, augment=True)
        device = sides.device
        gflop = gflop_of(sides.plain_model, device, backward=True)
        ours = step_of(sides.model, device, bf16=device.type == "cuda", fused=device.type == "cpu")
        plain = step_of(sides.plain_model, device, bf16=False, fused=False)
        order = np.random.default_rng(0).permutation(options.spots).tolist()
        compare_sides("m2ost_train", sides, ours, plain, order, gflop, options)


if __name__ == "__main__":
    main()
