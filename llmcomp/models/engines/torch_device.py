"""A device as torch sees it: its types, copies that nothing waits for, its memory, its clock and its speed.

What may not live here: models. `device` is torch's name of it, "cpu", "cuda" or "cuda:1".
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator

import numpy as np

from llmcomp.errors import Error

try:
    import torch
except ImportError as error:
    raise Error(f"the torch engine needs PyTorch ({error}): pip install llmcomp-exact[torch]") from None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def copy_ahead(array: np.ndarray, place: torch.device) -> torch.Tensor:
    """An array on the device, behind the work that it has been given, which nothing waits for: from pinned memory,
    which torch's allocator keeps until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(place, non_blocking=True) if place.type == "cuda" else tensor.to(place)


def copy_behind(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A copy on the CPU, made behind the work that the device has been given; what is returned waits for it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    on_host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return on_host

    return wait


def device_memory(device: str) -> tuple[int, int]:
    """(free, all) bytes of a device; what torch keeps for later use is free."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    kept_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_bytes + kept_bytes, total_bytes


def product_rate(device: str, dtype: str | None = None, width: int = 4096) -> float:
    """Operations a second that a product of two `width` x `width` matrices of random numbers reaches on `device`."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Error(f"device {device!r}: this torch ({torch.__version__}) finds no CUDA device")
    matrix = torch.rand((width, width), device=device).to(DTYPES[dtype or "float32"])
    seconds = []
    for _ in range(3):
        wait_for(device)
        start = time.perf_counter()
        matrix @ matrix
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def wait_for(device: str) -> None:
    """Return when `device` has done all that it was given; at once on the CPU, which never runs behind."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class DeviceStopwatch:
    """Seconds that a device spends on the parts of its work, by its own clock; nothing waits before `seconds`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._parts: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is given to the device inside belongs to part `name`."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        first.record(stream)
        try:
            yield
        finally:
            last.record(stream)
            self._parts.append((name, first, last))

    def seconds(self) -> dict[str, float]:
        """By part, of all since the last call."""
        wait_for(self._device)
        total: dict[str, float] = {}
        for name, first, last in self._parts:
            total[name] = total.get(name, 0.0) + first.elapsed_time(last) / 1000
        self._parts.clear()
        return total


def device_name(device: str) -> str:
    """What a device calls itself; of a CPU its architecture."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


def device_peak_bytes(device: str) -> int:
    """The most that tensors have taken on a device since this was last asked."""
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(found)
