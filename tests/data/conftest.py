"""A tokenizer of words, and a cache of its own for every test."""

import json
import zlib
from types import SimpleNamespace

import pytest
import torch

from tunesmith.configs.data import ChatData, TextData
from tunesmith.configs.pretrain import Pretrain
from tunesmith.configs.sft import SFT
from tunesmith.data.loader import chat_batches, text_batches, validation_batches


class Words:
    """Every word is a token; the answers of a conversation are in the loss. Ids from 10 on; 1 ends a text."""

    eos_id, pad_id = 1, 0

    def __init__(self, vocabulary=1_000_000):
        self.vocabulary, self.fingerprint = vocabulary, f"words {vocabulary}"

    def encode(self, text):
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
    config = SFT(model="none", dataset=data, **({"dataset_val": data} if validation else {}), **options)
    batches = validation_batches if validation else chat_batches
    return batches(config, tokenizer or Words(), mesh(rank, size), max_seq_len)


def open_text(data, tokenizer=None, max_seq_len=16, rank=0, size=1, **options):
    data = TextData(**data) if isinstance(data, dict) else data
    config = Pretrain(model="none", dataset=data, **options)
    return text_batches(config, tokenizer or Words(), mesh(rank, size), max_seq_len)


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
