"""Training: tokens per second, peak memory and time to the first step of tunesmith, transformers' Trainer and TRL's SFTTrainer.

Every contender starts from the same model folder and the same jsonl file, tokenizes and packs it itself into rows of at most
512 tokens, and updates all weights with fused AdamW, batches of 4 rows, the same rate and clipping, and saves the model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import material
from measure import Options, Outcome, Table, be_contender, mark, median, ratio, run_contender, run_process

LENGTH, BATCH = 512, 4
WARM_UP = 2
"""Steps that are not counted."""
TASKS = {
    "text": ["tunesmith", "transformers Trainer", "TRL, packing=wrapped", "TRL, packing=bfd"],
    "chat": ["tunesmith", "TRL, packing=bfd"],
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def measure(folder: Path, options: Options) -> list[Table]:
    rows = 1000 if options.quick else 6000
    material.write_tokenizer(folder / "model")
    data = {
        "text": material.write_rows(folder / "texts.jsonl", material.texts(rows)),
        "chat": material.write_rows(folder / "chats.jsonl", material.chats(rows)),
    }
    material.write_model(folder / "model", material.SMALL)
    tables = []
    for task, contenders in TASKS.items():
        for dtype in DTYPES:
            steps = WARM_UP + (3 if options.quick else {"fp32": 6, "bf16": 10}[dtype])
            outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
            for number in range(options.rounds):
                for name in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
                    outcomes[name].append(_run(name, task, folder, data[task], dtype, steps, options))
                    print(
                        f"  {task} {dtype}, round {number + 1}: {name} {_speed(outcomes[name][-1]):.0f} tokens/s",
                        flush=True,
                    )
            tables.append(_table(task, dtype, outcomes))
    return tables


def _run(name: str, task: str, folder: Path, data: Path, dtype: str, steps: int, options: Options) -> Outcome:
    arguments = {"model": str(folder / "model"), "data": str(data), "task": task, "dtype": dtype, "steps": steps}
    if name == "tunesmith":
        return run_process(_command(**arguments), folder, options)
    return run_contender(__file__, name, folder, options, **arguments)


def _command(model: str, data: str, task: str, dtype: str, steps: int) -> list[str]:
    """What a user would type."""
    recipe = ["pretrain", "from_scratch=false"] if task == "text" else ["sft", "dataset.packed=true"]
    settings = {
        "model": model, "dataset.source": data, "dtype": dtype, "max_steps": steps, "batch_size": BATCH,
        "tokenizer.max_seq_len": LENGTH, "optimizer.lr": 1e-4, "optimizer.weight_decay": 0.0, "device": "cpu",
        "output_dir": "run", "metric_logger.type": "measure.StepClock",
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "tunesmith", "run", *recipe, *words]


def _speed(outcome: Outcome) -> float:
    """Tokens per second over the counted steps, from the end of one step to the end of the last."""
    steps = outcome.named("step")[WARM_UP - 1 :]
    durations = [after["time"] - before["time"] for before, after in zip(steps, steps[1:])]
    tokens = (steps[-1]["tokens"] - steps[0]["tokens"]) / len(durations)
    return tokens / median(durations)


def _table(task: str, dtype: str, outcomes: dict[str, list[Outcome]]) -> Table:
    def column(name: str) -> tuple[list[float], list[float], list[float], list[float]]:
        ones = outcomes[name]
        firsts = [one.named("step")[0]["time"] for one in ones]
        return [_speed(one) for one in ones], [one.peak_gib for one in ones], firsts, [one.seconds for one in ones]

    ours = column("tunesmith")
    rows: list[list[Any]] = []
    for name in outcomes:
        theirs = column(name)
        cells: list[Any] = [name]
        for mine, values in zip(ours, theirs):
            cells += [median(values), ratio(mine, values)]
        rows.append(cells)
    what = "plain text" if task == "text" else "chats, loss on the answers"
    headers = ["", "tokens/s", "ours ×", "peak GiB", "ours ×", "first step after s", "ours ×", "whole run s", "ours ×"]
    raw = {name: [vars(one) for one in ones] for name, ones in outcomes.items()}
    return Table(f"train: {what}, {dtype}, packed to {LENGTH}, batch {BATCH}", headers, rows, raw)


# --- contenders --------------------------------------------------------------------------------------


def _arguments(steps: int) -> dict[str, Any]:
    return {
        "output_dir": "run", "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 1e-4,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "optim": "adamw_torch_fused",
        "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 1234,
    }  # fmt: skip


def _clock(tokens_per_step: float) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            mark("step", step=state.global_step, tokens=state.global_step * tokens_per_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                mark("loss", loss=float(logs["loss"]))

    return Clock()


def trainer(model: str, data: str, task: str, dtype: str, steps: int) -> None:
    """As transformers' own language-modelling example does it: texts end to end, cut into blocks."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = load_dataset("json", data_files=data, split="train")

    def tokenize(batch):
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]}

    def blocks(batch):
        line = [number for ids in batch["input_ids"] for number in ids]
        cut = [line[i : i + LENGTH] for i in range(0, len(line) - LENGTH + 1, LENGTH)]
        return {"input_ids": cut, "labels": [list(ids) for ids in cut]}

    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names).map(blocks, batched=True)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype])
    arguments = TrainingArguments(**_arguments(steps))
    loop = Trainer(
        network, arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[_clock(BATCH * LENGTH)]
    )
    loop.train()
    loop.save_model("saved")


def trl(model: str, data: str, task: str, dtype: str, steps: int, strategy: str) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype])
    config = SFTConfig(
        **_arguments(steps),
        packing=True,
        packing_strategy=strategy,
        max_length=LENGTH,
        assistant_only_loss=task == "chat",
    )
    loop = SFTTrainer(
        network,
        config,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    lengths = [len(ids) for ids in loop.train_dataset["input_ids"]]
    loop.add_callback(_clock(BATCH * sum(lengths) / len(lengths)))
    loop.train()
    loop.save_model("saved")


def trl_wrapped(**options) -> None:
    trl(**options, strategy="wrapped")


def trl_bfd(**options) -> None:
    trl(**options, strategy="bfd")


if __name__ == "__main__":
    be_contender({"transformers Trainer": trainer, "TRL, packing=wrapped": trl_wrapped, "TRL, packing=bfd": trl_bfd})
