"""One HTML page to look at: what was run, what came out, and how good it is."""

from histrata.report.page import write_report

__all__ = ["write_report"]
