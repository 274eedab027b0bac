"""torchtitan's TOML files (keys of July 2025) in ours. This file and torchtitan_keys.py alone know that torchtitan's configs exist."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.configs import _layers as layers
from tunesmith.configs._layers import Node, Place, Problem
from tunesmith.configs._suggest import did_you_mean
from tunesmith.configs.torchtitan_keys import DEFAULTS, MODELS, ONLY, OPTIONAL_SECTIONS, PLAIN, RENAMED, SILENT
from tunesmith.errors import UserError


class Imported(NamedTuple):
    """Settings of `pretrain`, each with its place in the TOML file, and one sentence for everything that has no counterpart."""

    settings: Node
    notes: list[Problem]


def import_toml(path: Path) -> Imported:
    """The settings in a torchtitan TOML file. Raises UserError where it can't be read or is no TOML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from error
    return _Import(path, content, _lines(text)).run()


def _lines(text: str) -> dict[str, int]:
    """{section.key: its line}."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\[\]]+?)\s*\]", line):
            section = re.sub(r"[\s\"']", "", header[1]) + "."
        elif key := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            found.setdefault(section + re.sub(r"[\"']", "", key[1]), number)
    return found


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _listed(value: Any) -> list[str]:
    """A list, which may be written as text with commas."""
    return [one.strip() for one in value.split(",") if one.strip()] if isinstance(value, str) else list(value or [])


def _layer_number(name: str) -> int | str:
    number = name.removeprefix("layers.")
    return int(number) if number.isdecimal() else name


class _Import:
    """Walks the keys of a file and writes settings of ours."""

    def __init__(self, path: Path, content: dict[str, Any], lines: dict[str, int]):
        self.path, self.lines = path, lines
        self.written = {RENAMED.get(key, key): value for key, value in _flatten(content).items()}
        self.lines |= {RENAMED[key]: line for key, line in lines.items() if key in RENAMED}
        self.values = {**DEFAULTS, **self.written}
        self.taken: set[str] = set()
        self.notes: list[Problem] = []
        self.settings = Node({}, self.place(""))

    def run(self) -> Imported:
        for key, ours in PLAIN.items():
            if (value := self.take(key)) is not None or key == "training.seed":
                self.put(ours, value, key)
        self.model()
        self.data()
        self.optimizer()
        self.schedule()
        self.batches()
        self.asynchronous()
        self.precision()
        self.memory()
        self.logging()
        self.checkpoints()
        self.rest()
        return Imported(self.settings, sorted(self.notes, key=lambda note: note.place.line))

    def place(self, key: str) -> Place:
        return Place(0, str(self.path), self.lines.get(key, 0))

    def take(self, key: str, default: Any = None) -> Any:
        self.taken.add(key)
        return self.values.get(key, default)

    def number(self, key: str, default: int = 0) -> int:
        """A whole number that something is computed from. Raises UserError for anything else."""
        value = self.take(key, default)
        if type(value) is not int:
            raise UserError(f"{self.place(key)}: `{key}` must be a whole number, got {value!r}")
        return value

    def put(self, dotted: str, value: Any, key: str = "") -> None:
        node = layers.to_node(value, self.place(key))
        self.settings = layers.merge(self.settings, layers.nest(dotted.split("."), node), [])

    def tell(self, key: str, text: str) -> None:
        self.notes.append(Problem(self.place(key), f"`{key}`: {text}"))

    # --- parts ---

    def model(self) -> None:
        name, flavor = str(self.take("model.name")), str(self.take("model.flavor"))
        start = self.take("checkpoint.initial_load_path") if self.values.get("checkpoint.enable_checkpoint") else None
        self.take("checkpoint.initial_load_path")
        converters = _listed(self.take("model.converters"))
        if start:
            self.put("model", start, "checkpoint.initial_load_path")
            self.put("from_scratch", False, "checkpoint.initial_load_path")
        elif (name, flavor) in MODELS:
            size, changes = MODELS[name, flavor]
            self.put("model", size, "model.flavor")
            if changes := {**changes, **self.vocabulary(flavor)}:
                self.put("model_args", changes, "model.flavor")
        else:
            known = ", ".join(sorted({f"{name} {flavor}" for name, flavor in MODELS}))
            self.tell(
                "model.flavor" if "model.flavor" in self.lines else "model.name",
                f"{name} {flavor} is not there; name a folder, a Hub id or a named size as `model` (known here: {known})",
            )
        for converter in converters:
            what = {"float8": "float8 training", "mx": "MXFP8 training"}.get(converter, f"the converter {converter}")
            self.tell(
                "model.converters", f"{what} is not there yet; the run computes in the number type that `dtype` says"
            )

    def vocabulary(self, flavor: str) -> dict[str, int]:
        """The debug model's, which is its tokenizer's; the others have Llama's or Qwen's own."""
        if flavor != "debugmodel":
            return {}
        folder = Path(str(self.values.get("model.tokenizer_path") or "")).expanduser()
        try:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            added = {token["content"] for token in content.get("added_tokens", ())}
            return {"vocab_size": len({*content["model"]["vocab"], *added})}
        except (OSError, ValueError, KeyError, TypeError):
            self.tell(
                "model.flavor",
                "its vocabulary is its tokenizer's, which is not here; set `model_args.vocab_size`, or the embedding has Llama 3's 128,256 rows",
            )
            return {}

    def data(self) -> None:
        self.source("training", "dataset")
        self.put("shuffle", False)  # torchtitan reads in the order of the data, around and around
        self.put("epochs", 1_000_000)
        if self.take("validation.enabled"):
            self.values.setdefault("validation.dataset", "c4_validation")
            self.source("validation", "dataset_val")
            self.put("run_val_every_n_steps", self.take("validation.freq"), "validation.freq")
            self.validation_steps()
            self.put("batch_size_val", self.take("validation.local_batch_size"), "validation.local_batch_size")
            length = self.take("validation.seq_len")
            if length not in (None, self.values["training.seq_len"]):
                self.tell("validation.seq_len", "validation has rows as long as training")
        else:
            self.taken |= {key for key in self.written if key.startswith("validation.")}

    def validation_steps(self) -> None:
        """There they are the micro-batches of each data-parallel rank, here those of all together."""
        key = "validation.steps"
        if (steps := self.number(key, -1)) == -1:
            return
        replicas = self.number("parallelism.data_parallel_replicate_degree", 1)
        if (shards := self.number("parallelism.data_parallel_shard_degree", -1)) == -1:
            degrees = {
                name: self.number(f"parallelism.{name}_parallel_degree", 1)
                for name in ("tensor", "context", "pipeline")
            }
            others = [f"{name}_parallel_dim {degree}" for name, degree in degrees.items() if degree > 1]
            divided = f", divided by {' and '.join(others)}" if others else ""
            self.tell(
                key,
                f"it counts those of each data-parallel rank, and `max_val_steps` those of all together: multiply {steps} by the number "
                f"of data-parallel ranks, which the file leaves open (the number of processes{divided})",
            )
            shards = replicas = 1
        self.put("max_val_steps", steps * replicas * shards, key)

    def source(self, section: str, ours: str) -> None:
        key, path_key = f"{section}.dataset", f"{section}.dataset_path"
        name, path = str(self.take(key)), self.take(path_key)
        known = {
            "c4": {"source": "c4", "streaming": True},
            "c4_validation": {"source": "c4", "split": "validation", "streaming": True},
            "c4_test": {"source": "tests/assets/c4_test"},
        }
        data = dict(known.get(name, {"source": name}))
        if path and Path(path).expanduser().exists():
            data = {"source": path}
        elif path:  # on the Hub, then, and in c4's layout
            data = {**data, "source": path, **({"subset": "en"} if name.startswith("c4") and name != "c4_test" else {})}
        elif name == "c4_test":
            self.tell(key, "c4_test is a folder in torchtitan's repository: start there, or name your own text")
        elif name not in known:
            self.tell(
                key,
                f"{name} is none of torchtitan's data sets (c4, c4_test, c4_validation); it is taken for a name of ours, a file or a Hub id",
            )
        # Documents of a row see each other there, and none is shortened.
        self.put(
            ours,
            {**data, "packed": True, "split_across_pack": True, "mask_documents": False},
            path_key if path else key,
        )

    def optimizer(self) -> None:
        name, key = str(self.take("optimizer.name")), "optimizer.name"
        numbers = {one: self.take(f"optimizer.{one}") for one in ("lr", "eps", "weight_decay", "beta1", "beta2")}
        betas = [numbers["beta1"], numbers["beta2"]]
        if name == "AdamW":
            self.put("optimizer", {"type": "adamw"}, key)
            for one in ("lr", "eps", "weight_decay"):
                self.put(f"optimizer.{one}", numbers[one], f"optimizer.{one}")
            self.put("optimizer.betas", betas, "optimizer.beta1")
        elif name == "Adam":
            options = {"betas": betas, "eps": numbers["eps"], "weight_decay": numbers["weight_decay"]}
            self.put("optimizer", {"type": "torch.optim.Adam", "lr": numbers["lr"], "options": options}, key)
        else:
            self.tell(key, f"{name} is none of torchtitan's optimizers (AdamW, Adam); set `optimizer`")
        key = "optimizer.early_step_in_backward"
        if not self.take(key):
            return
        if (
            self.number("training.global_batch_size", -1) != -1
            or self.number("parallelism.pipeline_parallel_degree", 1) > 1
        ):
            self.tell(
                key, "with several micro-batches a step it would update with a part of the gradient; it is left out"
            )
            return
        self.put("optimizer_in_bwd", True, key)
        self.put("clip_grad_norm", None, key)

    def schedule(self) -> None:
        ratio, kind = self.take("lr_scheduler.decay_ratio"), str(self.take("lr_scheduler.decay_type"))
        if ratio is None and kind in ("linear", "cosine"):
            self.put("lr_scheduler.type", kind, "lr_scheduler.decay_type")
            return
        if ratio is None:  # the fall begins where the warm-up ends
            steps = self.number("training.steps")
            ratio = max(0, steps - self.number("lr_scheduler.warmup_steps")) / max(steps, 1)
        self.put("lr_scheduler.type", "wsd", "lr_scheduler.decay_ratio")
        self.put("lr_scheduler.decay_ratio", ratio, "lr_scheduler.decay_ratio")
        self.put("lr_scheduler.decay_type", kind, "lr_scheduler.decay_type")

    def batches(self) -> None:
        """The rows of a micro-batch; a pipeline's are cut smaller, and a step has as many of them."""
        key = "training.local_batch_size"
        rows, total = self.number(key), self.number("training.global_batch_size", -1)
        micro = max(1, self.number("parallelism.pipeline_parallel_microbatch_size", 1))
        if self.number("parallelism.pipeline_parallel_degree", 1) > 1:
            if total == -1:
                self.put("gradient_accumulation_steps", max(1, rows // micro), key)
            rows, key = micro, "parallelism.pipeline_parallel_microbatch_size"
        self.put("batch_size", rows, key)
        if total != -1:
            self.put("global_batch_size", total, "training.global_batch_size")
        self.pipeline()

    def pipeline(self) -> None:
        """The schedule of a pipeline and where its stages begin."""
        has_one = self.number("parallelism.pipeline_parallel_degree", 1) > 1
        for name, default in (("schedule", "1F1B"), ("layers_per_stage", None), ("split_points", [])):
            key = f"parallelism.pipeline_parallel_{name}"
            value = self.take(key, default)
            if not has_one or value in (None, []):
                continue
            if name == "split_points":
                value = [_layer_number(one) for one in _listed(value)]
            self.put(f"pipeline_parallel_{name}", value, key)

    def asynchronous(self) -> None:
        """On one rank torchtitan passes over it; here it would be refused."""
        key = "parallelism.enable_async_tensor_parallel"
        if not (asked := self.take(key)):
            return
        if self.number("parallelism.tensor_parallel_degree", 1) > 1:
            self.put("enable_async_tensor_parallel", asked, key)
        else:
            self.tell(key, "it has an effect only with `tensor_parallel_degree` above 1; it is left out")

    def precision(self) -> None:
        """Weights are kept in float32 there, and cast for the computation."""
        compute, reduce = (self.take(f"training.mixed_precision_{what}") for what in ("param", "reduce"))
        words = {"bfloat16": "bf16", "float32": "fp32"}
        for name, value in (("param", compute), ("reduce", reduce)):
            if value not in words:
                self.tell(
                    f"training.mixed_precision_{name}",
                    f"{value} is none of torchtitan's number types (bfloat16, float32)",
                )
        self.put("dtype", words.get(compute, "bf16"), "training.mixed_precision_param")
        self.put("param_dtype", "fp32", "training.mixed_precision_param")
        self.put("reduce_dtype", words.get(reduce, "fp32"), "training.mixed_precision_reduce")

    def memory(self) -> None:
        mode = self.take("activation_checkpoint.mode")
        option = str(self.take("activation_checkpoint.selective_ac_option"))
        self.put("enable_activation_checkpointing", mode != "none", "activation_checkpoint.mode")
        if mode == "selective":
            self.put("ac_mode", "selective", "activation_checkpoint.mode")
            key = "activation_checkpoint.selective_ac_option"
            self.put("ac_option", int(option) if option.isdecimal() else option, key)
        elif mode not in ("none", "full"):
            self.tell(
                "activation_checkpoint.mode", f"{mode} is not there (none, full and selective are); full is taken"
            )

    def logging(self) -> None:
        board, wandb = self.take("metrics.enable_tensorboard"), self.take("metrics.enable_wandb")
        if wandb:
            self.put("metric_logger.type", "wandb", "metrics.enable_wandb")
        elif board:
            self.put("metric_logger.type", "tensorboard", "metrics.enable_tensorboard")
        if wandb and board:
            self.tell(
                "metrics.enable_tensorboard", "a run has one logger beside metrics.jsonl: Weights & Biases is taken"
            )
        every = self.number("profiling.profile_freq", 10)
        if self.take("profiling.enable_profiling"):
            cycles = max(1, self.number("training.steps") // max(every, 1))
            settings = {
                "enabled": True,
                "wait_steps": max(0, every - 4),
                "warmup_steps": 3,
                "active_steps": 1,
                "num_cycles": cycles,
            }
            self.put("profiler", settings, "profiling.enable_profiling")
        if self.take("profiling.enable_memory_snapshot"):
            self.put("profiler.memory_snapshot_every_n_steps", every, "profiling.enable_memory_snapshot")

    def checkpoints(self) -> None:
        interval, kept = self.take("checkpoint.interval"), self.take("checkpoint.keep_latest_k")
        mode = self.take("checkpoint.async_mode", "disabled")
        if not self.take("checkpoint.enable_checkpoint"):
            return  # the end of a run saves all the same
        self.put("save_every_n_steps", interval, "checkpoint.interval")
        self.put("resume_from_checkpoint", True, "checkpoint.enable_checkpoint")
        self.put("enable_async_checkpointing", mode != "disabled", "checkpoint.async_mode")
        if kept:
            self.put("keep_last_n_checkpoints", kept, "checkpoint.keep_latest_k")

    def rest(self) -> None:
        """Everything that was not looked at."""
        for key, value in self.written.items():
            if key in ONLY and value not in ONLY[key][0]:
                self.tell(key, ONLY[key][1])
            elif not (key in ONLY or key in self.taken or key in SILENT or key.partition(".")[0] in OPTIONAL_SECTIONS):
                known = sorted({*PLAIN, *ONLY, *SILENT, *self.taken, *RENAMED})
                self.tell(key, f"torchtitan had no such key in July 2025{did_you_mean(key, known)}; it is left out")
