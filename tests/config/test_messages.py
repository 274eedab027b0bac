"""The messages of mistakes, word for word: golden/NAME.txt holds what each case says.

After a wanted change: TUNESMITH_WRITE_GOLDEN=1 pytest tests/config/test_messages.py, then read `git diff tests/config/golden`.
"""

import difflib
import os
from pathlib import Path

import pytest

from tunesmith.config import load_config
from tunesmith.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
NEEDED = ["model=some/model", "dataset.source=chats.jsonl"]

CASES: dict[str, tuple[dict[str, str | bytes], list[str]]] = {
    # {case: ({file: content}, words)}
    "unknown_keys": (
        {"my.yaml": "recipe: sft\nmodel: some/model\nbatchsize: 4\ndataset:\n  sorce: a.jsonl\n  source: b.jsonl\n"},
        ["my.yaml", "optimizer.lrr=1", "weigths.rank=3"],
    ),
    "every_source_at_once": (
        {
            "my.yaml": "model: some/model\ndtype: bfloat\nepochs: many\nweights:\n  type: lroa\n",
            "more.yaml": "batch_size: -1x\n",
        },
        ["sft", "my.yaml", "+more.yaml", "+loar", "compile=2", "lr=3", "~optimizer.beta"],
    ),
    "wrong_types": (
        {},
        [
            "sft",
            *NEEDED,
            "batch_size=2.5",
            "optimizer.betas=0.9",
            "optimizer=3",
            "shuffle=1",
            "clip_grad_norm=big",
            "max_steps=[1, 2]",
        ],
    ),
    "wrong_shapes": (
        {},
        [
            "sft",
            "model=some/model",
            "dataset=chats.jsonl",
            "tokenizer=folder",
            "epochs.first=1",
            "optimizer.betas=[0.9]",
            "sample_prompts={a: b}",
        ],
    ),
    "required": ({}, ["sft"]),
    "required_in_section": ({"my.yaml": "recipe: sft\nmodel: m\ndataset:\n  packed: true\n"}, ["my.yaml"]),
    "type_changed": (
        {
            "my.yaml": "recipe: sft\nmodel: m\ndataset: {source: a.jsonl}\noptimizer:\n  type: adamw\n  betas: [0.9, 0.95]\n  lr: 1e-4\n"
        },
        ["my.yaml", "optimizer.type=sgd"],
    ),
    "type_of_another": ({}, ["sft", *NEEDED, "weights.rank=8", "metric_logger.project=p", "lr_scheduler.type=cosin"]),
    "cross_field": (
        {
            "my.yaml": "recipe: sft\nmodel: m\ndataset: {source: a.jsonl}\nbatch_size: 0\ngradient_accumulation_steps: 2\n"
        },
        [
            "my.yaml",
            "global_batch_size=8",
            "lr_scheduler.warmup_ratio=0.1",
            "lr_scheduler.num_warmup_steps=10",
            "seed=-1",
        ],
    ),
    "in_backward": (
        {},
        ["sft", *NEEDED, "optimizer_in_bwd=true", "clip_grad_norm=1.0", "gradient_accumulation_steps=4", "dtype=fp16"],
    ),
    "pretrain_rules": (
        {},
        [
            "pretrain",
            "model=llama3_2/1B",
            "dataset.source=a.txt",
            "weights.type=lora",
            "from_scratch=false",
            "model_args={hidden_size: 8}",
        ],
    ),
    "lora_from_scratch": ({}, ["pretrain", "model=llama3_2/1B", "dataset.source=a.txt", "+lora"]),
    "generate_rules": (
        {},
        ["generate", "model=m", "top_p=2", "temperature=-1", "max_new_tokens=0", "prompt={usr: hi}"],
    ),
    "brackets": (
        {},
        ["generate", "model=m", "prompt=[A color:, x]", "stop=[a: b, c]", "json_schema={type: object, type: array}"],
    ),
    "overlay_of_another_recipe": ({}, ["generate", "model=m", "+lora"]),
    "not_there_yet": ({}, ["sft", *NEEDED, "+fp8"]),
    "recipe_not_there_yet": ({}, ["grpo", "model=m"]),
    "unknown_recipe": ({}, ["stf", "model=m"]),
    "duplicate_keys": (
        {"my.yaml": "recipe: sft\nmodel: a\ndataset:\n  source: a\n  source: b\nmodel: b\n"},
        ["my.yaml"],
    ),
    "tab": ({"my.yaml": "recipe: sft\ndataset:\n\tsource: a\n"}, ["my.yaml"]),
    "syntax": ({"my.yaml": "recipe: sft\nstop: [a, b\nmodel: m\n"}, ["my.yaml"]),
    "object_tag": ({"my.yaml": "recipe: sft\nmodel: !!python/object:os.system x\n"}, ["my.yaml"]),
    "not_utf8": ({"my.yaml": b"recipe: sft\nmodel: caf\xe9\n"}, ["my.yaml"]),
    "no_mapping": ({"my.yaml": "- sft\n- model\n"}, ["sft", "my.yaml"]),
    "missing_file": ({}, ["sft", "--config", "absent.yaml", "batch_size=x"]),
    "folder": ({"my.yaml/inside": ""}, ["my.yaml"]),
    "no_recipe": ({"my.yaml": "model: m\n"}, ["my.yaml"]),
    "recipe_of_another": ({"my.yaml": "recipe: pretrain\nmodel: m\n"}, ["sft", "my.yaml", *NEEDED]),
    "interpolation": (
        {
            "my.yaml": "recipe: sft\nmodel: ${modle}\ndataset: {source: a}\nbatch_size: ${epochs}\nepochs: ${batch_size}\noutput_dir: x/${optimizer}\n"
        },
        ["my.yaml"],
    ),
    "list_index": (
        {"my.yaml": "recipe: sft\nmodel: m\ndataset:\n  - source: a\n"},
        ["my.yaml", "dataset.2.source=b", "dataset.0.sorce=c"],
    ),
    "list_with_section_keys": (
        {"my.yaml": "recipe: sft\nmodel: m\ndataset:\n  - source: a\n"},
        ["my.yaml", "dataset.packed=true"],
    ),
    "words": ({}, ["sft", *NEEDED, "--batch_size=4", "lora", "=3", "a..b=1"]),
    "names_of_others": (
        {},
        ["sft", *NEEDED, "learning_rate=1e-4", "num_train_epochs=3", "max_seq_len=512", "lora_rank=8"],
    ),
    "alias_in_itself": ({"my.yaml": "recipe: sft\nmodel: m\nsample_prompts: &a [*a]\n"}, ["my.yaml"]),
    "nothing_finite": ({}, ["sft", *NEEDED, "optimizer.lr=.nan", "weights.type=lora", "weights.alpha=.inf"]),
    "torchtune_without_counterpart": (
        {},
        "lora_finetune_single_device --config llama3_2/1B_lora_single_device fp8_recipe_name=rowwise model.lora_attn_modules=[w_proj] "
        "checkpointer.recipe_checkpoint=x.pt loss=torchtune.modules.loss.ForwardKLLoss dataset=torchtune.datasets.vqa_dataset".split(),
    ),
    "torchtune_unknown_size": ({}, ["full_finetune_distributed", "--config", "llama3_2/8B_full"]),
    "torchtune_unknown_family": ({}, ["lora_finetune_single_device", "--config", "llama9/3B_lora_single_device"]),
    "torchtune_preference": (
        {},
        "lora_dpo_distributed --config llama3_1/8B_lora_dpo loss=torchtune.modules.loss.LinearCrossEntropyLoss kd_ratio=0.5 "
        "ref_checkpointer.adapter_checkpoint=a.pt dataset=torchtune.datasets.alpaca_dataset".split(),
    ),
    "torchtune_preference_option": (
        {},
        "full_dpo_distributed --config llama3_1/8B_full_dpo loss.gamma=0.3 dataset.train_on_input=True".split(),
    ),
    "torchtune_distill": (
        {},
        "knowledge_distillation_distributed --config llama3_2/8B_to_1B_KD_lora_distributed kd_loss=torchtune.modules.loss.KLLoss "
        "loss=torchtune.modules.loss.ForwardKLLoss teacher_model=torchtune.models.llama3_2_vision.llama3_2_vision_11b "
        "kd_ratio=1.5 dataset=torchtune.datasets.stack_exchange_paired_dataset teacher_model.image=1".split(),
    ),
    "torchtune_unknown_teacher": (
        {},
        ["knowledge_distillation_single_device", "--config", "llama3_2/13B_to_1B_KD_lora_single_device"],
    ),
    "torchtune_qat": (
        {},
        "qat_distributed --config llama3_1/8B_qat_full quantizer=torchtune.training.quantization.Int8DynActInt4WeightQuantizer "
        "fake_quant_after_n_steps=-1".split(),
    ),
    "torchtune_qat_option": (
        {},
        "qat_distributed --config llama3_1/8B_qat_full quantizer.groupsize=1 quantizer.padding_allowed=True".split(),
    ),
    "torchtune_other_method": ({}, ["lora_dpo_single_device", "--config", "llama3_1/8B_lora_single_device"]),
    "torchtune_other_loss": (
        {},
        ["lora_finetune_single_device", "--config", "llama3_1/8B_lora", "loss=torchtune.rlhf.loss.DPOLoss"],
    ),
    "torchtune_file_of_another_method": (
        {
            "kd.yaml": "model: {_component_: torchtune.models.llama3.llama3_8b}\nkd_loss: {_component_: torchtune.modules.loss.ForwardKLLoss}\n"
        },
        ["full_finetune_distributed", "--config", "kd.yaml"],
    ),
    "torchtune_quantize": (
        {},
        "quantize --config quantization quantizer=torchtune.training.quantization.Float8Quantizer quantizer.groupsize=1".split(),
    ),
    "torchtune_ppo": ({}, ["ppo_full_finetune_single_device", "--config", "mistral/7B_full_ppo_low_memory"]),
    "torchtune_vision": ({}, ["full_finetune_distributed", "--config", "llama3_2_vision/11B_full"]),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case, tmp_path, monkeypatch):
    files, words = CASES[case]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        load_config(*words)
    said = str(raised.value) + "\n"
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("TUNESMITH_WRITE_GOLDEN"):
        golden.write_text(said, encoding="utf-8")
    expected = golden.read_text(encoding="utf-8")
    assert said == expected, "\n" + "".join(
        difflib.unified_diff(expected.splitlines(True), said.splitlines(True), "golden", "said")
    )


def test_no_golden_file_is_left_over():
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(CASES)
