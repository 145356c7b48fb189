"""Image folders: train/CLASS/x.png, or CLASS/x.png as one split.

Splits and classes are folders, never guessed from the names of files. A class is the first folder
under its split, as in torchvision; images deeper in it belong to it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdtoolkit.data.folder_tree import Folder, unwrap
from kdtoolkit.data.label_values import sorted_names
from kdtoolkit.data.split_names import FULL_NAMES, SPLIT_NAMES, split_of

if TYPE_CHECKING:
    import datasets

MAX_NAMES = 5  # that a note lists
LAYOUT = "expected train/CLASS/x.png, or CLASS/x.png"


@dataclasses.dataclass
class OpenedSplits:
    """The splits of a path.

    Attributes:
        splits: HF data sets by the source's name of the split.
        notes: Sentences about what was left out or decided.
    """

    splits: dict[str, Any]
    notes: list[str] = dataclasses.field(default_factory=list)


def open_image_folder(root: Folder) -> OpenedSplits:
    """Open train/CLASS/x.png, or CLASS/x.png as one split.

    Args:
        root: The folder; it holds images.

    Returns:
        The splits. Those without class folders are left out, with a note.

    Raises:
        ValueError: If images cannot be labelled, or splits have different classes.
    """
    root = unwrap(root)
    splits, notes = _find_splits(root)
    if not splits:
        return _open_classes(root)
    left_out = [name for name in root.filled if name not in splits]
    if root.images:
        notes.append(_describe_loose(root, "the folders of splits"))
    for name in left_out:
        notes.append(
            f"folder {name!r} ({_count(root.filled[name])}) is left out: its name is not that of a "
            "training, validation or test split"
        )
    return _open_splits(root, splits, notes)


def _find_splits(root: Folder) -> tuple[dict[str, Folder], list[str]]:
    """Folders that are splits, by name; none where the folders are classes."""
    named = {name: folder for name, folder in root.filled.items() if split_of(name)}
    with_classes = [name for name, folder in named.items() if folder.filled]
    others = [name for name in root.filled if name not in named]
    if not with_classes:
        if named and not others:
            raise ValueError(
                f"{root.path}: {_list(named)} {_holds(named)} images and no class folders, so that "
                f"their labels are not known: {LAYOUT}"
            )
        return {}, []
    trains = [name for name in with_classes if split_of(name) == "train"]
    unlabelled = [name for name in named if name not in with_classes]
    bad = next((name for name in unlabelled if split_of(name) == "train"), None)
    if bad is not None and not trains:
        raise ValueError(
            f"{root.path}: {bad!r} holds {_count(named[bad])} and no class folders, so that their "
            f"labels are not known: {LAYOUT}"
        )
    if not trains and others:
        raise ValueError(
            f"{root.path}: {_list(with_classes)} {_holds(with_classes)} class folders, and there "
            f"is no 'train' beside {_list(others)}: {LAYOUT}"
        )
    notes = [_describe_unlabelled(name, named[name]) for name in unlabelled]
    return named, notes


def _open_splits(root: Folder, named: dict[str, Folder], notes: list[str]) -> OpenedSplits:
    """Open the folders of splits, all with the classes of the training split."""
    labelled = {name: folder for name, folder in named.items() if folder.filled}
    trains = [name for name in labelled if split_of(name) == "train"] or list(labelled)
    first = min(trains, key=_preference)  # of several, name_splits takes the same
    train = _unwrap_split(labelled[first], ())
    names = list(train.filled)
    holders = {}
    for name, folder in labelled.items():
        if name == first:
            holders[name] = train
            continue
        inner = _unwrap_split(folder, names)
        if _is_unlabelled(inner, names):
            notes.append(_describe_unlabelled(name, folder))
            continue
        if split_of(name) == split_of(first):
            continue  # a second training split: left out below
        # a folder that is empty in train is a class that has rows elsewhere
        names += [c for c in inner.filled if c in train.folders and c not in names]
        _check_classes(root, name, list(inner.filled), first, names)
        holders[name] = inner
    classes = sorted_names(names)
    opened = {}
    for name, folder in labelled.items():
        if name in holders:
            opened[name] = _make_dataset(holders[name], classes)
            notes += _describe_files(holders[name], f"split {name!r}: ")
        elif split_of(name) == "train":
            notes.append(f"folder {name!r} ({_count(folder)}) is left out beside {first!r}")
    return OpenedSplits(opened, notes)


def _preference(name: str) -> int:
    return SPLIT_NAMES[str(split_of(name))].index(name.strip().lower())


def _unwrap_split(folder: Folder, known: Sequence[str]) -> Folder:
    """As `unwrap`; train/train/CLASS and test/test/x.png are wrapped once more too."""
    folder = unwrap(folder, known)
    if not folder.images and len(folder.filled) == 1:
        name, only = next(iter(folder.filled.items()))
        if split_of(name) is not None and name not in known and only.filled:
            return unwrap(only, known)
    return folder


def _is_unlabelled(folder: Folder, names: Sequence[str]) -> bool:
    """Whether there is but one folder, such as test/unknown/x.png, and it is no class of train."""
    return len(folder.filled) == 1 and not set(folder.filled) & set(names)


def _check_classes(
    root: Folder, split: str, found: list[str], train: str, names: list[str]
) -> None:
    unknown = [name for name in found if name not in names]
    if not unknown:
        return
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(unknown[0].lower(), folded, 1)
    hint = f" Did you mean {folded[close[0]]!r}?" if close else ""
    raise ValueError(
        f"{root.path}: {split} has the class folder{_s(unknown)} {_list(unknown)}, which {train} "
        f"has not; its classes are {_list(names)}.{hint} The classes of all splits must be those "
        "of train: rename or remove the folder"
    )


def _open_classes(root: Folder) -> OpenedSplits:
    """Open CLASS/x.png as one split."""
    if not root.filled:
        raise ValueError(
            f"{root.path} holds {_count(root)} and no class folders, so that their labels are not "
            f"known: {LAYOUT}"
        )
    classes = dict(root.filled)
    notes = []
    for name, folder in root.filled.items():
        inner = [split_of(under) for under in folder.filled]
        if inner and all(inner) and not folder.images:
            raise ValueError(
                f"{folder.path} holds the folder{_s(inner)} {_list(list(folder.filled))} of a data "
                f"set of its own, beside {_list([n for n in root.filled if n != name])}: pass the "
                f"folder that is meant. {LAYOUT.capitalize()}"
            )
        split = split_of(name)
        if split == "train":
            notes.append(f"folder {name!r} holds images beside class folders: it is a class")
        elif split is not None:
            notes.append(_describe_unlabelled(name, classes.pop(name)))
    names = sorted_names(list(classes))
    holder = Folder(root.path, root.images, root.others, {**root.folders, **classes})
    data = _make_dataset(holder, names)
    return OpenedSplits({"train": data}, notes + _describe_files(holder, "", names))


def _make_dataset(folder: Folder, names: Sequence[str]) -> datasets.Dataset:
    """Images of the class folders, class by class."""
    import datasets

    files = {name: folder.folders[name].all_images() for name in names if name in folder.folders}
    code_of = {name: code for code, name in enumerate(names)}
    rows = {
        "image": [path for paths in files.values() for path in paths],
        "label": [code for name, paths in files.items() for code in [code_of[name]] * len(paths)],
    }
    features = datasets.Features(
        image=datasets.Value("string"), label=datasets.ClassLabel(names=list(names))
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    return table.cast_column("image", datasets.Image())


# ------------------------------------------------------------------------------------- words
def _describe_files(folder: Folder, where: str, names: Sequence[str] | None = None) -> list[str]:
    """Sentences about what of a split is left out."""
    classes = folder.filled if names is None else {name: folder.folders[name] for name in names}
    notes = []
    if folder.images:
        notes.append(where + _describe_loose(folder, "the class folders"))
    empty = [name for name, under in folder.folders.items() if not under.num_images]
    if empty:
        notes.append(f"{where}folder{_s(empty)} {_list(empty)} hold{_s(empty, True)} no images")
    nested = [name for name, under in classes.items() if under.filled]
    if nested:
        notes.append(
            f"{where}{_list(nested)} hold{_s(nested, True)} images in folders of their own, which "
            "belong to the class of the outer folder"
        )
    others = [name for under in classes.values() for name in under.all_others()]
    if others:
        counts = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in others)
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common(MAX_NAMES))
        notes.append(f"{where}{len(others)} files in class folders are no known images ({kinds})")
    return notes


def _describe_loose(folder: Folder, beside: str) -> str:
    images = folder.images
    return (
        f"{_count_of(len(images))} beside {beside} ({_list(images)}) "
        f"{'is' if len(images) == 1 else 'are'} left out: no folder says the class"
    )


def _describe_unlabelled(name: str, folder: Folder) -> str:
    split = split_of(name)
    kind = f": there is no {FULL_NAMES[split]} split" if split in ("val", "test") else ""
    return (
        f"folder {name!r} ({_count(folder)}) is left out: it has no folders of the classes, so its "
        f"images have no labels{kind}"
    )


def _count(folder: Folder) -> str:
    return _count_of(folder.num_images)


def _count_of(number: int) -> str:
    return "1 image" if number == 1 else f"{number:,} images"


def _list(names: Mapping[str, Any] | Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:MAX_NAMES])
    return shown + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def _holds(names: Mapping[str, Any] | Sequence[str]) -> str:
    return "holds" if len(names) == 1 else "hold"


def _s(names: Sequence[Any], verb: bool = False) -> str:
    """The ending of a noun, or of a verb, for so many."""
    return "s" if (len(names) == 1) == verb else ""
