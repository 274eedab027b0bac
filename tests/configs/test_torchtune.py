"""torchtune's documented commands resolve to the right model, method and options; what has no counterpart is named."""

import shlex
from pathlib import Path

import pytest

from tunesmith.config import load, load_config
from tunesmith.configs import torchtune_methods, torchtune_names
from tunesmith.configs.loggers import TensorBoard, WandB
from tunesmith.configs.optimizers import SGD, AdamW, ThirdPartyOptimizer
from tunesmith.configs.quantize import SchemeConfig
from tunesmith.configs.schedule import Constant, Cosine
from tunesmith.configs.weights import FullWeights, LoRAWeights
from tunesmith.errors import UserError

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def resolve(command: str):
    loaded = load(shlex.split(command))
    return loaded.recipe.name, loaded.config


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch, tmp_path):
    """The folders that torchtune's downloads would have made are looked for here instead of in /tmp."""
    monkeypatch.setattr(
        torchtune_methods, "download_folder", lambda repo: tmp_path / "downloads" / repo.rpartition("/")[2]
    )


@pytest.mark.parametrize(
    ("command", "model", "weights"),
    [
        ("lora_finetune_single_device --config llama3_1/8B_lora_single_device", "meta-llama/Meta-Llama-3.1-8B-Instruct", LoRAWeights(target_modules=TARGETS)),
        ("lora_finetune_single_device --config llama3_2/3B_lora_single_device", "meta-llama/Llama-3.2-3B-Instruct", LoRAWeights(target_modules=TARGETS)),
        ("full_finetune_distributed --config llama3_1/8B_full", "meta-llama/Meta-Llama-3.1-8B-Instruct", FullWeights()),
        ("lora_finetune_single_device --config llama3_1/8B_lora_single_device device=xpu", "meta-llama/Meta-Llama-3.1-8B-Instruct", LoRAWeights(target_modules=TARGETS)),
        ("lora_finetune_distributed --config qwen2_5/72B_lora", "Qwen/Qwen2.5-72B-Instruct", LoRAWeights(target_modules=TARGETS)),
        ("lora_finetune_single_device --config llama3/8B_dora_single_device", "meta-llama/Meta-Llama-3-8B-Instruct", LoRAWeights(target_modules=TARGETS, use_dora=True)),
        ("lora_finetune_single_device --config llama3/8B_qdora_single_device", "meta-llama/Meta-Llama-3-8B-Instruct", LoRAWeights(target_modules=TARGETS, use_dora=True, quantize_base="nf4")),
        ("lora_finetune_single_device --config phi3/mini_lora_single_device", "microsoft/Phi-3-mini-4k-instruct", LoRAWeights(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])),
        ("full_finetune_single_device --config llama2/7B_full_low_memory", "meta-llama/Llama-2-7b-hf", FullWeights()),
        ("full_finetune_distributed --config llama3_3/70B_full_multinode", "meta-llama/Llama-3.3-70B-Instruct", FullWeights()),
        ("llama3_1/8B_full", "meta-llama/Meta-Llama-3.1-8B-Instruct", FullWeights()),
    ],
)  # fmt: skip
def test_command(command, model, weights):
    recipe, config = resolve(command)
    assert recipe == "sft" and config.model == model and config.weights == weights
    assert (
        config.dataset.source == "alpaca_cleaned"
        and config.dataset.train_on_input
        and config.batch_size == 2
        and config.clip_grad_norm is None
    )
    lora = weights.type == "lora"
    assert config.optimizer == AdamW(lr=3e-4 if lora else 2e-5, weight_decay=0.01)
    assert config.lr_scheduler == (Cosine(num_warmup_steps=100) if lora else Constant())


def test_readme_with_settings():
    words = "batch_size=8 enable_activation_checkpointing=True max_steps_per_epoch=128"
    recipe, config = resolve(f"lora_finetune_single_device --config llama2/7B_lora_single_device {words}")
    assert (recipe, config.model) == ("sft", "meta-llama/Llama-2-7b-hf")
    assert (config.batch_size, config.enable_activation_checkpointing, config.max_steps_per_epoch) == (8, True, 128)


def test_readme_with_every_memory_option():
    _, config = resolve(
        "lora_finetune_single_device --config llama3_2/3B_qlora_single_device dataset.packed=True compile=True "
        "loss=torchtune.modules.loss.CEWithChunkedOutputLoss enable_activation_checkpointing=True optimizer_in_bwd=False "
        "enable_activation_offloading=True optimizer=torch.optim.AdamW tokenizer.max_seq_len=4096 gradient_accumulation_steps=1 epochs=1 batch_size=2"
    )
    assert (
        config.weights == LoRAWeights(target_modules=TARGETS, quantize_base="nf4")
        and config.dataset.packed
        and config.compile
    )
    assert (
        config.loss.type == "cross_entropy"
        and config.enable_activation_offloading
        and config.gradient_accumulation_steps == 1
    )
    assert config.optimizer.type == "adamw" and config.tokenizer.max_seq_len == 4096


