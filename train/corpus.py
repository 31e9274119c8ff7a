"""The default training data: questions about Python, answered by the standard library's own docs.

It is real text, it needs no network, and everyone who can run this has it. The records are a
function of the Python version and platform alone.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterator

from train.records import Message, Record, stable_hash

QUESTIONS = {
    "module": (
        "What is the Python module `{name}` for?",
        "Describe the standard library module `{name}`.",
        "What does Python's `{name}` module provide?",
        "Give a short introduction to the module `{name}`.",
    ),
    "class": (
        "What is the class `{name}` in Python?",
        "Describe Python's class `{name}`.",
        "What is `{name}` used for?",
        "Explain the class `{name}` from the module `{module}`.",
    ),
    "exception": (
        "What does the exception `{name}` mean?",
        "When is `{name}` raised in Python?",
        "Explain the exception `{name}` from the module `{module}`.",
    ),
    "function": (
        "What does `{name}` do?",
        "Explain the Python function `{name}`.",
        "What is the function `{name}` from the standard library for?",
        "How does `{short}` in the module `{module}` work?",
    ),
    "method": (
        "What does the method `{name}` do?",
        "Explain the Python method `{name}`.",
        "What happens when the method `{short}` of `{owner}` is called?",
        "What is `{name}()` for?",
    ),
    "property": (
        "What does the attribute `{name}` hold?",
        "Describe the attribute `{short}` of `{owner}`.",
        "What is `{name}` in Python?",
    ),
}
"""Ways to ask about an item of each kind; a hash of the item's name chooses one."""

MAX_ANSWER_CHARACTERS = 800
MIN_RECORDS = 1000

# Left out: modules that do something when imported (print, open a browser or a window, take over
# the prompt), those that are about tests or other programs, tables of constants, and the modules
# behind os.path, which is asked about under its own name.
# fmt: off
_SKIPPED = frozenset([
    "antigravity", "distutils", "encodings", "ensurepip", "genericpath", "idlelib", "lib2to3",
    "ntpath", "posixpath", "pydoc_data", "readline", "rlcompleter", "sitecustomize", "test", "this",
    "tkinter", "turtle", "turtledemo", "usercustomize",
])
# fmt: on


def standard_library_records() -> list[Record]:
    """One question and its answer for each documented item of the standard library.

    The items are the public modules, and in them the public functions, classes and exceptions,
    and of these the public methods and properties. The answer is the docstring: its first
    paragraphs, up to about 800 characters. An answer is used once, for the item that comes first
    by module depth and name, so that no held-out answer was seen in training. Records are ordered
    by that as well. All but a few standard library modules are imported by this.

    Raises:
      RuntimeError: if docstrings are missing, as under `python -OO`.
    """
    records = {}
    with _quiet():
        for kind, name, owner, module, item in _items():
            answer = _answer(name, item)
            if answer is not None and answer not in records:
                records[answer] = _record(kind, name, owner, module, answer)
    if len(records) < MIN_RECORDS or sys.flags.optimize > 1:
        raise RuntimeError(
            f"found {len(records)} docstrings in Python's standard library, where some thousands"
            " are expected: this Python keeps no docstrings (python -OO, PYTHONOPTIMIZE=2, or a"
            " stripped build). Run it without that option, or give data of your own"
        )
    return list(records.values())


def _record(kind: str, name: str, owner: str, module: str, answer: str) -> Record:
    questions = QUESTIONS[kind]
    question = questions[stable_hash(kind, name) % len(questions)].format(
        name=name, owner=owner, module=module, short=name.rpartition(".")[2]
    )
    return Record((Message("user", question), Message("assistant", answer)), source=name, kind=kind)


def _items() -> Iterator[tuple[str, str, str, str, object]]:
    """(kind, qualified name, its owner, its module, the item itself), in a fixed order."""
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
    names = sorted([*filter(_is_public, sys.stdlib_module_names - _SKIPPED), "os.path"])
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


def _answer(name: str, item: object) -> str | None:
    """The first paragraphs of an item's docstring, or None where it says next to nothing."""
    doc = item.__doc__
    if not isinstance(doc, str):
        return None
    answer = "\n".join(line.rstrip() for line in inspect.cleandoc(doc).splitlines()).strip()
    if len(answer) > MAX_ANSWER_CHARACTERS:
        answer = answer[: MAX_ANSWER_CHARACTERS + 1]
        whole_paragraphs, _, _ = answer.rpartition("\n\n")
        whole_lines, _, _ = answer.rpartition("\n")
        answer = (whole_paragraphs or whole_lines).rstrip()
    is_signature = re.fullmatch(rf"{re.escape(name.rpartition('.')[2])}\(.*\)", answer)
    return None if is_signature or len(answer.split()) < 4 else answer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Imports of old modules warn that they are deprecated; nobody asked to use them."""
    output = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(output):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(output):
            yield
