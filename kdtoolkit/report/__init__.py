"""A run folder as a page: report.md with tables, curves and Grad-CAM pictures.

Figures need matplotlib, the extra `kdtoolkit[plot]`; without it the page is written without figures
and says so.

Example:
    ```python
    from kdtoolkit import report

    report.write("runs/srkd", student=s, teacher=t, baseline="runs/alone", images=x, labels=y)
    report.compare({"alone": "runs/alone", "kd": ["runs/kd-0", "runs/kd-1"]}, "runs/compared")
    ```
"""

from __future__ import annotations

from kdtoolkit.report.comparison import compare
from kdtoolkit.report.gradcam import gradcam
from kdtoolkit.report.gradcam_figure import gradcam_rows
from kdtoolkit.report.report_page import write

__all__ = ["compare", "gradcam", "gradcam_rows", "write"]
