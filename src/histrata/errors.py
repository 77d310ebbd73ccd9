"""The errors that Histrata raises for what a user can mend."""

from __future__ import annotations


class HistrataError(Exception):
    """A mistake that a user can mend.

    The message is one sentence: what was found, in which file, row and column, what was expected and
    how to mend it. The command line prints it without a traceback and exits with code 2.
    """


class SlideError(HistrataError):
    """A slide that cannot be used; `check` turns it into a rejected row, every other command stops."""


class SheetError(HistrataError):
    """A sheet or a configuration that does not fit its schema."""


class TableError(HistrataError):
    """A table (counts, spots, clinical data) that cannot be read or joined."""


class LeakError(HistrataError):
    """A split that would put one subject on both sides."""


def quoted(error: BaseException) -> str:
    """Return what a library told, to be put into a sentence: one line, printable, not too long."""
    told = "".join(c if c.isprintable() else " " for c in f"{error}").strip(" .") or type(error).__name__
    return told if len(told) <= 200 else f"{told[:200]}..."
