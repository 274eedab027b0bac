"""Data: conversations to ids and loss masks, and packing, in rows per second."""

from __future__ import annotations

import json
from pathlib import Path

import material
from measure import Options, Table, be_contender, mark, median, now, ratio, run_contender


def measure(folder: Path, options: Options) -> list[Table]:
    material.write_tokenizer(folder / "model")
    material.write_model(folder / "model", {**material.SMALL, "num_hidden_layers": 1, "hidden_size": 64})
    chats = material.write_rows(folder / "chats.jsonl", material.chats(500 if options.quick else 5000))
    texts = material.write_rows(folder / "texts.jsonl", material.texts(500 if options.quick else 5000))
    rows = 20_000 if options.quick else 200_000
    arguments = {"model": str(folder / "model"), "chats": str(chats), "texts": str(texts), "rows": rows}
    outcomes = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            outcomes[name].append(run_contender(__file__, name, folder, options, **arguments))
    raw = {name: [vars(one) for one in ones] for name, ones in outcomes.items()}

    def speeds(name: str, what: str) -> list[float]:
        return [one.value(what, "rows") / one.value(what, "seconds") for one in outcomes[name]]

    rows = []
    for what, (text, peer) in ROWS.items():
        mine, theirs = speeds("tunesmith", what), speeds(peer, what)
        rows.append([text, median(mine), median(theirs), peer, ratio(mine, theirs)])
    fills = []
    for capacity in (512, 2048):
        ones = [outcomes[name][0].value(f"pack {capacity}", "fill") for name in ("tunesmith", "TRL")]
        fills.append([f"rows of {capacity}", *(f"{one:.2%}" for one in ones)])
    return [
        Table("data: rows per second", ["", "tunesmith", "peer", "which", "ours ×"], rows, raw),
        Table("data: how full packed rows are", ["", "tunesmith", "TRL bfd"], fills),
    ]


ROWS = {
    "encode": ("chat rows in memory to ids and mask", "transformers"),
    "prepare chat": ("jsonl of chats to ids and mask on disk", "TRL"),
    "prepare text": ("jsonl of texts to ids on disk", "TRL"),
    "pack 512": ("packing to 512, tokens in place", "TRL"),
    "pack 2048": ("packing to 2048, tokens in place", "TRL"),
}


def _lengths(rows: int):
    """Like Alpaca's: a median of 90 tokens and a long tail."""
    import numpy as np

    return np.clip(np.random.default_rng(0).lognormal(4.5, 0.6, rows), 8, 512).astype(np.int64)


def ours(model: str, chats: str, texts: str, rows: int) -> None:
    import numpy as np
    import torch

    from tunesmith.config import load_config
    from tunesmith.data.cache import Documents, Reading
    from tunesmith.data.loader import chat_batches, text_batches
    from tunesmith.data.segments import Segments
    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.parallel.mesh import start_mesh

    tokenizer = load_tokenizer(model)
    conversations = [json.loads(line)["messages"] for line in open(chats)]
    tokenizer.encode_chat_batch(conversations[:8])
    started = now()
    encoded = tokenizer.encode_chat_batch(conversations)
    mark("encode", rows=len(encoded), seconds=now() - started)

    mesh = start_mesh(torch.device("cpu"))
    for what, recipe, source, batches in (
        ("chat", "sft", chats, chat_batches),
        ("text", "pretrain", texts, text_batches),
    ):
        config = load_config(recipe, f"model={model}", f"dataset.source={source}", "dataset.packed=false")
        started = now()
        data = batches(config, tokenizer, mesh, max_seq_len=2048)
        report = data.report.to_dict()
        mark(f"prepare {what}", rows=len(encoded), seconds=now() - started, report=report)

    lengths = _lengths(rows) + 1
    ends = lengths.cumsum()
    total = int(ends[-1])
    documents = Documents(
        ids=np.arange(total, dtype=np.int32), mask=np.ones(total, bool), ends=ends, rows=np.arange(rows),
        trained=lengths, lasts=lengths - 1, reading=Reading(),
    )  # fmt: skip
    for capacity in (512, 2048):
        data = load_config("sft", f"model={model}", f"dataset.source={chats}", "dataset.packed=true").dataset
        started = now()
        segments = Segments(documents, data, capacity)
        plan = segments.plan((0, 0))
        packed = [segments.row(plan, number) for number in range(plan.num_rows)]
        seconds = now() - started
        mark(f"pack {capacity}", rows=rows, seconds=seconds, fill=sum(map(len, packed)) / (len(packed) * capacity))


def transformers(model: str, chats: str, texts: str, rows: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    conversations = [json.loads(line)["messages"] for line in open(chats)]

    def encode(part):
        return tokenizer.apply_chat_template(part, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)

    encode(conversations[:8])
    started = now()
    encoded = encode(conversations)
    mark("encode", rows=len(encoded["input_ids"]), seconds=now() - started)


def trl(model: str, chats: str, texts: str, rows: int) -> None:
    import pyarrow as pa
    from datasets import Dataset, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, ignore_mismatched_sizes=True)
    for what, source in (("chat", chats), ("text", texts)):
        config = SFTConfig(output_dir="run", max_length=2048, assistant_only_loss=what == "chat", bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)  # fmt: skip
        few = Dataset.from_list([json.loads(line) for line in open(source).readlines()[:4]])
        loop = SFTTrainer(network, config, train_dataset=few, processing_class=tokenizer)
        started = now()
        dataset = load_dataset("json", data_files=source, split="train")
        prepared = loop._prepare_dataset(dataset, tokenizer, config, False, None, "train")
        mark(f"prepare {what}", rows=len(prepared), seconds=now() - started)

    lengths = _lengths(rows)
    offsets = pa.array([0, *lengths.cumsum().tolist()], pa.int32())
    flat = pa.array(range(int(lengths.sum())), pa.int32())
    table = {name: pa.ListArray.from_arrays(offsets, flat) for name in ("input_ids", "labels")}
    dataset = Dataset(pa.table(table))
    for capacity in (512, 2048):
        started = now()
        packed = pack_dataset(dataset, capacity, "bfd", {"keep_in_memory": True})
        seconds = now() - started
        mark(f"pack {capacity}", rows=rows, seconds=seconds, fill=int(lengths.sum()) / (len(packed) * capacity))


CONTENDERS = {"tunesmith": ours, "transformers": transformers, "TRL": trl}

if __name__ == "__main__":
    be_contender(CONTENDERS)
