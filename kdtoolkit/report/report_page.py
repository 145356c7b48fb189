"""report.md of one run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from kdtoolkit.report import page_sections, tables
from kdtoolkit.report.loading_code import loading_section
from kdtoolkit.report.page_figures import GRADCAM_FILE, draw_curve_figures, draw_gradcam_figure
from kdtoolkit.report.run_folder import read
from kdtoolkit.utils.io import write_text
from kdtoolkit.utils.manifest import record_files


def write(
    run_dir: str | os.PathLike[str],
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    baseline: str | os.PathLike[str] | None = None,
    images: Tensor | None = None,
    labels: Sequence[int] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    images_note: str = "",
    figures: bool = True,
) -> Path:
    """Write report.md and figures/*.png into a run folder, from whatever it holds.

    Args:
        run_dir: The `output_dir` of a run.
        student: The student, for its size and Grad-CAM; by default it is loaded from `student/` of
            the folder.
        teacher: The teacher, for the same; by default it is left out of Grad-CAM.
        baseline: Run folder of the same student trained alone.
        images: Images (B, 3, H, W) in [0, 1] for the Grad-CAM rows; without them there are none.
        labels: Class ids of the images, (B,).
        class_names: Names by class id.
        images_note: How the images were chosen, in a sentence, for the caption.
        figures: Whether figures are drawn.

    Returns:
        Path of report.md.

    Raises:
        ValueError: If a folder does not exist.
    """
    run = read(run_dir)
    alone = read(baseline) if baseline is not None else None
    notes = list(run.problems)
    if alone is not None:
        notes += [f"baseline: {problem}" for problem in alone.problems]
    captions = draw_curve_figures(run, alone, notes) if figures else {}
    if figures and images is not None:
        captions |= draw_gradcam_figure(
            run, alone, teacher, student, images, labels, class_names, notes
        )
    if images_note and GRADCAM_FILE in captions:
        captions[GRADCAM_FILE] += f" {images_note}"
    parts = [
        f"# {page_sections.page_title(run)}",
        page_sections.environment_line(run),
        "## Results",
        tables.describe_source(run),
        tables.metrics_table(page_sections.network_rows(run, alone, teacher, student)),
        page_sections.gain_line(run, alone) if alone is not None else "",
        page_sections.compression_section(run),
        page_sections.images_section(run),
        page_sections.settings_section(run),
        loading_section(run.path, student),
    ]
    if captions:
        parts.append("## Figures")
        parts += [
            f"![{name.removesuffix('.png')}](figures/{name})\n\n{caption}"
            for name, caption in captions.items()
        ]
    if notes:
        parts += ["## Notes", "\n".join(f"* {note}" for note in dict.fromkeys(notes))]
    text = "\n\n".join(part.strip() for part in parts if part)
    write_text(run.path / "report.md", f"{text}\n")
    record_files(run.path, ["report.md", *(f"figures/{name}" for name in captions)])
    return run.path / "report.md"
