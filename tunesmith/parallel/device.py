"""The device: the one file that calls an accelerator (through torch.accelerator: CUDA, ROCm, XPU, MPS, NPU) or asks the system about memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import UserError

_GIB = 2**30


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: a type such as cuda or cpu, cuda:1, or auto for the accelerator if there is one.

    Under torchrun a type without a number means this process's own (LOCAL_RANK). Raises UserError for a device that is not here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind, _, number = name.partition(":")
    if kind == "auto":
        kind = accelerator.type if accelerator else "cpu"
    if kind == "cpu" and not number:
        return torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator else 0
    index = number or os.environ.get("LOCAL_RANK", "0")
    if not accelerator or kind != accelerator.type or not index.isdecimal() or int(index) >= count:
        there = ", ".join([f"{accelerator.type}:{i}" for i in range(count)] + ["cpu"]) if accelerator else "cpu"
        raise UserError(f"device={name} is not here: this machine has {there}; choose one of them or device=auto")
    torch.accelerator.set_device_index(int(index))
    return torch.device(kind, int(index))


def device_name(device: torch.device) -> str:
    """What a person calls the device, such as NVIDIA H200 or the processor's name."""
    if device.type == "cpu":
        return _processor_name()
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def supports_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself; every CPU does (slowly, where it must emulate it)."""
    if device.type == "cpu":
        return True
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    module = torch.get_device_module(device)
    if device.type == "cuda":
        return module.is_bf16_supported(including_emulation=False)
    return module.is_bf16_supported() if hasattr(module, "is_bf16_supported") else True


def has_symmetric_memory(device: torch.device) -> bool:
    """Whether devices of this kind may read each other's memory in the middle of a kernel, and torch was built for it."""
    return device.type == "cuda" and torch.distributed.is_nccl_available()


def reads_memory_of(device: torch.device, index: int) -> bool:
    """Whether the device reads the memory of the one numbered `index` of the same kind and machine directly (NVLink, or peers on PCIe)."""
    return index < torch.accelerator.device_count() and torch.cuda.can_device_access_peer(device, index)


def supports_float8(device: torch.device) -> bool:
    """Whether the device holds 8-bit floating-point numbers; products of them are computed in wider ones."""
    return device.type != "mps"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give unused memory of the allocator back."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory in GiB since the start or the last reset: allocated tensors on an accelerator, resident memory of the process on a CPU."""
    if device.type == "cpu":
        return _peak_resident_bytes() / _GIB
    if device.type == "mps":  # its allocator keeps no high-water mark
        return torch.mps.driver_allocated_memory() / _GIB
    return torch.accelerator.max_memory_allocated(device) / _GIB


def reset_peak_memory(device: torch.device) -> None:
    """Let peak_memory_gib count from now; where the system does not permit that, it counts from the start of the process."""
    if device.type == "cpu":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # not Linux, or not permitted
    elif device.type != "mps":
        torch.accelerator.reset_peak_memory_stats(device)


def memory_counts(device: torch.device) -> dict[str, float]:
    """What the device's allocator counted besides `peak_memory_gib`: peaks in GiB since the last reset, and how often in
    all it had to try again or ran out of memory. Empty where the device keeps no such counts."""
    if device.type in ("cpu", "mps"):
        return {}
    counts = torch.accelerator.memory_stats(device)
    return {
        "peak_active_memory_gib": counts.get("active_bytes.all.peak", 0) / _GIB,
        "peak_reserved_memory_gib": counts.get("reserved_bytes.all.peak", 0) / _GIB,
        "num_alloc_retries": counts.get("num_alloc_retries", 0),
        "num_ooms": counts.get("num_ooms", 0),
    }


def total_memory_gib(device: torch.device) -> float:
    """Memory of the device in GiB."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    if device.type == "mps":
        return torch.mps.recommended_max_memory() / _GIB
    return torch.accelerator.get_memory_info(device)[1] / _GIB


def start_memory_history(device: torch.device) -> bool:
    """Let the allocator remember who asked for what; False where the device can't (all but CUDA and ROCm)."""
    if device.type != "cuda":
        return False
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    return True


def write_memory_snapshot(path: Path) -> None:
    """Write what memory holds and its history, for https://pytorch.org/memory_viz; the history goes on."""
    torch.cuda.memory._dump_snapshot(str(path))


def stop_memory_history() -> None:
    torch.cuda.memory._record_memory_history(enabled=None)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of the global random generators that a run uses: the CPU's and the device's own."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        module = torch.get_device_module(device)
        states[device.type] = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return states


def set_rng_state(device: torch.device, states: dict[str, Tensor]) -> None:
    """Put back what `rng_state` returned; the state of another kind of device is left out."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type in states and device.type != "cpu":
        module, state = torch.get_device_module(device), states[device.type].cpu()
        module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                count = torch.get_num_threads()
                return f"{line.partition(':')[2].strip()}, {count} thread{'s' * (count != 1)}"
    import platform

    return platform.processor() or platform.machine()


def start_flight_recorder(folder: str) -> None:
    """Let NCCL keep its last collectives, and write them below `folder` when one takes too long. Before the process group starts."""
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        os.environ.setdefault(name, "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, os.path.join(folder, "flight-"))


def flight_record() -> bytes:
    """The collectives that NCCL kept, for `torchfrtrace`; empty where it does not run."""
    dump = getattr(torch.distributed.distributed_c10d, "_dump_nccl_trace", None)
    return dump() if dump is not None and torch.cuda.is_available() else b""