@pytest.mark.parametrize(
    ("command", "method"),
    [
        ("ppo_full_finetune_single_device --config mistral/7B_full_ppo_low_memory", "PPO"),
        ("dev/grpo_full_finetune_distributed --config dev/3B_full_grpo", "GRPO"),
        ("dev/async_grpo_full_finetune_distributed --config dev/qwen3B_async_grpo", "GRPO"),
        ("dev/early_exit_finetune_distributed --config dev/7B_full_early_exit", "early-exit"),
        ("full_finetune_distributed --config llama4/scout_17B_16E_full", "Llama 4"),
    ],
)
def test_methods_that_are_not_there_answer_with_one_sentence(command, method):
    with pytest.raises(UserError) as raised:
        resolve(command)
    assert method in str(raised.value) and "not there yet" in str(raised.value) and "\n" not in str(raised.value)


def test_keys_and_components():
    _, config = resolve(
        "lora_finetune_single_device --config llama3_2/1B_lora_single_device model.lora_rank=32 model.lora_alpha=64 model.lora_dropout=0.1 "
        "model.lora_attn_modules=['q_proj','v_proj','output_proj'] model.apply_lora_to_mlp=False model.apply_lora_to_output=True "
        "metric_logger._component_=torchtune.training.metric_logging.WandBLogger metric_logger.project=mine "
        "lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup lr_scheduler.num_warmup_steps=7 "
        "profiler.enabled=True profiler.active_steps=3 optimizer.fused=False optimizer.lr=1e-3 seed=5 "
        "dataset=torchtune.datasets.samsum_dataset checkpointer.keep_last_n_checkpoints=2"
    )
    assert config.weights == LoRAWeights(
        rank=32, alpha=64, dropout=0.1, target_modules=["q_proj", "v_proj", "o_proj", "lm_head"]
    )
    assert config.metric_logger == WandB(project="mine") and config.lr_scheduler == Cosine(num_warmup_steps=7)
    assert config.profiler.enabled and config.profiler.active_steps == 3 and config.seed == 5
    assert config.optimizer == AdamW(lr=1e-3, weight_decay=0.01, fused=False) and config.keep_last_n_checkpoints == 2
    assert config.dataset.source == "samsum" and not config.dataset.train_on_input


def test_other_optimizers_and_deletions():
    base = "full_finetune_distributed --config llama3_2/1B_full"
    assert resolve(f"{base} optimizer=torch.optim.SGD")[1].optimizer == SGD(lr=2e-5)
    bnb = resolve(f"{base} optimizer=bitsandbytes.optim.PagedAdamW8bit")[1].optimizer
    assert bnb == ThirdPartyOptimizer("bitsandbytes.optim.PagedAdamW8bit", 2e-5, {})
    assert resolve(f"{base} ~optimizer.fused")[1].optimizer.fused
    assert resolve(f"{base} lr_scheduler=None")[1].lr_scheduler == Constant()
    assert resolve(f"{base} max_steps_per_epoch=None seed=null")[1].seed is None


def test_overlays_stand_between_the_config_and_what_was_written():
    _, config = resolve(
        "lora_finetune_single_device --config llama3_2/1B_lora_single_device +dora model.lora_rank=4 gradient_accumulation_steps=1"
    )
    assert config.weights.use_dora and config.weights.rank == 4
    assert resolve("lora_finetune_single_device model=m dataset.source=x")[1].weights.type == "lora"
    assert resolve("sft --config llama3_2/1B_lora_single_device")[1].weights.type == "lora"


def test_own_folders(tmp_path):
    base = "lora_finetune_single_device --config llama3_2/1B_lora_single_device"
    assert resolve(f"{base} checkpointer.checkpoint_dir=/models/mine")[1].model == "/models/mine"
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").touch()
    (tmp_path / "tok" / "tokenizer.model").touch()
    assert resolve(f"{base} tokenizer.path={tmp_path}/tok/tokenizer.model")[1].tokenizer.path == str(tmp_path / "tok")
    same = f"checkpointer.checkpoint_dir={tmp_path}/tok tokenizer.path={tmp_path}/tok/tokenizer.model"
    assert resolve(f"{base} {same}")[1].tokenizer.path is None, "the model's own tokenizer needs no mention"
    folder = torchtune_methods.download_folder("meta-llama/Llama-3.2-1B-Instruct")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve(base)[1].model == str(folder), "what torchtune's `tune download` made is used"


