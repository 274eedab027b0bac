"""From a config to a model, in one order: construct on meta → transform → parallelize → materialize → stream weights in → initialise the rest → freeze."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith import hub
from tunesmith.checkpoint import adapter as peft
from tunesmith.checkpoint.hf import load_weights, prepare_quantized, read_model_config, stated_dtype
from tunesmith.checkpoint.load import stored_weights
from tunesmith.checkpoint.streamed import stream_weights, weights_here
from tunesmith.configs.shared import TrainSettings
from tunesmith.configs.weights import QAT, LoRAWeights
from tunesmith.data.loader import DEFAULT_MAX_SEQ_LEN
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.models import families
from tunesmith.models.decoder import CausalLM, build
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.initialize import initialize
from tunesmith.nn.fake_quantize import apply_fake_quantization, set_rounding
from tunesmith.nn.lora import apply_lora, freeze_base, materialize_adapters, reset_adapters
from tunesmith.nn.quantize import quantize_linear_layers
from tunesmith.nn.scheme import Scheme
from tunesmith.parallel.device import pick_device, supports_bf16, supports_float8
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.parallelize import parallelize
from tunesmith.parallel.tensor import apply_tensor_parallel
from tunesmith.training.preflight import (
    check_plain,
    check_trainable,
    check_vocabulary,
    frozen_stages,
    labels_of,
    spread_quantized,
    warn_of_another_base,
)

logger = logging.getLogger(__name__)

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass
class Source:
    """Where a model comes from: a folder with weights, or only the numbers of a named size."""

    folder: Path | None
    hf_config: dict[str, Any]
    family: Family
    name: str
    repository: str | None = None
    """Hub id that a named size stands for."""
    new_head: str | None = None
    """What the names of the output layer's parameters begin with, where the folder has another one or none: it is initialised."""

    @property
    def label_names(self) -> list[str]:
        """What its head scores; empty for a language model."""
        return self.family.label_names(self.hf_config)

    @property
    def tokenizer(self) -> Path | str:
        """Where its tokenizer is: the folder, or for a named size the repository."""
        return self.folder or self.repository or self.name

    @property
    def fingerprint(self) -> str:
        """Changes with its weights and numbers."""
        numbers = hashlib.sha256(json.dumps(self.hf_config, sort_keys=True).encode()).hexdigest()[:16]
        return f"{hub.fingerprint_folder(self.folder)}-{numbers}" if self.folder else numbers


def find_model(
    name: str, model_args: dict[str, Any] | None = None, need_weights: bool = True, classifier: bool = False
) -> Source:
    """The source of the model called `name`: a folder, a Hub id, or (without weights) a named size such as llama3_2/1B.

    classifier: whether reward models and classifiers are welcome, too. Raises UserError for one where they are not.
    """
    sizes = families.named_sizes()
    if not need_weights and name in sizes and not Path(name).is_dir():
        family, hf_config, repository = sizes[name]
        return Source(None, {**hf_config, **(model_args or {})}, family, name, repository)
    ignored = None if need_weights else ["*.safetensors", "*.bin", "*.pth", "*.gguf"]
    folder = hub.resolve(name, ignore_patterns=ignored)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is an adapter, not a model: give its base as `model` and the adapter as `weights.adapter`"
        )
    hf_config, family, _ = read_model_config(folder)
    if not classifier:
        families.check_speaks(family, hf_config, name)
    return Source(folder, {**hf_config, **(model_args or {})}, family, name)


_PROBLEMS = {"preference": "regression", "classification": "single_label_classification"}
"""What transformers calls the task of a classifier of texts."""


