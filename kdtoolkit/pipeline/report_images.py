"""Images for the Grad-CAM figure: spread over the classes, some of them predicted wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from kdtoolkit.data.cache import CachedDataset
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.data.rows import RowDataset
from kdtoolkit.report.gradcam import predict
from kdtoolkit.types import Batch

SHOWN = 8
SHOWN_WRONG = 3  # at most
PIXELS = 64 * 224 * 224  # of all images that are looked at
FEWEST, MOST = 64, 512  # images that are looked at
MOST_STREAMED = 4096  # images of a stream that are read to find several classes
BATCH = 64


class ReportImages(NamedTuple):
    """Images of a split for the report.

    Attributes:
        images: (B, C, H, W) in [0, 1].
        labels: Class ids, (B,) int64.
        note: How they were chosen, in a sentence.
    """

    images: Tensor
    labels: Tensor
    note: str


def choose_images(data: Data, split: Split, student: nn.Module) -> ReportImages:
    """Choose images of a split that show the student at work and at fault.

    Args:
        data: The data.
        split: The split.
        student: The student; it predicts the images that are looked at.

    Returns:
        Up to 8 images, sorted by class.
    """
    height, width = data.image_size
    count = min(MOST, max(FEWEST, PIXELS // (height * width)))
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        batch = _read(data, split, count)
    labels = batch["y"].tolist()
    predicted: list[int] = []
    for start in range(0, len(labels), BATCH):
        predicted += predict(student, batch["x"][start : start + BATCH])[1]
    rows = pick(labels, predicted)
    wrong = sum(predicted[row] != labels[row] for row in rows)
    num_wrong = sum(a != b for a, b in zip(predicted, labels, strict=True))
    note = (
        f"Chosen of {len(labels)} images of the {split.name} split that are spread over the "
        f"classes: {wrong} of the {num_wrong} that the student gets wrong, and "
        f"{len(rows) - wrong} others."
    )
    return ReportImages(batch["x"][rows], batch["y"][rows], note)


def pick(labels: Sequence[int], predicted: Sequence[int]) -> list[int]:
    """Choose rows over as many classes as possible, up to three of them wrong.

    More are wrong only of classes that have no right ones, or where nothing else is left.

    Args:
        labels: Class ids.
        predicted: What the student predicts.

    Returns:
        Numbers of up to 8 rows, sorted by class.
    """
    rows = range(len(labels))
    wrong = [row for row in rows if predicted[row] != labels[row]]
    right = [row for row in rows if predicted[row] == labels[row]]
    known = {labels[row] for row in right}
    never_right = [row for row in wrong if labels[row] not in known]
    chosen = spread(never_right, labels, SHOWN_WRONG)
    chosen += spread(wrong, labels, SHOWN_WRONG - len(chosen), chosen)
    for group, only_new in ((right, True), (wrong, True), (right, False), (wrong, False)):
        chosen += spread(group, labels, SHOWN - len(chosen), chosen, only_new=only_new)
    return sorted(chosen, key=lambda row: labels[row])


def spread(
    rows: Sequence[int],
    labels: Sequence[int],
    count: int,
    chosen: Sequence[int] = (),
    *,
    only_new: bool = False,
) -> list[int]:
    """Choose rows of different classes.

    Args:
        rows: Rows to choose from.
        labels: Class id of every row.
        count: How many.
        chosen: Rows that are chosen already; their classes come last.
        only_new: Choose of other classes alone, one row of each.

    Returns:
        The rows, at most `count`: one of every class, then a second of each, and so on.
    """
    by_class: dict[int, list[int]] = {}
    for row in sorted(set(rows) - set(chosen)):
        by_class.setdefault(labels[row], []).append(row)
    used = {labels[row] for row in chosen}
    found: list[int] = []
    while by_class and len(found) < count:
        classes = sorted(label for label in by_class if label not in used)
        if not classes:
            if only_new:
                break
            used = set()
            continue
        wanted = min(count - len(found), len(classes))
        taken = [classes[k] for k in np.linspace(0, len(classes) - 1, wanted).astype(int)]
        found += [by_class[label].pop(0) for label in taken]
        used |= set(taken)
        by_class = {label: left for label, left in by_class.items() if left}
    return found


def _read(data: Data, split: Split, count: int) -> Batch:
    """Up to `count` images of a split, spread over its classes as far as that is known."""
    dataset = split.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitems__"):
        return _read_stream(data, split, count)
    labels = _known_labels(split)
    if labels is None:
        rows = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist()
    else:
        rows = spread(range(len(labels)), labels, count)
    fetched = dataset.__getitems__(rows)
    loader = split.user_loader
    raw = fetched if loader is None else loader.collate_fn(fetched)
    return data.prepare_batch(raw, epoch=0, train=False)


def _known_labels(split: Split) -> list[int] | None:
    """The labels of all rows, where they are known without reading these."""
    dataset = split.dataset
    if not isinstance(dataset, (CachedDataset, RowDataset)):
        return None
    if isinstance(dataset, RowDataset) and dataset.table.labels is None:
        return None
    labels: list[int] = dataset.row_labels().tolist()
    return labels


def _read_stream(data: Data, split: Split, count: int) -> Batch:
    per_class = -(-count // data.num_classes)
    kept: list[Batch] = []
    seen: dict[int, int] = {}
    num_read = num_kept = 0
    for raw in split.loader(BATCH):
        batch = data.prepare_batch(raw, epoch=0, train=False)
        rows = []
        for row, label in enumerate(batch["y"].tolist()):
            seen[label] = seen.get(label, 0) + 1
            if seen[label] <= per_class:
                rows.append(row)
        kept.append(Batch(x=batch["x"][rows], y=batch["y"][rows], index=batch["index"][rows]))
        num_read, num_kept = num_read + len(batch["y"]), num_kept + len(rows)
        if num_kept >= count or num_read >= MOST_STREAMED:
            break
    return Batch(
        x=torch.cat([batch["x"] for batch in kept]),
        y=torch.cat([batch["y"] for batch in kept]),
        index=torch.cat([batch["index"] for batch in kept]),
    )
