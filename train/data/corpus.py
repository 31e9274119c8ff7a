"""The default training data: questions about Python, answered by the standard library's own docs.

It is real text, it needs no network, and everyone who can run this has it. The records are a
function of the Python version and platform alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from train.data.records import Message, Record, stable_hash

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


def standard_library_records() -> list[Record]:
    """One question and its answer for each documented item of the standard library.

    The items are the public modules, and in them the public functions, classes and exceptions,
    and of these the public methods and properties. The answer is the docstring: its first
    paragraphs, up to 800 characters. An answer is used once, for the item that comes first by
    module depth and name, so that no held-out answer was seen in training. Records are ordered
    by that as well.

    Raises:
      RuntimeError: if this Python keeps no docstrings.
    """
    records = {}
    for item in _documented_items():
        answer = _answer(item["name"], item["doc"])
        if answer is not None and answer not in records:
            records[answer] = Record(
                (Message("user", _question(item)), Message("assistant", answer)),
                source=item["name"],
                kind=item["kind"],
            )
    if len(records) < MIN_RECORDS:
        raise ValueError(
            f"found {len(records)} docstrings in Python's standard library, where some thousands"
            f" are expected: {sys.executable} was built or installed without them. Use another"
            " Python, or give data of your own"
        )
    return list(records.values())


def _documented_items() -> list[dict[str, str]]:
    script = Path(__file__).with_name("docstrings.py")
    # Alone with the standard library (-I -S): no environment, site or user packages change a word.
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(script)]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise ValueError(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout)


def _question(item: dict[str, str]) -> str:
    templates = QUESTIONS[item["kind"]]
    template = templates[stable_hash(item["kind"], item["name"]) % len(templates)]
    return template.format(short=_short(item["name"]), **item)


def _answer(name: str, doc: str) -> str | None:
    """The first paragraphs of a docstring, or None where it says next to nothing."""
    if len(doc) > MAX_ANSWER_CHARACTERS:
        doc = doc[: MAX_ANSWER_CHARACTERS + 1]
        whole_paragraphs, _, _ = doc.rpartition("\n\n")
        whole_lines, _, _ = doc.rpartition("\n")
        doc = (whole_paragraphs or whole_lines).rstrip()
    is_signature = re.fullmatch(rf"{re.escape(_short(name))}\(.*\)", doc)
    return None if is_signature or len(doc.split()) < 4 else doc


def _short(name: str) -> str:
    return name.rpartition(".")[2]
