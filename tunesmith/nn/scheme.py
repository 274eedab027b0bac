"""The one table of how linear layers are quantized, and torchao's and bitsandbytes' words for it in a config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tunesmith.errors import UserError


class Kind(NamedTuple):
    """What a scheme does to the weights of a linear layer and, maybe, to its inputs."""

    levels: Literal["int4", "int8", "float8", "nf4"]
    """What a weight is rounded to."""
    rounds_inputs: bool
    """Whether each token's inputs are rounded to 8 bits, too."""
    groups: Literal["always", "allowed", "never"]
    """Whether neighbouring inputs of an output share a scale (otherwise all of them do; NF4 has blocks of 64)."""
    summary: str


KINDS = {
    "int8_weight_only": Kind("int8", False, "allowed", "weights in 8 bits"),
    "int8_dynamic": Kind("int8", True, "never", "weights and each token's inputs in 8 bits"),
    "int4_weight_only": Kind("int4", False, "always", "weights in 4 bits, in groups"),
    "int8_dynamic_int4": Kind("int4", True, "always", "weights in 4 bits, in groups, each token's inputs in 8 (8da4w)"),
    "float8_weight_only": Kind("float8", False, "never", "weights in 8-bit floating point (e4m3)"),
    "float8_dynamic": Kind("float8", True, "never", "weights and each token's inputs in 8-bit floating point (e4m3)"),
    "nf4": Kind("nf4", False, "never", "weights in 4-bit NormalFloat, in blocks of 64, as bitsandbytes has them"),
}

TRAINED = {
    "int8_dynamic_int4": "int8_dynamic_int4",
    "int4_weight_only": "int4_weight_only",
    "float8": "float8_dynamic",
    "float8_weight_only": "float8_weight_only",
}
"""What training can round for: {its name in the section `qat`: scheme}."""

DEFAULT_GROUP_SIZE = 32
NF4_BLOCK = 64


@dataclass(frozen=True)
class Scheme:
    """One of KINDS, with its numbers. All are symmetric: zero is a level, and needs no number of its own."""

    type: str
    group_size: int | None = None
    """Neighbouring inputs of an output that share a scale; None: all of them, or 32 where there must be groups."""

    def __post_init__(self):
        if self.group_size is None and self.kind.groups == "always":
            object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE)
        if self.group_size is not None and self.kind.groups == "never":
            raise ValueError(f"{self.type} has no groups")

    @classmethod
    def trained(cls, type: str, group_size: int) -> Scheme:
        """That of a section `qat`, whose groups float8 has none of."""
        grouped = KINDS[TRAINED[type]].groups != "never"
        return cls(TRAINED[type], group_size if grouped else None)

    @property
    def kind(self) -> Kind:
        return KINDS[self.type]

    @property
    def rounds_inputs(self) -> bool:
        return self.kind.rounds_inputs

    @property
    def multiple(self) -> int:
        """What the inputs of a layer must be a multiple of to be quantized.

        For NF4 the size of its blocks, which else go on from one output to the next: with such ones bitsandbytes (0.50) computes wrong
        products on a CPU. They are read all the same.
        """
        return self.group_size or (NF4_BLOCK if self.type == "nf4" else 1)

    def fits(self, inputs: int) -> bool:
        """Whether so many inputs are whole groups."""
        return inputs % self.multiple == 0

    def __str__(self) -> str:
        return self.type if self.group_size is None else f"{self.type}, groups of {self.group_size}"

    def to_config(self, left_out: Iterable[str], dtype: str = "float32") -> dict[str, Any]:
        """The `quantization_config` of a config.json with which transformers loads such a model through torchao or bitsandbytes.

        left_out: names of the linear layers that are not quantized. dtype: number type that is computed in.
        """
        if self.type == "nf4":
            return _bitsandbytes(left_out, dtype)
        name, data = _TORCHAO[self.type](self.group_size)
        return {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}},
            "modules_to_not_convert": sorted(left_out),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }

    @classmethod
    def of_config(cls, content: Any) -> Scheme:
        """The scheme that a `quantization_config` stands for. Raises UserError for one that isn't ours."""
        method = content.get("quant_method") if isinstance(content, dict) else content
        try:
            scheme = _read_bitsandbytes(content) if method == "bitsandbytes" else _read_torchao(content)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"`quantization_config` names {method}, which is not understood; torchao's weights in symmetric 8 or 4 bits or float8 "
                f"and bitsandbytes' NF4 are ({', '.join(KINDS)}): take the model that this one was made from"
            ) from None
        return scheme


# --- torchao -----------------------------------------------------------------------------------------

_READ_ALIKE = {
    "weight_mapping_type",
    "mapping_type",
    "intx_choose_qparams_algorithm",
    "weight_scale_dtype",
    "scale_dtype",
    "set_inductor_config",
    "group_size",
    "kernel_preference",
    "mm_config",
    "activation_value_lb",
    "weight_only_decode",
    "alg_id",
}
"""Keys that tell how a weight was quantized, or which kernel is liked, not what a weight stands for."""


