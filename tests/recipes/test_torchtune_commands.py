"""torchtune's commands train: each as it is written, on a tiny model and a few rows in the place of its own."""

import json

import pytest

from tunesmith.config import load_config, run

QUESTIONS = [{"instruction": f"question {i}", "output": "the quick brown fox " + "jumps " * (i % 3)} for i in range(8)]
PAIRS = [{"prompt": f"question {i}", "chosen": "the lazy fox", "rejected": "dog " * (1 + i % 3)} for i in range(8)]
KD = "knowledge_distillation_single_device --config"
COMMANDS = {
    "lora_dpo_single_device --config llama3_1/8B_dpo_single_device": ["loss=torchtune.rlhf.loss.RSOLoss"],
    "full_dpo_distributed --config llama3_1/8B_full_dpo": ["ref_checkpointer.checkpoint_dir={model}"],
    f"{KD} qwen2/1.5B_to_0.5B_KD_lora_single_device": ["teacher_checkpointer.checkpoint_dir={model}"],
    "qat_distributed --config llama3_1/8B_qat_full": ["quantizer.groupsize=32", "fake_quant_after_n_steps=1"],
    "qat_lora_finetune_distributed --config llama3_1/8B_qat_lora": ["quantizer.groupsize=32"],
    "qat_single_device --config llama3_1/8B_qat_single_device": ["quantizer.groupsize=32"],
}
COMMON = "device=cpu dtype=fp32 epochs=1 batch_size=2 gradient_accumulation_steps=1 max_steps_per_epoch=2 seed=1 tokenizer.max_seq_len=64"


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tiny_model, tmp_path):
    pairs = "dpo" in command
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (PAIRS if pairs else QUESTIONS)))
    builder = "preference_dataset" if pairs else "alpaca_dataset"
    data = [f"dataset=torchtune.datasets.{builder}", "dataset.source=json", f"dataset.data_files={rows}"]
    own = [word.format(model=tiny_model) for word in COMMANDS[command]]
    where = [f"checkpointer.checkpoint_dir={tiny_model}", f"output_dir={tmp_path / 'run'}"]
    run(load_config(*command.split(), *where, *data, *own, *COMMON.split()))
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([step for step in steps if "loss" in step]) == 2
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
    assert ("qat" in command) == (tmp_path / "run" / "quantized" / "config.json").is_file()
