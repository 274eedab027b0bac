"""Streams: every row once a pass, the same on any number of ranks, an exact continuation, and little memory."""

import json
import tracemalloc

import pytest
import torch

from tests.data.conftest import Words, open_chat, open_text, write_chats, write_lines
from tests.data.test_loader import rows_of
from tests.data.test_sources import ROWS, write
from tunesmith.configs.data import ChatData, TextData
from tunesmith.data import parts
from tunesmith.data.parts import open_parts
from tunesmith.data.sources import open_rows
from tunesmith.errors import UserError


@pytest.fixture
def chats(tmp_path):
    return write_chats(tmp_path / "chats.jsonl", 150)


@pytest.fixture(params=["one part", "eight parts"])
def number_of_parts(request, monkeypatch):
    """Small files are one part; with small chunks they are cut into eight."""
    if request.param == "eight parts":
        monkeypatch.setattr(parts, "_CHUNK", 100)
        return 8
    return 1


def stream(source, **options):
    loader = {
        name: options.pop(name)
        for name in ("rank", "size", "batch_size", "max_steps", "shuffle", "global_batch_size")
        if name in options
    }
    return open_chat(
        {"source": source, "streaming": True, "shuffle_buffer": 24, **options},
        **{"batch_size": 4, "max_steps": 60, **loader},
    )