OLD = """\
output_dir: /tmp/out
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/Llama-3.2-1B-Instruct/original/tokenizer.model
  max_seq_len: 1024
dataset:
  _component_: torchtune.datasets.chat_dataset
  source: json
  data_files: my_chats.json
  conversation_column: talk
  conversation_style: sharegpt
  split: train
  packed: True
seed: null
shuffle: True
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'k_proj']
  apply_lora_to_mlp: False
  lora_rank: 64
  lora_alpha: 128
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/Llama-3.2-1B-Instruct/
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3_2
resume_from_checkpoint: False
save_adapter_weights_only: False
batch_size: 4
epochs: 1
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  weight_decay: 0.02
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
max_steps_per_epoch: null
gradient_accumulation_steps: 8
compile: {model: True, loss: False}
metric_logger:
  _component_: torchtune.training.metric_logging.TensorBoardLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
log_peak_memory_stats: True
log_level: INFO
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiling_outputs
  cpu: True
  cuda: True
  profile_memory: False
  with_stack: False
  record_shapes: True
  with_flops: False
  wait_steps: 5
  warmup_steps: 3
  active_steps: 2
  num_cycles: 1
"""


def test_a_users_old_file(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(OLD)
    for words in (["lora_finetune_single_device", "--config", str(file)], [str(file)]):
        config = load_config(*words, "output_dir=elsewhere")
        assert (
            config.model == "meta-llama/Llama-3.2-1B-Instruct"
            and config.tokenizer.path is None
            and config.tokenizer.max_seq_len == 1024
        )
        assert config.weights == LoRAWeights(rank=64, alpha=128, target_modules=["q_proj", "k_proj"])
        assert (
            config.dataset.source == "my_chats.json" and config.dataset.format == "sharegpt" and config.dataset.packed
        )
        assert config.dataset.column_map == {"conversations": "talk"} and config.compile and config.device == "cuda"
        assert config.optimizer.weight_decay == 0.02 and config.lr_scheduler == Cosine(num_warmup_steps=100)
        assert config.metric_logger == TensorBoard(log_dir="elsewhere/logs") and config.profiler.warmup_steps == 3


def test_mistakes_in_an_old_file_have_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(OLD.replace("batch_size: 4", "batchsize: 4\nfp8_recipe_name: rowwise\nresume: x"))
    with pytest.raises(UserError) as raised:
        load_config("old.yaml")
    line = OLD.splitlines().index("batch_size: 4") + 1
    assert str(raised.value).splitlines()[:2] == [
        f"old.yaml:{line}: no option `batchsize`; did you mean `batch_size`?",
        f"old.yaml:{line + 1}: torchtune's `fp8_recipe_name` has no counterpart here; leave it out",
    ]


def test_datasets():
    base = "full_finetune_distributed --config llama3_2/1B_full dataset=torchtune.datasets"
    data = resolve(
        f"{base}.instruct_dataset dataset.source=mine.json 'dataset.column_map={{input: ask}}' dataset.new_system_prompt=Hi"
    )[1].dataset
    assert (
        data.column_map == {"prompt": "ask", "completion": "output"}
        and data.format == "prompt_completion"
        and data.system_prompt == "Hi"
    )
    data = resolve(f"{base}.text_completion_dataset dataset.source=text dataset.data_files=a.txt dataset.column=body")[
        1
    ].dataset
    assert (data.source, data.format, data.column_map) == ("a.txt", "text", {"text": "body"})
    assert resolve(f"{base}.wikitext_dataset")[1].dataset.column_map == {"text": "page"}
    data = resolve(f"{base}.alpaca_dataset dataset.train_on_input=False dataset.split=train[:5%]")[1].dataset
    assert (data.source, data.train_on_input, data.split) == ("alpaca", False, "train[:5%]")
    with pytest.raises(UserError, match="preference"):
        resolve(f"{base}.preference_dataset dataset.source=x")


def test_generation():
    recipe, config = resolve(
        "generate --config generation prompt.user='Tell me more' checkpointer.checkpoint_dir=/m max_new_tokens=5"
    )
    assert (
        recipe == "generate"
        and config.prompt.user == "Tell me more"
        and config.model == "/m"
        and config.max_new_tokens == 5
    )


def test_quantization():
    recipe, config = resolve("quantize --config quantization")
    assert recipe == "quantize" and config.model == torchtune_names.MODELS["llama2/7B"]
    assert config.scheme == SchemeConfig("int8_dynamic_int4", 256, skip_indivisible=True)
    assert config.output_dir == "/tmp/torchtune/llama2_7B/quantized" and config.dtype == "bf16"
    where = "quantizer=torchtune.training.quantization"
    words = "checkpointer.checkpoint_dir=/m checkpointer.output_dir=/out output_dir=/out"
    config = resolve(f"quantize --config quantization {where}.Int4WeightOnlyQuantizer quantizer.groupsize=64 {words}")[
        1
    ]
    assert (config.model, config.output_dir) == ("/m", "/out")
    assert config.scheme == SchemeConfig("int4_weight_only", 64, skip_indivisible=True)
    with pytest.raises(UserError, match="has no counterpart here; quantize takes Int8DynActInt4WeightQuantizer"):
        resolve(f"quantize --config quantization {where}.Float8Quantizer")


@pytest.mark.parametrize(
    "name, model",
    [
        ("eleuther_evaluation", "llama2/7B"),
        ("llama3_2/evaluation", "llama3_2/3B"),
        ("qwen2_5/evaluation", "qwen2_5/3B"),
    ],
)
def test_evaluation(name, model):
    recipe, config = resolve(f"eleuther_eval --config {name}")
    assert recipe == "evaluate" and config.model == torchtune_names.MODELS[model] and config.tasks == ["truthfulqa_mc2"]
    words = "tasks=['hellaswag','wikitext'] limit=5 max_seq_length=64 chat_template=True include_path=. checkpointer.checkpoint_dir=/m"
    config = resolve(f"eleuther_eval --config {name} {words} checkpointer.output_dir=/tmp/out output_dir=/out")[1]
    assert (config.model, config.tasks, config.limit) == ("/m", ["hellaswag", "wikitext"], 5)
    assert (config.max_length, config.apply_chat_template, config.output_dir) == (64, True, "/out")
    assert config.include_path == "."


def test_a_users_old_file_of_evaluation(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(
        "model: {_component_: torchtune.models.qwen2.qwen2_7b}\n"
        "checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /tmp/Qwen2-7B-Instruct, "
        "checkpoint_files: [a.safetensors], recipe_checkpoint: null, output_dir: ./, model_type: QWEN2}\n"
        "resume_from_checkpoint: False\n"
        "tokenizer: {_component_: torchtune.models.qwen2.qwen2_tokenizer, path: /tmp/Qwen2-7B-Instruct/vocab.json, "
        "merges_file: /tmp/Qwen2-7B-Instruct/merges.txt, qwen_version: '2', max_seq_len: null}\n"
        "device: cpu\ndtype: bf16\nseed: 1234\ntasks: [truthfulqa_mc2]\nlimit: null\nmax_seq_length: 4096\n"
        "batch_size: 8\nenable_kv_cache: True\nquantizer: null\n"
    )
    recipe, config = resolve(f"eleuther_eval --config {file}")
    assert recipe == "evaluate" and config.model == torchtune_names.MODELS["qwen2/7B"] and config.max_length == 4096
    assert config.output_dir == "evaluation"


def test_our_own_file_under_torchtunes_recipe_name(tmp_path):
    from tunesmith.config import dump

    file = tmp_path / "my_custom_config.yaml"
    file.write_text(dump(load_config("llama3_1/8B_full")))
    assert resolve(f"full_finetune_distributed --config {file}")[1] == load_config("llama3_1/8B_full")


def size_of(name):
    """The 1B of llama3_2/1B_lora and of llama3_2/8B_to_1B_KD_lora."""
    return name.rpartition("/")[2].rpartition("_to_")[2].partition("_")[0]


@pytest.mark.parametrize("name", torchtune_names.config_names())
def test_every_config_name(name):
    config = load_config(name)
    if name in torchtune_names.EVALUATED:
        assert config.model == torchtune_names.MODELS[torchtune_names.EVALUATED[name]]
    elif name not in ("generation", "quantization"):
        assert config.model == torchtune_names.MODELS[f"{name.partition('/')[0]}/{size_of(name)}"]


def test_names_of_models_are_the_same_as_the_families():
    from tunesmith.models.families import named_sizes

    assert {name: named_sizes()[name][2] for name in torchtune_names.MODELS} == torchtune_names.MODELS


@pytest.mark.parametrize(
    ("builder", "model"),
    [
        ("torchtune.models.llama3_1.lora_llama3_1_8b", ("llama3_1/8B", "lora_", "")),
        ("torchtune.models.qwen2_5.qwen2_5_0_5b_base", ("qwen2_5/0.5B", "", "base")),
        ("torchtune.models.qwen3.qlora_qwen3_1_7b_instruct", ("qwen3/1.7B", "qlora_", "instruct")),
        ("torchtune.models.gemma2.gemma2_27b", ("gemma2/27B", "", "")),
        ("torchtune.models.phi3.lora_phi3_mini", ("phi3/mini", "lora_", "")),
        ("torchtune.models.llama2.llama2_reward_7b", (None, "", "")),
    ],
)
def test_builders(builder, model):
    assert torchtune_names.model_of_builder(builder) == model
