"""Tables of texts as people have them: suffixes, separators, encodings, and what is damaged."""

import json
from pathlib import Path

import pytest

from adamerge.data.rows import open_rows
from adamerge.data.sources import find_source
from adamerge.data.tables import kind_of, read_table
from adamerge.errors import DataError

TEXTS = ["good day", "é, said she", "two\nlines"]


def test_lines_of_a_text_file_are_texts_whatever_ends_them(tmp_path: Path) -> None:
    for ending in ("\n", "\r\n", "\r"):
        (tmp_path / "new.txt").write_text(ending.join(["one", "", "three"]) + ending, newline="")
        assert read_table(tmp_path / "new.txt", "x") == {"text": ["one", "", "three"]}


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")])
def test_columns_and_quotes(tmp_path: Path, suffix: str, separator: str) -> None:
    file = tmp_path / f"rows.{suffix}"
    rows = [f'"{text}"{separator}{label}' for label, text in enumerate(TEXTS)]
    file.write_text("\n".join([f"text{separator}label", *rows]))
    assert read_table(file, "x") == {"text": TEXTS, "label": [0, 1, 2]}


def test_only_whole_columns_of_numbers_are_numbers_and_texts_never(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,code,label,name\n1,007,-1,3\n2,1,20,b\n")
    found = read_table(tmp_path / "r.csv", "x")
    assert found == {"text": ["1", "2"], "code": ["007", "1"], "label": [-1, 20], "name": ["3", "b"]}
    (tmp_path / "r.csv").write_text("text,a,b,c\n1,0.0,2,\n2,1.5,,\n")
    found = read_table(tmp_path / "r.csv", "x")
    assert found == {"text": ["1", "2"], "a": [0.0, 1.5], "b": [2, None], "c": ["", ""]}


def test_tabs_without_quoting_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.tsv").write_text('sentence\tlabel\n"good\t1\n"bad" one\t0\n')
    assert read_table(tmp_path / "r.tsv", "x") == {"sentence": ['"good', '"bad" one'], "label": [1, 0]}


def test_objects_with_and_without_lines(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": None, "more": [2]}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    for name in ("r.jsonl", "r.json"):
        found = read_table(tmp_path / name, "x")
        assert found == {"text": ["a", None], "label": [1, None], "more": [None, [2]]}
        assert [kind_of(values) for values in found.values()] == ["string", "int64", "null"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "r.csv").write_text("text\nné\n", encoding=encoding)
    assert read_table(tmp_path / "r.csv", "x") == {"text": ["né"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "r.txt",
            "ok\nné".encode("latin-1"),
            r"line 2 is no UTF-8 \(byte 0xe9\).\nSave it as UTF-8, .*iconv",
        ),
        ("r.csv", "text\nné".encode("utf-16-le"), "line 1 holds a NUL character.\nIs it UTF-16"),
        ("r.csv", b"text,label\na,1\nb, c,2\n", "line 3 has 3 values, its header 2: text, label"),
        ("r.csv", b'text,label\n"a,1\n"b,0\n', "line 3 is damaged: .*\nTexts with quotes stand in quotes"),
        ("r.csv", b"text,text\na,b\n", "the column 'text' stands there twice"),
        ("r.jsonl", b'{"text": "a"}\n["b"]', "line 2 is no JSON object"),
        ("r.jsonl", b'{"text": "a"}\n{"text"', "line 2 is no JSON object"),
        ("r.jsonl", b"[" * 100_000, "line 1 is no JSON object"),
        ("r.json", b'{"text": "a"}', "it is no JSON list of objects"),
        ("r.json", b'["a"]', "it is no JSON list of objects"),
    ],
)
def test_damage_is_told_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name, "task 'x'")


def test_a_long_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text\n" + "a" * 300_000)
    assert len(read_table(tmp_path / "r.csv", "x")["text"][0]) == 300_000


class TestSources:
    def test_parts_of_a_folder_are_its_splits(self, tmp_path: Path) -> None:
        for part in ("train", "test"):
            (tmp_path / f"{part}.csv").write_text(f"text,label\n{part},0\n")
        (tmp_path / "notes.md").write_text("")
        rows = open_rows(find_source(f"{tmp_path}@test", "x"), "x")
        assert rows.values("text") == ["test"]
        assert rows.source.layout == "text"
        with pytest.raises(DataError, match="has the splits test, train"):
            find_source(str(tmp_path), "x")

    def test_files_of_one_folder_are_joined(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}')
        (tmp_path / "b.jsonl").write_text('{"text": "b"}\n{"text": "c"}')
        rows = open_rows(find_source(str(tmp_path), "x"), "x")
        assert (len(rows), rows.values("text")) == (3, ["a", "b", "c"])
        assert rows.values("label") == [1, None, None]

    def test_a_file_without_rows_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "r.csv").write_text("text,label\n")
        with pytest.raises(DataError, match="r.csv holds no texts"):
            open_rows(find_source(str(tmp_path / "r.csv"), "x"), "x")
