"""A tokenizer of words, and a cache of its own for every test."""

import json
import zlib
from types import SimpleNamespace

import pytest
import torch

from tunesmith.configs._section import section
from tunesmith.configs.data import ChatData, PreferenceData, RewardData, TextData
from tunesmith.configs.pretrain import Pretrain
from tunesmith.configs.sft import SFT
from tunesmith.configs.shared import TrainSettings
from tunesmith.data.loader import chat_batches, preference_batches, reward_batches, text_batches, validation_batches


class Words:
    """Every word is a token; the answers of a conversation are in the loss. Ids from 10 on; 1 ends a text."""

    bos_id, eos_id, pad_id = None, 1, 0

    def __init__(self, vocabulary=1_000_000):
        self.vocabulary, self.fingerprint = vocabulary, f"words {vocabulary}"

    def encode(self, text, add_special_tokens=True):
        return [10 + zlib.crc32(word.encode()) % (self.vocabulary - 10) for word in text.split()]

    def encode_batch(self, texts, add_special_tokens=True):
        return [self.encode(text) for text in texts]

    def encode_chat_batch(self, conversations, tools=None, train_on_input=False):
        results = []
        for messages in conversations:
            ids, mask = [], []
            for message in messages:
                words = [2, *self.encode(message["content"]), 3]
                ids += words
                answer = message["role"] == "assistant" and message.get("weight", 1) == 1
                mask += [False, *[answer or train_on_input] * (len(words) - 1)]
            results.append((ids, mask))
        return results

    def render_chat(self, messages, tools=None):
        return " ".join(f"<{message['role']}> {message['content']} </>" for message in messages)

    def encode_prompt(self, messages, tools=None):
        return self.encode(self.render_chat(messages) + " <assistant>")


@pytest.fixture
def words():
    return Words()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenized"


def mesh(rank=0, size=1):
    return SimpleNamespace(dp_rank=rank, dp_size=size, device=torch.device("cpu"), node_first=lambda make: make())


def open_chat(data, rank=0, size=1, tokenizer=None, max_seq_len=64, validation=False, **options):
    data = ChatData(**data) if isinstance(data, dict) else data
    asked = _asked(options)
    config = SFT(model="none", dataset=data, **({"dataset_val": data} if validation else {}), **options)
    batches = validation_batches if validation else chat_batches
    return batches(config, tokenizer or Words(), mesh(rank, size), max_seq_len, **asked)


def open_text(data, tokenizer=None, max_seq_len=16, rank=0, size=1, **options):
    data = TextData(**data) if isinstance(data, dict) else data
    asked = _asked(options)
    config = Pretrain(model="none", dataset=data, **options)
    return text_batches(config, tokenizer or Words(), mesh(rank, size), max_seq_len, **asked)


def _asked(options):
    """Takes what is no option of a config out of `options`."""
    return {"with_index": options.pop("with_index")} if "with_index" in options else {}


@section(kw_only=True)
class Preferring(TrainSettings):
    """A recipe for preference data or a reward model."""

    dataset: PreferenceData | RewardData | list[PreferenceData] | list[RewardData]
    dataset_val: PreferenceData | RewardData | list[PreferenceData] | list[RewardData] | None = None


def open_preferences(data, units="pairs", rank=0, size=1, tokenizer=None, max_seq_len=64, validation=False, **options):
    data = PreferenceData(**data) if isinstance(data, dict) else data
    asked = _asked(options)
    config = Preferring(dataset=data, **({"dataset_val": data} if validation else {}), **options)
    batches = validation_batches if validation else preference_batches
    return batches(config, tokenizer or Words(), mesh(rank, size), max_seq_len, units=units, **asked)


def open_scored(data, task, rank=0, size=1, tokenizer=None, max_seq_len=64, validation=False, **options):
    data = RewardData(**data) if isinstance(data, dict) else data
    config = Preferring(dataset=data, **({"dataset_val": data} if validation else {}), **options)
    batches = validation_batches if validation else reward_batches
    return batches(config, tokenizer or Words(), mesh(rank, size), max_seq_len, task=task)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_chats(path, count, longest=40):
    """`count` conversations of different content and length."""
    return write_lines(
        path, [{"prompt": f"p{i} " * (1 + i % 5), "completion": f"c{i} " * (1 + i * 7 % longest)} for i in range(count)]
    )


def documents(batches):
    """The documents in some micro-batches, each as (ids, labels)."""
    for batch in batches:
        for row in range(len(batch.input_ids)):
            ids, labels = batch.input_ids[row], batch.labels[row]
            marks = batch.documents[row] if batch.documents is not None else torch.where(ids == 0, -1, 0)
            for number in marks.unique().tolist():
                if number >= 0:
                    yield tuple(ids[marks == number].tolist()), tuple(labels[marks == number].tolist())


def write_pairs(path, count, longest=12):
    """`count` prompts with two answers of different content and length."""
    return write_lines(
        path,
        [
            {
                "prompt": f"p{i} " * (1 + i % 5),
                "chosen": f"c{i} " * (1 + i * 7 % longest),
                "rejected": f"r{i} " * (1 + i * 5 % longest),
                "margin": i / 4,
            }
            for i in range(count)
        ],
    )


def units_in(batches, size=2):
    """The units in some micro-batches: of each document (ids, labels, value)."""
    for batch in batches:
        for row in range(len(batch.input_ids)):
            marks = batch.documents[row]
            found = []
            for number in range(int(marks.max()) + 1):
                here = marks == number
                assert batch.positions[row][here].tolist() == list(range(int(here.sum())))
                (value,) = set(batch.extra["values"][row][here].tolist())
                found.append(
                    (tuple(batch.input_ids[row][here].tolist()), tuple(batch.labels[row][here].tolist()), value)
                )
            assert len(found) % size == 0 and len(found) <= batch.most_documents
            yield from zip(*(found[part::size] for part in range(size)))
