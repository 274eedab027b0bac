"""The device and its memory."""

import pytest
import torch

from tunesmith.errors import UserError
from tunesmith.parallel.device import (
    device_name,
    empty_cache,
    peak_memory_gib,
    pick_device,
    reset_peak_memory,
    rng_state,
    set_rng_state,
    supports_bf16,
    supports_float8,
    synchronize,
    total_memory_gib,
)

CPU = torch.device("cpu")


def test_peak_memory_of_the_cpu_rises_and_can_be_reset():
    reset_peak_memory(CPU)
    before = peak_memory_gib(CPU)
    block = torch.ones(64 * 2**20 // 4)
    after = peak_memory_gib(CPU)
    assert after - before == pytest.approx(64 / 1024, abs=0.02)
    del block
    reset_peak_memory(CPU)
    assert peak_memory_gib(CPU) <= after
    assert 0 < after < total_memory_gib(CPU)


def test_devices_are_found_and_absent_ones_named():
    assert pick_device("cpu") == CPU
    there = pick_device("auto")
    assert device_name(there)
    synchronize(there)
    empty_cache(there)
    assert supports_bf16(CPU) and supports_float8(CPU) and not supports_float8(torch.device("mps"))
    absent = "xpu" if there.type != "xpu" else "cuda"
    for name in (absent, f"{there.type}:99", "tpu", "cpu:1"):
        with pytest.raises(UserError, match=rf"device={name} is not here: this machine has .*cpu; choose one of them"):
            pick_device(name)


def test_random_state_comes_back():
    device = pick_device("auto")
    states = rng_state(device)
    first = torch.rand(4), torch.rand(4, device=device)
    set_rng_state(device, states)
    assert torch.equal(torch.rand(4), first[0]) and torch.equal(torch.rand(4, device=device), first[1])
    set_rng_state(CPU, states | {"cuda": states["cpu"]})
