"""`auto` takes what both sides have."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitlearn.model import devices
from splitlearn.training.precision import Side, auto_precision

NEW_GPU = Side("cuda:0", "float32", has_bfloat16=True)
OLD_GPU = Side("cuda:0", "float32", has_bfloat16=False)
CPU = Side("cpu", "float32", has_bfloat16=False)
AMX_CPU = Side("cpu", "float32", has_bfloat16=True)
BF16_ON_CPU = Side("cpu", "bfloat16", has_bfloat16=False)
OTHER = Side("mps", "float32", has_bfloat16=False)


@pytest.mark.parametrize(
    ("here", "trunk", "expected"),
    [
        (NEW_GPU, NEW_GPU, "bfloat16"),
        (AMX_CPU, NEW_GPU, "bfloat16"),
        (BF16_ON_CPU, NEW_GPU, "bfloat16"),
        (BF16_ON_CPU, BF16_ON_CPU, "bfloat16"),
        (OLD_GPU, OLD_GPU, "float16"),
        (OLD_GPU, NEW_GPU, "float16"),
        (CPU, NEW_GPU, "float32"),
        (NEW_GPU, CPU, "float32"),
        (AMX_CPU, OLD_GPU, "float32"),
        (CPU, CPU, "float32"),
        (OTHER, NEW_GPU, "float32"),
    ],
    ids=str,
)
def test_auto_is_the_best_that_both_sides_have(here: Side, trunk: Side, expected: str) -> None:
    assert auto_precision(here, trunk) == expected


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_bfloat16_from_ampere_on(monkeypatch: Any, capability: tuple[int, int], has: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.has_bfloat16(torch.device("cuda", 0)) is has


@pytest.mark.parametrize(
    ("amx", "avx512", "has"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_a_processor_has_it_with_instructions_of_its_own(
    monkeypatch: Any, amx: bool, avx512: bool, has: bool
) -> None:
    told = SimpleNamespace(_is_amx_tile_supported=lambda: amx, _is_avx512_bf16_supported=lambda: avx512)
    monkeypatch.setattr(torch, "cpu", told)
    assert devices.has_bfloat16(torch.device("cpu")) is has


def test_what_this_torch_says_of_this_processor_is_understood() -> None:
    assert devices.has_bfloat16(torch.device("cpu")) in (True, False)
    assert devices.has_bfloat16(torch.device("meta")) is False
