"""Importing when a name is used: `import kdtoolkit` stays cheap, and the command line answers at once."""

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
    """`__getattr__` and `__dir__` of a package whose public names are imported when they are used.

    Args:
        package: Name of the package (`__name__`).
        public: Public name -> module that defines it; a name that is a module itself maps to that module.
        renamed: Old public name -> (new name, module); using one gives a `DeprecationWarning`.

    Returns:
        The two functions, to be bound to `__getattr__` and `__dir__` in the package.
    """
    old_names = dict(renamed or {})

    def getattr_(name: str) -> Any:
        new, module = old_names.get(name, (name, public.get(name)))
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        is_module = module == f"{package}.{new}"
        if name in old_names:
            warnings.warn(
                f"{package}.{name} is named {module if is_module else f'{module}.{new}'} now; the "
                "old name goes with the next release",
                DeprecationWarning,
                stacklevel=2,
            )
        loaded = importlib.import_module(module)
        value = loaded if is_module else getattr(loaded, new)
        if name not in old_names:
            setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *public})

    return getattr_, dir_


def import_after(module: str, then: str) -> None:
    """Import `then` as soon as `module` has been imported: now, where it has been.

    Args:
        module: Top-level module to wait for, such as `"timm"`.
        then: Module to import behind it.
    """
    if module in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _ImportAfter(module, then))


class _ImportAfter(importlib.abc.MetaPathFinder):
    """Finds `module` as the other finders do, and lets its loader import `then` at the end."""

    def __init__(self, module: str, then: str):
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
    def __init__(self, loader: importlib.abc.Loader, then: str):
        self.loader, self.then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.then)
