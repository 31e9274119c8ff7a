"""Files of records: JSON lines, a JSON array, either of them gzipped, and Parquet.

What a file is, its content says and not its name.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data import formats
from train.data.progress import progress
from train.data.records import Record

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
OTHERS = {
    b"version https://git-lfs": "the pointer to a file that Git LFS keeps: git lfs pull fetches it",
    b"\xff\xfe\0\0": "text in UTF-32: save it as UTF-8",  # before UTF-16, which begins it
    b"\0\0\xfe\xff": "text in UTF-32: save it as UTF-8",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8",
    b"\xfe\xff": "text in UTF-16: save it as UTF-8",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as JSON lines",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it, or use gzip",
    b"\xfd7zXZ\x00": "compressed by xz: decompress it, or use gzip",
    b"BZh": "compressed by bzip2: decompress it, or use gzip",
    b"ARROW1": "an Arrow file: save it as Parquet or JSON lines",
    b"SQLite format 3": "an SQLite database: save its rows as JSON lines",
}
"""What people have instead, by how it begins."""


def read(path: str | Path, skipped: list[str] | None = None) -> list[Record]:
    """The records of a file; `formats.FORMATS` has the formats that each may be in.

    Records with an empty response are returned like any other (`Record.has_empty_response`), since
    published data sets hold some; the caller leaves them out.

    Args:
      path: JSON lines (blank lines are skipped), a JSON array of objects, one of these gzipped, or
        Parquet, for which pyarrow must be installed.
      skipped: takes what is wrong with each bad record, with file and line, in place of an error.

    Raises:
      ValueError: naming file and line, for a record that is bad; naming the file, if it is not
        there, is something else, is damaged, or has no records.
    """
    path = Path(path)
    if not path.exists():
        file, _, end = str(path).rpartition(":")
        hint = f": {end!r} is no weight, as 2 or 0.5 is" if Path(file).is_file() else ""
        raise ValueError(f"there is no file {path}{hint}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the files in it")
    records, bad = [], []
    with progress(f"reading {path.name}") as advance:
        for where, value in values(path):
            advance(1)
            try:
                if isinstance(value, ValueError):
                    raise value
                records.append(Record(formats.parse(value), source=where))
            except ValueError as error:
                bad.append(f"{where}: {error}")
                if skipped is None:
                    raise ValueError(
                        f"{bad[0]}. (--skip-bad-records leaves such records out)"
                    ) from None
    if not records:
        first = f"; the first of {len(bad)} bad ones: {bad[0]}" if bad else ""
        raise ValueError(
            f"{path} holds no records{first or ': give JSON lines, one JSON object a line'}"
        )
    if skipped is not None:
        skipped += bad
    return records


def values(path: Path) -> Iterator[tuple[str, Any]]:
    """Each value with where it stands; a ValueError in the place of one that cannot be read."""
    with path.open("rb") as file:
        start = file.read(len(PARQUET))
    if start == PARQUET:
        return _parquet(path)
    try:
        content = gzip.decompress(path.read_bytes()) if start[:2] == GZIP else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from None
    _refuse_others(path, content)
    if b"\n" not in content:
        content = content.replace(b"\r", b"\n")  # how old Macs end lines
    if content.removeprefix(BOM).lstrip()[:1] == b"[":
        return _array(path, content)
    _refuse_one_object(path, content)
    return _lines(path, content)


def _refuse_others(path: Path, content: bytes) -> None:
    for start, what in OTHERS.items():
        if content.startswith(start):
            raise ValueError(f"{path} is {what}")
    beginning = content[:1000].removeprefix(BOM).strip()
    if b"\0" in beginning:
        raise ValueError(f"{path} is not text in UTF-8 (it holds zero bytes): save it as UTF-8")
    if beginning and b"{" not in beginning and not beginning.startswith(b"["):
        first = beginning.split(b"\n")[0].decode(errors="replace").strip()
        separators = {",": "CSV", "\t": "TSV"}
        kind = next((name for s, name in separators.items() if s in first), "not JSON")
        raise ValueError(
            f"{path} is {kind} (it begins {first[:60]!r}): save it as JSON lines, one object a line"
        )


def _refuse_one_object(path: Path, content: bytes) -> None:
    """Raises ValueError for a file that is one JSON object and not one record on one line."""
    content = content.removeprefix(BOM).strip()
    line, _, more = content.partition(b"\n")
    if not content.startswith(b"{") or (more and isinstance(_line(line), dict)):
        return
    value = _line(content)
    if not isinstance(value, dict):
        return
    fields = {field for needed in formats.FORMATS for field in needed}
    lists = [name for name, part in value.items() if _is_list_of_objects(part)]
    if lists and not fields & value.keys():
        raise ValueError(
            f"{path} is one JSON object that holds records in {' and '.join(map(repr, lists))}:"
            " save such a list alone, as a JSON array"
        )
    if more:
        raise ValueError(
            f"{path} is one JSON object over several lines: put each record on one line, or all of"
            " them in an array"
        )


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(x, dict) for x in value)


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        # Files with a mark of the byte order, joined, have it in the middle.
        if stripped := line.removeprefix(BOM).strip():
            yield f"{path}:{number}", _line(stripped)


def _line(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error})")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        hint = ": an object must be whole on one line" if line in (b"{", b"{,") else ""
        return ValueError(f"invalid JSON ({error}){hint}")


def _array(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """The elements of an array, each with the line that it begins in."""
    try:
        text = content.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error})") from None
    decode = json.JSONDecoder().raw_decode
    at, line, counted = _skip_blanks(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: invalid JSON ({error})") from None
        yield f"{path}:{line}", value
        at = _skip_blanks(text, end)
        if text[at : at + 1] == ",":
            at = _skip_blanks(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise ValueError(f"{path}:{line}: invalid JSON (a comma or the array's end is missing)")
    if text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        raise ValueError(f"{path}:{line}: invalid JSON (something follows the array's end)")


def _skip_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} is Parquet: pip install pyarrow to read it") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is a damaged Parquet file: {str(error).splitlines()[0]}"
        ) from None
