"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the real slides, sections and cohorts; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("HISTRATA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"HISTRATA_DATA points to {folder}, which is not there; CI needs the real data")
        pytest.skip(f"real data not found at {folder}; set HISTRATA_DATA")
    return folder
