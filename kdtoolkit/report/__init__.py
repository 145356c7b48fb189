"""A run folder turned into a page: report.md with tables, curves and Grad-CAM pictures.

    report.write("runs/srkd", student=s, teacher=t, baseline="runs/alone", images=x, labels=y)
    report.compare({"alone": "runs/alone", "kd": ["runs/kd-0", "runs/kd-1"]}, "runs/compared")

Figures need matplotlib, the extra `kdtoolkit[plot]`; without it the page is written and says so.
"""

from __future__ import annotations

from kdtoolkit.report.comparison import compare
from kdtoolkit.report.gradcam import gradcam
from kdtoolkit.report.gradcam_figure import gradcam_rows
from kdtoolkit.report.report_page import write

__all__ = ["compare", "gradcam", "gradcam_rows", "write"]
