import gzip
import json
import sys
from pathlib import Path

import pytest
from paths import SHARED_DATA

from train.data import files

SHARED = SHARED_DATA
BOM = b"\xef\xbb\xbf"
RECORDS = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(3)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def contents(path: Path) -> list[tuple[str, ...]]:
    return [tuple(m.content for m in record.messages) for record in files.read(path)]


EXPECTED = [(r["prompt"], r["completion"]) for r in RECORDS]


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        # Without the time, which would name the test otherwise in each process that collects it.
        gzip.compress(LINES, mtime=0),
        json.dumps(RECORDS).encode(),
        json.dumps(RECORDS, indent=2).encode(),
        BOM + json.dumps(RECORDS, indent=2).encode() + b"\n",
        gzip.compress(json.dumps(RECORDS).encode(), mtime=0),
        BOM + LINES.replace(b"\n", b"\n" + BOM, 1),  # two files with marks, joined
        LINES.replace(b"\n", b"\r\n"),
        LINES.replace(b"\n", b"\r"),
        json.dumps(RECORDS, indent=2).encode().replace(b"\n", b"\r"),
    ],
)
def test_whatever_the_file_the_records_are_the_same(tmp_path, content):
    # The name says nothing.
    assert contents(write(tmp_path / "data.txt", content)) == EXPECTED


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / "data.parquet"
    parquet.write_table(pa.Table.from_pylist(RECORDS), path)
    assert contents(path) == EXPECTED
    assert [r.source for r in files.read(path)] == [f"{path} row {n}" for n in (1, 2, 3)]

    turns = [{"role": role, "content": role, "tool_calls": None} for role in ("user", "assistant")]
    parquet.write_table(pa.Table.from_pylist([{"messages": turns, "text": None}]), path)
    assert contents(path) == [("user", "assistant")]

    write(path, path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"data\.parquet is a damaged Parquet file: .*"):
        files.read(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "data.bin", b"PAR1 and more")
    with pytest.raises(ValueError, match=r"data\.bin is Parquet: pip install pyarrow to read it"):
        files.read(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull fetches it"),
        (LINES.decode().encode("utf-16"), "text in UTF-16: save it as UTF-8"),
        (LINES.decode().encode("utf-32"), "text in UTF-32: save it as UTF-8"),
        (b"\0\0\xfe\xff" + LINES.decode().encode("utf-32-be"), "text in UTF-32: save it as"),
        (LINES.decode().encode("utf-16-be"), "not text in UTF-8 (it holds zero bytes)"),
        (b"prompt,completion\na,b\n", "CSV (it begins 'prompt,completion'): save it as JSON lines"),
        (b"prompt\tcompletion\na\tb\n", "TSV (it begins"),
        (b"Once upon a time\n", "not JSON (it begins 'Once upon a time')"),
        (b"PK\x03\x04rest", "a zip archive or a spreadsheet"),
        (gzip.compress(LINES, mtime=0)[:-20], "a damaged gzip file"),
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (json.dumps({"version": 1, "data": RECORDS}).encode(), "holds records in 'data': save"),
        (json.dumps({"data": RECORDS, "v": []}, indent=1).encode(), "records in 'data': save"),
        (json.dumps({"a": RECORDS, "b": RECORDS}).encode(), "records in 'a' and 'b': save such"),
        (json.dumps(RECORDS[0], indent=1).encode(), "one JSON object over several lines: put"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, what):
    path = write(tmp_path / "data.jsonl", content)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is asserted below)
        files.read(path)
    assert str(error.value).startswith(f"{path} ")
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("missing.jsonl", r"there is no file .*missing\.jsonl$"),
        ("missing.jsonl:1e3", r"there is no file .*missing\.jsonl:1e3$"),
        ("a.jsonl:1e3", r"there is no file .*a\.jsonl:1e3: '1e3' is no weight"),
        (".", "is a folder: name the files"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path, name, what):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=what):
        files.read(tmp_path / name)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b'{"prompt": "a", ', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"prompt": ' + b"7" * 5000 + b"}", "invalid JSON"),
        (b"{", "an object must be whole on one line"),
        (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
        (b"3", "expected a JSON object, got a number"),
        (b'{"prompt": "a"}', "missing field 'completion'"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_or_left_out(tmp_path, bad, what):
    path = write(tmp_path / "data.jsonl", LINES + b"\n" + bad + b"\n" + LINES)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is asserted below)
        files.read(path)
    assert str(error.value).startswith(f"{path}:5: ")
    assert what in str(error.value)
    assert "--skip-bad-records" in str(error.value)

    skipped: list[str] = []
    records = files.read(path, skipped)
    assert [r.source for r in records] == [f"{path}:{n}" for n in (1, 2, 3, 6, 7, 8)]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{path}:5: ")
    assert what in skipped[0]


def test_a_file_of_bad_records_alone_is_refused(tmp_path):
    path = write(tmp_path / "data.jsonl", b'{"a": 1}\n' * 3)
    with pytest.raises(ValueError, match=r"holds no records; the first of 3 bad ones: .*:1: none"):
        files.read(path, [])


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ('[\n  {"prompt": "a", "completion": "b"},\n  3\n]', 3, "expected a JSON object"),
        ('[\n  {"prompt": "a", "completion": "b"}\n', 3, "a comma or the array's end is missing"),
        ('[\n  {"prompt": "a",\n "completion": }]', 2, "invalid JSON"),
        ('[{"prompt": "a", "completion": "b"}]\n{}', 1, "something follows the array's end"),
        ('[\n{"prompt": "a", "completion": "\udcff"}]', 2, "not UTF-8"),
    ],
)
def test_what_is_wrong_in_an_array_is_named_by_line(tmp_path, content, line, what):
    path = write(tmp_path / "data.json", content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is asserted below)
        files.read(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert what in str(error.value)


def test_elements_of_an_array_are_known_by_their_lines(tmp_path):
    path = write(tmp_path / "data.json", json.dumps(RECORDS, indent=2).encode())
    assert [r.source for r in files.read(path)] == [f"{path}:{n}" for n in (2, 6, 10)]
    skipped: list[str] = []
    path.write_text(json.dumps([RECORDS[0], 3, RECORDS[1]], indent=2))
    assert len(files.read(path, skipped)) == 2
    assert skipped == [f"{path}:6: expected a JSON object, got a number"]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    line = json.dumps({"prompt": "é\u2028", "completion": "ü"}, ensure_ascii=False).encode()
    path = write(tmp_path / "data.jsonl", BOM + line + b"\r\n\r\n  \n" + line)
    records = files.read(path)
    assert [r.source for r in records] == [f"{path}:1", f"{path}:4"]
    assert [r.messages[0].content for r in records] == ["é\u2028"] * 2


@pytest.mark.skipif(not SHARED.exists(), reason="no folder of data sets beside the repository")
@pytest.mark.parametrize(
    ("name", "count", "empty"),
    [
        ("alpaca/alpaca_20k-00000.jsonl", 8971, [1462, 3588, 6235]),
        ("dolly/dolly_3k.jsonl", 2996, []),
    ],
)
def test_published_data_sets(name, count, empty):
    records = files.read(SHARED / name)
    assert len(records) == count
    sources = [r.source for r in records if r.has_empty_response]
    assert sources == [f"{SHARED / name}:{line}" for line in empty]
