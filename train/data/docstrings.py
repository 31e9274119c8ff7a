"""Prints the documented items of Python's standard library as JSON; run as a script by `corpus`.

It needs nothing but the standard library, and imports nearly all of that: hence the process of its
own, which can change nothing in the trainer's, and where nothing that pytest, a debugger or a
notebook has put in place of a standard function is found instead of it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import sys
import types
from collections.abc import Iterator

# Left out: modules that do something when imported (print, open a browser or a window, take over
# the prompt), those that are about tests or other programs, tables of constants, and the modules
# behind os.path, which is described under its own name.
# fmt: off
SKIPPED = frozenset([
    "antigravity", "distutils", "encodings", "ensurepip", "genericpath", "idlelib", "lib2to3",
    "ntpath", "posixpath", "pydoc_data", "readline", "rlcompleter", "sitecustomize", "test", "this",
    "tkinter", "turtle", "turtledemo", "usercustomize",
])
# fmt: on


def items() -> Iterator[dict[str, str]]:
    """Kind, name, owner, module and docstring of each documented item, in a fixed order."""
    for kind, name, owner, module, item in _items():
        doc = item.__doc__
        if isinstance(doc, str):
            lines = inspect.cleandoc(doc).splitlines()
            doc = "\n".join(line.rstrip() for line in lines).strip()
            yield {"kind": kind, "name": name, "owner": owner, "module": module, "doc": doc}


def _items() -> Iterator[tuple[str, str, str, str, object]]:
    for module_name, module in _modules():
        yield "module", module_name, "", module_name, module
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for short, item in _public_members(module):
            name = prefix + short
            if inspect.isclass(item):
                kind = "exception" if issubclass(item, BaseException) else "class"
                yield kind, name, module_name, module_name, item
                for attribute, member in sorted(vars(item).items()):
                    kind = "property" if inspect.isdatadescriptor(member) else "method"
                    if _is_public(attribute) and (kind == "property" or _is_routine(member)):
                        yield kind, f"{name}.{attribute}", name, module_name, member
            elif inspect.isroutine(item):
                yield "function", name, module_name, module_name, item


def _modules() -> Iterator[tuple[str, types.ModuleType]]:
    """The public modules by name: those of the top level, then those in packages, and so on."""
    names = sorted([*filter(_is_public, sys.stdlib_module_names - SKIPPED), "os.path"])
    while names:
        inner = []
        for name in names:
            try:
                module = importlib.import_module(name)
            except Exception:  # of another platform, or left out when this Python was built
                continue
            yield name, module
            entries = pkgutil.iter_modules(getattr(module, "__path__", None) or [])
            inner += [f"{name}.{entry.name}" for entry in entries if _is_public(entry.name)]
        names = sorted(inner)


def _public_members(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """The names a module says are public; without `__all__`, those defined in it."""
    declared = getattr(module, "__all__", None)
    for name in sorted(vars(module) if declared is None else set(declared)):
        item = getattr(module, name, None)
        if _is_public(name) and (declared or getattr(item, "__module__", "") == module.__name__):
            yield name, item


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _is_routine(member: object) -> bool:
    return inspect.isroutine(member) or isinstance(member, classmethod | staticmethod)


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = list(items())
    json.dump(found, sys.stdout)
