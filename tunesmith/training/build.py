"""From a config to a model, in one order: construct on meta → transform → parallelize → materialize → stream weights in → initialise the rest → freeze."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tunesmith import hub
from tunesmith.checkpoint import adapter as peft
from tunesmith.checkpoint.hf import load_weights, prepare_quantized
from tunesmith.checkpoint.load import stored_weights
from tunesmith.configs.shared import TrainSettings
from tunesmith.configs.weights import QAT, LoRAWeights
from tunesmith.data.loader import DEFAULT_MAX_SEQ_LEN
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM, build
from tunesmith.models.initialize import initialize
from tunesmith.nn.fake_quantize import apply_fake_quantization, set_rounding
from tunesmith.nn.lora import apply_lora, freeze_base, reset_adapters
from tunesmith.nn.quantize import quantize_linear_layers
from tunesmith.nn.scheme import Scheme
from tunesmith.parallel.device import supports_bf16, supports_float8
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.parallelize import parallelize
from tunesmith.training.dtypes import DTYPES, default_dtype
from tunesmith.training.preflight import check_plain, check_trainable, check_vocabulary, frozen_stages
from tunesmith.training.source import Source


def max_sequence_length(config: TrainSettings, source: Source) -> int:
    """The longest row of a run: what `tokenizer.max_seq_len` says, else 2048 or the model's limit."""
    limit = source.family.read_config(source.hf_config).max_position_embeddings
    return config.tokenizer.max_seq_len or min(DEFAULT_MAX_SEQ_LEN, limit or DEFAULT_MAX_SEQ_LEN)


def build_model(
    config: TrainSettings, source: Source, tokenizer: Tokenizer, mesh: Mesh, resume_from: Path | None = None
) -> CausalLM:
    """The model of a training run on `mesh`, ready for its first step.

    With `resume_from`, a checkpoint of the same run, its weights (or adapter) are loaded in place of the source's. The
    trained parameters are float32 where `dtype` is fp16 and for adapters, and of `dtype` elsewhere.
    """
    model, first_new_row = construct_model(config, source, tokenizer, mesh, resume_from)
    lora = config.weights if isinstance(config.weights, LoRAWeights) else None
    is_cast = lora is None and config.param_dtype is not None and config.param_dtype != config.dtype
    parallelize(model, mesh, source.family.tp_plan, config, DTYPES[config.dtype] if is_cast else None)
    _materialize(
        model, torch.device("cpu") if config.fsdp_cpu_offload else mesh.device, max_sequence_length(config, source)
    )
    if lora:  # before anything gathers parameters: `fully_shard` looks then which of them are trained
        freeze_base(model)

    seed = config.seed or 0
    if resume_from is not None and not lora:
        load_weights(model, resume_from, source.family)
    elif source.folder is None or getattr(config, "from_scratch", False):
        initialize(model, seed)
    else:
        load_weights(model, source.folder, source.family, new_rows_from=first_new_row, without=source.new_head)
        if source.new_head:
            initialize(model, seed, source.new_head)
    if lora:
        reset_adapters(model, seed)
        if trained := resume_from or (hub.resolve(lora.adapter, what="adapter") if lora.adapter else None):
            peft.load_adapter(model, trained)
    return model.train()


def construct_model(
    config: TrainSettings, source: Source, tokenizer: Tokenizer, mesh: Mesh, resume_from: Path | None = None
) -> tuple[CausalLM, int | None]:
    """The model of a run on the meta device, adapters on it, and the first row of its embedding that is new (None: none).

    It takes a moment and reads no weights, but needs all of them to fit: raises UserError where the device lacks the
    number type, the model is quantized, the tokenizer has more tokens than the embedding rows, `weights.target_modules` names no layer, or the
    adapter to go on from was made for another model.
    """
    if config.dtype == "bf16" and not supports_bf16(mesh.device):
        raise UserError(f"{mesh.device} has no bf16: use `dtype: fp16` or `dtype: fp32`")
    if config.qat and scheme_of(config.qat).kind.levels == "float8" and not supports_float8(mesh.device):
        raise UserError(
            f"`qat.type: {config.qat.type}`: {mesh.device.type} has no 8-bit floating-point numbers; set `device=cpu`"
        )
    check_trainable(config, source.hf_config)
    lora = config.weights if isinstance(config.weights, LoRAWeights) else None
    dtype = DTYPES[config.dtype] if lora else trained_dtype(config)
    rows = source.family.read_config(source.hf_config).vocab_size
    check_vocabulary(config, source.name, rows, tokenizer.vocab_size)
    grows = tokenizer.vocab_size > rows
    hf_config = {**source.hf_config, "vocab_size": tokenizer.vocab_size} if grows else source.hf_config
    with torch.device("meta"), default_dtype(dtype):
        model = build(hf_config, source.family, source.family.read_config(hf_config))
    if source.folder is not None:
        prepare_quantized(model, source.folder)
    if lora:
        _apply(model, lora, resume_from)
    if config.qat:
        apply_fake_quantization(model, scheme_of(config.qat))
        set_rounding(model, config.qat.fake_quant_after_n_steps == 0)  # until `Run.steps` knows the step
    return model, rows if grows else None


