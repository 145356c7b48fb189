"""Which columns are image and label: names first, then types; ids and other types are refused."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from kdtoolkit import data as kd
from kdtoolkit import distill
from kdtoolkit.data.columns import check_columns, find_columns
from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.config_file import config_to_plain, read_config
from kdtoolkit.pipeline.shell_values import ColumnPair

INT, TEXT, FLOAT = (datasets.Value(kind) for kind in ("int64", "string", "float32"))
BOOL, IMAGE = datasets.Value("bool"), datasets.Image()
FINE = datasets.ClassLabel(names=[f"f{k}" for k in range(5)])
COARSE = datasets.ClassLabel(names=["a", "b"])
SEVERAL = datasets.Sequence(INT)

CHOICES = {
    "text called label beside ids": ({"image_id": INT, "label": TEXT}, "label"),
    "text called Label": ({"image_id": INT, "Label": TEXT}, "Label"),
    "integers called target beside text": ({"caption": TEXT, "target": INT}, "target"),
    "label before class": ({"class": INT, "label": INT}, "label"),
    "label before a ClassLabel of another name": ({"label": TEXT, "source": COARSE}, "label"),
    "label before more classes": ({"label": COARSE, "breed": FINE}, "label"),
    "fine before coarse": ({"coarse_label": COARSE, "fine_label": FINE}, "fine_label"),
    "category": ({"id": INT, "category": TEXT}, "category"),
    "species": ({"width": INT, "height": INT, "species": TEXT}, "species"),
    "class_id": ({"image_id": INT, "class_id": INT}, "class_id"),
    "a bool called class": ({"image_id": INT, "class": BOOL}, "class"),
    "ClassLabel of any name": ({"image_id": INT, "zzz": COARSE}, "zzz"),
    "most classes": ({"zzz": COARSE, "aaa": FINE}, "aaa"),
    "y after a ClassLabel": ({"y": INT, "zzz": COARSE}, "zzz"),
    "y": ({"x": INT, "y": INT}, "y"),
    "a float called label, if nothing else": ({"label": FLOAT, "score": FLOAT}, "label"),
    "a ClassLabel before floats called target": ({"target": FLOAT, "zzz": COARSE}, "zzz"),
    "a ClassLabel before several labels": ({"labels": SEVERAL, "zzz": COARSE}, "zzz"),
    "class before several labels": ({"labels": SEVERAL, "class": INT}, "class"),
    "the only integers that are no ids": ({"image_id": INT, "idx": INT, "kind": INT}, "kind"),
    "not a second image": ({"target": IMAGE, "class": INT}, "class"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_label_column(case):
    features, label = CHOICES[case]
    given = ("image", None) if IMAGE in features.values() else None
    found = find_columns({"image": IMAGE, **features}, given)
    assert (found.image, found.label) == ("image", label)
    assert f"label {label!r} (" in found.reason


REFUSED = {
    "ids only": ({"image_id": INT, "id": INT}, r"no label column: .*columns=\(None, label\)"),
    "text of another name": ({"caption": TEXT}, r"no label column: .*text becomes classes"),
    "two integers": ({"a": INT, "b": INT}, r"2 integer columns: a, b\. Say which with columns="),
    "several labels": ({"labels": SEVERAL}, r"'labels' has type .*one class a row"),
    "a box": ({"category": {"x": INT}}, r"'category' has type .*one class a row"),
    "a date": ({"class": datasets.Value("timestamp[s]")}, r"'class' has type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    features, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        find_columns({"image": IMAGE, **features})


def rows(n=24, **columns):
    """A data set of n images and the given columns: name -> values."""
    picture = IMAGE.encode_example(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))
    table = datasets.Dataset.from_dict({"image": [picture] * n}).cast_column("image", IMAGE)
    for name, values in columns.items():
        table = table.add_column(name, values)
    return table


NUMBERS = list(range(24))
KINDS = ["b", "a", "c"] * 8


def test_ids_are_no_classes_and_columns_chooses():
    table = rows(image_id=NUMBERS, species=KINDS, size=[k // 4 for k in NUMBERS])
    data = kd.load(table, transforms="none")
    assert (
        data.class_names == ["a", "b", "c"]
        and "'species' (by its name)" in data.describe()["columns"]
    )
    assert kd.load(table, columns=(None, "size"), transforms="none").num_classes == 6
    for name in ("image_id", "number"):
        with pytest.raises(ValueError, match=r"24 different values in 24 rows.*columns=\(None"):
            kd.load(rows(**{name: NUMBERS}), columns=(None, name))
    with pytest.raises(ValueError, match=r"column 'number' holds 24 different values"):
        kd.load(rows(number=NUMBERS))
    mostly = [*NUMBERS[:20], 0, 1, 2, 3]  # more than half of the rows have a value of their own
    with pytest.raises(ValueError, match=r"column 'number' holds 20 different values in 24 rows"):
        kd.load(rows(number=mostly))
    assert kd.load(rows(label=mostly), transforms="none").num_classes == 20


def test_other_splits_use_the_columns_of_train():
    """A test split without the label column has no labels: its ids are none."""
    both = datasets.DatasetDict(train=rows(label=KINDS), test=rows(image_id=[0, 1] * 12))
    data = kd.load(both, transforms="none")
    assert len(data.test) == 5 and "'test' (24 rows) is left out: its rows have no" in data.notes[0]
    with pytest.raises(ValueError, match="no label column"):
        kd.load(both["train"], both["test"])
    two = rows(label=KINDS, kind=[0, 1] * 12)
    data = kd.load(
        datasets.DatasetDict(train=two, test=two), columns=(None, "kind"), transforms="none"
    )
    assert data.num_classes == 2 and set(data.test.dataset.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("columns", ["label", ("label",), (1, 2), ("", None), {"image": "label"}])
def test_columns_must_be_a_pair(columns):
    with pytest.raises(ValueError, match=r"allowed is a pair of names \(image, label\)"):
        kd.load(rows(label=KINDS), columns=columns)
    assert check_columns(["image", None]) == ("image", None)


@pytest.mark.parametrize(
    "source",
    [
        TensorDataset(torch.zeros(8, 3, 8, 8), torch.tensor([0, 1] * 4)),
        rows(label=KINDS).with_transform(lambda batch: batch),
    ],
)
def test_columns_of_other_sources_are_refused(source):
    with pytest.raises(ValueError, match="leave columns out"):
        kd.load(source, columns=("image", "label"))


def test_columns_of_a_call_of_a_shell_and_of_a_file(tmp_path):
    table = rows(image_id=NUMBERS, kind=[0, 1] * 12, other=KINDS)
    run = dict(student="cifar_resnet8", method="none", dry_run=True, transforms="none")
    plan = distill(train_data=table, columns=(None, "other"), **run).plan
    assert "3 classes (0 a, 1 b, 2 c)" in str(plan)
    assert "columns" in plan["data"] and "'other' (given)" in plan["data"]["columns"]
    assert distill(train_data=table, **run).plan["data"]["num_classes"] == 2
    assert ColumnPair.parse(["none", "other"]) == (None, "other")
    assert ColumnPair.parse(["none"]) is None
    config = DistillConfig.from_keywords(train_data="x", columns=(None, "other"))
    assert read_config(config_to_plain(config, {})).data.columns == (None, "other")
