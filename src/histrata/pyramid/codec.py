"""The `jpeg` codec of the zarr-extensions registry for zarr-python.

Specification: zarr-extensions, `codecs/jpeg`. A chunk is (height, width) or (height, width, 1) grey, or
(height, width, 3) colour, uint8, encoded as one baseline JPEG stream; `transpose` goes before it where
channels do not come last. The codec is registered through the `zarr.codecs` entry point, so that any
Python with Histrata installed opens the stores.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Self

import imagecodecs
import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

from histrata.slides import jpeg
from histrata.slides.jpeg import SUBSAMPLINGS

_LONGEST = 65535  # px of a side: 16 bits in the stream


@dataclass(frozen=True)
class JpegCodec(ArrayBytesCodec):
    """Baseline JPEG as an array -> bytes codec.

    Parameters
    ----------
    quality
        Encoding quality, 0 to 100. Decoding does not depend on it.
    encoded_color_space
        Colour space of the stream for chunks of three channels: "ycbcr" or "rgb"; None for grey.
    subsampling
        Sampling factors [horizontal, vertical] of each component; for "ycbcr" 4:2:0 where not given.

    Raises
    ------
    ValueError
        For a configuration or a chunk shape that the specification does not allow.
    """

    is_fixed_size = False

    quality: int
    encoded_color_space: str | None = None
    subsampling: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.quality, int) or not 0 <= self.quality <= 100:
            raise ValueError(f"jpeg codec: quality {self.quality!r} is not a whole number from 0 to 100")
        if self.encoded_color_space not in (None, "ycbcr", "rgb"):
            raise ValueError(f"jpeg codec: encoded_color_space '{self.encoded_color_space}' is not ycbcr or rgb")
        factors = self.subsampling
        if factors is not None:
            factors = tuple((int(h), int(v)) for h, v in factors)
            object.__setattr__(self, "subsampling", factors)
        allowed: tuple[Any, ...] = {
            None: (None, ((1, 1),)),
            "rgb": (None, SUBSAMPLINGS["444"]),
            "ycbcr": (None, *SUBSAMPLINGS.values()),
        }[self.encoded_color_space]
        if factors not in allowed:
            raise ValueError(f"jpeg codec: subsampling {factors} does not go with {self.encoded_color_space}")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the codec from its metadata document."""
        return cls(**data["configuration"])

    def to_dict(self) -> dict[str, Any]:
        """Return the metadata document of the codec."""
        configuration: dict[str, Any] = {"quality": self.quality}
        if self.encoded_color_space:
            configuration["encoded_color_space"] = self.encoded_color_space
        if self.subsampling:
            configuration["subsampling"] = [list(pair) for pair in self.subsampling]
        return {"name": "jpeg", "configuration": configuration}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """Refuse data types that JPEG cannot hold; inside shards zarr does not call `validate`."""
        native = array_spec.dtype.to_native_dtype()
        if native != np.uint8:
            raise ValueError(f"jpeg codec: data type {native} is not uint8")
        return self

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:  # noqa: ARG002
        """Refuse chunks that no `transpose` before this codec could make fit.

        zarr tells the shape before any transpose here; the shape that arrives is checked with every chunk.
        """
        chunk = tuple(getattr(chunk_grid, "chunk_shape", shape))
        if len(chunk) not in (2, 3) or (len(chunk) == 3 and not {1, 3} & set(chunk)):
            raise ValueError(f"jpeg codec: chunk shape {chunk} is not (h, w), (h, w, 1) or (h, w, 3)")

    def _check(self, chunk: tuple[int, ...]) -> None:
        channels = chunk[2] if len(chunk) == 3 else 1
        if len(chunk) not in (2, 3) or channels not in (1, 3) or max(chunk[:2]) > _LONGEST:
            raise ValueError(
                f"jpeg codec: chunk shape {chunk} is not (h, w), (h, w, 1) or (h, w, 3) of at most {_LONGEST} px a side"
            )
        if (channels == 3) != (self.encoded_color_space is not None):
            raise ValueError(
                f"jpeg codec: encoded_color_space {self.encoded_color_space} does not go with {channels} channel(s)"
            )

    def _encode(self, chunk: np.ndarray) -> bytes:
        self._check(chunk.shape)
        if self.encoded_color_space is None:
            grey = np.ascontiguousarray(chunk.reshape(chunk.shape[:2]))
            return bytes(imagecodecs.jpeg8_encode(grey, level=self.quality))
        default = SUBSAMPLINGS["420" if self.encoded_color_space == "ycbcr" else "444"]
        name = next(name for name, factors in SUBSAMPLINGS.items() if factors == (self.subsampling or default))
        return bytes(
            imagecodecs.jpeg8_encode(
                np.ascontiguousarray(chunk),
                level=self.quality,
                colorspace="RGB",
                outcolorspace=self.encoded_color_space.upper(),
                subsampling=name,
            )
        )

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        encoded = await asyncio.to_thread(self._encode, chunk_array.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(encoded)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        self._check(chunk_spec.shape)
        pixels = await asyncio.to_thread(jpeg.decode, chunk_bytes.to_bytes())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(pixels.reshape(chunk_spec.shape))

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        """Refuse: the size of a JPEG stream is not known beforehand."""
        raise NotImplementedError("the encoded size of a JPEG chunk depends on its pixels")
