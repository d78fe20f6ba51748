"""Plug-ins: Python from elsewhere, imported by a module's name, by a file, or as what installed packages offer."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from mithridate.core.errors import ConfigError, UserError
from mithridate.core.files import path_of

GROUP = "mithridate.components"
"""The entry point group: each names a module that registers components when it is imported."""


def offered() -> Sequence[EntryPoint]:
    """What installed packages offer, in the order of their modules."""
    return sorted(entry_points(group=GROUP), key=lambda point: point.value)


def absolute(plugin: str, folder: Path) -> str:
    """A plug-in as it is known from any folder: a path becomes absolute, a module's name stays.

    Args:
        plugin: `package.module`, or the path of a .py file.
        folder: Where a relative path begins.
    """
    is_path = plugin.endswith(".py") or Path(plugin).name != plugin
    return str((folder / path_of(plugin)).resolve()) if is_path else plugin


def module_of(plugin: str) -> ModuleType:
    """Import a plug-in.

    Args:
        plugin: `package.module`, or the absolute path of a .py file. A file hides no other module,
            whatever it is called.

    Raises:
        ConfigError: There is no such module or file, or it raises; names it and the error.
    """
    path = Path(plugin)
    if path.is_absolute() and not path.is_file():
        raise ConfigError(f"there is no plug-in {plugin}; give a module's name or the path of a .py file.")
    try:
        return _from_file(path) if path.is_absolute() else importlib.import_module(plugin)
    except Exception as error:  # whatever somebody else's code can raise
        raise ConfigError(
            f"the plug-in {plugin} cannot be loaded ({reason(error)}); mend it, or run where Python finds it."
        ) from error


def _from_file(path: Path) -> ModuleType:
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("its name does not end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    """The file's own name, so that `name:Class` finds it too, unless that is or would be another module's."""
    if path.stem.isidentifier():
        spec = importlib.util.find_spec(path.stem)
        if spec is None or Path(spec.origin or "").resolve() == path:
            return path.stem
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def reason(error: Exception) -> str:
    """An error in a few words, to stand in brackets; a user's mistake speaks for itself."""
    return str(error).rstrip(".") if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
