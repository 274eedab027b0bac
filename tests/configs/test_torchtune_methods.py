"""torchtune's commands for DPO, knowledge distillation and QAT: recipe, models, weights and figures; its files; what has no counterpart."""

import shlex

import pytest

from tunesmith.config import load, load_config
from tunesmith.configs import torchtune_methods
from tunesmith.configs.data import ChatData, PreferenceData
from tunesmith.configs.distill import ForwardKL, ReverseKL, SymmetricKL, Teacher
from tunesmith.configs.optimizers import AdamW
from tunesmith.configs.preference import DPO, Hinge, Reference
from tunesmith.configs.schedule import Constant, Cosine
from tunesmith.configs.torchtune_names import MODELS
from tunesmith.configs.weights import QAT, FullWeights, LoRAWeights
from tunesmith.errors import UserError

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoRAWeights(target_modules=TARGETS)
ANSWERS = ChatData("alpaca_cleaned", train_on_input=True)


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch, tmp_path):
    """The folders that torchtune's downloads would have made are looked for here instead of in /tmp."""
    monkeypatch.setattr(
        torchtune_methods, "download_folder", lambda repo: tmp_path / "downloads" / repo.rpartition("/")[2]
    )


def resolve(command, recipe):
    loaded = load(shlex.split(command))
    assert loaded.recipe.name == recipe
    return loaded.config


# --- the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "lora_dpo_single_device --config llama3_1/8B_dpo_single_device",
        "lora_dpo_single_device --config llama3_1/8B_lora_dpo_single_device",
        "lora_dpo_distributed --config llama3_1/8B_lora_dpo",
        "lora_dpo_distributed --config llama3_1/8B_lora_dpo_distributed",
        "preference --config llama3_1/8B_lora_dpo",
        "llama3_1/8B_lora_dpo",
    ],
)
def test_dpo_with_adapters(command):
    config = resolve(command, "preference")
    assert (config.model, config.weights) == (MODELS["llama3_1/8B"], LORA)
    assert config.loss == DPO(beta=0.1) and config.reference == Reference()
    assert config.dataset == PreferenceData("stack_exchange_paired")
    assert config.optimizer == AdamW(lr=5e-4, weight_decay=0.05) and config.lr_scheduler == Cosine(num_warmup_steps=100)
    assert (config.batch_size, config.gradient_accumulation_steps, config.max_steps_per_epoch) == (4, 8, 1000)
    assert config.clip_grad_norm is None and config.enable_activation_checkpointing and config.seed is None


@pytest.mark.parametrize(
    "command",
    [
        "full_dpo_distributed --config llama3_1/8B_full_dpo",
        "full_dpo_distributed --config llama3_1/8B_full_dpo_distributed",
        "full_dpo_single_device --config llama3_1/8B_dpo_single_device",  # the recipe says which weights
        "full_dpo_single_device --config llama3_1/8B_full_dpo_single_device",
        "llama3_1/8B_full_dpo",
    ],
)
def test_dpo_of_all_weights(command):
    config = resolve(command, "preference")
    assert (config.model, config.weights) == (MODELS["llama3_1/8B"], FullWeights())
    assert config.loss == DPO(beta=0.05) and config.tokenizer.max_seq_len == 1024 and not config.optimizer_in_bwd
    assert config.reference == Reference(), "the model that training starts from"
    assert config.optimizer == AdamW(lr=2e-5, weight_decay=0.05) and config.lr_scheduler == Cosine(num_warmup_steps=20)


