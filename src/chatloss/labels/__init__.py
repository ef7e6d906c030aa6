"""The audit of rows that another tool prepared: ids with labels or a mask."""

from chatloss.labels.audit import check_labels
from chatloss.labels.report import LabelsReport
from chatloss.labels.rows import read_labels

__all__ = ["LabelsReport", "check_labels", "read_labels"]
