"""Reading a config.json so that no key that would change the maths is passed over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tunesmith.errors import UserError
from tunesmith.nn.config import RopeConfig
from tunesmith.nn.scheme import Scheme

HARMLESS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache pretraining_tp auto_map name_or_path
    id2label label2id num_labels problem_type task_specific_params finetuning_task output_attentions output_hidden_states
    output_scores return_dict return_dict_in_generate torchscript use_bfloat16 is_decoder is_encoder_decoder
    tokenizer_class prefix cache_implementation attn_implementation sep_token_id decoder_start_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id
    forced_eos_token_id remove_invalid_values tf_legacy_loss chunk_size_feed_forward unsloth_fixed unsloth_version
    classifier_dropout token_classification_bias chat_template special_tokens original_architecture is_llama_config
    """.split()
)
"""Keys that don't change what the model computes. Those that begin with an underscore don't either."""

OFF: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0,),
    "embd_pdrop": (0,),
    "resid_pdrop": (0,),
    "hidden_dropout": (0,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({}, []),
    "tie_encoder_decoder": (False,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "rope_interleaved": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}
"""Keys that are understood only at these values (or null), at which they do nothing."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(kind, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_MUST_BE = {
    key: (words, is_right)
    for words, is_right, keys in (
        (
            "a whole number above 0",
            lambda value: _is_whole(value) and value > 0,
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings original_max_position_embeddings sliding_window sliding_window_pattern "
            "_sliding_window_pattern num_labels",
        ),
        ("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0, "max_window_layers"),
        ("a whole number", _is_whole, "bos_token_id pad_token_id"),
        (
            "a whole number or a list of them",
            lambda value: _is_whole(value) or _is_list_of(_is_whole)(value),
            "eos_token_id",
        ),
        (
            "a number above 0",
            lambda value: _is_number(value) and value > 0,
            "rope_theta rope_local_base_freq query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping factor "
            "attention_factor low_freq_factor high_freq_factor beta_fast beta_slow",
        ),
        ("a number, 0 or more", lambda value: _is_number(value) and value >= 0, "rms_norm_eps initializer_range"),
        ("a number", _is_number, "mscale mscale_all_dim short_mscale long_mscale"),
        (
            "a number above 0, at most 1",
            lambda value: _is_number(value) and 0 < value <= 1,
            "partial_rotary_factor",
        ),
        ("a list of numbers", _is_list_of(_is_number), "short_factor long_factor"),
        (
            "true or false",
            lambda value: isinstance(value, bool),
            "tie_word_embeddings attention_bias mlp_bias use_sliding_window truncate",
        ),
        ("text", _is_text, "hidden_act hidden_activation model_type rope_type type"),
        ("a list of names", _is_list_of(_is_text), "architectures layer_types"),
        (
            "an object",
            lambda value: isinstance(value, dict),
            "rope_scaling rope_parameters full_attention sliding_attention text_config id2label",
        ),
        # Of adapter_config.json:
        ("a whole number above 0", lambda value: _is_whole(value) and value > 0, "r"),
        ("a number", _is_number, "lora_alpha"),
        (
            "an object of whole numbers",
            lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
            "rank_pattern",
        ),
        (
            "an object of numbers",
            lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
            "alpha_pattern",
        ),
        ("text", _is_text, "base_model_name_or_path"),
    )
    for key in keys.split()
}
"""Key -> what its value must be, in words and as a check."""


def checked(key: str, value: Any, where: str = "config.json") -> Any:
    """`value`, where it is what `key` must be; raises UserError that names `where` it stands."""
    words, is_right = _MUST_BE[key]
    if not is_right(value):
        raise UserError(f"{where}: `{key}` is {_shorten(value)}, and must be {words}")
    return value


def check_known(content: dict[str, Any], where: str = "config.json") -> None:
    """Raise UserError for the first value that is not what its key, where we know it, must be; null stands for none."""
    for key, value in content.items():
        if key in _MUST_BE and value is not None:
            checked(key, value, where)


class ConfigJson:
    """Takes keys one by one; `finish` complains about those that are left."""

    def __init__(self, hf: dict[str, Any], defaults: dict[str, Any] | None = None):
        self.hf, self.defaults = hf, defaults or {}
        self.taken: set[str] = set()

    def take(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of these keys that is there and not null, else the family's default, else `default`.

        Raises UserError for a value that is not what the key must be.
        """
        self.taken.update(keys)
        for source in (self.hf, self.defaults):
            for key in keys:
                if source.get(key) is not None:
                    return checked(key, source[key])
        return default

    def take_or_null(self, key: str, default: Any) -> Any:
        """The value of a key for which null means "off"; the default only where the key is absent."""
        self.taken.add(key)
        value = self.hf.get(key, default)
        return None if value is None else checked(key, value)

    def need(self, *keys: str) -> Any:
        value = self.take(*keys)
        if value is None:
            raise UserError(
                f"config.json has no `{keys[0]}`, without which the model's shape is unknown: is the file complete?"
            )
        return value

    def wants_nothing_of(self, *keys: str) -> None:
        """These keys do nothing in this family."""
        self.taken.update(keys)

    def finish(self) -> None:
        for key, value in self.hf.items():
            if key in self.taken or key in HARMLESS or key.startswith("_") or value is None:
                continue
            if key == "quantization_config":
                Scheme.of_config(value)  # how numbers are held, not the shape: `checkpoint.load` heeds it
                continue
            if key not in OFF:
                raise UserError(
                    f"config.json sets `{key}` to {_shorten(value)}, which is not understood and might change what the model computes: remove the key if you know that it doesn't"
                )
            if value not in OFF[key]:
                raise UserError(f"config.json sets `{key}` to {_shorten(value)}, which is not supported")


def read_shape(reader: ConfigJson) -> dict[str, Any]:
    """The fields of DecoderConfig that every family has, under the usual keys."""
    hidden_size, heads = reader.need("hidden_size"), reader.need("num_attention_heads")
    key_value_heads = reader.take("num_key_value_heads", default=heads)
    head_dim = reader.take("head_dim", default=hidden_size // heads)
    if head_dim < 2 or head_dim % 2:
        raise UserError(
            f"config.json: heads have {head_dim} features (`head_dim`), and rotary positions need pairs of them"
        )
    if heads % key_value_heads:
        raise UserError(
            f"config.json: `num_attention_heads` ({heads}) must be a multiple of `num_key_value_heads` ({key_value_heads})"
        )
    eos = reader.take("eos_token_id")
    return dict(
        vocab_size=reader.need("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.need("intermediate_size"),
        num_hidden_layers=reader.need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.take("rms_norm_eps", default=1e-6),
        hidden_act=read_activation(reader),
        tie_word_embeddings=reader.take("tie_word_embeddings", default=False),
        max_position_embeddings=reader.take("max_position_embeddings", default=2048),
        initializer_range=reader.take("initializer_range", default=0.02),
        bos_token_id=reader.take("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=reader.take("pad_token_id"),
    )


def read_activation(reader: ConfigJson) -> str:
    """Gemma's files say hidden_activation, or call the tanh approximation plain gelu; that family corrects it."""
    name = reader.take("hidden_activation", "hidden_act", default="silu")
    known = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
    if name not in known:
        raise UserError(f"config.json: unknown `hidden_act` {name!r}; known are {', '.join(known)}")
    return name


# --- rotary positions -----------------------------------------------------------------------------

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ROPE_KEYS = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    },
    "longrope": {
        *("factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"),
        *("short_mscale", "long_mscale"),
    },
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(
    reader: ConfigJson,
    default_theta: float = 10000.0,
    aliases: dict[str, str] | None = None,
    rotates_part: bool = False,
) -> RopeConfig:
    """Rotary positions from `rope_parameters` (transformers 5 on) or `rope_theta` and `rope_scaling` (before)."""
    theta = reader.take("rope_theta", default=default_theta)
    scaling = reader.take("rope_scaling") or {}
    parameters = {**(reader.take("rope_parameters") or {}), **scaling}
    return rope_config(reader, parameters, theta, aliases, rotates_part)


def rope_config(
    reader: ConfigJson,
    parameters: dict[str, Any],
    theta: float,
    aliases: dict[str, str] | None = None,
    rotates_part: bool = False,
) -> RopeConfig:
    """One dictionary of rotary parameters as a RopeConfig; what it doesn't say comes from the rest of config.json.

    rotates_part: whether the family knows `partial_rotary_factor`. Others rotate whole heads whatever it says, as in
    transformers, where the two together with a stretched rope fail: there it is refused.
    """
    own = {key: value for key, value in parameters.items() if value is not None}
    check_known(own)
    kind = own.get("rope_type") or own.get("type") or "default"
    kind = (aliases or {}).get(kind, kind)
    if kind not in _ROPE_KINDS:
        raise UserError(f"config.json: unknown rope type {kind!r}; known are {', '.join(_ROPE_KINDS)}")
    for key in ("rope_type", "type"):
        own.pop(key, None)
    longest = reader.take("max_position_embeddings", default=2048)
    outer = reader.take("original_max_position_embeddings")
    partial = own.pop("partial_rotary_factor", reader.take("partial_rotary_factor", default=1.0))
    if partial != 1 and not rotates_part:
        if kind != "default":
            raise UserError(
                f"config.json: `partial_rotary_factor` ({partial}) with the rope type {kind!r} is not understood in this family"
            )
        partial = 1.0
    theta, original = own.pop("rope_theta", theta), outer or own.get("original_max_position_embeddings") or longest
    _check_rope(kind, own)
    own.pop("original_max_position_embeddings", None)
    if kind in ("yarn", "longrope"):
        own.setdefault("factor", longest / original)
    for key in ("short_factor", "long_factor"):
        if key in own:
            own[key] = tuple(own[key])
    for key in ("short_mscale", "long_mscale"):
        own.pop(key, None)
    return RopeConfig(
        kind=kind,
        theta=float(theta),
        partial_rotary_factor=partial,
        max_position_embeddings=longest,
        original_max_position_embeddings=original,
        **({} if kind == "default" else own),
    )


def _check_rope(kind: str, own: dict[str, Any]) -> None:
    if kind == "default":
        return
    for key in own:
        if key not in _ROPE_KEYS[kind] | {"original_max_position_embeddings"}:
            raise UserError(f"config.json: the rope type {kind!r} has no `{key}` that is understood")
    for key in _ROPE_NEEDS[kind]:
        if key not in own:
            raise UserError(f"config.json: the rope type {kind!r} needs `{key}`")


# --- windows --------------------------------------------------------------------------------------


def layer_windows(layer_types: list[str], window: int | None, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, from the words that config.json has for them."""
    if len(layer_types) < num_layers:
        raise UserError(f"config.json: `layer_types` names {len(layer_types)} layers of {num_layers}")
    known = {"full_attention": None, "sliding_attention": window}
    for kind in layer_types:
        if kind not in known:
            raise UserError(f"config.json: unknown entry {kind!r} in `layer_types`; known are {', '.join(known)}")
    return tuple(known[kind] for kind in layer_types[:num_layers])


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
