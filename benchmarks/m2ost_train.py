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

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from m2ost_sides import Batch, Pass, Sides, compare, gflop_of, go_through, options_of, prepare
from plain_m2ost import plain_loader
from timing import CORES

from histrata.expression.model import load_batches, scaled


def step_of(network: Any, device: torch.device, *, bf16: bool, fused: bool) -> Callable[[Batch], object]:
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
        workers = CORES if device.type == "cuda" else 0

        def with_histrata() -> Pass:
            return go_through(load_batches(sides.windows, order, options.batch_size), ours, device)

        def plainly() -> Pass:
            loader = plain_loader(sides.plain_windows, order, options.batch_size, workers)
            return go_through(loader, plain, device)

        figures = compare({"histrata": with_histrata, "plain": plainly}, options.repeats, options.spots, gflop)
        held = [sides.windows.__getitems__(order[: options.batch_size])] * 2
        alone = compare(
            {
                "histrata": lambda: go_through(held, ours, device),
                "plain": lambda: go_through(held, plain, device),
            },
            options.repeats,
            2 * options.batch_size,
            gflop,
        )
    told = {"model": options.model, "spots": options.spots, "batch": options.batch_size}
    told |= {"device": str(device), "cores": options.cores}
    print(
        json.dumps(
            {"benchmark": "m2ost_train"}
            | told
            | figures
            | {
                "ratio_of_networks_alone": alone["ratio"],
                "ratio_of_networks_alone_cpu_time": alone["ratio_of_cpu_time"],
                "gflop_per_spot": round(gflop, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