def check_weights(source: Source, model: CausalLM, first_new_row: int | None) -> None:
    """Raise UserError where the files of `source` lack what a `model` made from it on the meta device needs: names and shapes alone are looked at."""
    if source.folder is not None:
        stored_weights(model, source.folder, source.family, first_new_row, source.new_head)


def build_frozen(
    config: TrainSettings, source: Source, tokenizer: Tokenizer, mesh: Mesh, quantize: str | None = None
) -> CausalLM:
    """A second model beside the trained one, spread over `mesh` like it, whose weights stay as they are: a reference, a teacher.

    quantize: "nf4" holds its matrices in 4 bits. Its embedding grows with the tokenizer as the trained one's does.
    """
    model, first_new_row = construct_frozen(config, source, tokenizer, quantize)
    # Nothing of it is kept for a backward pass.
    as_it_is = {"enable_activation_checkpointing": False, "ac_mode": "full", "enable_activation_offloading": False}
    parallelize(model, mesh, source.family.tp_plan, replace(frozen_stages(config), **as_it_is))
    device = torch.device("cpu") if config.fsdp_cpu_offload else mesh.device
    _materialize(model, device, max_sequence_length(config, source))
    model.requires_grad_(False)
    assert source.folder is not None, "a frozen model has weights"
    load_weights(model, source.folder, source.family, new_rows_from=first_new_row)
    return model.eval()


def construct_frozen(
    config: TrainSettings, source: Source, tokenizer: Tokenizer, quantize: str | None = None
) -> tuple[CausalLM, int | None]:
    """The same on the meta device, not yet spread, and the first row of its embedding that is new (None: none)."""
    check_plain(source.hf_config, source.name)
    rows = source.family.read_config(source.hf_config).vocab_size
    grows = tokenizer.vocab_size > rows
    hf_config = {**source.hf_config, "vocab_size": tokenizer.vocab_size} if grows else source.hf_config
    with torch.device("meta"), default_dtype(DTYPES[config.dtype]):
        model = build(hf_config, source.family, source.family.read_config(hf_config))
    if quantize:
        quantize_linear_layers(model)
    return model.requires_grad_(False), rows if grows else None


def scheme_of(qat: QAT) -> Scheme:
    """What the layers of a run compute with."""
    return Scheme.trained(qat.type, qat.group_size)


def trained_dtype(config: TrainSettings) -> torch.dtype:
    """Number type in which trained weights are kept: float32 where fp16 is computed in, else `param_dtype` or `dtype`."""
    return torch.float32 if config.dtype == "fp16" else DTYPES[config.param_dtype or config.dtype]


def _apply(model: CausalLM, lora: LoRAWeights, resume_from: Path | None) -> None:
    """Put adapters on the model. One to go on from decides its own shape: rank, scale, targets and kind."""
    options = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "target_modules": lora.target_modules,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }
    folder = resume_from or (hub.resolve(lora.adapter, what="adapter") if lora.adapter else None)
    # Small updates would round away in bf16 or fp16: adapters are float32 whatever the base is.
    if folder is not None:
        peft.apply_adapter(model, folder, lora.dropout, lora.quantize_base, dtype=torch.float32)
        return
    apply_lora(model, dropout=lora.dropout, quantize_base=lora.quantize_base, dtype=torch.float32, **options)


def _materialize(model: CausalLM, device: torch.device, max_seq_len: int | None) -> None:
    model.to_empty(device=device)
    model.init_buffers(device, max_seq_len)
