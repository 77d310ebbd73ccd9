"""What the benchmarks of M2OST share: a slide, both networks with the same weights, both loaders, and the timing."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mirrored import MPP, write_mirrored
from plain_m2ost import Batch, PlainM2OST, PlainWindows, plain_loader
from timing import CORES, scattered, use_cores
from torch.utils.flop_counter import FlopCounterMode

from histrata import create_model
from histrata.devices import find_device
from histrata.expression.model import load_batches, scaled
from histrata.expression.sections import Section
from histrata.expression.windows import SpotWindows
from histrata.pyramid import Pyramid
from histrata.pyramid.writer import write_pyramid

FIELD_UM, N_GENES = 154.0, 250

Step = Callable[[Batch], object]
"""What is done with a batch."""


@dataclass(frozen=True)
class Sides:
    """A slide with spots, and the networks and windows of both sides."""

    model: Any
    plain_model: PlainM2OST
    windows: SpotWindows
    plain_windows: PlainWindows
    device: torch.device


def options_of(about: str, spots: int, **further: dict[str, Any]) -> argparse.Namespace:
    """Read the command line; `further` are options of the one benchmark, each as `add_argument` takes it."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default="m2ost_small", choices=("m2ost_small", "m2ost_reference"))
    parser.add_argument("--spots", type=int, default=spots, help="spots of a pass")
    parser.add_argument("--batch-size", type=int, help="default: 32, m2ost_reference on a CPU: 8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--times", type=int, default=4, help="CMU-1-Small-Region is mirrored so many times each way")
    parser.add_argument("--cores", type=int, default=CORES, help="of the CPU; 1 where others use the machine, too")
    parser.add_argument("--device", default="auto")
    for name, settings in further.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    options = parser.parse_args()
    use_cores(options.cores)
    torch.set_num_threads(options.cores)
    small = options.model == "m2ost_reference" and find_device(options.device).type == "cpu"
    options.batch_size = options.batch_size or (8 if small else 32)
    return options


def prepare(folder: Path, options: argparse.Namespace, *, augment: bool, pitch_patches: float | None = None) -> Sides:
    """Write the slide and its pyramid, build both sides, and see that their networks give the same.

    Spots are scattered, or on a grid of so many patches of the finest level.
    """
    svs, zarr = folder / "mirrored.svs", folder / "mirrored.ome.zarr"
    width, height = write_mirrored(svs, options.times)
    write_pyramid(svs, zarr, threads=CORES)
    targets = np.random.default_rng(1).standard_normal((options.spots, N_GENES)).astype(np.float32)
    model: Any = create_model(options.model, n_genes=N_GENES)
    size = model.config.size
    mpp = [FIELD_UM * wider / size for wider in model.config.fields_of_view]
    centres = scattered(width, height, options.spots)
    if pitch_patches:
        centres = on_grid(width, height, options.spots, pitch_patches * model.config.patch_size * mpp[0] / MPP)
    spots: Any = SimpleNamespace(obsm={"spatial": centres})
    section = Section("mirrored", "mirrored", None, Pyramid(zarr), spots, None)  # type: ignore[arg-type]
    windows = SpotWindows([section], mpp, size, targets=targets, augment=augment, jitter=0.05)
    plain_windows = PlainWindows(svs, centres, [value / MPP for value in mpp], size, targets, augment=augment)
    device = find_device(options.device)
    sides = Sides(model.to(device), PlainM2OST(model).to(device), windows, plain_windows, device)
    check_equal(sides)
    return sides


def on_grid(width: int, height: int, count: int, pitch: float) -> np.ndarray:
    """Return (count, 2) centres x, y in level-0 px, row by row in the middle of the slide."""
    rows, columns = np.divmod(np.arange(count), math.isqrt(count - 1) + 1)
    places = np.column_stack([columns, rows]) * pitch
    return (np.array([width, height]) - places.max(axis=0)) / 2 + places


