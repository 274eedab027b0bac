"""From gradients to updates: the schedule, clipping, loss scaling, and the optimizer step in backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.hf import outgoing as outgoing_part
from tunesmith.checkpoint.tensor_files import StoredTensor
from tunesmith.checkpoint.write import Outgoing
from tunesmith.configs.shared import TrainSettings
from tunesmith.errors import UserError
from tunesmith.nn.part import Part, local_tensor, parameter_parts, speaks_for
from tunesmith.parallel.gradients import norm_over, sum_partial
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.whole import Wholes
from tunesmith.training.optim_state import as_asked, place, put_together, take_apart
from tunesmith.training.optimizers import Parameters, build_optimizers
from tunesmith.training.schedule import lr_factor

_SMALLEST_LOSS_SCALE = 2.0**-10


class Optimizer:
    """The optimizer of a run. `set_step`, a backward pass of `scaled(loss)` for each micro-batch, then `step`."""

    def __init__(self, model: nn.Module, config: TrainSettings, total_steps: int, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.total_steps = total_steps
        self.may_skip = False
        self._model = model
        self._trained: Parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not mesh.max([len(self._trained)])[0]:
            raise UserError("no parameter is trained: `weights.target_modules` matches nothing that can learn")
        # Updates are elementwise, so each rank makes those of its part, as plain tensors: any optimizer understands them.
        self._parameters: Parameters = [(n, _own_part(p)) for n, p in self._trained]
        self._parts, self._speaks = parameter_parts(model), speaks_for(model)
        self._copies: dict[str, str] = getattr(model, "copies", {})
        cut = [name for name, part in self._parts.items() if not part.is_whole]
        self._cut = {name for names in mesh.ranks.gather(cut) for name in names}
        """Parameters that some rank holds a part of."""
        self._scaler = torch.amp.GradScaler(mesh.device.type) if config.dtype == "fp16" else None
        if self._scaler:  # which begins to work when it scales something: stages of a pipeline have no loss
            self._scaler.scale(torch.zeros((), device=mesh.device))
        self._lengths: dict[str, Tensor] = {}
        if config.optimizer_in_bwd:
            self._optimizers = [o for p in self._parameters for o in self._build([p])]
            self._update_in_backward()
        else:
            self._optimizers = self._build(self._parameters)
        self._groups_at_start = [_numbers(group) for group in self._groups()]

    def _build(self, parameters: Parameters) -> list[torch.optim.Optimizer]:
        config = self.config.optimizer
        return build_optimizers(parameters, config, lambda: self._wholes)

    @cached_property
    def _wholes(self) -> Wholes:
        return Wholes(self._model, self.mesh)

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a forward pass: fp16 computes under autocast over float32 weights, others as the weights are."""
        if self.config.dtype == "fp16":
            return torch.autocast(self.mesh.device.type, torch.float16)
        return nullcontext()

    def set_step(self, step: int) -> float:
        """Set the learning rate of `step` everywhere, before its backward pass may need it; return it."""
        lr = self.config.optimizer.lr * lr_factor(self.config.lr_scheduler, step, self.total_steps)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # a compiled step would be compiled again for another number
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
        return lr

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate in place of the loss."""
        return self._scaler.scale(loss) if self._scaler else loss

    def step(self, finite_loss: bool) -> tuple[float | None, bool]:
        """Clip and update. Returns the gradient norm before clipping and whether the update was made.

        It is not made where loss or norm is not finite or the norm exceeds `skip_grad_norm_above`; `may_skip` says
        whether that is allowed by the configuration or by loss scaling.
        """
        if self.config.optimizer_in_bwd:
            norm = norm_over(self._model, self._lengths, self.mesh)
            self._lengths.clear()
            return norm, finite_loss and math.isfinite(norm)
        self._take_gradients()
        if self._scaler:
            for optimizer in self._optimizers:
                self._scaler.unscale_(optimizer)
        lengths = {name: _length(p.grad) for name, p in self._parameters if p.grad is not None}
        norm = norm_over(self._model, lengths, self.mesh)
        finite = finite_loss and math.isfinite(norm)
        too_large = self.config.skip_grad_norm_above is not None and norm > self.config.skip_grad_norm_above
        if finite and not too_large:
            if self.config.clip_grad_norm is not None and norm > self.config.clip_grad_norm:
                gradients = [p.grad for _, p in self._parameters if p.grad is not None]
                for gradient in gradients:
                    gradient.mul_(self.config.clip_grad_norm / norm)
            for optimizer in self._optimizers:
                optimizer.step()
        self.may_skip = (finite and too_large) or (finite_loss and self._scaler is not None)
        self._update_loss_scale()
        for (_, trained), (_, part) in zip(self._trained, self._parameters):
            trained.grad = part.grad = None
        return norm, finite and not too_large

    def _take_gradients(self) -> None:
        """Give each part its gradient, complete: of parameters that are whole on all tensor-parallel ranks, the ranks have summands."""
        for (_, trained), (_, part) in zip(self._trained, self._parameters):
            if trained is not part:
                part.grad = None if trained.grad is None else local_tensor(trained.grad)
        sum_partial(self._model, dict(self._parameters), self.mesh)

    def _update_loss_scale(self) -> None:
        if self._scaler is None:
            return
        states = self._scaler._per_optimizer_states.values()
        found = [one for state in states for one in state["found_inf_per_device"].values()]
        if not found:  # this rank trains nothing, but its scale must follow the others'
            found = [torch.zeros((), device=self.mesh.device)]
            self._scaler._per_optimizer_states[0]["found_inf_per_device"][self.mesh.device] = found[0]
        anywhere = self.mesh.max([max(map(float, found), default=0.0)])[0]  # an overflow anywhere is one everywhere
        for one in found:
            one.fill_(anywhere)
        self._scaler.update()
        if self._scaler.get_scale() < _SMALLEST_LOSS_SCALE:
            raise UserError(
                "gradients overflow fp16 at every loss scale: use `dtype: bf16` or `fp32`, or a lower `optimizer.lr`"
            )

    def _update_in_backward(self) -> None:
        """Step each parameter as soon as its gradient is complete, and free the gradient."""
        for (name, trained), (_, part), optimizer in zip(self._trained, self._parameters, self._optimizers):

            def update(
                trained: Tensor, name: str = name, part: Tensor = part, optimizer: torch.optim.Optimizer = optimizer
            ) -> None:
                assert trained.grad is not None
                part.grad = local_tensor(trained.grad)
                sum_partial(self._model, {name: part}, self.mesh)
                self._lengths[name] = _length(part.grad)
                # An update with a gradient that is not finite would ruin the weights before the step can be refused.
                if torch.isfinite(self._lengths[name]):
                    optimizer.step()
                trained.grad = part.grad = None

            trained.register_post_accumulate_grad_hook(update)

    # --- what a checkpoint keeps ---------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Outgoing], dict[str, Any]]:
        """Everything a resumed run needs: tensors by `parameter::key`, cut as the parameter is, and plain values.

        Of parameter groups, what the optimizer itself has changed is kept (some count or estimate there). A tensor in
        another shape than its parameter (8-bit blocks, factored moments), where parameters are cut, is kept by each rank
        for itself, as `parameter::key@rank`.
        """
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {
            "loss_scale": self._scaler.state_dict() if self._scaler else None,
            "plain": {},
            "wrapped": {},
            "nested": {},
            "groups": [
                {key: value for key, value in _numbers(group).items() if value != at_start.get(key)}
                for group, at_start in zip(self._groups(), self._groups_at_start)
            ],
        }
        names = self._name_of
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                if names[id(parameter)] not in self._copies:
                    take_apart(names[id(parameter)], dict(state), tensors, values)
        values["wrapped"] = {self._own_slot(slot): record for slot, record in values["wrapped"].items()}
        outgoing: dict[str, Outgoing] = {}
        for slot, tensor in tensors.items():
            name = slot.partition("::")[0]
            part, speaks = self._parts[name], self._speaks(name)
            if tensor.ndim and tensor.shape == part.local_shape:
                outgoing[slot] = outgoing_part(tensor, part, speaks)
            elif tensor.numel() == 1 or name not in self._cut:
                outgoing[slot] = outgoing_part(tensor, Part.whole(tensor.shape), speaks)
            else:
                outgoing[self._own_slot(slot)] = outgoing_part(tensor, Part.whole(tensor.shape), True)
        return outgoing, values

    def load_state(self, stored: Mapping[str, StoredTensor], values: dict[str, Any], same_layout: bool = True) -> None:
        """Go on from what `state` gave, on any layout; each rank reads its part. same_layout: whether it is the one that it was saved on."""
        if self._scaler and values["loss_scale"]:
            self._scaler.load_state_dict(values["loss_scale"])
        for group, changed in zip(self._groups(), values["groups"]):
            group.update(changed)
        saved = {slot for slot in values["nested"] if "::" not in slot}
        trained = {name for names in self.mesh.ranks.gather([name for name, _ in self._parameters]) for name in names}
        if unknown := saved - trained:
            raise UserError(
                f"the checkpoint holds optimizer states of parameters that are not trained now, such as {min(unknown)}"
            )
        if not same_layout and any("@" in slot for slot in (*stored, *values["wrapped"])):
            raise UserError(
                f"the states of `optimizer.type: {self.config.optimizer.type}` were saved by ranks that each held blocks of "
                "their own: go on with the layout they were saved on"
            )
        wrapped = {slot.partition("@")[0]: one for slot, one in values["wrapped"].items() if self._is_own(slot)}
        values = {**values, "wrapped": wrapped}
        slots: dict[str, list[str]] = {}
        for slot in filter(self._is_own, stored):
            slots.setdefault(slot.partition("::")[0], []).append(slot)
        for optimizer in self._optimizers:
            fused = bool(optimizer.defaults.get("fused"))
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self._name_of[id(parameter)]
                    original = self._copies.get(name, name)
                    if original in saved:
                        own = {
                            slot.partition("@")[0]: self._read(slot, stored[slot], name)
                            for slot in slots.get(original, ())
                        }
                        state = put_together(original, own, values)
                        state = {k: place(k, v, parameter, fused) for k, v in state.items()}
                        optimizer.state[parameter] = as_asked(optimizer, parameter, state)

    def _own_slot(self, slot: str) -> str:
        """The name of what each rank keeps for itself."""
        return slot if self.mesh.world_size == 1 else f"{slot}@{self.mesh.rank}"

    def _is_own(self, slot: str) -> bool:
        return "@" not in slot or slot == self._own_slot(slot.partition("@")[0])

    def _read(self, slot: str, stored: StoredTensor, name: str) -> Tensor:
        part = self._parts[name]
        is_cut = "@" not in slot and tuple(stored.shape) == part.shape
        tensor = torch.empty(part.local_shape if is_cut else stored.shape, dtype=stored.dtype)
        stored.read_into(tensor, part if is_cut else None)
        return tensor

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    @property
    def _name_of(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self._parameters}


def _length(gradient: Tensor) -> Tensor:
    """In float32: bfloat16 would leave two or three digits of the norm.

    Row by row, then of the rows: in one go the CPU adds up so many squares in so few sums that a large matrix comes out
    too short, by 2e-5 of 1.6 million numbers, by 4 % of 260 million, and less so the smaller the parts it is cut into.
    """
    rows = gradient
    if gradient.ndim > 1:
        along = min(range(gradient.ndim), key=gradient.stride)  # neighbours in memory
        rows = torch.linalg.vector_norm(gradient, dim=along, dtype=torch.float32)
    return torch.linalg.vector_norm(rows, dtype=torch.float32)


def _own_part(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself or, where `fully_shard` cut it, this rank's part: the same memory."""
    local = local_tensor(parameter.detach())
    return nn.Parameter(local) if hasattr(parameter, "to_local") else parameter


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group holds besides parameters and the learning rate, as far as json can hold it."""
    return {
        key: value
        for key, value in group.items()
        if key not in ("params", "lr") and isinstance(value, bool | int | float | str)
    }


def build_optimizer(model: nn.Module, config: TrainSettings, total_steps: int, mesh: Mesh) -> Optimizer:
    """The optimizer of a run over the trained parameters of `model`; `total_steps` is what the schedule spans."""
    return Optimizer(model, config, total_steps, mesh)
