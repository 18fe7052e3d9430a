"""Pages that open offline: of a training run, of a supervised one, of an evaluation, of two evaluations compared."""

from cluster.report.comparison import write_comparison_report
from cluster.report.evaluation import write_evaluation_report
from cluster.report.supervised import write_supervised_report
from cluster.report.training import write_report

__all__ = ["write_comparison_report", "write_evaluation_report", "write_report", "write_supervised_report"]