def check_equal(sides: Sides) -> None:
    """Raise unless both networks give the same output and the same gradients for the same windows."""
    views = scaled(sides.windows.__getitems__([0, 1])[0], sides.device)
    outputs, gradients = [], []
    for network in (sides.model, sides.plain_model):
        network.eval().zero_grad()
        outputs.append(network(views))
        outputs[-1].square().mean().backward()
        # The class token gets a gradient through the whole network.
        token = network.class_token if network is sides.plain_model else network.dpe.class_token
        gradients.append(token.grad.clone())
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@dataclass
class Pass:
    """Seconds of going through all batches once, of CPU time, and of waiting; the most memory held in MiB."""

    seconds: float
    cpu: float
    waited: float
    mib: float


def go_through(batches: Iterable[Batch], step: Step, device: torch.device) -> Pass:
    forget_peak(device)
    start, cpu, waited = time.perf_counter(), time.process_time(), 0.0
    iterator = iter(batches)
    while True:
        asked = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Pass(time.perf_counter() - start, time.process_time() - cpu, waited, peak_mib(device))


def forget_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:  # Linux: what is free goes back, and the peak is counted from here.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def gflop_of(network: Any, device: torch.device, *, backward: bool) -> float:
    """Count the operations of the network for a spot, in 1e9, multiplications and additions each."""
    views = [torch.zeros(1, 3, network.config.size, network.config.size, device=device) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        out = network(views)
        if backward:
            out.sum().backward()
    return counter.get_total_flops() / 1e9


def compare(run: dict[str, Callable[[], Pass]], repeats: int, spots: int, gflop: float) -> dict[str, float]:
    """Time the sides in turn, after a round that is not counted, and return the figures of a line of JSON."""
    passes: dict[str, list[Pass]] = {name: [] for name in run}
    for _ in range(1 + repeats):
        for name, side in run.items():
            passes[name].append(side())
    figures: dict[str, float] = {}
    for name, counted in ((name, all_[1:]) for name, all_ in passes.items()):
        rate = spots / statistics.median(p.seconds for p in counted)
        waiting = statistics.median(p.waited / p.seconds for p in counted)
        figures |= {
            f"{name}_spots_per_s": round(rate, 1),
            f"{name}_gflop_per_s": round(rate * gflop, 1),
            f"{name}_share_waiting_for_data": round(waiting, 3),
            f"{name}_peak_mib": round(max(p.mib for p in counted)),
        }
    pairs = list(zip(passes["histrata"][1:], passes["plain"][1:], strict=True))
    figures["ratio"] = round(statistics.median(plain.seconds / ours.seconds for ours, plain in pairs), 2)
    figures["ratio_of_cpu_time"] = round(statistics.median(plain.cpu / ours.cpu for ours, plain in pairs), 2)
    return figures


def compare_sides(
    name: str, sides: Sides, ours: Step, plain: Step, order: Sequence[int], gflop: float, options: argparse.Namespace
) -> None:
    """Compare the whole of both sides, then the networks alone, and print the line of JSON."""
    device, size = sides.device, options.batch_size
    workers = CORES if device.type == "cuda" else 0

    def with_histrata() -> Pass:
        return go_through(load_batches(sides.windows, order, size), ours, device)

    def plainly() -> Pass:
        return go_through(plain_loader(sides.plain_windows, order, size, workers), plain, device)

    figures = compare({"histrata": with_histrata, "plain": plainly}, options.repeats, options.spots, gflop)
    held = [sides.windows.__getitems__(order[:size])] * 2
    steps = {"histrata": ours, "plain": plain}
    networks = {side: partial(go_through, held, step, device) for side, step in steps.items()}
    alone = compare(networks, options.repeats, 2 * size, gflop)
    told = {"benchmark": name, "model": options.model, "spots": options.spots, "batch": size}
    told |= {"device": str(device), "cores": options.cores, **figures}
    told |= {"ratio_of_networks_alone": alone["ratio"], "ratio_of_networks_alone_cpu_time": alone["ratio_of_cpu_time"]}
    print(json.dumps(told | {"gflop_per_spot": round(gflop, 3)}))
