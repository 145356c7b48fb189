"""What a plan and a result show: in a terminal, in a notebook, in a log."""

import sys

import pytest
import timm
import torch
from torchvision.transforms import v2

from kdtoolkit import distill
from kdtoolkit.pipeline.plan import Plan
from kdtoolkit.pipeline.result import DistillResult

SMALL = {"student": "cifar_resnet8", "train_data": "digits", "progress": "off"}


@pytest.fixture(scope="module")
def planned():
    teacher = timm.create_model("cifar_resnet8", num_classes=10)
    return distill(teacher, method="kd", dry_run=True, **SMALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return distill(
        **SMALL, method="none", max_steps=1, train_limit=64, batch_size=32, output_dir=folder,
        report_to="none", figures=False,
    )  # fmt: skip


@pytest.fixture
def notebook(monkeypatch):
    """rich believes to be in a notebook, and a display that is used is an error."""
    pytest.importorskip("IPython")

    def display(*args, **kwargs):
        raise AssertionError("something was displayed")

    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)


def test_a_plan_is_text_in_a_notebook_and_shows_nothing_by_itself(planned, notebook, capsys):
    text = str(planned.plan)
    assert "cifar_resnet8" in text and "│ kd" in text and text == repr(planned.plan)
    html = planned.plan._repr_html_()
    assert html.startswith("<pre") and "│ kd" in html and "training images" in html
    assert capsys.readouterr().out == ""


def test_a_plan_is_the_same_text_everywhere(planned, monkeypatch, capsys):
    text = str(planned.plan)
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "20", "TTY_COMPATIBLE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert str(planned.plan) == text and "\x1b" not in text
    assert capsys.readouterr().out == ""


def test_nothing_of_a_plan_is_read_as_markup_or_cut_off():
    note = "weights [0.1, 0.2] of [bold]layers[/bold] :smile: " + "and a long sentence " * 20
    data = {"name": "x", "num_classes": 2, "image_size": [3, 4]}
    data |= {"augmentation": "[flip] " * 60, "evaluation": "Resize " * 60}
    row = {"loss": "[ce]", "weight": 1.0, "student": "[layer1]", "teacher": ""}
    text = str(Plan(notes=[note], data=data, losses=[row]))
    for part in (f"note: {note.rstrip()}", "[ce]", "[layer1]", data["augmentation"].strip()):
        assert part in text
    assert f"evaluation images: {data['evaluation'].strip()}" in text


@pytest.mark.parametrize("options", [{}, {"transforms": v2.RandomCrop(12), "num_workers": 0}])
@pytest.mark.parametrize("dry_run", [True, False])
def test_the_plan_shows_both_transforms(options, dry_run):
    result = distill(
        **SMALL, method="none", max_steps=1, train_limit=20, batch_size=20, dry_run=dry_run,
        **options,
    )  # fmt: skip
    lines = str(result.plan).splitlines()
    training = next(line for line in lines if line.startswith("training images: "))
    evaluation = next(line for line in lines if line.startswith("evaluation images: "))
    assert ("RandomCrop" in training) is bool(options) and "RandomCrop" not in evaluation
    if options and dry_run:  # the data is not read
        assert "the size that training images get" in evaluation
    else:
        assert ("Resize to 12x12" if options else "16x16 as decoded") in evaluation


def test_a_result_is_a_short_line(planned, trained, notebook, capsys):
    for result in (planned, trained):
        text = repr(result)
        assert text.startswith("DistillResult(student ResNet of 78,042 parameters")
        assert "\n" not in text and len(text) < 400 and text == str(result)
    assert f"{trained.metrics['top1']:.2f} % (test split" in repr(trained)
    assert str(trained.output_dir) in repr(trained) and "| top-1 |" in trained._repr_markdown_()
    assert capsys.readouterr().out == ""


def test_a_result_without_anything_has_a_line():
    assert repr(DistillResult(torch.nn.ReLU())) == "DistillResult(student ReLU of 0 parameters)"


def test_a_result_is_shown_once_by_a_python_prompt(trained, capsys):
    sys.displayhook(trained)
    assert capsys.readouterr().out.count("\n") == 1
