"""M2OST: gene expression of a spot from views of its surroundings at several magnifications.

Wang et al., "M2OST: Many-to-one Regression for Predicting Spatial Transcriptomics from Digital Pathology
Images", AAAI 2025, arXiv 2409.15092. The names below are the paper's:

- DPE, the patch embedding at several granularities: level k is cut into patches as a whole, and again, with
  patches half and a quarter as wide, in the centre that the finer levels show. The embeddings are shared by
  the levels.
- ITMM, self-attention among the tokens of one level, with weights of its own for each level.
- A feed-forward network shared by the levels.
- CTMM, cross-attention from each level to each other level.
- CCMM, squeeze-and-excitation over the channels of all levels together.
- The head: the class tokens of all levels, side by side, through one linear layer to the genes.

**What a model is given.** A list of (n, 3, size, size) tensors, RGB in 0..1, finest level first, all centred
on the spot. As published, level k shows a field of view 2**k times as wide as level 0 with the same number of
pixels (`M2OSTConfig.fields_of_view`), and its innermost crop is what level 0 shows; other um/px are possible, and
the crops are then merely centres. The model cannot see which they are; the caller reads the windows at the um/px
of its choice, and turns and flips all levels of a spot alike. With ``tokens="encoder"`` each level is
(n, token_count, token_dim) instead: what a frozen encoder made of the window, in place of the DPE.

**What differs from the published code**, which is followed otherwise:

- The innermost crop of level 2 is a centred quarter of the window. The published code takes 84 of 224 px,
  off the centre, and stops with a shape error.
- Any number of levels, window and patch size. A single level has no CTMM; levels beyond the third are cut at
  the same three granularities as the third, since patches would soon be smaller than a pixel.
- Queries, keys and values of a level come from one matrix, and attention runs through
  `scaled_dot_product_attention`, or in training with few tokens on a CPU through `_ShortAttention`: the same
  numbers in less time. Dropout is applied to the outputs of attention, not to its weights, which would leave the
  fused kernels.
- On a CPU, float32 products go through oneDNN, and patches are cut colour by colour, with the weights of the first
  layer reordered to that: the same numbers again. docs/m2ost.md has what this gives.
- The normalisation that the ITMM creates and never uses is left out, so every parameter gets a gradient.
- Nothing is computed that no output depends on: in the last layer only the class tokens and the mean of all
  tokens go through the CTMM's projection, its dropout and the CCMM.
- Prediction on a CPU embeds patches that several windows of a batch have in common once (histrata.expression.patches).
- Options that the published code lacks, all off in `m2ost_reference`; docs/m2ost.md has what each gives on real
  data, and the other variants have those on that earned it. From the paper, which the code does not follow:
  learned scalar weights in the CTMM (`cross_weights`) and random masks in the ITMM (`mask_ratio`). The field's
  habits: pixels that keep their brightness and contrast (`patch_norm`: published, every patch is brought to mean
  0 and variance 1, so that a dark patch and a pale one look alike) or windows of which each channel is
  brought to mean 0 and variance 1 (`window_norm`), normalisation before the ITMM (`pre_norm`), a residual around
  the CTMM, without which each layer forgets a level's own tokens (`cross_residual`), position embeddings that
  start smaller beside the tokens (`position_std`), `dropout`, stochastic depth (`drop_path`), and a head that
  takes the mean of the tokens instead of the class token (`head`).

Published weights are read by `load_published_weights` and `from_published`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import skip_init

from histrata.errors import HistrataError
from histrata.expression.patches import Distinct, Shared, cut_patches, pick
from histrata.registry import make_config, register_model

# Whole windows, their centre half, their centre quarter.
MAX_GRANULARITIES = 3
# The published code gives its CTMM three heads whatever it is configured with.
PUBLISHED_CROSS_HEADS = 3
# What torch's own compiler multiplies with; a build without oneDNN does not have it.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Tokens up to which attention that keeps its weights is faster than torch's fused kernel, in training on a CPU; and
# the bytes of weights that are worked on at a time. docs/performance.md has the measurements.
_SHORT, _CACHED = 192, 1 << 21
_CHOICES = {"tokens": ("patches", "encoder"), "head": ("class", "mean")}


@dataclass(frozen=True)
class M2OSTConfig:
    """Everything that determines the shape and arithmetic of an `M2OST`; the defaults are the published ones.

    Values are plain numbers, so that ``M2OSTConfig(**json.loads(json.dumps(asdict(config))))`` is `config`.

    Parameters
    ----------
    n_genes
        Number of predicted genes of a spot.
    n_outputs
        Values for each gene: 1, or the 2 parameters of a distribution.
    n_levels
        Number of views of a spot, finest first.
    tokens
        "patches" of the windows' pixels, or those of a frozen "encoder".
    token_count, token_dim
        Tokens of a level and their channels, where an encoder made them; without meaning for patches.
    size
        Height and width of every view in pixels.
    patch_size
        Height and width in pixels of a patch of the whole view; 1/2 and 1/4 of it in the centre crops.
    depth
        Number of layers.
    dim
        Channels of a token (the published `dim` counts three levels together: 576 there is 192 here).
    heads, cross_heads
        Attention heads of a level in the ITMM and in the CTMM (published: `heads` // 3, and always 3).
    dim_head
        Channels of an attention head.
    mlp_dim
        Hidden channels of the shared feed-forward network, and of the CCMM for each level (published:
        `mlp_dim` // 3).
    dropout
        Share of the values dropped in training after attention and in the feed-forward networks.
    drop_path
        Share of the spots for which a branch (ITMM, feed-forward, CTMM with a residual) is left out in training.
    mask_ratio
        Share of the tokens that the others do not see in the ITMM in training, drawn for each batch and layer.
    patch_norm
        Whether each patch is normalised by its own mean and variance (True, published) or all pixels alike.
    window_norm
        Whether each channel of a window is brought to mean 0 and variance 1.
    pre_norm
        Whether tokens are normalised before the ITMM.
    cross_residual
        Whether the CTMM adds to the tokens (True) or replaces them (False, as published).
    cross_weights
        Whether the CTMM adds up what it finds in the other levels with a learned weight for each pair (the paper)
        or puts it side by side (the published code).
    position_std
        Standard deviation of the position embeddings and the class token at the start.
    head
        What of each level the head takes: its "class" token (published) or the "mean" of all its tokens.

    Raises
    ------
    HistrataError
        A value has the wrong type or is out of range, or `size` cannot be cut as described above.
    """

    n_genes: int = 250
    n_outputs: int = 1
    n_levels: int = 3
    tokens: str = "patches"
    token_count: int = 1
    token_dim: int = 1
    size: int = 224
    patch_size: int = 16
    depth: int = 4
    dim: int = 192
    heads: int = 3
    cross_heads: int = 3
    dim_head: int = 64
    mlp_dim: int = 128
    dropout: float = 0.0
    drop_path: float = 0.0
    mask_ratio: float = 0.0
    patch_norm: bool = True
    window_norm: bool = False
    pre_norm: bool = False
    cross_residual: bool = False
    cross_weights: bool = False
    position_std: float = 1.0
    head: str = "class"

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name), type(field.default))
        finest = 2 ** (self.n_granularities - 1)
        if self.patch_size % finest:
            raise HistrataError(
                f"patch_size is {self.patch_size} px, but {self.n_levels} levels are also cut into patches "
                f"of 1/{finest} of that: choose a multiple of {finest}"
            )
        # Twice the finest: the smallest crop leaves a whole number of pixels on each side.
        step = math.lcm(self.patch_size, 2 * finest if finest > 1 else 1)
        if self.size % step:
            raise HistrataError(
                f"size is {self.size} px, which cannot be cut into centred crops and patches of "
                f"{self.patch_size} px: choose a multiple of {step}"
            )

    @property
    def n_granularities(self) -> int:
        """Number of patch widths: patch_size, its half, its quarter."""
        return min(self.n_levels, MAX_GRANULARITIES)

    @property
    def fields_of_view(self) -> tuple[int, ...]:
        """Width of the tissue that each level shows, and its um/px, as multiples of level 0: 1, 2, 4..."""
        return tuple(2**level for level in range(self.n_levels))

    def n_tokens(self, level: int) -> int:
        """Count the tokens of a level: a class token, then as many patches at each of its granularities."""
        if self.tokens == "encoder":
            return 1 + self.token_count
        return 1 + min(level + 1, MAX_GRANULARITIES) * (self.size // self.patch_size) ** 2


def _check_value(name: str, value: Any, kind: type) -> None:
    # An exact comparison, since True is an int to isinstance.
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        raise HistrataError(f"{name} is {value!r}, where a value of type {kind.__name__} is expected")
    if kind is int and not value >= 1:
        raise HistrataError(f"{name} is {value}, where 1 or more is expected")
    if kind is float and not 0 <= value < math.inf:
        raise HistrataError(f"{name} is {value}, where 0 or more is expected")
    if name in ("dropout", "drop_path", "mask_ratio") and not value < 1:
        raise HistrataError(f"{name} is {value}, where a share below 1 is expected")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise HistrataError(f"{name} is {value!r}, where one of {', '.join(_CHOICES[name])} is expected")


class DPE(nn.Module):
    """Embed the patches of every level at every granularity, and add class token and positions.

    Level k is cut at granularities j = min(k, 2), ..., 0, finest first: its centre crop of ``size / 2**j``
    pixels into patches of ``patch_size / 2**j`` pixels. The crop at j = k is the field of view of level 0.
    """

    def __init__(self, config: M2OSTConfig) -> None:
        super().__init__()
        self.size, self.patch_size = config.size, config.patch_size
        self.patch_norm, self.window_norm = config.patch_norm, config.window_norm
        self.embeddings = nn.ModuleList(_patch_embedding(config, j) for j in range(config.n_granularities))
        self.class_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.positions = nn.ParameterList(
            torch.empty(1, config.n_tokens(level), config.dim) for level in range(config.n_levels)
        )

    def forward(self, views: Sequence[Tensor], shared: Shared | None = None) -> list[Tensor]:
        """Turn views (n, 3, size, size) into tokens (n, n_tokens(level), dim), one tensor for each level."""
        if self.window_norm:
            views = [nn.functional.instance_norm(view) for view in views]
        tokens = [[self.class_token.expand(len(view), -1, -1)] for view in views]
        for j, embed in reversed(list(enumerate(self.embeddings))):
            # All levels that are cut at this granularity go through its embedding in one piece.
            cut = [cut_patches(view, self.size // 2**j, self.patch_size // 2**j) for view in views[j:]]
            distinct = [level[j] for level in shared[j:]] if shared else []
            embedded = self._embed_distinct(embed, cut, distinct) if any(distinct) else self._embed_all(embed, cut)
            for level, x in enumerate(embedded, start=j):
                tokens[level].append(x)
        return [torch.cat(t, dim=1) + position for t, position in zip(tokens, self.positions, strict=True)]

    def _embed_all(self, embed: Any, cut: list[Tensor]) -> Iterable[Tensor]:
        """Embed every patch (n, rows, columns, 3, patch, patch) of each level: (n, rows * columns, dim)."""
        return self._embed(embed, torch.stack(cut).flatten(4).flatten(2, 3))

    def _embed_distinct(self, embed: Any, cut: list[Tensor], distinct: list[Distinct | None]) -> Iterable[Tensor]:
        """Do what `_embed_all` does, with one of those patches that are equal."""
        for x, d in zip(cut, distinct, strict=True):
            embedded = self._embed(embed, (pick(x, d.first) if d else x.flatten(0, 2)).flatten(1))
            yield (embedded[d.which.to(embedded.device)] if d else embedded).unflatten(0, (len(x), -1))

    def _embed(self, embed: Any, patches: Tensor) -> Tensor:
        """Embed patches (..., 3 * patch * patch), colour by colour; the weights are for pixel by pixel."""
        norm, first, *further = embed
        weight, bias = _by_colour(first.weight), first.bias
        if self.patch_norm:
            shape = patches.shape[-1:]
            patches = nn.functional.layer_norm(patches, shape, _by_colour(norm.weight), _by_colour(norm.bias), norm.eps)
        elif not self.window_norm:
            # From 0..1 to the spread that the embeddings would otherwise get from a normalisation: 4 (x - 1/2).
            weight, bias = 4 * weight, bias - 2 * weight.sum(dim=1)
        x = _multiply(patches, weight, bias)
        for module in further:
            x = module(x)
        return x


def _by_colour(weight: Tensor) -> Tensor:
    """Reorder the last axis (pixels, 3) of weights to (3, pixels): patches are cut faster so."""
    return weight.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)


class TokenEmbedding(nn.Module):
    """Bring the tokens of a frozen encoder to the model's channels, and add class token and positions."""

    def __init__(self, config: M2OSTConfig) -> None:
        super().__init__()
        self.embedding = nn.Sequential(
            nn.LayerNorm(config.token_dim),
            _linear(config.token_dim, config.dim),
            nn.LayerNorm(config.dim),
            _Dropout(config.dropout),
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.positions = nn.ParameterList(
            torch.empty(1, config.n_tokens(level), config.dim) for level in range(config.n_levels)
        )

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Turn (n, token_count, token_dim) into tokens (n, n_tokens(level), dim), one tensor for each level."""
        embedded = self.embedding(torch.stack(list(views))).unbind()
        first = self.class_token.expand(len(views[0]), -1, -1)
        return [torch.cat([first, x], dim=1) + position for x, position in zip(embedded, self.positions, strict=True)]


def _patch_embedding(config: M2OSTConfig, j: int) -> nn.Sequential:
    pixels, hidden = 3 * (config.patch_size // 2**j) ** 2, 3 * config.dim // 2**j
    return nn.Sequential(
        nn.LayerNorm(pixels) if config.patch_norm else nn.Identity(),
        _linear(pixels, hidden),
        nn.GELU(),
        _linear(hidden, config.dim),
        nn.LayerNorm(config.dim),
    )


class ITMM(nn.Module):
    """Self-attention within each level, with projections of its own for each level; adds to the tokens."""

    def __init__(self, config: M2OSTConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads, self.mask_ratio = config.heads, config.mask_ratio
        self.norm = nn.LayerNorm(config.dim) if config.pre_norm else nn.Identity()
        self.to_qkv = nn.ModuleList(_linear(config.dim, 3 * inner, bias=False) for _ in range(config.n_levels))
        self.to_out = nn.ModuleList(_linear(inner, config.dim) for _ in range(config.n_levels))
        self.dropout, self.drop_path = _Dropout(config.dropout), _DropPath(config.drop_path)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Add to the tokens (n, tokens, dim) of each level what attention finds in that level."""
        return [
            x + self.drop_path(self.dropout(to_out(self._attend(to_qkv(self.norm(x))))))
            for x, to_qkv, to_out in zip(levels, self.to_qkv, self.to_out, strict=True)
        ]

    def _attend(self, qkv: Tensor) -> Tensor:
        query, key, value = _split_heads(qkv, self.heads)
        if self.training and self.mask_ratio:
            seen = torch.rand(key.shape[2], device=key.device) >= self.mask_ratio
            seen[0] = True  # The class token: somebody has to be seen.
            key, value = key[:, :, seen], value[:, :, seen]
        return _attend(query, key, value)


class SharedFeedForward(nn.Module):
    """One feed-forward network for the tokens of all levels, with a GELU at its end too; adds to them."""

    def __init__(self, config: M2OSTConfig) -> None:
        super().__init__()
        self.drop_path = _DropPath(config.drop_path)
        self.net = nn.Sequential(
            nn.LayerNorm(config.dim),
            _linear(config.dim, config.mlp_dim),
            nn.GELU(),
            _Dropout(config.dropout),
            _linear(config.mlp_dim, config.dim),
            nn.GELU(),
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Pass the tokens (n, tokens, dim) of every level through the same network."""
        return [x + self.drop_path(self.net(x)) for x in levels]


class CTMM(nn.Module):
    """Cross-attention from each level to each other; adds to the tokens, or replaces them (published)."""

    def __init__(self, config: M2OSTConfig) -> None:
        super().__init__()
        inner, others = config.cross_heads * config.dim_head, config.n_levels - 1
        self.heads, self.residual = config.cross_heads, config.cross_residual
        self.drop_path = _DropPath(config.drop_path)
        self.norm = nn.LayerNorm(config.dim)
        self.to_qkv = nn.ModuleList(_linear(config.dim, 3 * inner, bias=False) for _ in range(config.n_levels))
        joined = inner if config.cross_weights else others * inner
        self.to_out = nn.ModuleList(_linear(joined, config.dim) for _ in range(config.n_levels))
        self.weights = nn.Parameter(torch.empty(config.n_levels, others)) if config.cross_weights else None
        self.dropout = _Dropout(config.dropout)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Gather for the tokens (n, tokens, dim) of each level what attention finds in the other levels."""
        return self._added(levels, self._gather(levels))

    def pooled(self, levels: list[Tensor]) -> list[Tensor]:
        """Return of what `forward` gives only the class token and the mean of all tokens, (n, 2, dim) a level.

        Dropout falls on these two, instead of on all tokens before their mean.
        """
        # The projection is linear: that of a mean is the mean of the projections.
        return self._added([_pool(x) for x in levels], [_pool(x) for x in self._gather(levels)])

    def _gather(self, levels: list[Tensor]) -> list[Tensor]:
        """Return for each level (n, tokens, joined) what its queries find in the others, not yet projected."""
        qkv = [_split_heads(to_qkv(self.norm(x)), self.heads) for x, to_qkv in zip(levels, self.to_qkv, strict=True)]
        gathered = []
        for level, (query, _, _) in enumerate(qkv):
            seen = [_attend(query, key, value) for other, (_, key, value) in enumerate(qkv) if other != level]
            if self.weights is None:
                gathered.append(torch.cat(seen, dim=-1))
            else:
                gathered.append(sum(w * x for w, x in zip(self.weights[level], seen, strict=True)))
        return gathered

    def _added(self, levels: list[Tensor], gathered: list[Tensor]) -> list[Tensor]:
        mixed = [self.dropout(to_out(x)) for x, to_out in zip(gathered, self.to_out, strict=True)]
        if not self.residual:
            return mixed
        return [x + self.drop_path(m) for x, m in zip(levels, mixed, strict=True)]


class CCMM(nn.Module):
    """Squeeze-and-excitation: scale each channel of each level by 1 + a score from all channels' means."""

    def __init__(self, config: M2OSTConfig) -> None:
        super().__init__()
        channels, hidden = config.n_levels * config.dim, config.n_levels * config.mlp_dim
        self.net = nn.Sequential(
            nn.LayerNorm(channels),
            _linear(channels, hidden),
            nn.GELU(),
            _Dropout(config.dropout),
            _linear(hidden, channels),
            _Dropout(config.dropout),
            nn.Sigmoid(),
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Scale the tokens (n, tokens, dim) of every level."""
        return self._scale(levels, [x.mean(dim=1) for x in levels])

    def pooled(self, levels: list[Tensor]) -> list[Tensor]:
        """Scale class token and mean of the tokens, (n, 2, dim) a level."""
        return self._scale(levels, [x[:, 1] for x in levels])

    def _scale(self, levels: list[Tensor], means: list[Tensor]) -> list[Tensor]:
        scores = self.net(torch.cat(means, dim=-1)).unsqueeze(1).chunk(len(levels), dim=-1)
        return [x * (1 + score) for x, score in zip(levels, scores, strict=True)]


class Layer(nn.Sequential):
    """ITMM, feed-forward, CTMM (where there are several levels) and CCMM, one after the other."""

    def __init__(self, config: M2OSTConfig) -> None:
        # A single level has no other to look at.
        cross = [CTMM(config)] if config.n_levels > 1 else []
        super().__init__(ITMM(config), SharedFeedForward(config), *cross, CCMM(config))

    def pooled(self, levels: list[Tensor]) -> list[Tensor]:
        """Return the class token and the mean of all tokens, (n, 2, dim) a level: all that a head takes."""
        modules: list[Any] = list(self)
        within, feed_forward, *cross, channels = modules
        levels = feed_forward(within(levels))
        pooled: list[Tensor] = cross[0].pooled(levels) if cross else [_pool(x) for x in levels]
        scaled: list[Tensor] = channels.pooled(pooled)
        return scaled


class M2OST(nn.Module):
    """Many-to-one regression from views of a spot at several levels to its expression.

    Parameters
    ----------
    config
        Shape and options.
    seed
        The starting weights are drawn from a generator of their own with this seed.
    """

    def __init__(self, config: M2OSTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.dpe = TokenEmbedding(config) if config.tokens == "encoder" else DPE(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = _linear(config.n_levels * config.dim, config.n_outputs * config.n_genes)
        self.reset_parameters(torch.Generator().manual_seed(seed))

    @property
    def shares_patches(self) -> bool:
        """Whether patches of the same pixels are embedded alike whatever window they are cut from."""
        return self.config.tokens == "patches" and not self.config.window_norm

    def forward(self, views: Sequence[Tensor], shared: Shared | None = None) -> Tensor:
        """Predict expression.

        Parameters
        ----------
        views
            A float tensor for each level, finest first: (n, 3, size, size), RGB in 0..1, or (n, token_count,
            token_dim) where the tokens are an encoder's.
        shared
            What `SharedPatches.find` gave for these views, of a model that `shares_patches`: less is embedded.

        Returns
        -------
        Expression (n, n_genes), not bounded; (n, n_outputs, n_genes) where there are several outputs.

        Raises
        ------
        HistrataError
            The number of levels, a shape or a dtype is not that of the configuration.
        """
        self._check(views)
        levels = self.dpe(views, shared) if shared else self.dpe(views)
        for layer in self.layers[:-1]:
            levels = layer(levels)
        last: Any = self.layers[-1]
        taken = 1 if self.config.head == "mean" else 0
        pooled = [self.norm(x[:, taken]) for x in last.pooled(levels)]
        genes: Tensor = self.head(torch.cat(pooled, dim=-1))
        return genes if self.config.n_outputs == 1 else genes.unflatten(-1, (self.config.n_outputs, -1))

    def _check(self, views: Sequence[Tensor]) -> None:
        if len(views) != self.config.n_levels:
            raise HistrataError(
                f"got {len(views)} levels where the model takes {self.config.n_levels}: give a list of one "
                "tensor for each level, finest first"
            )
        config = self.config
        shape = (config.token_count, config.token_dim) if config.tokens == "encoder" else (3, config.size, config.size)
        expected = (len(views[0]), *shape)
        for level, view in enumerate(views):
            if view.shape != expected:
                raise HistrataError(f"level {level} has shape {tuple(view.shape)}, where {expected} is expected")
            if not view.is_floating_point():
                raise HistrataError(f"level {level} is {view.dtype}, where floats in 0..1 are expected")

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights anew from `generator` (on their device), distributed as in the published code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, CTMM) and module.weights is not None:
                # What the levels give together starts as large as what one gives.
                module.weights.fill_(1 / module.weights.shape[1])
        for embedding in (self.dpe.class_token, *self.dpe.positions):
            embedding.normal_(0, self.config.position_std, generator=generator)


class _Linear(nn.Linear):
    """A linear layer that is multiplied by oneDNN on a CPU: the same float32 numbers as torch's, sooner.

    torch gives float32 products to MKL, which leaves the widest registers of processors other than Intel's unused.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., in) by the weight and add the bias."""
        return _multiply(input, self.weight, self.bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do what `torch.nn.functional.linear` does, on a CPU with float32 through oneDNN."""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel() or torch.is_autocast_enabled("cpu")
    if plain or not (_HAS_ONEDNN and torch.backends.mkldnn.enabled):
        return nn.functional.linear(x, weight, bias)
    product: Tensor = _OneDNN.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)
    return product


class _Dropout(nn.Dropout):
    """Dropout that draws its mask eight values at a time on a CPU, where drawing takes longer than all else.

    The share that is dropped is there rounded to 1/256.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop values in training, and make up for them in the others."""
        dropped = round(self.p * 256)
        if not (self.training and dropped and input.device.type == "cpu"):
            return super().forward(input)
        size = input.numel()
        words = torch.empty(-(-size // 8), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
        kept = (words.view(torch.uint8)[:size] >= dropped).view(input.shape)
        return input * kept.to(input.dtype).mul_(256 / (256 - dropped))


class _OneDNN(torch.autograd.Function):
    """A linear layer and its gradients, each one product of oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            _product(grad, weight.t()) if of_x else None,
            _product_of_columns(rows, inputs) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _product_of_columns(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (n, a) and (n, b) to left^T right (a, b); oneDNN turns its first factor, so that is the narrower."""
    if left.shape[1] <= right.shape[1]:
        return _product(left.t(), right.t())
    return _product(right.t(), left.t()).t()


def _linear(n_in: int, n_out: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer without drawing its weights, which would advance the global random state."""
    return skip_init(_Linear, n_in, n_out, bias=bias)


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Split (n, tokens, 3 * heads * dim_head) into query, key and value (n, heads, tokens, dim_head)."""
    # Taken apart before the axes are exchanged: their gradients are then put together by one copy.
    return tuple(part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention of (n, heads, tokens, dim_head), with the heads joined again."""
    learns = torch.is_grad_enabled() and query.device.type == "cpu" and query.dtype == torch.float32
    short = max(query.shape[2], key.shape[2]) <= _SHORT
    attend = _ShortAttention.apply if learns and short else scaled_dot_product_attention
    found: Tensor = attend(query, key, value)
    return found.transpose(1, 2).flatten(2)


class _ShortAttention(torch.autograd.Function):
    """Attention and its gradients for training on a CPU: the weights are kept, and a few spots computed at a time.

    torch's fused kernel computes the weights again for the gradients, in tiles that few tokens do not fill.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        found, kept = torch.empty_like(query), []
        for some in _few_spots(query, key):
            scores = (query[some] @ key[some].transpose(-1, -2)).mul_(scale)
            kept.append(torch.softmax(scores, dim=-1, out=scores))
            found[some] = kept[-1] @ value[some]
        ctx.save_for_backward(query, key, value, *kept)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *kept = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
        for some, weights in zip(_few_spots(query, key), kept, strict=True):
            of_value[some] = weights.transpose(-1, -2) @ grad[some]
            of_weights = grad[some] @ value[some].transpose(-1, -2)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, torch.float32).mul_(scale)
            of_query[some] = of_scores @ key[some]
            of_key[some] = of_scores.transpose(-1, -2) @ query[some]
        return of_query, of_key, of_value


def _few_spots(query: Tensor, key: Tensor) -> list[slice]:
    """Cut the spots so that the attention weights of some of them fit into a processor's cache."""
    weights = query.shape[1] * query.shape[2] * key.shape[2]
    step = max(1, _CACHED // (4 * weights))
    return [slice(start, start + step) for start in range(0, len(query), step)]


def _pool(x: Tensor) -> Tensor:
    """Return the class token and the mean of all tokens (n, 2, dim) of (n, tokens, dim)."""
    return torch.stack([x[:, 0], x.mean(dim=1)], dim=1)


class _DropPath(nn.Module):
    """Stochastic depth: leaves a branch (n, tokens, dim) out for some of the spots in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Leave the branch out for the share `rate` of the spots, and make up for it in the others."""
        if not (self.training and self.rate):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * kept / (1 - self.rate)


_RECOMMENDED: dict[str, Any] = {
    "dropout": 0.1,
    "patch_norm": False,
    "pre_norm": True,
    "cross_residual": True,
}


@register_model
def m2ost_reference(seed: int = 0, **config: Any) -> M2OST:
    """M2OST as its authors train it, 224-px windows, 7.04 M parameters with 250 genes; meant for a GPU."""
    return M2OST(make_config(M2OSTConfig, config), seed)


@register_model
def m2ost(seed: int = 0, **config: Any) -> M2OST:
    """M2OST of the published size in the recommended arrangement; meant for a GPU."""
    return M2OST(make_config(M2OSTConfig, config, **_RECOMMENDED), seed)


@register_model
def m2ost_small(seed: int = 0, **config: Any) -> M2OST:
    """M2OST in the recommended arrangement, 2 layers, 112-px windows, 1.15 M parameters; trains on a CPU."""
    small = {"size": 112, "depth": 2, "dim": 96, "dim_head": 32, "mlp_dim": 64}
    return M2OST(make_config(M2OSTConfig, config, **small, **_RECOMMENDED), seed)


def from_published(path: Path) -> M2OST:
    """Build the model that weights of the published code belong to, and load them.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or a file that the published code saved (read with ``weights_only=True``).

    Returns
    -------
    An `m2ost_reference` with the configuration that the shapes of the weights tell.

    Raises
    ------
    HistrataError
        The file cannot be read or does not hold the weights of a published M2OST.
    """
    state = _read_published(path)
    depth = max(1, sum(name.endswith(".2.to_q0.weight") for name in state))
    _check_names(str(path), state, depth)
    model = M2OST(_published_config(state, depth))
    load_published_weights(model, state)
    return model


def load_published_weights(model: M2OST, weights: Mapping[str, Tensor] | Path) -> None:
    """Copy weights saved by the published code (also under DataParallel) into a model of the same shape.

    Parameters
    ----------
    model
        A three-level model with the options of `m2ost_reference`.
    weights
        A state dict under the published names, or a file as `from_published` takes it.

    Raises
    ------
    HistrataError
        The file cannot be read, the model is arranged otherwise, or the weights are not those of the model:
        names are missing, unknown, or of another shape.
    """
    config = model.config
    published = M2OSTConfig(n_levels=3, cross_heads=PUBLISHED_CROSS_HEADS)
    arranged = ("n_levels", "n_outputs", "tokens", "cross_heads", "patch_norm", "window_norm", "pre_norm")
    for key in (*arranged, "cross_residual", "cross_weights", "head"):
        if getattr(config, key) != getattr(published, key):
            raise HistrataError(
                f"published weights need a model with {key}={getattr(published, key)}, and this one has "
                f"{getattr(config, key)}: build it with from_published or as m2ost_reference"
            )
    source = "the state dict" if isinstance(weights, Mapping) else str(weights)
    state = _strip(weights) if isinstance(weights, Mapping) else _read_published(weights)
    _check_names(source, state, config.depth)
    ours = model.state_dict()
    loaded = {}
    for name, joined in _published_names(config.depth).items():
        loaded[name] = torch.cat([state[part] for part in joined])
        if loaded[name].shape != ours[name].shape:
            raise HistrataError(
                f"{' + '.join(joined)} of {source} has shape {tuple(loaded[name].shape)}, where the model "
                f"has {tuple(ours[name].shape)}: build the model with from_published"
            )
    model.load_state_dict(loaded)


def _read_published(path: Path) -> dict[str, Tensor]:
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise HistrataError(f"{path} is not there: give the file of the published weights") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError, OSError) as error:
        raise HistrataError(f"{path} cannot be read as weights, a plain state dict is expected") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise HistrataError(f"{path} does not hold a plain state dict of names and tensors")
    return _strip(state)


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix that DataParallel puts before every name."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def _published_config(state: Mapping[str, Tensor], depth: int) -> M2OSTConfig:
    """Tell the configuration from the shapes."""
    first = "transformer.layers.0"
    patch_size = math.isqrt(len(state["to_patch_embedding1.1.weight"]) // 3)
    dim_head = len(state[f"{first}.2.to_q0.weight"]) // PUBLISHED_CROSS_HEADS
    return M2OSTConfig(
        n_genes=len(state["mlp_head.weight"]),
        size=patch_size * math.isqrt(state["pos_embedding1"].shape[1] - 1),
        patch_size=patch_size,
        depth=depth,
        dim=state["cls_token"].shape[-1],
        heads=len(state[f"{first}.0.to_qkv1.weight"]) // (3 * dim_head),
        cross_heads=PUBLISHED_CROSS_HEADS,
        dim_head=dim_head,
        mlp_dim=len(state[f"{first}.1.split_mlp.1.weight"]),
    )


def _published_names(depth: int) -> dict[str, tuple[str, ...]]:
    """Map each name of ours to the published ones whose tensors it joins along the first axis."""
    names: dict[str, tuple[str, ...]] = {"dpe.class_token": ("cls_token",)}
    pairs = [("norm", "transformer.norm"), ("head", "mlp_head")]
    for level in range(3):
        names[f"dpe.positions.{level}"] = (f"pos_embedding{level + 1}",)
        # The published sequence begins with the cutting into patches, ours does not.
        pairs += [(f"dpe.embeddings.{level}.{i}", f"to_patch_embedding{level + 1}.{i + 1}") for i in (0, 1, 3, 4)]
    for layer in range(depth):
        ours, theirs = f"layers.{layer}", f"transformer.layers.{layer}"
        for level in range(3):
            names[f"{ours}.0.to_qkv.{level}.weight"] = (f"{theirs}.0.to_qkv{level + 1}.weight",)
            names[f"{ours}.2.to_qkv.{level}.weight"] = tuple(f"{theirs}.2.to_{x}{level}.weight" for x in "qkv")
            pairs.append((f"{ours}.0.to_out.{level}", f"{theirs}.0.to_out{level + 1}.0"))
            pairs.append((f"{ours}.2.to_out.{level}", f"{theirs}.2.to_out{level}.0"))
        pairs += [(f"{ours}.1.net.{i}", f"{theirs}.1.split_mlp.{i}") for i in (0, 1, 4)]
        pairs += [(f"{ours}.3.net.{i}", f"{theirs}.3.net.{i}") for i in (0, 1, 4)]
        pairs.append((f"{ours}.2.norm", f"{theirs}.2.norm"))
    for ours, theirs in pairs:
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}
    return names


def _check_names(source: str, state: Mapping[str, Tensor], depth: int) -> None:
    expected = {name for joined in _published_names(depth).values() for name in joined}
    # The published ITMM holds a normalisation that it never uses.
    unused = {f"transformer.layers.{i}.0.norm.{kind}" for i in range(depth) for kind in ("weight", "bias")}
    missing = sorted(expected - state.keys())
    unknown = sorted(state.keys() - expected - unused)
    if missing or unknown:
        found = [f"{len(missing)} names are missing (such as {missing[0]})"] if missing else []
        found += [f"{len(unknown)} are unknown (such as {unknown[0]})"] if unknown else []
        raise HistrataError(
            f"{source} does not hold the weights of a published M2OST of {depth} layers: {', '.join(found)}"
        )
