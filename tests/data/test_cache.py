"""Tokenized rows are kept by content; what is damaged is made again, what can't be written is done without."""

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from tests.data.conftest import Words, documents, open_chat, open_text, write_chats, write_lines
from tunesmith.data import cache as caching
from tunesmith.data import documents as documents_module
from tunesmith.data.cache import Reading, Skipped, Tokenized, cached
from tunesmith.errors import UserError

DOCUMENTS = [Tokenized(0, [5, 6, 7], [False, True, False]), Tokenized(2, [8, 9], None)]


def make(reading):
    reading.rows = 3
    reading.skip("empty answer", 1, "a.jsonl:2")
    yield DOCUMENTS[:1]
    yield []
    yield DOCUMENTS[1:]


def check(documents):
    assert documents.ids.tolist() == [5, 6, 7, 8, 9]
    assert documents.mask.tolist() == [False, True, False, False, True]  # nothing predicts a first token
    assert documents.ends.tolist() == [3, 5] and documents.starts.tolist() == [0, 3]
    assert documents.rows.tolist() == [0, 2]
    assert documents.lasts.tolist() == [1, 1] and documents.trained.tolist() == [1, 1]
    assert documents.reading == Reading(3, {"empty answer": Skipped(1, 1, "a.jsonl:2")})


def test_the_second_time_nothing_is_made(own_cache):
    first, found = cached(["key"], make)
    assert not found
    check(first)
    second, found = cached(["key"], lambda reading: pytest.fail("made again"))
    assert found and isinstance(second.ids.base, np.memmap)
    check(second)
    assert not cached(["other key"], make)[1]
    assert not [path for path in own_cache.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["about.json", "ids", "mask", "ends", "truncate", "flip"])
def test_what_is_damaged_is_made_again(own_cache, damage, caplog):
    cached(["key"], make)
    (folder,) = (path for path in own_cache.iterdir() if path.is_dir())
    if damage == "truncate":
        (folder / "ids").write_bytes((folder / "ids").read_bytes()[:-4])
    elif damage == "flip":
        content = bytearray((folder / "ids").read_bytes())
        content[0] ^= 1
        (folder / "ids").write_bytes(content)
    else:
        (folder / damage).unlink()
    documents, found = cached(["key"], make)
    assert not found and "is made again" in caplog.text
    check(documents)
    assert cached(["key"], make)[1]


def test_a_crash_half_way_leaves_nothing(own_cache):
    def crash(reading):
        yield DOCUMENTS[:1]
        raise KeyError("bug")

    with pytest.raises(KeyError):
        cached(["key"], crash)
    assert not [path for path in own_cache.iterdir() if path.is_dir()]
    # a killed process can't clean up; the next one does
    (name,) = (path.stem for path in own_cache.glob("*.lock"))
    (own_cache / f".{name}.killed").mkdir()
    check(cached(["key"], make)[0])
    assert not list(own_cache.glob(".*"))


def test_a_cache_that_cannot_be_written_costs_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    documents, found = cached(["key"], make)
    check(documents)
    assert not found and "kept in memory" in caplog.text and "TUNESMITH_CACHE" in caplog.text


def test_a_full_disk_costs_a_warning(monkeypatch, own_cache, caplog):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.os, "fsync", full)
    check(cached(["key"], make)[0])
    assert "No space left on device" in caplog.text
    assert not [path for path in own_cache.iterdir() if path.is_dir()]


def test_large_files_are_checked_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_WHOLE", 1 << 20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(80 << 20))
    before = caching._digest(path)
    with path.open("r+b") as file:
        file.seek((80 << 20) - 1)
        file.write(b"\0" if path.read_bytes()[-1:] != b"\0" else b"\1")
    assert caching._digest(path) != before


def _write_the_same(results, folder):
    os.environ["TUNESMITH_CACHE"] = folder
    documents, found = cached(["key"], make)
    results.put((documents.ids.tolist(), found))


