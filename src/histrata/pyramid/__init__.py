"""What the rest of the program reads: multi-scale OME-Zarr pyramids."""

from histrata.pyramid.reader import Pyramid
from histrata.pyramid.writer import write_pyramid

__all__ = ["Pyramid", "write_pyramid"]