def read_all(part, count=7):
    cursor, rows = part.start, []
    while cursor is not None:
        found, cursor = part.read(cursor, count)
        rows += [row for _, row in found]
    return rows


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.json.bz2"]
)
def test_every_kind_of_file_can_be_streamed(tmp_path, name, number_of_parts):
    path = write(tmp_path / name)
    opened, _ = open_parts(ChatData(source=str(path)))
    assert sum((read_all(part) for part in opened), []) == ROWS
    if name == "a.jsonl":
        assert len(opened) == (1 if number_of_parts == 1 else path.stat().st_size // 100)
    for part in opened:  # from any cursor on, also with a part that was opened anew
        cursor, seen = part.start, 0
        everything = read_all(part)
        while cursor is not None:
            fresh = next(
                p for p in open_parts(ChatData(source=str(path)))[0] if p.start == part.start or len(opened) == 1
            )
            assert fresh.read(cursor, 100)[0] == [(place, row) for place, row in part.read(cursor, 100)[0]]
            assert [row for _, row in part.read(cursor, 100)[0]] == everything[seen:]
            rows, cursor = part.read(cursor, 1)
            seen += len(rows)


@pytest.mark.parametrize("sizes", [[1], [900, 5, 4000, 60], [3, 3, 3]])
@pytest.mark.parametrize("chunk", [1, 17, 100, 5000])
def test_lines_are_cut_anywhere_without_loss(tmp_path, monkeypatch, sizes, chunk):
    monkeypatch.setattr(parts, "_CHUNK", chunk)
    for number, size in enumerate(sizes):
        write_lines(
            tmp_path / f"{number}.jsonl",
            [{"n": [number, i], "x": "x" * (i * 37 % 90)} for i in range(max(1, size // 50))],
        )
    opened, _ = open_parts(ChatData(source=str(tmp_path)))
    whole = open_rows(ChatData(source=str(tmp_path)))
    assert sum((read_all(part) for part in opened), []) == [whole[i] for i in range(len(whole))]
    assert all(read_all(part) for part in opened) and len(opened) <= 8


@pytest.mark.parametrize("chunk", [1, 2, 3, 64, 1 << 20])
def test_json_arrays_and_texts_over_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(parts, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False).replace("p1", "é→𝄞"), encoding="utf-8")
    assert read_all(open_parts(ChatData(source=str(path)))[0][0]) == json.loads(path.read_text(encoding="utf-8"))
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(UserError, match="not JSON, or cut off"):
        read_all(open_parts(ChatData(source=str(path)))[0][0])
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo<|e|>three é\nfour<|e|>five")
    split = open_parts(TextData(source=str(text), document_split="<|e|>"))[0][0]
    assert read_all(split) == [{"text": "one\ntwo"}, {"text": "three é\nfour"}, {"text": "five"}]
    assert "".join(row["text"] for row in read_all(open_parts(TextData(source=str(text)))[0][0])) == text.read_text()


@pytest.mark.parametrize("packed", [False, True])
def test_every_row_comes_once_a_pass(tmp_path, packed, number_of_parts):
    """Of parts of like length, all are through their first pass when the first begins its second."""
    rows = [{"prompt": f"p{i:03}", "completion": f"c{i:03}"} for i in range(160)]
    data = stream(write_lines(tmp_path / "a.jsonl", rows), packed=packed, batch_size=8, shuffle_buffer=40)
    labels = []
    while len(labels) < 160:
        labels += [
            int(i)
            for batch in data.step(len(labels) and data.state()["step"] + 1 or 1)
            for i in batch.labels[batch.labels > 3]
        ]
    if not packed and number_of_parts == 1:
        assert sorted(labels) == sorted(Words().encode(" ".join(row["completion"] for row in rows)))
    assert len(set(labels)) >= 140 and labels != sorted(labels)


@pytest.mark.parametrize("packed", [False, True])
def test_a_stop_after_any_step_changes_nothing(chats, packed, number_of_parts):
    whole = stream(chats, packed=packed, max_steps=24)
    expected = [whole.step(n) for n in range(1, 25)]
    for stop in (0, 1, 2, 5, 11, 17):
        first = stream(chats, packed=packed, max_steps=24)
        for n in range(1, stop + 1):
            first.step(n)
        state = json.loads(json.dumps(first.state()))
        second = stream(chats, packed=packed, max_steps=24)
        second.load_state(state)
        for n in range(stop + 1, min(stop + 5, 25)):
            assert_same(second.step(n), expected[n - 1])
    assert_same(whole.step(3), expected[2])  # back to an earlier step, from the start again


def assert_same(found, expected):
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch.input_ids, other.input_ids) and torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.positions, other.positions)


def test_a_resumed_stream_reads_on_from_where_it_was(chats, monkeypatch):
    monkeypatch.setattr(parts, "_CHUNK", 300)
    data = stream(chats)
    for n in range(1, 21):
        data.step(n)
    state = data.state()
    again = stream(chats, max_steps=21)  # and none is made ahead meanwhile
    again.load_state(state)
    read, found = parts.Part.read, []
    monkeypatch.setattr(parts.Part, "read", lambda *args: found.append(read(*args)) or found[-1])
    again.step(21)
    again.close()
    assert 0 < sum(len(rows) for rows, _ in found) <= 8 * 3 * 2, "a block or two of each part"


@pytest.mark.parametrize("packed", [False, True])
def test_the_report_after_a_resume_is_that_of_a_run_that_never_stopped(tmp_path, packed, number_of_parts):
    rows = [
        {"prompt": f"p{i}", "completion": f"c{i} " * (i % 9 if i % 13 else 90)} for i in range(150)
    ]  # 0: empty; 90: cut
    source = write_lines(
        tmp_path / "a.jsonl",
        [row if i % 7 else {"prompt": "word " * 80, "completion": "x"} for i, row in enumerate(rows)],
    )
    options = {"packed": packed, "max_steps": 24}
    whole = stream(source, **options)
    assert whole.report.to_dict()["rows_read"] == 0 and "streamed" in str(whole.report)
    after = [whole.report.to_dict()]
    for n in range(1, 25):
        whole.step(n)
        after.append(whole.report.to_dict())
    assert after[24]["truncated"] and after[24]["skipped"] and after[24]["rows_read"] > after[12]["rows_read"] > 0
    assert set(after[24]["sources"][0]["skipped"]) == {"empty answer", "no answer within max_seq_len"}
    for stop in (1, 5, 11, 17, 24):
        first, second = stream(source, **options), stream(source, **options)
        for n in range(1, stop + 1):
            first.step(n)
        second.load_state(json.loads(json.dumps(first.state())))
        assert as_json(second) == json.loads(json.dumps(after[stop])), "before anything was read"
        for n in range(stop + 1, 25):
            second.step(n)
        assert as_json(second) == json.loads(json.dumps(after[24]))


def as_json(data):
    return json.loads(json.dumps(data.report.to_dict()))


@pytest.mark.parametrize("packed", [False, True])
def test_every_cut_gives_the_same_rows(chats, packed, number_of_parts):
    whole = stream(chats, packed=packed, batch_size=12, max_steps=6)
    expected = [rows_of(whole.step(n)) for n in range(1, 7)]
    for batch_size, size in ((3, 1), (2, 2), (1, 3), (3, 4)):
        cuts = [
            stream(chats, packed=packed, rank=rank, size=size, batch_size=batch_size, global_batch_size=12, max_steps=6)
            for rank in range(size)
        ]
        for n in range(1, 7):
            assert rows_of(sum((cut.step(n) for cut in cuts), [])) == expected[n - 1]


def test_ranks_read_parts_of_their_own(chats, monkeypatch):
    monkeypatch.setattr(parts, "_CHUNK", 300)
    data = stream(chats, rank=1, size=2)
    for n in range(1, 8):
        data.step(n)
    data.close()
    read = [stream._begun is not None for stream in data.order.sources[0].streams]
    assert read == [False, True] * 4
    assert data.state()["parts"][0][0]["start"]["first"] == 0 < data.state()["parts"][0][1]["following"]["first"]
    assert 0 < data.report.sources[0].rows_read <= 150


def test_sources_are_mixed_by_weight(tmp_path):
    sources = []
    for name, count, weight in (("a", 30, 1), ("b", 10, 3)):
        rows = [{"prompt": name, "completion": f"{name}{i}"} for i in range(count)]
        sources.append(
            ChatData(
                source=write_lines(tmp_path / f"{name}.jsonl", rows), weight=weight, streaming=True, shuffle_buffer=8
            )
        )
    data = open_chat(sources, batch_size=10, max_steps=110)
    first = Words().encode("a")[0]
    drawn = [sum(row[0][1] == first for row in rows_of(data.step(n))) for n in range(1, 101)]
    assert sum(drawn) == 250 and len(set(drawn)) > 2
    state = data.state()
    again = open_chat(sources, batch_size=10, max_steps=110)
    again.load_state(state)
    for n in range(101, 111):
        assert_same(again.step(n), data.step(n))


def test_memory_stays_bounded(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(6000):
            file.write(json.dumps({"text": f"{i} " + "word " * 800}) + "\n")
    assert path.stat().st_size > 24_000_000
    tracemalloc.start()
    opened, _ = open_parts(TextData(source=str(path), streaming=True))
    seen = sum(len(read_all(part, 32)) for part in opened)
    data = open_text(
        {"source": str(path), "streaming": True, "shuffle_buffer": 64}, max_seq_len=512, batch_size=4, max_steps=40
    )
    for n in range(1, 41):
        data.step(n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    data.close()
    assert seen == 6000 and len(opened) == 8
    assert peak < 6_000_000


def test_text_streams_are_packed_full(tmp_path):
    rows = [{"text": "word " * (3 + i * 7 % 50)} for i in range(300)]
    data = open_text(
        {"source": write_lines(tmp_path / "a.jsonl", rows), "streaming": True},
        max_seq_len=32,
        batch_size=4,
        max_steps=20,
    )
    for n in range(1, 21):
        (batch,) = data.step(n)
        assert batch.input_ids.shape == (4, 32)
    assert "packed into" in str(data.report) and data.report.sources[0].fill > 0.98


def test_blocks_that_hold_nothing_are_passed_over(tmp_path):
    """Behind the last row of a pass stands an empty block; and all rows of a block may be of no use."""
    rows = [{"text": f"word{i} " * 30} for i in range(10)]
    empty = [{"text": " "}] * 10
    for name, content in (("exact", rows), ("first", empty + rows), ("middle", rows + empty + rows)):
        source = write_lines(tmp_path / f"{name}.jsonl", content)
        data = open_text({"source": source, "streaming": True, "shuffle_buffer": 10}, batch_size=4, max_steps=30)
        seen = {int(i) for n in range(1, 31) for batch in data.step(n) for i in batch.labels[batch.labels > 9]}
        assert seen == set(Words().encode(" ".join(row["text"] for row in rows))), name


def test_half_a_surrogate_costs_its_row_only(tmp_path):
    rows = [{"text": "one two three"}, {"text": "half \ud83d"}] * 20
    source = write_lines(tmp_path / "a.jsonl", rows)
    options = {"batch_size": 4, "max_steps": 6}
    for streaming in (False, True):
        data = open_text({"source": source, "streaming": streaming}, **options)
        for n in range(1, min(data.total_steps, 6) + 1):
            data.step(n)
        (count, example) = data.report.sources[0].skipped["text that is not Unicode"]
        assert count >= 20 and "half a surrogate pair: 'half \\ud83d'" in example
        with pytest.raises(UserError, match="text that is not Unicode.*mend the row"):
            open_text({"source": source, "streaming": streaming, "on_bad_row": "error"}, **options).step(1)


def test_the_hub_as_a_stream(monkeypatch):
    import datasets

    def load(*args, streaming, **options):
        assert streaming
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    opened, _ = open_parts(ChatData(source="owner/name"))
    assert len(opened) == 3
    assert sorted(row["prompt"] for part in opened for row in read_all(part, 2)) == [row["prompt"] for row in ROWS]
    cursor = opened[0].read(opened[0].start, 1)[1]
    assert open_parts(ChatData(source="owner/name"))[0][0].read(cursor, 1) == opened[0].read(cursor, 1)


def test_what_a_stream_cannot_do(chats, tmp_path):
    with pytest.raises(UserError, match=r"`dataset.streaming: true` needs `max_steps`"):
        stream(chats, max_steps=None)
    with pytest.raises(UserError, match="a stream has no length that a slice could refer to"):
        stream(chats, split="train[:50%]")
    with pytest.raises(UserError, match="has no split `test`; it has `train`"):
        stream(chats, split="test")
    with pytest.raises(UserError, match="no known format fits"):
        stream(write_lines(tmp_path / "b.jsonl", [{"x": 1}]))
    empty = write_lines(tmp_path / "c.jsonl", [{"prompt": "p", "completion": ""}] * 50)
    with pytest.raises(UserError, match="no row in a part of .* can be used: .* skipped: empty answer"):
        stream(empty).step(1)
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        stream(str(tmp_path / "d.jsonl"))
