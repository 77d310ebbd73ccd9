"""How fast models of expression train and predict on this machine.

Prints one JSON line for each model: spots a second of a training step and of prediction (median of repeats), and the
ratio of its training speed to that of m2ost_small.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from histrata import create_model

BATCH = {"m2ost_small": 32, "m2ost_reference": 4}
REPEATS = 5


def rate(step: Callable[[], object], batch: int) -> float:
    step()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times)


def main() -> None:
    reference = None
    for name, batch in BATCH.items():
        model = create_model(name, n_genes=250)
        size = model.config.size  # type: ignore[union-attr]
        levels = [torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) for _ in range(3)]

        def train(model=model, levels=levels) -> None:
            model.zero_grad()
            model(levels).square().mean().backward()

        def predict(model=model, levels=levels) -> None:
            with torch.inference_mode():
                model(levels)

        trained = rate(train, batch)
        reference = reference or trained
        figures = {"train_spots_per_s": round(trained, 1), "predict_spots_per_s": round(rate(predict, batch), 1)}
        print(
            json.dumps(
                {"benchmark": "training", "model": name, "batch": batch, "threads": torch.get_num_threads()}
                | figures
                | {"train_ratio_to_m2ost_small": round(trained / reference, 3)}
            )
        )


if __name__ == "__main__":
    main()
