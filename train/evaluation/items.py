"""Multiple-choice questions in files: JSON lines, JSON arrays, either gzipped, Parquet, and CSV."""

from __future__ import annotations

import csv
import dataclasses
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data import files
from train.flags import require

LETTERS = string.ascii_uppercase
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")
OF_A_SUBJECT = re.compile(r"(.+)_(dev|val|test|validation|train)\.csv")
"""How MMLU names its files."""
HALF = re.compile("[\ud800-\udfff]")
csv.field_size_limit(2**31 - 1)  # as long as a question in JSON may be


@dataclasses.dataclass(frozen=True)
class Item:
    """A question with its choices."""

    question: str
    choices: tuple[str, ...]
    """At least two, none of them empty."""
    answer: int
    """The index of the right one."""
    context: str = ""
    """What stands before the question; empty if nothing does."""
    subject: str = ""
    """The part of the task that it is of; empty if there are no parts."""
    name: str = ""
    """Its id in the data, or else where it stands."""

    def __post_init__(self) -> None:
        for what, text in {
            "question": self.question,
            "context": self.context,
            **{f"choice {i}": choice for i, choice in enumerate(self.choices)},
        }.items():
            require(isinstance(text, str), f"the {what} must be text, not {text!r}")
            require(
                text.isascii() or not HALF.search(text),
                f"the {what} holds half of a surrogate pair, which is no character",
            )
        require(bool(self.question.strip()), "the question is empty")
        require(len(self.choices) > 1, f"a question needs two choices or more: {self.choices}")
        require(
            len(self.choices) <= len(LETTERS),
            f"{len(self.choices)} choices are more than there are letters",
        )
        empty = [i for i, choice in enumerate(self.choices) if not choice.strip()]
        require(not empty, f"choice {empty[:1]} is empty: {self.choices}")
        require(
            0 <= self.answer < len(self.choices),
            f"the answer {self.answer} is none of the choices 0 to {len(self.choices) - 1}",
        )


def values(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file with where it stands.

    Of a CSV file without a heading, as MMLU's: the question, the choices, the letter of the answer.

    Raises:
      ValueError: naming file and line of what cannot be read.
    """
    require(path.is_file(), f"there is no file {path}")
    rows = _csv(path) if path.suffix.lower() == ".csv" else files.values(path)
    found = False
    for where, row in rows:
        found = True
        if isinstance(row, ValueError):
            raise ValueError(f"{where}: {row}") from None
        require(isinstance(row, dict), f"{where}: a question is an object, not {str(row)[:60]}")
        yield where, row
    require(found, f"{path} holds no questions")


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    named = OF_A_SUBJECT.fullmatch(path.name)
    subject = {"subject": named[1]} if named else {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            heading: list[str] | None = None
            line = 1
            for row in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not any(cell.strip() for cell in row):
                    continue
                names = [cell.strip().lower() for cell in row]
                if heading is None and "question" in names and "answer" in names:
                    heading = names
                    continue
                heading = heading or []
                if heading:
                    require(
                        len(row) == len(heading),
                        f"{where}: {len(row)} cells, and the heading has {len(heading)}",
                    )
                    cells: dict[str, Any] = dict(zip(heading, row, strict=True))
                    letters = sorted(name for name in heading if len(name) == 1)
                    choices = [cells.pop(name) for name in letters]
                    while choices and not choices[-1]:
                        choices.pop()  # a question with fewer choices than others
                    answer = cells["answer"].strip()
                    cells |= {"answer": _numbered(answer, choices, where)}
                    yield where, {**subject, **cells, "choices": choices}
                else:
                    require(
                        len(row) >= 4,
                        f"{where}: {len(row)} cells: a question, its choices, the answer's letter",
                    )
                    yield (
                        where,
                        {
                            **subject,
                            "question": row[0],
                            "choices": row[1:-1],
                            "answer": letter(row[-1].strip()),
                        },
                    )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path} is a damaged CSV file: {error}") from None


def _numbered(answer: str, choices: Sequence[str], where: str) -> str | int:
    """An index where it is a number, which no cell of a CSV file is by itself.

    Raises:
      ValueError: if it is also the text of another choice, as of a sum's.
    """
    if not answer.isdecimal() or (answer in choices and int(answer) >= len(choices)):
        return answer
    meant = {i for i, choice in enumerate(choices) if choice == answer} | {int(answer)}
    require(
        len(meant) == 1,
        f"{where}: the answer {answer} may mean any of the choices {sorted(meant)}, counted from 0:"
        " write its letter",
    )
    return int(answer)


def letter(answer: Any) -> Any:
    """The index that a letter means; anything else as it is."""
    is_one = isinstance(answer, str) and len(answer) == 1 and answer in LETTERS
    return LETTERS.index(answer) if is_one else answer


def answer_of(choices: Sequence[str], answer: Any) -> int:
    """The index that an answer names: itself, a letter, or the text of a choice.

    Raises:
      ValueError: if it names none, or two.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        require(
            0 <= answer < len(choices),
            f"the answer {answer} is none of the choices 0 to {len(choices) - 1}",
        )
        return answer
    if not isinstance(answer, str):
        raise ValueError(f"the answer must be a number or text, not {answer!r}")
    texts = {i for i, choice in enumerate(choices) if choice == answer}
    place = letter(answer)
    found = texts | ({place} if isinstance(place, int) and place < len(choices) else set())
    require(bool(found), f"the answer {answer!r} is none of the choices {list(choices)}")
    require(len(found) == 1, f"the answer {answer!r} may mean any of the choices {sorted(found)}")
    return found.pop()


def labelled(choices: Any, key: Any) -> tuple[tuple[str, ...], int]:
    """The texts and the answer's index of ARC's choices: {"text": […], "label": […]}, or a list of
    {"text", "label"}.

    Raises:
      ValueError: for other choices, and a key that is no label.
    """
    texts: Any
    labels: Any
    if isinstance(choices, Mapping):
        texts, labels = choices.get("text"), choices.get("label")
    else:
        pairs = choices if isinstance(choices, list) else [choices]
        whole = all(isinstance(pair, Mapping) for pair in pairs)
        texts = [pair.get("text") for pair in pairs] if whole else None
        labels = [pair.get("label") for pair in pairs] if whole else None
    if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)):
        raise ValueError(f"choices must have as many texts as labels, not {choices!r}")
    key = key.strip() if isinstance(key, str) else key
    require(key in labels, f"the answer {key!r} is none of the labels {labels}")
    require(labels.count(key) == 1, f"the answer {key!r} may be any of the labels {labels}")
    return tuple(texts), labels.index(key)
