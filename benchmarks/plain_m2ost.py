"""M2OST as one would write it down from its description, and its windows as one would read them: what we compare with.

Everything is float32. The network loops over levels and granularities, holds q, k and v of the cross attention in
layers of their own, and writes attention out (einsum, softmax, einsum) for each pair of levels. The loader decodes one
window for each spot and level through OpenSlide, from the level of the file that fits, and scales it, by as many
threads as there are cores. It computes the same numbers as `histrata.expression.m2ost.M2OST` with the same weights, for
the options that the registered variants use; dropout drops at the same places, but for the last CTMM, where
ours drops of what the head takes alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openslide
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from histrata.expression.m2ost import M2OST, M2OSTConfig

Batch = tuple[list[Tensor], Tensor]


def cut(image: Tensor, patch: int) -> Tensor:
    """Turn (n, 3, side, side) into (n, patches, patch * patch * 3), pixel by pixel with its three colours."""
    n, colours, side, _ = image.shape
    rows = side // patch
    x = image.reshape(n, colours, rows, patch, rows, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * rows, patch * patch * colours)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of (n, tokens, heads * channels), all scores at once."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = torch.einsum("nihd,njhd->nhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("nhij,njhd->nihd", scores.softmax(dim=-1), v).flatten(2)


class WithinLevels(nn.Module):
    """Self-attention of each level, one after the other."""

    def __init__(self, c: M2OSTConfig) -> None:
        super().__init__()
        inner = c.heads * c.dim_head
        self.heads = c.heads
        self.norm = nn.LayerNorm(c.dim) if c.pre_norm else nn.Identity()
        self.to_qkv = nn.ModuleList(nn.Linear(c.dim, 3 * inner, bias=False) for _ in range(c.n_levels))
        self.to_out = nn.ModuleList(nn.Linear(inner, c.dim) for _ in range(c.n_levels))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Go from the tokens (n, tokens, dim) of each level to new ones."""
        out = []
        for i, x in enumerate(levels):
            q, k, v = self.to_qkv[i](self.norm(x)).chunk(3, dim=-1)
            out.append(x + self.dropout(self.to_out[i](attention(q, k, v, self.heads))))
        return out


class FeedForward(nn.Module):
    """The feed-forward network that the levels share, one level after the other."""

    def __init__(self, c: M2OSTConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(c.dim), nn.Linear(c.dim, c.mlp_dim), nn.GELU(), nn.Dropout(c.dropout),
            nn.Linear(c.mlp_dim, c.dim), nn.GELU(),
        )  # fmt: skip

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Go from the tokens (n, tokens, dim) of each level to new ones."""
        return [x + self.net(x) for x in levels]


class AcrossLevels(nn.Module):
    """Cross-attention of each level with each other, pair by pair."""

    def __init__(self, c: M2OSTConfig) -> None:
        super().__init__()
        inner = c.cross_heads * c.dim_head
        self.heads, self.residual = c.cross_heads, c.cross_residual
        self.norm = nn.LayerNorm(c.dim)
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.ModuleList(nn.Linear(c.dim, inner, bias=False) for _ in range(c.n_levels)))
        self.to_out = nn.ModuleList(nn.Linear((c.n_levels - 1) * inner, c.dim) for _ in range(c.n_levels))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Go from the tokens (n, tokens, dim) of each level to new ones."""
        normed = [self.norm(x) for x in levels]
        q, k, v = ([f(x) for f, x in zip(to, normed, strict=True)] for to in (self.to_q, self.to_k, self.to_v))
        out = []
        for i, x in enumerate(levels):
            seen = [attention(q[i], k[j], v[j], self.heads) for j in range(len(levels)) if j != i]
            mixed = self.dropout(self.to_out[i](torch.cat(seen, dim=-1)))
            out.append(x + mixed if self.residual else mixed)
        return out


