"""Rows from every kind of file, folder and split; whatever is wrong is one sentence with its place."""

import bz2
import csv
import gzip
import json
import subprocess
import sys

import pytest

from tests.data.conftest import open_chat, write_lines
from tunesmith.configs.data import ChatData, TextData
from tunesmith.data.named import NAMED, resolve
from tunesmith.data.parts import open_parts
from tunesmith.data.sources import open_rows
from tunesmith.data.splits import cut, parse_split
from tunesmith.errors import MissingExtra, UserError

ROWS = [{"prompt": f"p{i}", "completion": f'c, "{i}"\nnext'} for i in range(10)]


def write(path):
    kind = path.name.removesuffix(".gz").removesuffix(".bz2").rpartition(".")[2]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=3)
        return path
    opener = gzip.open if path.suffix == ".gz" else bz2.open if path.suffix == ".bz2" else open
    with opener(path, "wt", newline="") as file:
        if kind == "json":
            json.dump(ROWS, file)
        elif kind in ("csv", "tsv"):
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
        else:
            file.write("\n".join(json.dumps(row) for row in ROWS))
    return path


def rows(source, split=None, data=ChatData, **options):
    opened = open_rows(data(source=str(source), split=split, **options))
    return [opened[i] for i in range(len(opened))]


def message(source, split=None, data=ChatData, **options):
    with pytest.raises(UserError) as caught:
        rows(source, split, data, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.json.bz2"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name)
    assert rows(path) == ROWS
    assert rows(path, "train[2:4]") == rows(path, "[2:4]") == ROWS[2:4]
    opened = open_rows(ChatData(source=str(path)))
    assert [opened[i] for i in (9, 0, 5, 4)] == [ROWS[i] for i in (9, 0, 5, 4)]
    assert opened.place(4).startswith(str(path))


def test_json_in_other_shapes(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert rows(path) == ROWS
    path.write_text(json.dumps({"train": ROWS[:7], "test": ROWS[7:]}))
    assert rows(path) == ROWS[:7] and rows(path, "test") == ROWS[7:]
    path.write_text(json.dumps({"data": ROWS}))
    assert rows(path) == ROWS


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}')
    assert rows(path) == [{"text": "a"}, {"text": "b"}]
    assert open_rows(ChatData(source=str(path))).place(1) == f"{path}:4"
    path.write_text(f'{{"text": "a"}}\n{" " * 40}\n\t {{"text": "b"}}\n')
    assert rows(path) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_only_line_breaks_end_a_row_of_csv(tmp_path, ending):
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    (tmp_path / "a.csv").write_text(
        ending.join(["prompt,completion", f"{odd},{odd}", "p,c", "1,2,3", ""]), encoding="utf-8", newline=""
    )
    said = message(tmp_path / "a.csv")
    assert ":4: 3 values where the header has 2 columns" in said
    content = (tmp_path / "a.csv").read_bytes().replace(f"1,2,3{ending}".encode(), b"")
    (tmp_path / "a.csv").write_bytes(content)
    expected = [{"prompt": odd, "completion": odd}, {"prompt": "p", "completion": "c"}]
    assert rows(tmp_path / "a.csv") == expected
    (part,), _ = open_parts(ChatData(source=str(tmp_path / "a.csv")))
    assert [row for _, row in part.read(part.start, 9)[0]] == expected


def test_text_files_are_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo<|endoftext|>three<|endoftext|>\n")
    assert rows(path, data=TextData) == [{"text": path.read_text()}]
    assert rows(path, data=TextData, document_split="<|endoftext|>") == [{"text": "one\ntwo"}, {"text": "three"}]


def test_folders_hold_splits(tmp_path):
    for name in (
        "train-00001-of-00002.jsonl",
        "train-00000-of-00002.jsonl",
        "validation.jsonl",
        "extra_sft.jsonl",
        "sub/test/x.jsonl",
        ".hidden.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("about")
    assert [row["text"] for row in rows(tmp_path)] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert rows(tmp_path, "val") == rows(tmp_path, "validation") == [{"text": "validation.jsonl"}]
    assert rows(tmp_path, "test") == [{"text": "sub/test/x.jsonl"}]
    assert [row["text"] for row in rows(tmp_path, "extra_sft+validation[:1]")] == [
        "extra_sft.jsonl",
        "validation.jsonl",
    ]
    assert len(rows(tmp_path / "*.jsonl")) == 4
    assert message(tmp_path, "dev2") == (
        f"`{tmp_path}` has no split `dev2`; it has `extra_sft`, `test`, `train`, `validation`: set `split` to one of them"
    )


@pytest.mark.parametrize(
    "text",
    [
        "train",
        "train[:95%]",
        "train[95%:]",
        "train[:100]",
        "train[10:20]",
        "train[33%:66%]",
        "train[-10%:]",
        "train[-3:]",
        "train[:10%]+train[-1:]",
    ],
)
@pytest.mark.parametrize("count", [1, 10, 33, 101, 150])
def test_slices_are_cut_as_datasets_cuts_them(text, count):
    from datasets import ReadInstruction

    theirs = [(i.from_, i.to) for i in ReadInstruction.from_spec(text).to_absolute({"train": count})]
    assert [cut(part, count) for part in parse_split(text)] == theirs


@pytest.mark.parametrize("text", ["train[", "train[5]", "a b", "train[1:50%]", "train[:150%]", "+", ""])
def test_bad_slices(tmp_path, text):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    if text:
        assert f"`split: {text}`" in message(path, text)


def test_what_is_not_there(tmp_path):
    write_lines(tmp_path / "alpaca.jsonl", ROWS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.jsonl").write_text("\n\n")
    assert (
        message(tmp_path / "alpacca.jsonl")
        == f"`{tmp_path}/alpacca.jsonl` is no file, folder or built-in data set; did you mean `{tmp_path}/alpaca.jsonl`?"
    )
    assert message("alpaca_cleand").endswith("did you mean the built-in `alpaca_cleaned`?")
    assert "there is no folder" in message(tmp_path / "no/such.jsonl")
    assert "holds no data files" in message(tmp_path / "empty")
    assert (
        message(tmp_path / "nothing.jsonl") == f"`{tmp_path}/nothing.jsonl` holds no rows; check `source` and `split`"
    )
    assert "holds no rows" in message(tmp_path / "alpaca.jsonl", "[20:]")
    assert "no file matches" in message(tmp_path / "*.csv")
    assert "has no split `validation`; it has `train`" in message(tmp_path / "alpaca.jsonl", "validation")
    (tmp_path / "a.docx").write_text("x")
    assert "not a kind of data file we read" in message(tmp_path / "a.docx")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2: not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', ":2: list where an object with columns was expected"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not UTF-8"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', ":2: not JSON"),
        ("a.json", b'"text"', ": holds a JSON str"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3: 3 values where the header has 2 columns (a, b)"),
        ("a.csv", b'a,b\n1,"2\n', ":2: not CSV"),
        ("a.txt", b"one\ntwo \xff", ":2: not UTF-8"),
        ("a.parquet", b"PAR1 no", "damaged or incomplete (Parquet"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "damaged or incomplete (Compressed file ended before the end-of-stream marker"),
    ],
)
def test_damaged_files_say_where(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    text = message(tmp_path / name)
    assert text.startswith(f"{tmp_path / name}") and words in text and "\n" not in text


def damaged(path):
    """A file of ROWS with some of its data spoilt, its ends whole; or cut off."""
    cut = "cut" in path.name
    content = bytearray(write(path).read_bytes())
    if cut:
        path.write_bytes(content[: len(content) // 2])
    else:
        start = 4 if path.suffix == ".parquet" else 12
        content[start : start + 40] = b"\xff" * 40
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.parquet", "a.jsonl.gz", "cut.jsonl.gz", "a.csv.gz", "cut.csv.gz", "cut.json.bz2", "a.json.bz2", "cut.parquet"],
)
def test_damage_within_a_file_is_told_however_it_is_read(tmp_path, name):
    path = damaged(tmp_path / name)
    texts = [message(path)]
    with pytest.raises(UserError) as caught:
        first = open_parts(ChatData(source=str(path)))[0][0]
        first.read(first.start, 99)
    texts.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        open_chat({"source": str(path)})
    texts.append(str(caught.value))
    for text in texts:
        assert text.startswith(f"{path}: damaged or incomplete (") and text.endswith("); get the file again")


def test_what_is_no_row_in_an_array_is_named_however_it_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 5]')
    expected = f"{path} row 2: int where an object with columns was expected; mend or remove it"
    assert message(path) == expected
    (part,), _ = open_parts(ChatData(source=str(path)))
    with pytest.raises(UserError) as caught:
        part.read(part.start, 9)
    assert str(caught.value) == expected


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tunesmith\[parquet\]'"):
        rows(path)


def test_the_hub_when_offline():
    text = message("some-owner/some-data")
    assert (
        text.startswith("the data set `some-owner/some-data` can't be loaded from the Hub (")
        and "offline mode is on" in text
    )


def test_the_hub_through_datasets(monkeypatch):
    """`datasets` is asked for repository, subset, split and revision; slices are cut here."""
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((*args, options["split"], options["revision"]))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows("owner/name", "train[:3]+train[8:]", subset="main", revision="v1") == ROWS[:3] + ROWS[8:]
    assert asked == [("owner/name", "main", "train", "v1")]

    def fail(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "set `revision: refs/convert/parquet`" in message("owner/name")


def test_folders_that_datasets_saved(tmp_path):
    import datasets

    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "d")
    assert rows(tmp_path / "d", "train[5:]") == ROWS[5:] and rows(tmp_path / "d", "test") == ROWS[:2]


def test_a_reader_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "my_reader.py").write_text(
        "def read(source, split):\n    yield {'text': source, 'split': split}\n\ndef bad(source, split):\n    yield 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert rows("s3://x", "train", reader="my_reader.read") == [{"text": "s3://x", "split": "train"}]
    assert rows("s3://x", reader=f"{tmp_path}/my_reader.py:read")[0]["text"] == "s3://x"
    assert message("x", reader="my_reader.reed").endswith("has no function `reed`")
    assert "can't be imported" in message("x", reader="no_such_module.read")
    assert (
        message("x", reader="my_reader.bad")
        == "`reader: my_reader.bad` gave int as row 1; it must give dicts of columns"
    )


def test_fingerprints_follow_the_content(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, ROWS)
    before = open_rows(ChatData(source=str(path))).fingerprint()
    write_lines(tmp_path / "b.jsonl", ROWS)
    assert open_rows(ChatData(source=str(tmp_path / "b.jsonl"))).fingerprint() == before
    assert open_rows(ChatData(source=str(path), split="[1:]")).fingerprint() != before
    write_lines(path, ROWS[::-1])
    assert open_rows(ChatData(source=str(path))).fingerprint() != before


def test_fingerprints_tell_apart_what_one_file_can_give(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS[:5], "test": ROWS[5:]}))
    (tmp_path / "a.txt").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    for name in ("a.jsonl", "a.csv", "a.tsv"):
        (tmp_path / name).write_bytes((tmp_path / "a.txt").read_bytes())
    opened = [
        *(
            open_rows(ChatData(source=str(tmp_path / "a.json"), split=s))
            for s in ("train", "test", "train[:2]", "test[:2]")
        ),
        *(open_rows(TextData(source=str(tmp_path / "a.txt"), document_split=s)) for s in (None, "\n", "\n\n")),
        *(open_rows(TextData(source=str(tmp_path / name))) for name in ("a.jsonl", "a.csv", "a.tsv")),
    ]
    assert len({source.fingerprint() for source in opened}) == len(opened)
    whole, cut = (open_parts(TextData(source=str(tmp_path / "a.txt"), document_split=s))[1] for s in (None, "\n\n"))
    assert whole != cut


def test_names_stand_for_hub_data_sets():
    data, reading = resolve(ChatData(source="gsm8k", split="[:10]"))
    assert (data.source, data.subset, data.split, reading.format) == (
        "openai/gsm8k",
        "main",
        "train[:10]",
        "prompt_completion",
    )
    data, reading = resolve(TextData(source="cnn_dailymail"))
    assert (
        data.source == "abisee/cnn_dailymail" and reading.column_map == {"text": "article"} and reading.format == "text"
    )
    assert resolve(ChatData(source="wikitext"))[1].format == "text"
    with pytest.raises(UserError, match="holds conversations, which are for sft"):
        resolve(TextData(source="alpaca"))
    assert {"alpaca", "alpaca_cleaned", "samsum", "grammar", "cnn_dailymail", "wikitext", "slimorca", "c4"} <= set(
        NAMED
    )


def test_sources_need_no_torch():
    names = ["sources", "files", "formats", "named", "parts", "documents", "cache", "packing", "report"]
    code = f"import sys\nfor name in {names}: __import__('tunesmith.data.' + name)\nassert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
