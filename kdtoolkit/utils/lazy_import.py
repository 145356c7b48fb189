"""Imports that happen when a name is used, so that `import kdtoolkit` costs little.

Two tools: `lazy_attributes` imports a package's public names when they are used, and `import_after`
imports a module as soon as another one has been imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def lazy_attributes(
    package: str,
    public: Mapping[str, str],
    renamed: Mapping[str, tuple[str, str]] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package whose public names are imported when used.

    Args:
        package: Name of the package (`__name__`).
        public: Module that defines each public name. A name that is a module itself maps to that
            module.
        renamed: New name and its module for each old public name; using an old name gives a
            `DeprecationWarning`.

    Returns:
        The two functions, to be bound to `__getattr__` and `__dir__` in the package.

    Example:
        >>> __getattr__, __dir__ = lazy_attributes(__name__, {"Taps": "package.features.extractor"})
    """
    old_names = dict(renamed or {})

    def get_attribute(name: str) -> Any:
        if name in old_names:
            new, module = old_names[name]
            _warn_of_old_name(package, name, new, module)
            return _load(package, new, module)
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = _load(package, name, public[name])
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *public})

    return get_attribute, list_names


def _load(package: str, name: str, module: str) -> Any:
    loaded = importlib.import_module(module)
    return loaded if module == f"{package}.{name}" else getattr(loaded, name)


def _warn_of_old_name(package: str, old: str, new: str, module: str) -> None:
    place = module if module == f"{package}.{new}" else f"{module}.{new}"
    warnings.warn(
        f"{package}.{old} is now {place}; the old name will be removed in the next release",
        DeprecationWarning,
        stacklevel=3,
    )


def import_after(module: str, then: str) -> None:
    """Import a module as soon as another one has been imported, or now if it has been.

    Args:
        module: Top-level module to wait for, such as "timm".
        then: Module that is imported right after it.
    """
    if module in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _FinderThenImport(module, then))


class _FinderThenImport(importlib.abc.MetaPathFinder):
    """Finds `module` as the other finders do, with a loader that imports `then` at its end."""

    def __init__(self, module: str, then: str) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenImport(spec.loader, self.then)
        return spec


class _LoaderThenImport(importlib.abc.Loader):
    """Loads a module with its own loader, then imports another one."""

    def __init__(self, loader: importlib.abc.Loader, then: str) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.then)