@pytest.mark.parametrize(
    ("command", "student", "teacher", "rank", "rows"),
    [
        ("knowledge_distillation_distributed --config qwen2/1.5B_to_0.5B_KD_lora_distributed", "qwen2/0.5B", "qwen2/1.5B", 32, 8),
        ("knowledge_distillation_single_device --config qwen2/1.5_to_0.5B_KD_lora_single_device", "qwen2/0.5B", "qwen2/1.5B", 32, 8),
        ("knowledge_distillation_single_device --config qwen2/1.5B_to_0.5B_KD_lora_single_device", "qwen2/0.5B", "qwen2/1.5B", 32, 8),
        ("knowledge_distillation_single_device --config llama3_2/8B_to_1B_KD_lora_single_device", "llama3_2/1B", "llama3_1/8B", 64, 4),
        ("knowledge_distillation_distributed --config llama3_2/8B_to_1B_KD_lora_distributed", "llama3_2/1B", "llama3_1/8B", 64, 4),
        ("knowledge_distillation_distributed --config llama3_2/8B_to_1B_KD_distributed", "llama3_2/1B", "llama3_1/8B", 64, 4),
        ("knowledge_distillation_single_device --config qwen2_5/14B_to_7B_KD_lora_single_device", "qwen2_5/7B", "qwen2_5/14B", 64, 2),
        ("distill --config llama3_2/70B_to_3B_KD_lora_distributed", "llama3_2/3B", "llama3_1/70B", 64, 4),
        ("qwen3/8B_to_0.6B_KD_lora_single_device", "qwen3/0.6B", "qwen3/8B", 64, 4),
    ],
)  # fmt: skip
def test_distillation(command, student, teacher, rank, rows):
    config = resolve(command, "distill")
    assert (config.model, config.teacher) == (MODELS[student], Teacher(MODELS[teacher]))
    assert config.weights == LoRAWeights(rank=rank, alpha=2 * rank, target_modules=TARGETS)
    assert (config.divergence, config.kd_ratio, config.loss.type) == (ForwardKL(), 0.5, "cross_entropy")
    assert config.dataset == ANSWERS and (config.batch_size, config.gradient_accumulation_steps) == (rows, 8)
    assert config.optimizer == AdamW(lr=3e-4, weight_decay=0.01) and config.lr_scheduler == Cosine(num_warmup_steps=100)
    assert config.clip_grad_norm is None


def test_distillation_of_other_weights():
    full = resolve("llama3_2/8B_to_1B_KD_full_distributed", "distill")
    assert full.weights == FullWeights() and full.optimizer.lr == 2e-5 and full.lr_scheduler == Constant()
    assert resolve("llama3_2/8B_to_1B_KD_qlora_single_device", "distill").weights.quantize_base == "nf4"


@pytest.mark.parametrize(
    ("command", "model", "weights"),
    [
        ("qat_distributed --config llama3_1/8B_qat_full", "llama3_1/8B", FullWeights()),
        ("qat_distributed --config llama3_1/8B_qat_lora", "llama3_1/8B", LORA),
        ("qat_lora_finetune_distributed --config llama3_1/8B_qat_lora", "llama3_1/8B", LORA),
        ("qat_lora_finetune_distributed --config llama3/8B_qat_lora", "llama3/8B", LORA),
        ("qat_lora_finetune_distributed --config llama3/8B_qat", "llama3/8B", LORA),
        ("qat_single_device --config llama3_1/8B_qat_single_device", "llama3_1/8B", FullWeights()),
        ("qat_single_device --config qwen2/1.5B_qat_single_device", "qwen2/1.5B", FullWeights()),
        ("sft --config llama3_1/8B_qat_full", "llama3_1/8B", FullWeights()),
        ("llama3_2/3B_qat_full", "llama3_2/3B", FullWeights()),
    ],
)
def test_qat(command, model, weights):
    config = resolve(command, "sft")
    assert (config.model, config.weights, config.dataset) == (MODELS[model], weights, ANSWERS)
    assert config.qat == QAT("int8_dynamic_int4", group_size=256, skip_indivisible=True)
    lora = weights.type == "lora"
    assert config.optimizer == AdamW(lr=3e-4 if lora else 2e-5, weight_decay=0.01) and config.batch_size == 2
    assert config.lr_scheduler == (Cosine(num_warmup_steps=100) if lora else Constant())
    assert config.optimizer_in_bwd == command.endswith("qat_single_device")
    assert config.enable_activation_checkpointing == (not lora)


