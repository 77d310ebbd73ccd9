"""What scanners wrote: open a slide, read regions, know its scale, check it before anything runs."""

from __future__ import annotations

from histrata.slides.mpp import Mpp
from histrata.slides.reader import Level
from histrata.slides.slide import Slide, open_slide

__all__ = ["Level", "Mpp", "Slide", "open_slide"]
