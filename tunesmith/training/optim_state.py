"""An optimizer's state as tensors and values that a checkpoint can hold, and back."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError

_CONTAINERS = {"dict": dict, "list": list, "tuple": tuple}


def take_apart(slot: str, value: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Store a value of an optimizer's state under `slot`, what it contains under `slot::key`: tensors, and what json can hold.

    A tensor of a subclass (8-bit states) is stored as its inner tensors, with what rebuilds it among the values.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) and hasattr(value, "__tensor_flatten__"):
            inner, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
            values["wrapped"][slot] = {
                "type": f"{type(value).__module__}.{type(value).__qualname__}",
                "context": _dtypes_named(context),
                "inner": list(inner),
                "shape": list(value.shape),
                "stride": list(value.stride()),
            }
            tensors.update({f"{slot}::{part}": getattr(value, part).detach() for part in inner})
        else:
            tensors[slot] = value.detach()
    elif value is None or isinstance(value, bool | int | float | str):
        values["plain"][slot] = value
    else:
        kind = type(value).__name__
        items = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list | tuple) else {}
        keys_differ = len({str(key) for key in items}) == len(items)
        if type(value) is not _CONTAINERS.get(kind) or {type(key) for key in items} - {str, int} or not keys_differ:
            raise UserError(
                f"the optimizer's state {slot} can't be saved: it is of the type {kind}, and may be made of tensors, numbers, "
                "texts, lists, tuples and dicts with texts or whole numbers as keys; choose another `optimizer.type`"
            )
        values["nested"][slot] = {"type": kind, "keys": list(items)}
        for key, item in items.items():
            take_apart(f"{slot}::{key}", item, tensors, values)


def put_together(slot: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> Any:
    """What `take_apart` stored under `slot`."""
    if slot in values["plain"]:
        return values["plain"][slot]
    if slot in values["wrapped"]:
        return _rebuild(slot, values["wrapped"][slot], tensors)
    if slot not in values["nested"]:
        return tensors[slot]
    record = values["nested"][slot]
    items = {key: put_together(f"{slot}::{key}", tensors, values) for key in record["keys"]}
    return items if record["type"] == "dict" else _CONTAINERS[record["type"]](items.values())


def _rebuild(slot: str, record: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    module, _, name = record["type"].rpartition(".")
    if module.partition(".")[0] != "torchao":  # a checkpoint must not choose what code runs
        raise UserError(f"the checkpoint's optimizer state {slot} is of the unknown type {record['type']}")
    kind = getattr(importlib.import_module(module), name)
    inner = {part: tensors[f"{slot}::{part}"] for part in record["inner"]}
    context = _dtypes_found(record["context"])
    return kind.__tensor_unflatten__(inner, context, torch.Size(record["shape"]), tuple(record["stride"]))


def _dtypes_named(context: Any) -> Any:
    """The context of a tensor subclass as json can hold it."""
    if isinstance(context, torch.dtype):
        return {"dtype": str(context).removeprefix("torch.")}
    return [_dtypes_named(one) for one in context] if isinstance(context, list | tuple) else context


def _dtypes_found(context: Any) -> Any:
    if isinstance(context, dict):
        return getattr(torch, context["dtype"])
    return [_dtypes_found(one) for one in context] if isinstance(context, list) else context


def place(key: str | int, value: Any, parameter: Tensor, fused: bool) -> Any:
    """Step counters stay on the host, where the unfused optimizers keep them; all else goes to the parameter's device."""
    if isinstance(value, dict):
        return {k: place(k, v, parameter, fused) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(place(key, v, parameter, fused) for v in value)
    if not isinstance(value, Tensor):
        return value
    return value if key == "step" and not fused else value.to(parameter.device)


def as_asked(optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """AdamW's averages in the number type that is asked for now; they may have been saved in another."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return state
    dtype = getattr(optimizer, "state_dtype", parameter.dtype)
    return {key: value.to(dtype) if key.startswith("exp_avg") else value for key, value in state.items()}
