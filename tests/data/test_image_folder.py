"""Image folders as users have them: wrappers, splits, classes, what is left out or refused."""

from __future__ import annotations

import io
import json
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from kdtoolkit import data as kd
from kdtoolkit.data.files import open_path
from kdtoolkit.data.folder_tree import scan_folder
from kdtoolkit.data.image_folder import open_image_folder
from kdtoolkit.data.split_names import name_splits


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def png(value=0):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


PNG = png()


def make(root, *paths):
    """Write files: "a/b*3.png" is three images, a path that ends with "/" an empty folder."""
    for path in paths:
        stem, star, rest = path.partition("*")
        count, _, suffix = rest.partition(".")
        files = [f"{stem}{k}.{suffix}" for k in range(int(count))] if star else [path]
        for file in files:
            if file.endswith("/"):
                (root / file).mkdir(parents=True, exist_ok=True)
                continue
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(PNG if file.endswith((".png", ".JPG", ".webp")) else b"text")
    return root


def opened(root):
    """Split -> (class names, rows a class), and the notes."""
    found = open_image_folder(scan_folder(root))
    named = name_splits(found.splits, str(root))
    splits = {}
    for split, table in named.splits.items():
        names = table.features["label"].names
        labels = np.array(table["label"][:])
        splits[split] = {name: int((labels == k).sum()) for k, name in enumerate(names)}
    return splits, [*found.notes, *named.notes]


TWO = ("train/cat/a*3.png", "train/dog/b*2.png", "test/cat/c*2.png", "test/dog/d*1.png")
SPLITS = {"train": {"cat": 3, "dog": 2}, "test": {"cat": 2, "dog": 1}}