def test_recipes_without_a_config():
    needed = "model=m dataset.source=x"
    assert resolve(f"lora_dpo_single_device {needed}", "preference") == load_config(
        "preference", "+lora", *needed.split()
    )
    assert resolve(f"full_dpo_distributed {needed}", "preference") == load_config("preference", *needed.split())
    assert resolve(f"knowledge_distillation_distributed {needed} teacher.model=t", "distill") == load_config(
        "distill", "+lora", *needed.split(), "teacher.model=t"
    )
    assert resolve(f"qat_single_device {needed}", "sft") == load_config("sft", "+qat", *needed.split())
    assert resolve(f"qat_lora_finetune_distributed {needed}", "sft") == load_config(
        "sft", "+lora", "+qat", *needed.split()
    )
    assert resolve("qat_distributed --config llama3_1/8B_full", "sft").qat == QAT(), "the recipe's name asks for it"


# --- components and keys -------------------------------------------------------------------------


def test_losses_of_preference():
    lora, full = (
        "lora_dpo_distributed --config llama3_1/8B_lora_dpo",
        "full_dpo_distributed --config llama3_1/8B_full_dpo",
    )
    assert resolve(f"{lora} loss.beta=0.3 loss.label_smoothing=0.1", "preference").loss == DPO(
        beta=0.3, label_smoothing=0.1
    )
    assert resolve(f"{full} loss=torchtune.rlhf.loss.DPOLoss", "preference").loss == DPO(beta=0.05)
    rso = "loss=torchtune.rlhf.loss.RSOLoss"
    assert resolve(f"{full} {rso}", "preference").loss == Hinge(beta=0.1), "RSOLoss's own default, not DPO's beta"
    assert resolve(f"{full} {rso} loss.gamma=0.4", "preference").loss == Hinge(beta=0.4)
    assert resolve(f"{full} {rso} loss.chunk_size=0", "preference").loss == Hinge(chunk_size=0), (
        "keys of ours go through"
    )


def test_data_of_preference():
    base = "lora_dpo_distributed --config llama3_1/8B_lora_dpo dataset=torchtune.datasets"
    data = resolve(
        f"{base}.hh_rlhf_helpful_dataset dataset.split=train[:10%] dataset.packed=False", "preference"
    ).dataset
    assert data == PreferenceData("hh_rlhf_helpful", split="train[:10%]")
    words = "dataset.source=json dataset.data_files=p.jsonl dataset.new_system_prompt=Hi dataset.train_on_input=False"
    columns = "'dataset.column_map={chosen: good, rejected: bad}'"
    config = resolve(f"{base}.preference_dataset {words} {columns}", "preference")
    assert config.dataset == PreferenceData(
        "p.jsonl", format="preference", column_map={"chosen": "good", "rejected": "bad"}, system_prompt="Hi"
    )
    assert resolve(f"{base}.stack_exchange_paired_dataset dataset.streaming=true", "preference").dataset.streaming


def test_the_reference_is_named_where_it_is_another_model(tmp_path):
    full, original = "full_dpo_distributed --config llama3_1/8B_full_dpo", MODELS["llama3_1/8B"]
    mine = resolve(f"{full} checkpointer.checkpoint_dir=/models/mine", "preference")
    assert (mine.model, mine.reference.model) == ("/models/mine", original), "torchtune's is the model as downloaded"
    both = resolve(f"{full} checkpointer.checkpoint_dir=/m ref_checkpointer.checkpoint_dir=/m/", "preference")
    assert (both.model, both.reference.model) == ("/m", None)
    assert resolve(f"{full} ref_checkpointer.checkpoint_dir=/r", "preference").reference.model == "/r"
    ours = resolve(f"{full} model=/models/mine", "preference")
    assert (ours.model, ours.reference.model) == ("/models/mine", None), (
        "said in our words, it starts where training does"
    )
    folder = torchtune_methods.download_folder(original)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    found = resolve(full, "preference")
    assert (found.model, found.reference.model) == (str(folder), None)


