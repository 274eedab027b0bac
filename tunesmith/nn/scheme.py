"""How a quantized linear layer rounds, and torchao's words for it in a config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import UserError

INTEGER_TYPES = ("int8_dynamic_int4", "int4_weight_only")


_SYMMETRIC = "SYMMETRIC_NO_CLIPPING_ERR"
_READ_ALIKE = (
    "weight_mapping_type",
    "mapping_type",
    "intx_choose_qparams_algorithm",
    "weight_scale_dtype",
    "scale_dtype",
)
"""Keys that tell how a weight was quantized, not how it is read."""


@dataclass(frozen=True)
class Scheme:
    """4-bit weights in groups, symmetric; with int8_dynamic_int4 every token's inputs in 8 bits, asymmetric, too."""

    type: str
    group_size: int = 32
    """Neighbouring inputs of an output that share a scale."""

    @property
    def rounds_inputs(self) -> bool:
        return self.type == "int8_dynamic_int4"

    def __str__(self) -> str:
        return f"{self.type}, groups of {self.group_size}"

    def to_config(self, left_out: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of a config.json with which transformers loads such a model through torchao.

        left_out: names of the linear layers that are not quantized.
        """
        group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": self.group_size}}
        common = {
            "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
            "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
            "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
        }
        symmetric, asymmetric = ({"_type": "MappingType", "_data": name} for name in (_SYMMETRIC, "ASYMMETRIC"))
        if self.rounds_inputs:
            name = "Int8DynamicActivationIntxWeightConfig"
            data = {"weight_granularity": group, "weight_mapping_type": symmetric, "act_mapping_type": asymmetric}
            data |= {"weight_scale_dtype": None}
        else:
            name = "IntxWeightOnlyConfig"
            data = {"granularity": group, "mapping_type": symmetric, "scale_dtype": None}
        return {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": name, "_version": 2, "_data": common | data}},
            "modules_to_not_convert": sorted(left_out),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }

    @classmethod
    def of_config(cls, content: Any) -> Scheme:
        """The scheme that a `quantization_config` stands for. Raises UserError for one that isn't ours."""
        try:
            chosen = content["quant_type"]["default"]
            data = chosen["_data"]
            kind = {
                "Int8DynamicActivationIntxWeightConfig": "int8_dynamic_int4",
                "IntxWeightOnlyConfig": "int4_weight_only",
            }[chosen["_type"]]
            group = data["weight_granularity" if kind == "int8_dynamic_int4" else "granularity"]["_data"]["group_size"]
            scheme = cls(kind, group)
            ours = scheme.to_config(())["quant_type"]["default"]["_data"]
            if content["quant_method"] != "torchao" or any(
                data.get(key, ours[key]) != ours[key] for key in ours if key not in _READ_ALIKE
            ):
                raise KeyError
        except (KeyError, TypeError):
            method = content.get("quant_method") if isinstance(content, dict) else content
            raise UserError(
                f"`quantization_config` names {method}, which is not understood; torchao's 4-bit weights in symmetric groups are "
                f"({', '.join(INTEGER_TYPES)}): take the model that this one was made from"
            ) from None
        return scheme