LAYOUTS = {
    "plain": (TWO, SPLITS, []),
    "one wrapper": ([f"archive/{p}" for p in TWO], SPLITS, []),
    "three wrappers": ([f"a/b/c/{p}" for p in TWO], SPLITS, []),
    "wrapper beside files and leftovers": (
        [f"archive/{p}" for p in TWO]
        + ["README.md", "LICENSE", ".DS_Store", "__MACOSX/archive/train/cat/._a0.png", ".git/x.png"]
        + ["archive/.ipynb_checkpoints/x.png", "archive/train/cat/._a0.png", "labels.txt"]
        + ["archive/train/cat/Thumbs.db", "@eaDir/x.png", "empty/"],
        SPLITS,
        [],
    ),
    "names in any case": (
        [p.replace("train", "Train").replace("test", "TESTING") for p in TWO],
        SPLITS,
        [],
    ),
    "aliases": (
        [*(p.replace("train/", "training/") for p in TWO), "Dev/cat/e*1.png"],
        SPLITS | {"val": {"cat": 1, "dog": 0}},
        [],
    ),
    "a split in itself": (
        ["train/train/cat/a*3.png", "train/train/dog/b*2.png", "test/test/x*4.png"],
        {"train": SPLITS["train"]},
        [r"folder 'test' \(4 images\) is left out: .*no labels: there is no test split"],
    ),
    "test without class folders": (
        ["train/cat/a*3.png", "train/dog/b*2.png", "test/x*4.png"],
        {"train": SPLITS["train"]},
        [r"folder 'test' \(4 images\) is left out: .*no labels: there is no test split"],
    ),
    "test under one folder that is no class": (
        ["train/cat/a*3.png", "train/dog/b*2.png", "test/unknown/x*4.png"],
        {"train": SPLITS["train"]},
        [r"folder 'test' \(4 images\) is left out"],
    ),
    "validation without class folders": (
        [*TWO, "val/x*4.png"],
        SPLITS,
        [r"folder 'val' \(4 images\) is left out: .*there is no validation split"],
    ),
    "test of one class of train": (
        ["train/cat/a*3.png", "train/dog/b*2.png", "test/dog/x*4.png"],
        {"train": SPLITS["train"], "test": {"cat": 0, "dog": 4}},
        [],
    ),
    "other folders beside splits": (
        [*TWO, "extra/cat/e*2.png", "unlabelled/u*5.png", "doc/x.txt"],
        SPLITS,
        [r"folder 'extra' \(2 images\) is left out", r"folder 'unlabelled' \(5 images\) is left"],
    ),
    "two of a kind": (
        [*TWO, "val/cat/v*1.png", "validation/cat/w*2.png"],
        SPLITS | {"val": {"cat": 2, "dog": 0}},
        [r"split 'val' \(1 rows\) is left out: 'validation' is the validation split"],
    ),
    "two training folders": (
        [*TWO, "training/cat/v*1.png"],
        SPLITS,
        [r"folder 'training' \(1 image\) is left out beside 'train'"],
    ),
    "eval beside test": (
        [*TWO, "eval/cat/v*1.png"],
        SPLITS,
        [r"split 'eval' \(1 rows\) is left out: 'test' is the test split"],
    ),
    "only one split": (
        ["val/cat/a*3.png", "val/dog/b*2.png"],
        {"train": SPLITS["train"]},
        [r"'val', the only split, is trained on"],
    ),
    "classes alone": (["cat/a*3.png", "dog/b*2.png"], {"train": SPLITS["train"]}, []),
    "classes in a wrapper": (["x/cat/a*3.png", "x/dog/b*2.png"], {"train": SPLITS["train"]}, []),
    "a loose image beside classes": (
        ["cat/a*3.png", "dog/b*2.png", "cover*1.png"],
        {"train": SPLITS["train"]},
        [r"1 image beside the class folders \('cover0.png'\) is left out"],
    ),
    "loose images in splits": (
        [*TWO, "train/x*2.png", "banner.png"],
        SPLITS,
        [
            r"1 image beside the folders of splits \('banner.png'\) is left out",
            r"split 'train': 2 images beside the class folders .* are left out",
        ],
    ),
    "classes beside an unlabelled test folder": (
        ["cat/a*3.png", "dog/b*2.png", "test/x*4.png"],
        {"train": SPLITS["train"]},
        [r"folder 'test' \(4 images\) is left out"],
    ),
    "a class of the name train": (
        ["car/a*1.png", "train/b*2.png", "bus/c*3.png"],
        {"train": {"bus": 3, "car": 1, "train": 2}},
        [r"folder 'train' holds images beside class folders: it is a class"],
    ),
    "folders in a class": (
        ["cat/2020/a*2.png", "cat/2021/b*1.png", "dog/b*2.png"],
        {"train": SPLITS["train"]},
        [r"'cat' holds images in folders of their own, which belong to the class of the outer"],
    ),
    "an empty class folder": (
        ["cat/a*3.png", "dog/b*2.png", "horse/"],
        {"train": SPLITS["train"]},
        [r"folder 'horse' holds no images"],
    ),
    "a class that is empty in train": (
        [*TWO, "train/horse/", "test/horse/h*2.png"],
        {"train": {"cat": 3, "dog": 2, "horse": 0}, "test": {"cat": 2, "dog": 1, "horse": 2}},
        [r"split 'train': folder 'horse' holds no images"],
    ),
    "other files in classes": (
        ["cat/a*3.png", "cat/x*2.heic", "dog/b*2.png", "dog/notes.txt"],
        {"train": SPLITS["train"]},
        [r"3 files in class folders are no known images \(\.heic 2, \.txt 1\)"],
    ),
    "suffixes in any case": (
        ["cat/a.JPG", "cat/b.webp", "cat/c.png", "dog/b*2.png"],
        {"train": SPLITS["train"]},
        [],
    ),
    "numbers": (
        [f"{k}/a*1.png" for k in (0, 1, 2, 9, 10, 11, 100)],
        {"train": {str(k): 1 for k in (0, 1, 2, 9, 10, 11, 100)}},
        [],
    ),
    "numbers with zeros": (
        ["train/010/a*1.png", "train/9/a*1.png", "train/-1/a*1.png", "test/9/a*1.png"],
        {"train": {"-1": 1, "9": 1, "010": 1}, "test": {"-1": 0, "9": 1, "010": 0}},
        [],
    ),
    "numbers and a word": (
        ["10/a*1.png", "9/a*1.png", "nine/a*1.png"],
        {"train": {"10": 1, "9": 1, "nine": 1}},
        [],
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(case, tmp_path):
    paths, splits, notes = LAYOUTS[case]
    found, said = opened(make(tmp_path / "root", *paths))
    assert found == splits
    assert [list(rows) for rows in found.values()] == [list(rows) for rows in splits.values()]
    assert len(said) == len(notes), said
    for note, pattern in zip(said, notes, strict=True):
        assert re.search(pattern, note), note


REFUSED = {
    "images without class folders": (["a*3.png"], r"3 images and no class folders"),
    "a wrapper of images": (["x/a*3.png"], None),
    "splits without class folders": (
        ["train/a*3.png", "test/b*2.png"],
        r"'test', 'train' hold images and no class folders",
    ),
    "train without class folders": (
        ["train/a*3.png", "test/cat/b*2.png"],
        r"'train' holds 3 images and no class folders",
    ),
    "a class that train has not": (
        [*TWO, "test/Cat/x*1.png"],
        r"test has the class folder 'Cat', which train has not; .* Did you mean 'cat'\?",
    ),
    "two data sets": (
        [f"a/{p}" for p in TWO] + [f"b/{p}" for p in TWO],
        r"a holds the folders 'test', 'train' of a data set of its own, beside 'b'",
    ),
    "a data set and images": (
        [f"a/{p}" for p in TWO] + ["extra/x*2.png"],
        r"a holds the folders 'test', 'train' of a data set of its own, beside 'extra'",
    ),
    "class before split": (
        ["cat/train/a*2.png", "cat/test/a*2.png", "dog/train/a*2.png", "dog/test/a*2.png"],
        r"cat holds the folders 'test', 'train' of a data set of its own",
    ),
    "classes and no train": (
        ["cat/a*1.png", "dog/b*1.png", "val/cat/c*1.png"],
        r"'val' holds class folders, and there is no 'train' beside 'cat', 'dog'",
    ),
    "val and test alone": (["val/a/x*1.png", "test/a/x*1.png"], r"splits test, val, no 'train'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    paths, message = REFUSED[case]
    root = make(tmp_path / "root", *paths)
    if message is None:  # a single class, which labels cannot tell from a wrapper
        assert opened(root)[0] == {"train": {"x": 3}}
        with pytest.raises(ValueError, match=r"a single class, 'x', and nothing to learn"):
            kd.load(root)
        return
    with pytest.raises(ValueError, match=message):
        opened(root)


def test_files_are_read_and_links_back_are_left_out(tmp_path):
    root = make(tmp_path / "root", "wrap/train/cat/a*3.png", "wrap/train/dog/b*3.png")
    (root / "wrap" / "train" / "cat" / "z.png").write_bytes(png(255))
    (root / "wrap" / "train" / "again").symlink_to(root / "wrap")
    data = kd.load(root, validation="none", transforms="none")
    assert data.name == "root" and data.class_names == ["cat", "dog"]
    rows = data.train.dataset
    assert (len(data.train), len(data.test)) == (6, 1)  # one of seven is held out
    assert {int(x.max()) for x in [*rows.images, *data.test.dataset.images]} == {0, 255}
    assert any("1 training rows, drawn by class, are the test set" in note for note in data.notes)


def test_a_broken_image_is_named(tmp_path):
    root = make(tmp_path / "root", "cat/a*3.png", "dog/b*3.png")
    (root / "dog" / "b1.png").write_bytes(PNG[:40])
    with pytest.raises(ValueError, match=r"dog/b1\.png\): the image cannot be decoded"):
        kd.load(root)


# pandas, which datasets reads CSV with, leaves the file to the garbage collection
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_labels_of_a_metadata_file(tmp_path, name):
    root = make(tmp_path / "root", "a*6.png")
    labels = ["cat", "dog"] * 3
    rows = [{"file_name": f"a{k}.png", "label": label} for k, label in enumerate(labels)]
    lines = [json.dumps(row) for row in rows]
    if name.endswith("csv"):
        lines = ["file_name,label"] + [f"a{k}.png,{label}" for k, label in enumerate(labels)]
    (root / name).write_text("\n".join(lines) + "\n")
    data = kd.load(root, validation="none")
    assert data.class_names == ["cat", "dog"] and len(data.train) + len(data.test) == 6


def test_saved_data_and_parquet_in_a_wrapper(tmp_path):
    image = datasets.Image().encode_example(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = {"image": [image] * 20, "label": [0, 1] * 10}
    table = datasets.Dataset.from_dict(rows, features)
    both = datasets.DatasetDict(train=table, test=table)
    both.save_to_disk(str(tmp_path / "a" / "archive"))
    make(tmp_path / "a", "README.md", "__MACOSX/x.png")
    assert len(kd.load(tmp_path / "a").test) == 20
    folder = tmp_path / "b" / "archive"
    for split in ("Train", "Test"):
        (folder / split).mkdir(parents=True)
        table.to_parquet(str(folder / split / "0000.parquet"))
    make(tmp_path / "b", "__MACOSX/archive/Train/._0000.parquet", "archive/Train/._0000.parquet")
    assert set(open_path(tmp_path / "b").splits) == {"train", "test"}
    table.to_parquet(str(folder / "extra.parquet"))
    with pytest.raises(ValueError, match=r"extra\.parquet: which split\?"):
        kd.load(tmp_path / "b")


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_path_is_refused(empty, tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path / "root", "cat/a*3.png", "dog/b*3.png"))
    with pytest.raises(ValueError, match="an empty path would be the current folder"):
        kd.load(empty)
    with pytest.raises(ValueError, match="an empty path would be the current folder"):
        kd.load("digits", eval_data=empty)
    with pytest.raises(ValueError, match=r"data_path is '\s*': an empty path"):
        kd.load("digits", data_path=empty)
    assert kd.load(".", validation="none").name == "root"