def test_a_model_in_our_words_keeps_the_adapters():
    config = resolve("lora_dpo_distributed --config llama3_1/8B_lora_dpo model=Qwen/Qwen3-0.6B", "preference")
    assert (config.model, config.weights) == ("Qwen/Qwen3-0.6B", LORA)
    assert (
        resolve("lora_finetune_single_device --config llama3_2/1B_lora_single_device model=/m", "sft").weights == LORA
    )


@pytest.mark.parametrize("ending", ["Loss", "WithChunkedOutputLoss"])
def test_divergences(ending):
    base = "knowledge_distillation_single_device --config llama3_2/8B_to_1B_KD_lora_single_device"
    for name, divergence in (("ForwardKL", ForwardKL()), ("ReverseKL", ReverseKL()), ("SymmetricKL", SymmetricKL())):
        words = f"{base} kd_loss=torchtune.modules.loss.{name}{ending} kd_loss.num_output_chunks=4 kd_ratio=0.9"
        config = resolve(words, "distill")
        assert (config.divergence, config.kd_ratio) == (divergence, 0.9)
    assert resolve(f"{words} kd_loss.sym_kd_ratio=0.2", "distill").divergence == SymmetricKL(sym_kd_ratio=0.2)


def test_teachers():
    base = "knowledge_distillation_single_device --config llama3_2/8B_to_1B_KD_lora_single_device"
    assert resolve(f"{base} teacher_checkpointer.checkpoint_dir=/models/mine", "distill").teacher == Teacher(
        "/models/mine"
    )
    default = f"{base} teacher_checkpointer.checkpoint_dir=/tmp/Meta-Llama-3.1-8B-Instruct/"
    assert resolve(default, "distill").teacher == Teacher(MODELS["llama3_1/8B"])
    other = f"{base} teacher_model=torchtune.models.llama3_2.qlora_llama3_2_3b"
    assert resolve(other, "distill").teacher == Teacher(MODELS["llama3_2/3B"], quantize="nf4")
    lora = f"{base} teacher_model=torchtune.models.llama3_2.lora_llama3_2_3b teacher_model.lora_attn_modules=[q_proj]"
    assert resolve(lora, "distill").teacher == Teacher(MODELS["llama3_2/3B"]), "its adapters are as they begin: nothing"
    assert resolve(f"{base} teacher.model=/t teacher.quantize=nf4", "distill").teacher == Teacher("/t", quantize="nf4")


def test_quantizers():
    base, where = "qat_distributed --config llama3_1/8B_qat_full", "torchtune.training.quantization"
    int4 = f"{base} quantizer={where}.Int4WeightOnlyQATQuantizer"
    assert resolve(int4, "sft").qat == QAT("int4_weight_only", 256, skip_indivisible=True)
    more = f"{int4} quantizer.groupsize=128 fake_quant_after_n_steps=1000"
    assert resolve(more, "sft").qat == QAT("int4_weight_only", 128, 1000, skip_indivisible=True)
    assert resolve(f"{base} quantizer=None fake_quant_after_n_steps=5", "sft").qat is None
    assert resolve(f"{base} qat.skip_indivisible=false", "sft").qat == QAT(group_size=256)
    added = f"full_finetune_distributed --config llama3_1/8B_full quantizer={where}.Int8DynActInt4WeightQATQuantizer"
    assert resolve(added, "sft").qat == QAT(group_size=256, skip_indivisible=True)


# --- files ---------------------------------------------------------------------------------------

