"""Kinds of files, and folders of them."""

import datetime
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from lora_jax.data import labelled, language, tables

ROWS = [{"text": "a\nb", "tags": [{"x": "1"}]}, {"text": "é", "tags": [{"y": "2"}]}]


def write(file, rows=ROWS):
    """A table, by the end of its name."""
    if file.suffix in (".parquet", ".arrow"):
        table = pyarrow.Table.from_pylist(rows)
        if file.suffix == ".parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            new = pyarrow.ipc.new_file if "file" in file.name else pyarrow.ipc.new_stream
            with new(str(file), table.schema) as writer:
                writer.write_table(table, 1)
        return file
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    content = lines if ".jsonl" in file.name else json.dumps(rows, indent=1).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL.gz", "a.json", "a.json.gz", "a.parquet", "stream.arrow", "file.arrow"])
def test_every_kind_has_the_same_rows(tmp_path, name):
    file = write(tmp_path / name.replace("JSONL", "jsonl"))
    assert [row for _, row in tables.rows(file, ["text"])] == ROWS and tables.columns(file) == ("text", "tags")
    with pytest.raises(ValueError, match=rf"{name.lower()}.*: there is no column 'b'; the columns are 'text', 'tags'"):
        list(tables.rows(file, ["b"]))


def test_what_json_has_not_is_a_text(tmp_path):
    turn = {"role": "user", "content": "a", "at": datetime.datetime(2026, 1, 2), "raw": b"\xff"}
    [(_, row)] = tables.rows(write(tmp_path / "a.parquet", [{"messages": [turn]}]), ["messages"])
    assert row["messages"] == [{"role": "user", "content": "a", "at": "2026-01-02 00:00:00", "raw": "b'\\xff'"}]


def test_compressed_csv_and_text(tmp_path):
    with gzip.open(tmp_path / "a.csv.gz", "wt") as stream:
        stream.write('text,label\n"a\nb",1\nc,0\n')
    assert labelled.read(tmp_path / "a.csv.gz", "text", "label") == labelled.Texts(("a\nb", "c"), ("1", "0"))
    with gzip.open(tmp_path / "a.txt.gz", "wt") as stream:
        stream.write("One.\n\n\nTwo.")
    assert language.read(tmp_path / "a.txt.gz", "text", ("p", "c"), "messages").items == ("One.", "Two.")


BAD = {
    "a.parquet": (b"PAR1 or not", r"a\.parquet can't be read: .*Parquet"),
    "a.arrow": (b"nothing of it", r"a\.arrow can't be read: "),
    "a.jsonl.gz": (b'{"text": "a"}\n', r"a\.jsonl\.gz can't be read: Not a gzipped file"),
    "b.jsonl.gz": (gzip.compress(b'{"text": "a"}\n')[:-12], r"b\.jsonl\.gz can't be read: "),
    "a.json": (b'{"text": "a"}', r"a\.json must hold a list of objects, not dict"),
    "b.json": (b'[{"text": "a"}, 3]', r"b\.json, row 2 must be a JSON object, not int"),
    "a.parquet.gz": (b"", r"a\.parquet\.gz: the data must be a \.csv, \.jsonl, \.json, \.parquet or \.arrow file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        [list(tables.rows(file, ["text"])) for _, file in tables.files(tmp_path / name)]


def names(*sources):
    return [(number, file.name) for number, file in tables.files([str(source) for source in sources])]


def test_folders_are_read_in_order(tmp_path):
    for name in ("c.jsonl", "a.jsonl.gz", "b.jsonl"):
        write(tmp_path / name)
    for name in (".hidden.csv", "README.md"):
        (tmp_path / name).write_text("")
    assert names(tmp_path, tmp_path / "b.jsonl") == [(0, "a.jsonl.gz"), (0, "b.jsonl"), (0, "c.jsonl"), (1, "b.jsonl")]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: there is no column 'text'"):
        language.read(tmp_path, "text", ("prompt", "completion"), "messages")
    write(tmp_path / "d.json")
    with pytest.raises(ValueError, match=r"holds \.json and \.jsonl files: give those that you mean by their names"):
        names(tmp_path)


def test_folders_of_datasets(tmp_path):
    """As `save_to_disk` writes them, a folder for each split, and as the cache has them, splits beside each other."""
    for split in ("train", "test"):
        (tmp_path / "saved" / split).mkdir(parents=True)
        write(tmp_path / "saved" / split / "data-00000-of-00001.arrow")
        (tmp_path / "saved" / split / "state.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert names(tmp_path / "saved" / "train") == [(0, "data-00000-of-00001.arrow")]
    with pytest.raises(ValueError, match=r"saved holds no .* or \.arrow file; give one of its folders: test, train"):
        names(tmp_path / "saved")
    (tmp_path / "cache").mkdir()
    for name in ("cache-1f.arrow", "imdb-train-00000-of-00002.arrow", "imdb-train-00001-of-00002.arrow", "dataset_info.json"):
        write(tmp_path / "cache" / name)
    shards = ["imdb-train-00000-of-00002.arrow", "imdb-train-00001-of-00002.arrow"]
    assert names(tmp_path / "cache") == [(0, name) for name in shards]
    write(tmp_path / "cache" / "imdb-test.arrow")
    with pytest.raises(ValueError, match=r"cache holds several splits \(test, train\): give the files of one by their names"):
        names(tmp_path / "cache")


def test_several_sources(tmp_path):
    """One corpus, whose digest says what is from where."""
    for name, texts in {"a": "xy", "b": "z"}.items():
        write(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
    read = lambda *files: language.read([str(tmp_path / name) for name in files], "text", ("prompt", "completion"), "messages")
    both = read("a.jsonl", "b.jsonl")
    assert (both.items, both.sources) == (("x", "y", "z"), (0, 0, 1)) and both.places[2].endswith("b.jsonl, line 1")
    write(tmp_path / "c.jsonl", [{"text": "x"}])
    write(tmp_path / "d.jsonl", [{"text": "y"}, {"text": "z"}])
    other = read("c.jsonl", "d.jsonl")
    assert other.items == both.items and other.digest() != both.digest()
    write(tmp_path / "e.jsonl", [{"prompt": "x", "completion": "y"}])
    with pytest.raises(ValueError, match=r"e\.jsonl holds pairs, and .*a\.jsonl text: the data must be of one kind"):
        read("a.jsonl", "e.jsonl")
