"""An item or a batch of the user's data: (x, y), (x, y, index) or a dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

IMAGE_KEYS = ("x", "image", "images", "img", "pixel_values", "inputs", "input")
LABEL_KEYS = ("y", "label", "labels", "target", "targets", "fine_label")
INDEX_KEYS = ("index", "idx", "indices")


class Item(NamedTuple):
    """What an item or a batch of the user's data holds.

    Attributes:
        image: The image or images.
        label: The label or labels; None where the item says so.
        index: The row numbers; None where there are none.
    """

    image: Any
    label: Any
    index: Any


def split_item(item: object, where: str) -> Item:
    """Take an item or a batch of the user's data apart.

    Args:
        item: (x, y), (x, y, index), or a dict with one of the known keys for each.
        where: Start of the message of an error.

    Returns:
        Image, label and index.

    Raises:
        ValueError: If it has another form.
    """
    if isinstance(item, Mapping):
        return _split_mapping(item, where)
    got = type(item).__name__
    if isinstance(item, (tuple, list)):
        if len(item) in (2, 3):
            return Item(item[0], item[1], item[2] if len(item) == 3 else None)
        got = f"{got} of {len(item)}"
    raise ValueError(
        f"{where}: got {got} where (x, y), (x, y, index) or a dict is expected; labels are needed"
    )


def _split_mapping(item: Mapping[Any, Any], where: str) -> Item:
    image, label, index = (_first_of(item, keys) for keys in (IMAGE_KEYS, LABEL_KEYS, INDEX_KEYS))
    has_label = any(key in item for key in LABEL_KEYS)
    if image is None or not has_label:
        missing = "an image" if image is None else "a label"
        raise ValueError(
            f"{where}: no key for {missing} among {sorted(map(str, item))}; "
            f"known are {', '.join(IMAGE_KEYS)} and {', '.join(LABEL_KEYS)}"
        )
    return Item(image, label, index)


def _first_of(item: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    return next((item[key] for key in keys if key in item), None)
