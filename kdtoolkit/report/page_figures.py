"""The figures of a report page. A figure that fails is a note on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import timm
from torch import Tensor, nn

from kdtoolkit.report import plots, tables
from kdtoolkit.report.curves import draw_loss_curves, evaluation_curves
from kdtoolkit.report.gradcam_figure import gradcam_rows
from kdtoolkit.report.run_folder import RunFolder

GRADCAM_FILE = "gradcam.png"
GRADCAM_CAPTION = (
    "Grad-CAM: where each network looks for the class that it chose; red is much, blue is little. "
    "Below each picture the chosen class, green if right, red if wrong."
)


def draw_curve_figures(
    run: RunFolder, baseline: RunFolder | None, notes: list[str]
) -> dict[str, str]:
    """Draw accuracy.png, eval_loss.png and loss.png into the folder of a run.

    Args:
        run: The run.
        baseline: Run of the same student trained alone.
        notes: Sentences about figures that could not be drawn are added here.

    Returns:
        File name -> caption of the figures that were drawn.
    """
    folder, split = run.path / "figures", run.curve_split or "eval"

    def draw_accuracy() -> bool:
        teacher = tables.teacher_metrics(run, run.curve_split)
        levels = {}
        if "top1" in teacher:
            levels[f"teacher ({teacher['top1']:.2f} %)"] = teacher["top1"]
        curves = evaluation_curves(run, baseline, "top1")
        title = f"Accuracy on the {split} split"
        file = folder / "accuracy.png"
        return plots.draw_curves(file, title, "epoch", "top-1 accuracy (%)", curves, levels)

    def draw_evaluation_loss() -> bool:
        curves = evaluation_curves(run, baseline, "loss")
        title = f"Loss on the {split} split"
        file = folder / "eval_loss.png"
        return plots.draw_curves(file, title, "epoch", "cross-entropy (nats)", curves)

    def draw_losses() -> bool:
        return draw_loss_curves(run, folder / "loss.png")

    figures = (
        ("accuracy.png", draw_accuracy, f"Top-1 accuracy on the {split} split after each epoch."),
        (
            "eval_loss.png",
            draw_evaluation_loss,
            f"Cross-entropy on the {split} split after each epoch.",
        ),
        (
            "loss.png",
            draw_losses,
            "Training loss: terms as weighted in the total; pale: as logged, "
            "strong: moving average.",
        ),
    )
    return {name: caption for name, draw, caption in figures if _try_to_draw(name, draw, notes)}


def draw_gradcam_figure(
    run: RunFolder,
    baseline: RunFolder | None,
    teacher: nn.Module | None,
    student: nn.Module | None,
    images: Tensor,
    labels: Sequence[int] | Tensor | None,
    class_names: Sequence[str] | None,
    notes: list[str],
) -> dict[str, str]:
    """Draw gradcam.png into the folder of a run.

    Args:
        run: The run.
        baseline: Run of the same student trained alone, which is loaded from its folder.
        teacher: The teacher; None leaves it out.
        student: The student; None loads it from the folder of the run.
        images: Images (B, 3, H, W) in [0, 1].
        labels: Class ids (B,).
        class_names: Names by class id.
        notes: Sentences about what could not be drawn are added here.

    Returns:
        File name -> caption, empty where nothing was drawn.
    """
    name = "distilled" if run.has_teacher else "student"
    networks = {
        "teacher": teacher,
        "student alone": None if baseline is None else _load_student(baseline, notes),
        name: _load_student(run, notes) if student is None else student,
    }
    models = {name: network for name, network in networks.items() if network is not None}
    file = run.path / "figures" / GRADCAM_FILE

    def draw() -> bool:
        return gradcam_rows(models, images, labels, class_names, file) is not None

    return {file.name: GRADCAM_CAPTION} if _try_to_draw(file.name, draw, notes) else {}


def _try_to_draw(name: str, draw: Callable[[], bool], notes: list[str]) -> bool:
    """Whether a figure was drawn; if it fails, the page and the other figures are still written."""
    try:
        return draw()
    except ImportError:
        notes.append(plots.NO_MATPLOTLIB)
    except Exception as error:
        reason = (str(error) or "no message").splitlines()[0]
        notes.append(f"no {name}: it could not be drawn ({type(error).__name__}: {reason})")
    return False


def _load_student(run: RunFolder, notes: list[str]) -> nn.Module | None:
    """The student of a run folder in eval mode; None, and a note, where it cannot be loaded."""
    if not (run.path / "student").is_dir():
        notes.append(f"no Grad-CAM row of {run.path.name}: it has no `student/` folder")
        return None
    try:
        student: nn.Module = timm.create_model(f"local-dir:{run.path / 'student'}", pretrained=True)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        notes.append(
            f"no Grad-CAM row of {run.path.name}: its student could not be loaded ({reason})"
        )
        return None
    return student.eval()
