"""What the rest of the program reads: multi-scale OME-Zarr pyramids (written by `histrata.pyramid.writer`)."""

from histrata.pyramid.reader import Pyramid

__all__ = ["Pyramid"]
