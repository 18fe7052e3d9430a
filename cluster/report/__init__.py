"""The report of a run: one page that opens offline."""

from cluster.report.page import write_report

__all__ = ["write_report"]
