"""What a model family is: one torch-free record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.models.config_json import checked
from tunesmith.models.weights import Operator
from tunesmith.nn.config import DecoderConfig, RopeConfig

__all__ = ["LLAMA_PLAN", "DecoderConfig", "Family", "RopeConfig", "Scored"]

LLAMA_PLAN = {
    "model.embed_tokens": "embedding",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "head",
}
"""Tensor parallelism in words, one for a module; modules not named are replicated and see whole inputs.

embedding   rows of the table over the ranks, outputs summed
colwise     output features over the ranks, output left cut
rowwise     input features over the ranks, output summed
per_head    a norm of single heads, whole on every rank, fed with that rank's heads: its gradients are summed
all_heads   a norm over all heads at once, its weight cut like them: its mean of squares is summed
fused_qkv   colwise, with queries, keys and values each cut on their own
fused_pair  colwise, with both halves each cut on their own
head        rows of the output layer over the ranks
"""

_NOT_LINEAR = ("embedding", "per_head", "all_heads")


@dataclass(frozen=True)
class Scored:
    """The head of a reward model or classifier."""

    num_labels: int
    per_token: bool
    """Whether every token has scores of its own, or the last one's are the text's."""
    bias: bool


@dataclass(frozen=True)
class Family:
    """Models of one shape. Everything special to it is said here or in its model class."""

    name: str
    architectures: tuple[str, ...]
    """Entries of `architectures` in config.json that it serves."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json that it serves, for files without `architectures`."""
    read_config: Callable[[dict[str, Any]], DecoderConfig]
    """From config.json's content; raises UserError for a key that would change the maths and isn't understood."""
    model: str = "tunesmith.models.decoder:CausalLM"
    """The model class, as module:name."""
    tp_plan: dict[str, str] = field(default_factory=lambda: dict(LLAMA_PLAN))
    """Module name, with * for a layer's number -> word, see LLAMA_PLAN."""
    weights: tuple[Operator, ...] = ()
    """From the names in weight files to the model's and back."""
    classifiers: tuple[str, str] = ("", "")
    """What transformers calls a classifier of texts and one of tokens, where that isn't the language model's name with
    SequenceClassification or TokenClassification for CausalLM."""
    unloadable: tuple[str, ...] = ()
    """Those of the two that transformers has no class for."""
    text_config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """The config.json of the text model within that of a larger one; itself for most."""
    chat_templates: tuple[str, ...] = ()
    """Built-in chat templates for repositories that have none: the first whose special tokens the vocabulary has."""
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Named sizes: "llama3_2/1B" -> the content of config.json."""
    repositories: dict[str, str] = field(default_factory=dict)
    """Named sizes: "llama3_2/1B" -> the Hub repository that the name stands for."""

    def classifier(self, per_token: bool) -> str:
        """The entry of `architectures` in the config.json of a classifier of texts or of tokens."""
        kind = "TokenClassification" if per_token else "SequenceClassification"
        return self.classifiers[per_token] or self.architectures[0].replace("CausalLM", kind)

    def classifier_config(self, hf: dict[str, Any], labels: Sequence[str], per_token: bool) -> dict[str, Any]:
        """config.json's content of this model with a head for these labels, of texts or of tokens."""
        described: dict[str, Any] = {
            "architectures": [self.classifier(per_token)],
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }
        if per_token:
            described["classifier_dropout"] = 0.0  # transformers' default is another one
        return {key: value for key, value in hf.items() if key != "num_labels"} | described

    def label_names(self, hf: dict[str, Any]) -> list[str]:
        """Names of what the scoring head that config.json's content describes gives, in order."""
        scored, named = self.scores(hf), {int(number): str(name) for number, name in (hf.get("id2label") or {}).items()}
        return [named.get(number, f"LABEL_{number}") for number in range(scored.num_labels if scored else 0)]

    def scores(self, hf: dict[str, Any]) -> Scored | None:
        """The scoring head that config.json's content describes; None for a language model."""
        for per_token in (False, True):
            if self.classifier(per_token) in (hf.get("architectures") or ()):
                labels = checked("id2label", hf.get("id2label") or {}) or range(
                    checked("num_labels", hf.get("num_labels") or 2)  # transformers writes neither where there are two
                )
                return Scored(len(labels), per_token, per_token and hf.get("token_classification_bias") is not False)
        return None

    def adaptable_layers(self, num_hidden_layers: int) -> tuple[list[str], list[str]]:
        """Names of all layers that can carry an adapter, and of those the output layers: what `nn.lora` finds in the model."""
        plan = {name: word for name, word in self.tp_plan.items() if word not in _NOT_LINEAR}
        inner = [name for name in plan if "*" in name]
        names = [name.replace("*", str(layer)) for layer in range(num_hidden_layers) for name in inner]
        return names + [name for name in plan if "*" not in name], [name for name in plan if plan[name] == "head"]

    def linear_inputs(self, shape: DecoderConfig) -> dict[str, tuple[int, bool]]:
        """{linear layer, with * for a layer's number: (its inputs, whether tensor parallelism cuts them)}; the output layer is none."""
        found = {}
        for name, word in self.tp_plan.items():
            if word == "rowwise":
                heads = shape.num_attention_heads * shape.head_dim
                found[name] = (heads if ".self_attn." in name else shape.intermediate_size, True)
            elif word not in (*_NOT_LINEAR, "head"):
                found[name] = (shape.hidden_size, False)
        return found