def _named(kind: str, value: Any) -> dict[str, Any]:
    return {"_type": kind, "_data": value}


def _granularity(group_size: int | None) -> dict[str, Any]:
    if group_size is None:
        return {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group_size}}


def _int4(group_size: int | None) -> dict[str, Any]:
    return {
        "weight_dtype": _named("torch.dtype", "int4"),
        "intx_packing_format": _named("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "intx_choose_qparams_algorithm": _named("IntxChooseQParamsAlgorithm", "AFFINE"),
    }


_NO_CLIPPING = _named("MappingType", "SYMMETRIC_NO_CLIPPING_ERR")


def _int4_weight_only(group_size: int | None) -> tuple[str, dict[str, Any]]:
    data = {"granularity": _granularity(group_size), "mapping_type": _NO_CLIPPING, "scale_dtype": None}
    return "IntxWeightOnlyConfig", _int4(group_size) | data


def _int8_dynamic_int4(group_size: int | None) -> tuple[str, dict[str, Any]]:
    data = {"weight_granularity": _granularity(group_size), "weight_mapping_type": _NO_CLIPPING}
    data |= {"act_mapping_type": _named("MappingType", "ASYMMETRIC"), "weight_scale_dtype": None}
    return "Int8DynamicActivationIntxWeightConfig", _int4(group_size) | data


def _int8_weight_only(group_size: int | None) -> tuple[str, dict[str, Any]]:
    data = {"granularity": _granularity(group_size), "group_size": None, "set_inductor_config": True}
    return "Int8WeightOnlyConfig", data


def _int8_dynamic(_: None) -> tuple[str, dict[str, Any]]:
    data = {"act_mapping_type": _named("MappingType", "SYMMETRIC"), "granularity": _granularity(None)}
    more = {"reduce_range": False, "set_inductor_config": True, "weight_only_decode": False}
    return "Int8DynamicActivationInt8WeightConfig", data | more


def _float8_weight_only(_: None) -> tuple[str, dict[str, Any]]:
    data = {"granularity": _granularity(None), "set_inductor_config": True}
    return "Float8WeightOnlyConfig", data | {"weight_dtype": _named("torch.dtype", "float8_e4m3fn")}


def _float8_dynamic(_: None) -> tuple[str, dict[str, Any]]:
    data = {name: _named("torch.dtype", "float8_e4m3fn") for name in ("activation_dtype", "weight_dtype")}
    data |= {"granularity": [_granularity(None), _granularity(None)], "set_inductor_config": True, "alg_id": 0}
    data |= {
        "packing_format": _named("Float8PackingFormat", "PLAIN"),
        "kernel_preference": _named("KernelPreference", "AUTO"),
    }
    data |= {"activation_value_lb": None, "activation_value_ub": None, "mm_config": {"_version": 1} | _PRODUCT}
    return "Float8DynamicActivationFloat8WeightConfig", data


_PRODUCT = _named("Float8MMConfig", {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False})


_TORCHAO: Mapping[str, Any] = {
    "int8_weight_only": _int8_weight_only,
    "int8_dynamic": _int8_dynamic,
    "int4_weight_only": _int4_weight_only,
    "int8_dynamic_int4": _int8_dynamic_int4,
    "float8_weight_only": _float8_weight_only,
    "float8_dynamic": _float8_dynamic,
}


def _read_torchao(content: Any) -> Scheme:
    """Raises KeyError and its like for what is not understood."""
    chosen = content["quant_type"]["default"]
    data, names = chosen["_data"], {config(DEFAULT_GROUP_SIZE)[0]: kind for kind, config in _TORCHAO.items()}
    kind = names[chosen["_type"]]
    granularity = data.get("weight_granularity") or data.get("granularity")
    grouped = isinstance(granularity, dict) and granularity.get("_type") == "PerGroup"
    scheme = Scheme(kind, granularity["_data"]["group_size"] if grouped else None)
    ours = scheme.to_config(())["quant_type"]["default"]["_data"]
    if content["quant_method"] != "torchao" or content.get("include_input_output_embeddings"):
        raise KeyError("quant_method")
    for key in ours.keys() - _READ_ALIKE:
        if _plain(data.get(key, ours[key])) != _plain(ours[key]):
            raise KeyError(key)
    return scheme


def _plain(value: Any) -> Any:
    """Without versions, and one granularity for a pair of the same."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if key != "_version"}
    if isinstance(value, list):
        return _plain(value[0]) if len(value) == 2 and _plain(value[0]) == _plain(value[1]) else value
    return value


# --- bitsandbytes ------------------------------------------------------------------------------------


def _bitsandbytes(left_out: Iterable[str], dtype: str) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(left_out),
        "llm_int8_threshold": 6.0,
    }


def _read_bitsandbytes(content: Any) -> Scheme:
    if not content.get("load_in_4bit", content.get("_load_in_4bit")) or content["bnb_4bit_quant_type"] != "nf4":
        raise KeyError("bnb_4bit_quant_type")
    return Scheme("nf4")