def as_classifier(source: Source, task: str, labels: Sequence[str] | None, pad_id: int) -> Source:
    """The same model with a head for a task of `tune run reward`: its own, where it has such a one, or a new one.

    labels: names of what is scored, None: those it has. pad_id: what stands behind the last token of a text. Raises UserError
    as `preflight.labels_of`.
    """
    family, hf, more = source.family, source.hf_config, dict[str, Any](pad_token_id=pad_id)
    names = labels_of(source.name, family, hf, task, labels)
    if task in _PROBLEMS:
        more["problem_type"] = _PROBLEMS[task]
    described = family.classifier_config(hf, names, per_token=task == "process") | more
    return replace(source, hf_config=described, new_head="score." if family.scores(hf) is None else None)


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


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made in this context have `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    quantize_base: bool = False,
    mesh: Mesh | None = None,
) -> CausalLM:
    """A model to compute with, from a folder or a Hub id; the folder of a PEFT adapter brings its base.

    Args:
        path: a folder or Hub id of a model or of a PEFT adapter.
        dtype: such as "bfloat16"; default: the one the checkpoint was saved in.
        device: such as "cuda", or "auto".
        adapter: a PEFT adapter to put on the model.
        base: the adapter's base, where it is not the one that adapter_config.json names.
        quantize_base: hold the matrices in 4-bit NormalFloat.
        mesh: where its axis tp has several ranks, each holds its part of every matrix.

    Returns the module in evaluation mode under Hugging Face's parameter names; its parameters ask for no gradient.
    Raises UserError for a folder that is no model, lacks files, or does not fit.
    """
    found = _construct(path, dtype, adapter, base, quantize_base)
    model, place = found.model, pick_device(str(device))
    if mesh is not None and mesh.size("tp") > 1:
        if model.hf_config.get("quantization_config"):
            raise UserError(spread_quantized(path))
        apply_tensor_parallel(model, model.family.tp_plan, mesh, sequence_parallel=False)
    load_weights(model, found.folder, model.family, device=place, without=found.brought)
    _add_adapter(found, place)
    return model.requires_grad_(False).eval()


def stream_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
) -> CausalLM:
    """As `load_model`, but the weights stay in their files (see `checkpoint.streamed`): for models to be computed with a few times, and written."""
    found = _construct(path, dtype, adapter, base, quantize_base=False)
    model, place = found.model, pick_device(str(device))
    stream_weights(model, stored_weights(model, found.folder, model.family, without=found.brought), place)
    with weights_here(model.model.embed_tokens), weights_here(model.head):  # an adapter may bring a copy of them
        _add_adapter(found, place)
    return model.requires_grad_(False).eval()


@dataclass
class _Constructed:
    """A model on meta, adapters on it, and where its values are."""

    model: CausalLM
    folder: Path
    adapter: Path | None
    brought: str | None
    """What the names of the parameters begin with that the adapter brings whole."""


def _construct(
    path: str | Path,
    dtype: str | torch.dtype | None,
    adapter: str | Path | None,
    base: str | Path | None,
    quantize_base: bool,
) -> _Constructed:
    folder = hub.resolve(str(path))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        if adapter is not None:
            raise UserError(f"{path} is an adapter itself: give its base as the model, or no second adapter")
        adapter, folder = folder, base_of(folder, base)
        path = base or folder
    hf_config, family, decoder_config = read_model_config(folder)
    adapter_folder = hub.resolve(str(adapter), what="adapter") if adapter is not None else None
    if adapter_folder is not None:
        hf_config = peft.adapted_config(adapter_folder, family, hf_config)
    wanted = _dtype(dtype) if dtype is not None else stated_dtype(hf_config)
    with torch.device("meta"), default_dtype(wanted):
        model = build(hf_config, family, decoder_config)
    prepare_quantized(model, folder)
    if content := hf_config.get("quantization_config"):
        takes_adapters = Scheme.of_config(content).type == "nf4"
        if takes_adapters and quantize_base:
            raise UserError(f"{path} is quantized already: leave `quantize_base` out")
        if not takes_adapters and (quantize_base or adapter is not None):
            raise UserError(
                f"{path} is quantized: neither `quantize_base` nor an adapter goes with it; take the model it was made from, or one in NF4"
            )
    if adapter_folder is not None:
        if warning := warn_of_another_base(adapter_folder, str(path)):
            logger.warning("%s", warning)
        peft.apply_adapter(model, adapter_folder, quantize_base="nf4" if quantize_base else None, dtype=torch.float32)
    elif quantize_base:
        quantize_linear_layers(model)
    brings_head = adapter_folder is not None and peft.brings_head(adapter_folder)
    return _Constructed(model, folder, adapter_folder, f"{model.head_name}." if brings_head else None)


def _add_adapter(found: _Constructed, device: torch.device) -> None:
    """Make on `device` what the base's files don't hold, and read it."""
    found.model.init_buffers(device)
    if found.brought is not None:
        found.model.head.to_empty(device=device)
    if found.adapter is not None:
        materialize_adapters(found.model, device)
        peft.load_adapter(found.model, found.adapter)


def describe_model(path: str) -> tuple[Family, DecoderConfig]:
    """Family and shape of a model, or of the base of an adapter, before its weights are read."""
    folder = hub.resolve(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        folder = base_of(folder, None)
    _, family, shape = read_model_config(folder)
    return family, shape


def base_of(adapter: Path, base: str | Path | None) -> Path:
    """The folder of the base of the adapter in a folder: `base`, or the one it names."""
    name = str(base) if base is not None else peft.read_adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter} doesn't name its base model: give it")
    return hub.resolve(name)


def tokenizer_folder(model: str, adapter: str | None = None) -> Path:
    """Where the tokenizer of a model, or of one with an adapter, is: an adapter made here brings its own, others use their base's."""
    folder = hub.resolve(model)
    own = hub.resolve(adapter, what="adapter") if adapter else folder
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    base = base_of(folder, None) if is_adapter else folder
    return hub.tokenizer_home(own, hub.tokenizer_home(folder, base))


def _dtype(name: str | torch.dtype) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f"no number type {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