class Channels(nn.Module):
    """Squeeze-and-excitation over the channels of all levels."""

    def __init__(self, c: M2OSTConfig) -> None:
        super().__init__()
        channels, hidden = c.n_levels * c.dim, c.n_levels * c.mlp_dim
        self.net = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(c.dropout),
            nn.Linear(hidden, channels), nn.Dropout(c.dropout), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Go from the tokens (n, tokens, dim) of each level to new ones."""
        scores = self.net(torch.cat([x.mean(dim=1) for x in levels], dim=-1)).chunk(len(levels), dim=-1)
        return [x * (1 + score.unsqueeze(1)) for x, score in zip(levels, scores, strict=True)]


class PlainM2OST(nn.Module):
    """The network, with the weights of a model of ours."""

    def __init__(self, model: M2OST) -> None:
        super().__init__()
        c = self.config = model.config
        self.embeddings = nn.ModuleList()
        for j in range(c.n_granularities):
            pixels, hidden = 3 * (c.patch_size // 2**j) ** 2, 3 * c.dim // 2**j
            norm = nn.LayerNorm(pixels) if c.patch_norm else nn.Identity()
            self.embeddings.append(
                nn.Sequential(norm, nn.Linear(pixels, hidden), nn.GELU(), nn.Linear(hidden, c.dim), nn.LayerNorm(c.dim))
            )
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.positions = nn.ParameterList(torch.zeros(1, c.n_tokens(k), c.dim) for k in range(c.n_levels))
        self.layers = nn.ModuleList(
            nn.Sequential(WithinLevels(c), FeedForward(c), AcrossLevels(c), Channels(c)) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.n_levels * c.dim, c.n_genes)
        self.load_state_dict(plain_names(model.state_dict()))

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Predict expression (n, n_genes) from a view (n, 3, size, size) of each level."""
        levels = [self.tokens(view, k) for k, view in enumerate(views)]
        for layer in self.layers:
            levels = layer(levels)
        return self.head(torch.cat([self.norm(x)[:, 0] for x in levels], dim=-1))

    def tokens(self, view: Tensor, level: int) -> Tensor:
        """Embed one level: its centre in fine patches, and then wider and wider in coarser ones."""
        c = self.config
        if not c.patch_norm:
            view = (view - 0.5) * 4
        parts = [self.class_token.expand(len(view), -1, -1)]
        for j in reversed(range(min(level + 1, c.n_granularities))):
            edge = (c.size - c.size // 2**j) // 2
            centre = view[:, :, edge : c.size - edge, edge : c.size - edge]
            parts.append(self.embeddings[j](cut(centre, c.patch_size // 2**j)))
        return torch.cat(parts, dim=1) + self.positions[level]


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights, and take the joined q, k and v of the cross attention apart."""
    named = {}
    for name, weight in state.items():
        short = name.removeprefix("dpe.")
        if ".2.to_qkv." in name:
            for which, part in zip("qkv", weight.chunk(3), strict=True):
                named[short.replace("to_qkv", f"to_{which}")] = part
        else:
            named[short] = weight
    return named


class PlainWindows(Dataset[Batch]):
    """Windows of a slide, each decoded for itself, as floats in 0..1; turned and flipped alike at all levels."""

    def __init__(
        self, slide: Path, centres: np.ndarray, steps: Sequence[float], size: int, targets: np.ndarray, *, augment: bool
    ) -> None:
        self.path, self.centres, self.steps, self.size = slide, centres, steps, size
        self.targets, self.augment, self.rng = targets, augment, np.random.default_rng(0)
        self._slide: openslide.OpenSlide | None = None

    def __len__(self) -> int:
        return len(self.centres)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            views = list(pool.map(self.views, indices))
        stacked = []
        for level in range(len(self.steps)):
            images = [torch.from_numpy(v[level]).permute(2, 0, 1).float() / 255 for v in views]
            stacked.append(torch.stack(images))
        if self.augment:
            for row in range(len(views)):
                turns, flip, jitter = int(self.rng.integers(4)), bool(self.rng.integers(2)), self.rng
                for level in stacked:
                    image = torch.rot90(level[row], turns, (1, 2))
                    image = image.flip(2) if flip else image
                    scale = torch.from_numpy(jitter.uniform(0.95, 1.05, (3, 1, 1)).astype(np.float32))
                    level[row] = (image * scale).clip(0, 1)
        return stacked, torch.from_numpy(self.targets[list(indices)])

    def views(self, index: int) -> list[np.ndarray]:
        """Decode and scale the windows (size, size, 3) of one spot."""
        if self._slide is None:
            self._slide = openslide.OpenSlide(self.path)
            self._slide.set_cache(openslide.OpenSlideCache(256 << 20))  # as much as a pyramid keeps
        windows = []
        for step in self.steps:
            level = self._slide.get_best_level_for_downsample(step * 1.01)
            side = round(self.size * step / self._slide.level_downsamples[level])
            x, y = np.rint(self.centres[index] - self.size * step / 2).astype(int).tolist()
            region = np.asarray(self._slide.read_region((x, y), level, (side, side)))[..., :3]
            windows.append(cv2.resize(region, (self.size, self.size), interpolation=cv2.INTER_AREA))
        return windows


def plain_loader(windows: PlainWindows, order: Sequence[int], batch_size: int, workers: int) -> DataLoader[Batch]:
    """Load batches; by `workers` processes beside the network where it computes on a GPU."""
    return DataLoader(windows, batch_size, sampler=order, collate_fn=lambda batch: batch, num_workers=workers)
