"""Map-style sources seen as one table of (image, label) rows: an HF data set or a torch data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import VisionDataset
from torchvision.transforms import v2

from kdtoolkit.data.columns import find_columns

IMAGE_KEYS = ("x", "image", "images", "img", "pixel_values", "inputs", "input")
LABEL_KEYS = ("y", "label", "labels", "target", "targets", "fine_label")
INDEX_KEYS = ("index", "idx", "indices")


class SizesDiffer(Exception):
    """An image's size is not that of the others: the split cannot be one tensor."""

    def __init__(self, row: int, size: tuple[int, ...], expected: tuple[int, int]) -> None:
        super().__init__(
            f"row {row} is {size[0]}x{size[1]}, others are {expected[0]}x{expected[1]}"
        )


class HFTable:
    """An HF Dataset with an Image and a label column; images are decoded here, so that an error can name the row.

    split       its name in messages
    labels      (N,) int64, -1 for a row without one; None when only reading tells
    cacheable   an image is the same at each reading
    threads     may be read by several threads at once
    """

    cacheable = threads = True
    in_memory = False

    def __init__(
        self, dataset: datasets.Dataset, split: str, columns: tuple[str | None, str | None] | None
    ) -> None:
        self.split = split
        if len(dataset) == 0:
            raise ValueError(f"split {split!r} holds no rows")
        found = find_columns(dataset.features, columns)
        self.image, self.class_names, self.note = found.image, found.class_names, found.note
        labels = dataset.select_columns([found.label]).with_format("arrow")[:][found.label]
        self.labels: np.ndarray | None = labels.cast(pa.int64()).fill_null(-1).to_numpy()
        raw = dataset.select_columns([found.image]).with_format(None)
        self.raw = raw.cast_column(found.image, datasets.Image(decode=False)).with_format("arrow")

    def __len__(self) -> int:
        return len(self.raw)

    def hide(self, rows: np.ndarray) -> None:
        """Take the labels of these rows away."""
        assert self.labels is not None
        self.labels = self.labels.copy()
        self.labels[rows] = -1

    def read(self, rows: np.ndarray) -> list[tuple[int, Any, int]]:
        """Row numbers -> (row, RGB image, label) each."""
        assert self.labels is not None
        values = self.raw[rows.tolist()][self.image].to_pylist()
        triples = zip(rows.tolist(), values, self.labels[rows].tolist(), strict=True)
        return [(row, decode_image(value, self.split, row), label) for row, value, label in triples]


class TorchTable:
    """A torch Dataset (or an HF Dataset with its own transform) whose items are (x, y) or a dict; see HFTable."""

    threads = False

    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset, self.split = dataset, split
        if len(dataset) == 0:
            raise ValueError(f"split {split!r} holds no rows")
        self.labels = labels_of(dataset)
        self.class_names = class_names_of(dataset)
        self.cacheable = is_fixed(dataset)
        self.in_memory = all(isinstance(leaf, TensorDataset) for leaf in leaves(dataset))
        self.note = f"items of {type(dataset).__name__}"
        self.hidden: set[int] = set()  # rows whose label is taken away

    def __len__(self) -> int:
        return len(self.dataset)

    def hide(self, rows: np.ndarray) -> None:
        """Take the labels of these rows away."""
        assert self.labels is not None
        self.labels = self.labels.copy()
        self.labels[rows] = -1
        self.hidden |= set(rows.tolist())

    def read(self, rows: np.ndarray) -> list[tuple[int, Any, int]]:
        """Row numbers -> (row, PIL image, array or (C, H, W) tensor, label) each."""
        return [self._read(row) for row in rows.tolist()]

    def _read(self, row: int) -> tuple[int, Any, int]:
        where = f"split {self.split!r}, row {row}"
        image, label, _ = parts(self.dataset[row], where)
        if label is None or row in self.hidden:
            return row, image, -1
        if np.ndim(label) != 0 or isinstance(label, str):
            raise ValueError(f"{where}: label {label!r} is not one integer class id")
        return row, image, int(label)

    def read_labels(self) -> np.ndarray:
        """(N,) int64, by reading every item once."""
        return np.array([label for _, _, label in self.read(np.arange(len(self)))], np.int64)


Table = HFTable | TorchTable


def parts(item: Any, where: str) -> tuple[Any, Any, Any]:
    """An item or a batch -> image, label (None where it says so), index (None when it has none). `where` opens the
    message of an error."""
    if isinstance(item, Mapping):
        image, label, index = (
            next((item[k] for k in keys if k in item), None)
            for keys in (IMAGE_KEYS, LABEL_KEYS, INDEX_KEYS)
        )
        if image is None or not any(k in item for k in LABEL_KEYS):
            wanted = "an image" if image is None else "a label"
            raise ValueError(
                f"{where}: no key for {wanted} among {sorted(map(str, item))}; "
                f"known are {', '.join(IMAGE_KEYS)} and {', '.join(LABEL_KEYS)}"
            )
        return image, label, index
    if isinstance(item, (tuple, list)) and len(item) in (2, 3):
        return item[0], item[1], item[2] if len(item) == 3 else None
    got = (
        f"{type(item).__name__} of {len(item)}"
        if isinstance(item, (tuple, list))
        else type(item).__name__
    )
    raise ValueError(
        f"{where}: got {got} where (x, y), (x, y, index) or a dict is expected; labels are needed"
    )


