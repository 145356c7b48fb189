"""The tree of a folder: which images and other files are in it, without what is hidden."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

from kdtoolkit.data.split_names import split_of

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
}  # fmt: skip
IGNORED_FOLDERS = ("__macosx", "@eadir", "__pycache__", "$recycle.bin")
IGNORED_FILES = ("thumbs.db", "desktop.ini", "icon\r")


@dataclasses.dataclass
class Folder:
    """A folder, without what is hidden.

    Attributes:
        path: Where it is.
        images: Names of the images in it, sorted.
        others: Names of the other files in it.
        folders: Its subfolders by name, sorted.
    """

    path: Path
    images: list[str]
    others: list[str]
    folders: dict[str, Folder]

    @functools.cached_property
    def num_images(self) -> int:
        """Images in it and under it."""
        return len(self.images) + sum(folder.num_images for folder in self.folders.values())

    @functools.cached_property
    def filled(self) -> dict[str, Folder]:
        """Subfolders that hold images, themselves or under them."""
        return {name: folder for name, folder in self.folders.items() if folder.num_images}

    def all_images(self) -> list[str]:
        """Return the paths of all images in it and under it."""
        own = [str(self.path / name) for name in self.images]
        return own + [path for folder in self.folders.values() for path in folder.all_images()]

    def all_others(self) -> list[str]:
        """Return the names of all files in it and under it that are no images."""
        under = (folder.all_others() for folder in self.folders.values())
        return self.others + [name for names in under for name in names]


def scan_folder(path: Path, seen: frozenset[str] = frozenset()) -> Folder:
    """Read the tree of a folder.

    Args:
        path: The folder.
        seen: Real paths of the folders above it; links back to them are left out.

    Returns:
        The tree, without hidden files and what archive programs leave behind.
    """
    seen |= {os.path.realpath(path)}
    found = Folder(path, [], [], {})
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        name, lower = entry.name, entry.name.lower()
        if name.startswith(".") or lower in IGNORED_FILES:
            continue
        if not entry.is_dir():
            is_image = os.path.splitext(lower)[1] in IMAGE_SUFFIXES
            (found.images if is_image else found.others).append(name)
        elif lower not in IGNORED_FOLDERS and os.path.realpath(entry.path) not in seen:
            found.folders[name] = scan_folder(Path(entry.path), seen)
    return found


def unwrap(folder: Folder, known: Sequence[str] = ()) -> Folder:
    """Go down through folders that hold one folder of folders, as archives make them.

    Args:
        folder: Where to begin.
        known: Names of classes: a folder of such a name is not gone through.

    Returns:
        The folder that holds splits or classes.
    """
    while not folder.images and len(folder.filled) == 1:
        name, only = next(iter(folder.filled.items()))
        if not only.filled or name in known or split_of(name) is not None:
            break
        folder = only
    return folder
