"""Preference tuning, reward models and distillation: steps per second and peak memory of tunesmith and TRL.

Both start from the same model folder (the reference is a second copy of it; the teacher a larger one) and the same jsonl file, tokenize
it themselves, cut answers at 512 tokens, and update all float32 weights with fused AdamW on 4 rows a step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import material
from measure import Options, Outcome, Table, be_contender, mark, median, ratio, run_contender, run_process

LENGTH, BATCH, WARM_UP = 512, 4, 2
TEACHER = {**material.SMALL, "num_hidden_layers": 12}
METHODS = {
    "DPO": ["preference", "loss.type=dpo"],
    "KTO": ["preference", "loss.type=kto"],
    "reward": ["reward"],
    "distill": ["distill", "kd_ratio=1.0"],
}


def measure(folder: Path, options: Options) -> list[Table]:
    for name, shape in (("model", material.SMALL), ("teacher", TEACHER)):
        material.write_tokenizer(folder / name)
        material.write_model(folder / name, shape)
    rows = 200 if options.quick else 800
    pairs = material.write_rows(folder / "pairs.jsonl", material.pairs(rows))
    data = {
        "DPO": pairs,
        "KTO": material.write_rows(folder / "marked.jsonl", material.marked(rows)),
        "reward": pairs,
        "distill": material.write_rows(folder / "chats.jsonl", material.chats(rows)),
    }
    steps = WARM_UP + (3 if options.quick else 8)
    table: list[list[Any]] = []
    raw = {}
    for method in METHODS:
        outcomes: dict[str, list[Outcome]] = {"tunesmith": [], "TRL": []}
        for number in range(options.rounds):
            for name in list(outcomes) if number % 2 == 0 else reversed(list(outcomes)):
                outcomes[name].append(_run(name, method, folder, data[method], steps, options))
                print(f"  {method}, round {number + 1}: {name} {_speed(outcomes[name][-1]):.3f} steps/s", flush=True)
        raw[method] = {name: [vars(one) for one in ones] for name, ones in outcomes.items()}
        for name, ones in outcomes.items():
            ours, theirs = [_speed(one) for one in outcomes["tunesmith"]], [_speed(one) for one in ones]
            memory, their_memory = [one.peak_gib for one in outcomes["tunesmith"]], [one.peak_gib for one in ones]
            cells = [median(theirs), ratio(ours, theirs), median(their_memory), ratio(memory, their_memory)]
            table.append([f"{method}: {name}", *cells])
    headers = ["", "steps/s", "ours ×", "peak GiB", "ours ×"]
    return [
        Table(f"methods: fp32, all weights, {BATCH} rows a step, answers up to {LENGTH} tokens", headers, table, raw)
    ]


def _speed(outcome: Outcome) -> float:
    """Steps per second, from the end of one step to the end of the next; the median of the counted ones."""
    times = [one["time"] for one in outcome.named("step")[WARM_UP - 1 :]]
    return 1 / median(after - before for before, after in zip(times, times[1:]))


def _run(name: str, method: str, folder: Path, data: Path, steps: int, options: Options) -> Outcome:
    arguments = {"method": method, "model": str(folder / "model"), "teacher": str(folder / "teacher"), "data": str(data), "steps": steps}  # fmt: skip
    if name == "tunesmith":
        return run_process(_command(**arguments), folder, options)
    return run_contender(__file__, name, folder, options, **arguments)


def _command(method: str, model: str, teacher: str, data: str, steps: int) -> list[str]:
    """What a user would type."""
    settings = {
        "model": model, "dataset.source": data, "dtype": "fp32", "max_steps": steps, "batch_size": BATCH,
        "tokenizer.max_seq_len": LENGTH, "optimizer.lr": 1e-5, "optimizer.weight_decay": 0.0, "device": "cpu",
        "output_dir": "run", "metric_logger.type": "measure.StepClock", "shuffle": "false",
    } | ({"teacher.model": teacher} if method == "distill" else {})  # fmt: skip
    return [
        sys.executable,
        "-m",
        "tunesmith",
        "run",
        *METHODS[method],
        *(f"{key}={value}" for key, value in settings.items()),
    ]


def trl(method: str, model: str, teacher: str, data: str, steps: int) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            mark("step", step=state.global_step)

    settings: dict[str, Any] = {
        "output_dir": "run", "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 1e-5,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 1234, "max_length": LENGTH,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    common = {
        "train_dataset": load_dataset("json", data_files=data, split="train"),
        "processing_class": tokenizer,
        "callbacks": [Clock()],
    }
    if method == "reward":
        from trl import RewardConfig, RewardTrainer

        network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="float32")
        network.config.pad_token_id = tokenizer.pad_token_id
        RewardTrainer(network, args=RewardConfig(**settings), **common).train()
        return
    network = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    if method == "distill":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        # Forward KL at temperature 1 on the data's own answers, as `tune run distill` does by default.
        config = GKDConfig(**settings, lmbda=0.0, beta=0.0, temperature=1.0)
        large = AutoModelForCausalLM.from_pretrained(teacher, dtype="float32")
        GKDTrainer(network, teacher_model=large, args=config, **common).train()
        return
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    if method == "DPO":
        from trl import DPOConfig, DPOTrainer

        DPOTrainer(network, ref_model=reference, args=DPOConfig(**settings), **common).train()
    else:
        from trl import KTOConfig, KTOTrainer

        KTOTrainer(network, ref_model=reference, args=KTOConfig(**settings), **common).train()


if __name__ == "__main__":
    be_contender({"TRL": trl})
