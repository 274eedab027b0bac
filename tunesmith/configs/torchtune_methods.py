"""torchtune's preference tuning, knowledge distillation and quantization-aware training in our keys, and what every key needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.configs import _layers as layers
from tunesmith.configs._layers import Node, Place, Problem
from tunesmith.configs.torchtune_names import (
    MODELS_NOT_THERE,
    download_folder,
    downloaded,
    model_of_builder,
    repository,
)

DATA_SECTIONS = {"sft": "conversations", "distill": "conversations", "preference": "pairs of answers"}
"""{recipe of ours that trains as torchtune's do: what it reads}."""

PAIRED_DATASETS: dict[str, dict[str, Any]] = {
    "preference_dataset": {"format": "preference"},
    "stack_exchange_paired_dataset": {"source": "stack_exchange_paired"},
    "hh_rlhf_helpful_dataset": {"source": "hh_rlhf_helpful"},
}
"""Data sets of a chosen and a rejected answer."""


class Component(NamedTuple):
    """What a class of torchtune is here: a type of a section, and its arguments as options of it."""

    type: str
    arguments: Mapping[str, str | None]
    """{argument: our option, None where it changes no number}."""


_CROSS_ENTROPY = Component("cross_entropy", {"num_output_chunks": None, "ignore_index": None})
_KD_CHUNKS = {"num_output_chunks": None, "ignore_index": None}
_KL = {
    "ForwardKL": Component("forward_kl", _KD_CHUNKS),
    "ReverseKL": Component("reverse_kl", _KD_CHUNKS),
    "SymmetricKL": Component("symmetric_kl", _KD_CHUNKS | {"sym_kd_ratio": "sym_kd_ratio"}),
}
_PREFERENCE_LOSSES = {
    "DPOLoss": Component("dpo", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "RSOLoss": Component("hinge", {"gamma": "beta"}),
}
_ANSWER_LOSSES = {
    "CEWithChunkedOutputLoss": _CROSS_ENTROPY,
    "LinearCrossEntropyLoss": _CROSS_ENTROPY,
    "CrossEntropyLoss": _CROSS_ENTROPY,
}
_DIVERGENCES = {
    f"{name}{ending}": component for name, component in _KL.items() for ending in ("Loss", "WithChunkedOutputLoss")
}
_QUANTIZERS = {
    f"{name}{ending}": Component(kind, {"groupsize": "group_size"})
    for name, kind in (
        ("Int8DynActInt4WeightQATQuantizer", "int8_dynamic_int4"),
        ("Int4WeightOnlyQATQuantizer", "int4_weight_only"),
    )
    for ending in ("", "ModuleSwap")
}
_GROUP_SIZE = 256
"""Both quantizers' own."""
_POST_TRAINING = {
    "Int8DynActInt4WeightQuantizer": ("int8_dynamic_int4", 256),
    "Int8DynActInt4WeightQATQuantizer": ("int8_dynamic_int4", 256),
    "Int4WeightOnlyQuantizer": ("int4_weight_only", 128),
    "Int4WeightOnlyQATQuantizer": ("int4_weight_only", 256),
    "Int8WeightOnlyQuantizer": ("int8_weight_only", None),
}
"""{quantizer of `tune run quantize`: (our scheme, its own size of groups)}."""

ADAPTER_ARGUMENTS = (
    "lora_attn_modules apply_lora_to_mlp apply_lora_to_output lora_rank lora_alpha lora_dropout use_dora quantize_base"
).split()

_SIGNS = {
    "reward_and_value_model": "PPO",
    "grpo_samples": "GRPO",
    "tasks": "evaluate",
    "teacher_model": "distill",
    "kd_loss": "distill",
    "ref_checkpointer": "preference",
    "max_new_tokens": "generate",
}
"""{section that only one method's files have: our recipe, or the method that is not there}."""


def method_of_file(tree: Node) -> tuple[str | None, str, Place]:
    """(our recipe for a file of torchtune, or the method that is not there; None: nothing tells; what tells it; and where that stands)."""
    for key, method in _SIGNS.items():
        if key in tree.value:
            return method, key, tree.value[key].place
    for key, known in (("loss", _PREFERENCE_LOSSES), ("dataset", PAIRED_DATASETS)):
        named = layers.find(tree, [key, "_component_"])
        if named is not None and str(named.value).rpartition(".")[2] in known:
            return "preference", str(named.value), named.place
    quantizer = tree.value.get("quantizer")
    if quantizer is not None and quantizer.value is not None and "dataset" not in tree.value:
        named = layers.find(quantizer, ["_component_"])
        if named is None or str(named.value).rpartition(".")[2] not in _QUANTIZERS:
            return "quantize", "quantizer", quantizer.place
    return None, "", tree.place


class Built(NamedTuple):
    """A model builder of torchtune."""

    size: str
    prefix: str
    """lora_, qlora_ or nothing."""
    kind: str
    """base, instruct or nothing."""


class Methods:
    """What walks a tree in torchtune's keys and writes one in ours: the tools, and the keys of single methods."""

    def __init__(self, tree: Node, problems: list[Problem], recipe: str, own_model: Node | None):
        self.tree, self.problems, self.recipe, self.own_model = tree, problems, recipe, own_model
        self.out = Node({}, tree.place)
        self.base = Place(0, "", 0, True)

    def put(self, dotted: str, node: Node) -> None:
        self.out = layers.merge(self.out, layers.nest(dotted.split("."), node), self.problems)

    def report(self, node: Node, text: str) -> None:
        self.problems.append(Problem(node.place, text))

    def harmless(self, dotted: str, node: Node, values: tuple) -> None:
        value = node.plain()
        value = value.get("_component_") if isinstance(value, dict) else value
        if value not in values:
            self.report(node, f"torchtune's `{dotted}` has no counterpart here; leave it out")

    def component(self, node: Node) -> tuple[Node | None, str, dict[str, Node]]:
        """(the node of `_component_`, its value, the other keys) of a section."""
        if not isinstance(node.value, dict):
            return None, "", {}
        entries = dict(node.value)
        named = entries.pop("_component_", None)
        return named, str(named.value) if named is not None else "", entries

    def built(self, named: Node, dotted: str) -> Built | None:
        """The model that a builder of torchtune makes; None, with a problem, where we have none."""
        size, prefix, kind = model_of_builder(dotted)
        if size is not None:
            return Built(size, prefix, kind)
        missing = next((what for family, what in MODELS_NOT_THERE.items() if f".{family}." in dotted), None)
        self.report(
            named,
            f"{missing} is not there yet"
            if missing
            else f"torchtune's model `{dotted}` has no counterpart here; name a folder or Hub id: model=…",
        )
        return None

    def location(self, repo: str) -> str:
        """What a model of torchtune stands for: the folder its `tune download` made, or its Hub repository."""
        folder = download_folder(repo)
        return str(folder) if (folder / "config.json").is_file() else repo

    def stands_for(self, node: Node) -> str:
        """A folder of weights; torchtune's default folder, where it is absent, stands for what belongs there."""
        folder = Path(str(node.value)).expanduser()
        repo = downloaded(folder)
        return self.location(repo) if repo and not folder.exists() else str(folder)

    def weights_of(self, section: str, node: Node) -> dict[str, Node]:
        """The keys of a checkpointer, but for those that no section may use."""
        named, dotted, entries = self.component(node)
        if dotted.endswith("FullModelTorchTuneCheckpointer") and named is not None:
            self.report(
                named, "torchtune's own checkpoint format is not read; use the model's Hugging Face or Meta files"
            )
        ours = {
            "recipe_checkpoint": "has no counterpart; `resume_from_checkpoint=true` goes on from the newest checkpoint in output_dir",
            "adapter_checkpoint": "is `weights.adapter` here: the folder of a PEFT adapter",
        }
        if section != "checkpointer":
            ours["adapter_checkpoint"] = (
                "has no counterpart; merge the adapter with `tune run export`, and name what that writes"
            )
        for key, child in entries.items():
            if key in ours and child.value is not None:
                self.report(child, f"`{section}.{key}` {ours[key]}")
        return {key: child for key, child in entries.items() if key not in ours}

    def arguments(self, ours: str, component: Component, entries: dict[str, Node], own: bool) -> None:
        """The arguments of a component as options of our section.

        own: whether the user named the component. What torchtune's config gave to the one it replaces is left out, then.
        """
        for key, child in entries.items():
            option = component.arguments.get(key, key)
            left_over = key not in component.arguments and own and child.place.shipped
            if option is not None and not left_over:
                self.put(f"{ours}.{option}", child)

    # --- preference tuning ---

    def _loss(self, node: Node) -> None:
        named, dotted, entries = self.component(node)
        if named is None:
            self.put("loss", node)
            return
        known = _PREFERENCE_LOSSES if self.recipe == "preference" else _ANSWER_LOSSES
        component = known.get(dotted.rpartition(".")[2])
        if component is None:
            what = {
                "preference": "preference tuning takes torchtune's DPOLoss and RSOLoss, or one of ours: loss.type=dpo, ipo, simpo, …",
                "distill": "beside `kd_loss`, distillation takes the cross-entropy of the answers",
            }.get(self.recipe, "fine-tuning takes the cross-entropy of the answers")
            self.report(named, f"torchtune's loss `{dotted}` has no counterpart here; {what}")
            return
        self.put("loss.type", Node(component.type, named.place))
        self.arguments("loss", component, entries, own=not named.place.shipped)

    def _ref_checkpointer(self, node: Node) -> None:
        """The reference, where it is another model than the one that training starts from."""
        folder = self.weights_of("ref_checkpointer", node).get("checkpoint_dir")
        if folder is None or self.own_model is not None and folder.place.shipped:
            return
        model = self.own_model or layers.find(self.out, ["model"])
        if model is None or self.stands_for(model) != self.stands_for(folder):
            self.put("reference.model", Node(self.stands_for(folder), folder.place))

    def report_wrong_data(self, named: Node, dotted: str) -> None:
        """A data set for another method."""
        has, wants = "pairs of answers", DATA_SECTIONS.get(self.recipe, "something else")
        if self.recipe == "preference":
            has, wants = "conversations", "pairs of answers, such as those of torchtune.datasets.preference_dataset"
        self.report(named, f"`{dotted}` holds {has}, and the recipe {self.recipe} reads {wants}")

    # --- knowledge distillation ---

    def _teacher_model(self, node: Node) -> None:
        if not isinstance(node.value, dict):
            self.put("teacher.model", node)
            return
        named, dotted, entries = self.component(node)
        for key, child in entries.items():
            if key not in ADAPTER_ARGUMENTS:  # adapters of a teacher are as they begin, and change nothing of it
                self.report(child, f"torchtune's `teacher_model.{key}` has no counterpart here; leave it out")
        found = self.built(named, dotted) if named is not None else None
        if named is None:
            return
        if found is None:
            self.put("teacher.model", Node(layers.UNRESOLVED, named.place))
            return
        self.put("teacher.model", Node(self.location(repository(found.size, found.kind)), named.place))
        if found.prefix == "qlora_" or "quantize_base" in entries and entries["quantize_base"].value:
            self.put("teacher.quantize", Node("nf4", entries.get("quantize_base", named).place))

    def _teacher_checkpointer(self, node: Node) -> None:
        folder = self.weights_of("teacher_checkpointer", node).get("checkpoint_dir")
        if folder is not None and (
            Path(str(folder.value)).expanduser().exists() or not downloaded(Path(str(folder.value)))
        ):
            self.put("teacher.model", folder)

    def _kd_loss(self, node: Node) -> None:
        named, dotted, entries = self.component(node)
        component = _DIVERGENCES.get(dotted.rpartition(".")[2])
        if component is None or named is None:
            names = ", ".join(name for name in _DIVERGENCES if "Chunked" not in name)
            self.report(
                named or node,
                f"`kd_loss` is one of torchtune's {names}, or `divergence.type` of ours, not `{dotted or node.plain()}`",
            )
            return
        self.put("divergence.type", Node(component.type, named.place))
        self.arguments("divergence", component, entries, own=not named.place.shipped)

    # --- quantization-aware training ---

    def _quantizer(self, node: Node) -> None:
        if node.value is None:
            return
        named, dotted, entries = self.component(node)
        if self.recipe == "quantize" and named is not None:
            self._post_training(named, dotted, entries)
            return
        component = _QUANTIZERS.get(dotted.rpartition(".")[2])
        if self.recipe not in DATA_SECTIONS or component is None or named is None:
            trains = self.recipe in DATA_SECTIONS
            names = ", ".join(name for name in _QUANTIZERS if not name.endswith("ModuleSwap"))
            self.report(
                named or node,
                f"torchtune's `quantizer` {dotted or node.plain()} has no counterpart here; "
                + (f"training takes {names}" if trains else "leave it out, and name a model from `tune run quantize`"),
            )
            return
        self.put("qat.type", Node(component.type, named.place))
        self.put("qat.group_size", Node(_GROUP_SIZE, named.place))
        self.put("qat.skip_indivisible", Node(True, named.place))  # as torchtune leaves such layers as they are
        self.arguments("qat", component, entries, own=not named.place.shipped)

    def _post_training(self, named: Node, dotted: str, entries: dict[str, Node]) -> None:
        """A quantizer of torchtune's recipe quantize, as our section `scheme`."""
        if (found := _POST_TRAINING.get(dotted.rpartition(".")[2])) is None:
            known = ", ".join(name for name in _POST_TRAINING if "QAT" not in name)
            self.report(named, f"torchtune's `quantizer` {dotted} has no counterpart here; quantize takes {known}")
            return
        self.put("scheme.type", Node(found[0], named.place))
        if found[1] is not None:
            self.put("scheme.group_size", Node(found[1], named.place))
        self.put("scheme.skip_indivisible", Node(True, named.place))  # as torchtune leaves such layers as they are
        for key, child in entries.items():
            if key == "groupsize":
                self.put("scheme.group_size", child)
            elif key in ("precision", "scales_precision", "padding_allowed", "inner_k_tiles"):
                continue  # how its kernels are fed
            else:
                self.report(child, f"torchtune's `quantizer.{key}` has no counterpart here; leave it out")

    def _fake_quant_after_n_steps(self, node: Node) -> None:
        is_off = "quantizer" in self.tree.value and self.tree.value["quantizer"].value is None
        if node.value is not None and not is_off:
            self.put("qat.fake_quant_after_n_steps", node)

    # --- evaluation ---

    def _max_seq_length(self, node: Node) -> None:
        self.put("max_length" if self.recipe == "evaluate" else "max_seq_length", node)

    def _chat_template(self, node: Node) -> None:
        if self.recipe == "evaluate" and isinstance(node.value, bool):
            self.put("apply_chat_template", node)
        else:
            self.put("chat_template", node)

    def _resume_from_checkpoint(self, node: Node) -> None:
        if self.recipe == "evaluate":
            self.harmless("resume_from_checkpoint", node, (False, None))
        else:
            self.put("resume_from_checkpoint", node)