def test_processes_that_want_the_same_wait_for_the_first(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_write_the_same, args=(results, str(tmp_path / "shared"))) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert [ids for ids, _ in found] == [[5, 6, 7, 8, 9]] * 4
    assert sorted(was_there for _, was_there in found) == [False, True, True, True]


def test_the_key_holds_all_that_decides_the_tokens(tmp_path):
    path = tmp_path / "a.jsonl"

    def from_cache(tokenizer=None, **options):
        return open_chat({"source": write_chats(path, 20), **options}, tokenizer=tokenizer).report.sources[0].from_cache

    assert not from_cache()
    assert from_cache()
    assert from_cache(packed=True)  # the layout is no matter of the cache
    other = Words()
    other.fingerprint = "other"
    for options in (
        {"tokenizer": other},
        {"train_on_input": True},
        {"system_prompt": "x"},
        {"split": "[1:]"},
        {"on_bad_row": "error"},
    ):
        assert not from_cache(**options), options
    shutil.copy(path, tmp_path / "b.jsonl")
    assert open_chat({"source": str(tmp_path / "b.jsonl")}).report.sources[0].from_cache
    write_chats(path, 21)
    assert not open_chat({"source": str(path)}).report.sources[0].from_cache


def test_another_split_or_cut_of_a_file_is_another_key(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"prompt": name, "completion": name} for name in ("a b", "c d e")]
    path.write_text(json.dumps({"train": rows[:1] * 3, "test": rows[1:] * 3}))
    train, test, again = (open_chat({"source": str(path), "split": split}) for split in ("train", "test", "test"))
    assert [data.report.sources[0].from_cache for data in (train, test, again)] == [False, False, True]
    assert set(documents(train.step(1))) != set(documents(test.step(1))) == set(documents(again.step(1)))
    assert train.fingerprint != test.fingerprint == again.fingerprint
    (tmp_path / "a.txt").write_text("a b c\n\nd e f g")
    whole, cut = (open_text({"source": str(tmp_path / "a.txt"), "document_split": s}) for s in (None, "\n\n"))
    assert [data.report.sources[0].documents for data in (whole, cut)] == [1, 2]
    assert whole.fingerprint != cut.fingerprint


def test_what_other_code_cached_is_not_taken(tmp_path, monkeypatch):
    """Any module of tunesmith.data may change how a row is read."""
    source = write_chats(tmp_path / "a.jsonl", 3)
    open_chat({"source": source})
    digest = documents_module.file_digest
    for name in ("files.py", "sources.py", "splits.py", "formats.py", "chat_spans.py"):
        monkeypatch.setattr(
            documents_module, "file_digest", lambda path, name=name: "new" if path.name == name else digest(path)
        )
        assert not open_chat({"source": source}).report.sources[0].from_cache, name
    monkeypatch.undo()


def test_a_copy_of_a_file_is_named_in_what_the_cache_says_of_it(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}, {"prompt": 5, "completion": "c"}]
    for name in ("a.jsonl", "b.jsonl"):
        report = open_chat({"source": write_lines(tmp_path / name, rows)}).report.sources[0]
        examples = {reason: example for reason, (_, example) in report.skipped.items()}
        assert examples["empty answer"] == f"{tmp_path / name}:2: column `completion`"
        assert examples["column `prompt` is not a list of messages"] == f"{tmp_path / name}:3: it is 5"
    assert report.from_cache


def test_a_source_that_cannot_be_read_is_no_matter_of_the_cache(own_cache, caplog):
    def torn_off(reading):
        yield DOCUMENTS
        raise OSError(5, "Input/output error", "a.jsonl")

    with pytest.raises(OSError, match="Input/output error"):
        cached(["key"], torn_off)
    assert not caplog.text and not [path for path in own_cache.iterdir() if path.is_dir()]


def test_a_user_error_is_no_matter_of_the_cache(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": ""}) + "\n")
    for _ in range(2):
        with pytest.raises(UserError, match="no row of .* can be used: 1 of 1 skipped: empty answer"):
            open_chat({"source": str(tmp_path / "a.jsonl")})