REST = """\
output_dir: /tmp/out
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/Llama-3.2-1B-Instruct/original/tokenizer.model
  max_seq_len: 512
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/mine
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3_2
resume_from_checkpoint: False
seed: 7
shuffle: True
batch_size: 4
epochs: 2
max_steps_per_epoch: 50
gradient_accumulation_steps: 2
optimizer:
  _component_: torch.optim.AdamW
  lr: 1e-5
compile: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
"""
FULL = "model: {_component_: torchtune.models.llama3_2.llama3_2_1b}\n"
FILES = {
    "dpo": REST
    + FULL
    + """\
ref_checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/Llama-3.2-1B-Instruct
  checkpoint_files: [model.safetensors]
  output_dir: ${output_dir}
  model_type: LLAMA3_2
dataset:
  _component_: torchtune.datasets.preference_dataset
  source: json
  data_files: pairs.json
  column_map: {chosen: better, rejected: worse}
  train_on_input: False
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 10
loss:
  _component_: torchtune.rlhf.loss.DPOLoss
  beta: 0.2
  label_smoothing: 0.05
""",
    "kd": REST
    + """\
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj']
  lora_rank: 4
  lora_alpha: 8
teacher_model:
  _component_: torchtune.models.llama3_1.llama3_1_8b
teacher_checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/teacher
  checkpoint_files: {filename_format: "model-{}-of-{}.safetensors", max_filename: "00004"}
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
dataset:
  _component_: torchtune.datasets.alpaca_dataset
  packed: True
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
kd_loss:
  _component_: torchtune.modules.loss.ReverseKLWithChunkedOutputLoss
  num_output_chunks: 8
kd_ratio: 0.25
""",
    "qat": REST
    + FULL
    + """\
dataset:
  _component_: torchtune.datasets.alpaca_dataset
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
quantizer:
  _component_: torchtune.training.quantization.Int4WeightOnlyQATQuantizer
  groupsize: 64
fake_quant_after_n_steps: 20
optimizer_in_bwd: False
""",
}


@pytest.mark.parametrize(
    ("kind", "recipe", "named"),
    [("dpo", "preference", "full_dpo_distributed"), ("kd", "distill", "knowledge_distillation_single_device"), ("qat", "sft", "qat_distributed")],
)  # fmt: skip
def test_files(tmp_path, kind, recipe, named):
    file = tmp_path / "old.yaml"
    file.write_text(FILES[kind])
    config = resolve(f"{named} --config {file}", recipe)
    assert resolve(str(file), recipe) == config == resolve(f"{recipe} {file}", recipe), "its keys tell the recipe"
    assert (config.model, config.seed, config.batch_size, config.epochs, config.device) == (
        "/models/mine",
        7,
        4,
        2,
        "cuda",
    )
    assert config.optimizer == AdamW(lr=1e-5, weight_decay=0.01) and config.clip_grad_norm is None
    assert config.tokenizer.max_seq_len == 512 and config.output_dir == "/tmp/out"
    if kind == "dpo":
        assert config.loss == DPO(beta=0.2, label_smoothing=0.05) and config.lr_scheduler == Cosine(num_warmup_steps=10)
        assert config.reference == Reference(MODELS["llama3_2/1B"])
        columns = {"chosen": "better", "rejected": "worse"}
        assert config.dataset == PreferenceData("pairs.json", format="preference", column_map=columns)
    elif kind == "kd":
        assert config.teacher == Teacher("/models/teacher") and config.divergence == ReverseKL()
        assert config.kd_ratio == 0.25 and config.weights == LoRAWeights(rank=4, alpha=8, target_modules=["q_proj"])
        assert config.dataset == ChatData("alpaca", train_on_input=True, packed=True)
    else:
        assert config.qat == QAT("int4_weight_only", 64, 20, skip_indivisible=True)
        assert config.weights == FullWeights() and config.lr_scheduler == Constant()


def test_files_of_methods_that_are_not_there(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(f"{FULL}grpo_samples: 4\n")
    with pytest.raises(UserError, match="GRPO.* not there yet"):
        load_config(file)


def test_the_checkpointer_counts_wherever_it_stands(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(FILES["qat"])  # the checkpointer before the model
    assert load_config(file).model == "/models/mine"
    assert load_config(file, "model=/other").model == "/other"