def leaves(dataset: Any) -> list[Any]:
    """The data sets under torch's Subset and ConcatDataset."""
    if isinstance(dataset, Subset):
        return leaves(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [leaf for part in dataset.datasets for leaf in leaves(part)]
    return [dataset]


def is_fixed(dataset: Dataset) -> bool:
    """True when an item is known to be the same at each reading: tensors, or torchvision's data without transforms."""
    return all(
        isinstance(leaf, TensorDataset)
        or (isinstance(leaf, VisionDataset) and leaf.transform is None and leaf.transforms is None)
        for leaf in leaves(dataset)
    )


def labels_of(dataset: Any) -> np.ndarray | None:
    """(N,) int64 from what the data set says of itself (tensors, targets, labels, label column), -1 for None in them;
    None where it says nothing."""
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        each = [labels_of(part) for part in dataset.datasets]
        return (
            None
            if any(part is None for part in each)
            else np.concatenate([p for p in each if p is not None])
        )
    if isinstance(dataset, datasets.Dataset):
        table = dataset.with_format("arrow")
        try:
            label = find_columns(dataset.features).label
        except ValueError:  # the transform makes the columns up
            return None
        return table[:][label].cast(pa.int64()).fill_null(-1).to_numpy()
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    elif getattr(dataset, "target_transform", None) is not None:
        found = None
    else:
        found = getattr(dataset, "targets", None)
        found = getattr(dataset, "labels", None) if found is None else found
    if found is None or callable(found):
        return None
    try:
        found = (
            [-1 if value is None else value for value in found]
            if isinstance(found, (list, tuple))
            else found
        )
        array = np.asarray(found)
    except (TypeError, ValueError):
        return None
    usable = array.shape == (len(dataset),) and np.issubdtype(array.dtype, np.integer)
    return array.astype(np.int64) if usable else None


def class_names_of(dataset: Any) -> tuple[str, ...] | None:
    """The `classes` of torchvision's data sets, or the names of an HF ClassLabel; None when there are none."""
    leaf = leaves(dataset)[0]
    if isinstance(leaf, datasets.Dataset):
        try:
            return find_columns(leaf.features).class_names
        except ValueError:
            return None
    names = getattr(leaf, "classes", None)
    return (
        tuple(names)
        if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)
        else None
    )


_IMAGE = datasets.Image()


def decode_image(value: Any, split: str, row: int) -> Image.Image:
    """The stored form {"bytes", "path"} -> RGB image, turned upright where EXIF says so."""
    try:
        if value is None:
            raise ValueError("empty")
        return rgb(_IMAGE.decode_example(value))
    except Exception as e:  # noqa: BLE001  whatever a decoder raises means the same to the reader
        path = f" ({value['path']})" if isinstance(value, Mapping) and value.get("path") else ""
        raise ValueError(
            f"split {split!r}, row {row}{path}: the image cannot be decoded: {e}. Replace or remove that row."
        ) from e


def rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB; 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pil(image: Any) -> Image.Image:
    """PIL image, (H, W) or (H, W, C) uint8 array, or (C, H, W) tensor -> RGB PIL image."""
    return rgb(image if isinstance(image, Image.Image) else v2.functional.to_pil_image(image))


def to_uint8(image: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """PIL image, array or uint8 tensor -> (3, H, W) uint8; `size` resizes (bilinear, antialiased)."""
    image = to_pil(image)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def to_tensor(image: Any, where: str) -> Tensor:
    """What a data set or a transform gave -> (3, H, W) uint8, or float in [0, 1]."""
    if isinstance(image, (Image.Image, np.ndarray)):
        return torch.from_numpy(np.ascontiguousarray(to_uint8(image)))
    if not isinstance(image, Tensor):
        raise ValueError(
            f"{where}: the image is {type(image).__name__}, expected a (3, H, W) tensor or a PIL image"
        )
    image = image.as_subclass(Tensor)  # type: ignore[arg-type]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"{where}: the image has shape {tuple(image.shape)}, expected (3, H, W)")
    check_range(image, where)
    return image.expand(3, -1, -1)


def check_range(x: Tensor, where: str) -> None:
    """uint8, or floats in [0, 1] (0.01 of slack for resampling); anything else is a ValueError."""
    if x.dtype == torch.uint8:
        return
    if not x.is_floating_point():
        raise ValueError(f"{where}: images of type {x.dtype}, expected uint8 or float in [0, 1]")
    low, high = (float(v) for v in x.aminmax())
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(
            f"{where}: image values from {low:.3g} to {high:.3g}, expected [0, 1]. "
            "Each model normalises its own input: remove Normalize from the transforms."
        )


def sizes(table: Table, rows: Sequence[int]) -> set[tuple[int, int]]:
    """The (H, W) found among some rows."""
    found = set()
    for _, image, _ in table.read(np.asarray(rows)):
        h, w = image.shape[-2:] if isinstance(image, Tensor) else to_pil(image).size[::-1]
        found.add((int(h), int(w)))
    return found
