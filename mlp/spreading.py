"""Trainings of many networks on several devices, which train their shares at the same time.

A sweep is divided into one sweep for each device. The fits of a search take the devices in turn. A
network trains on one device only, so its numbers are the same as on one device.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import kernels

from .data.dataset import has_float64


def existing(name: torch.device | str) -> torch.device:
    """The device of this name. ValueError, in one line, if this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; known: cpu, cuda, cuda:1, …") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device {name} was asked for, but this machine has {count} CUDA devices; use device "
            "cpu"
        )
    try:
        if device.type not in ("cpu", "cuda"):
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch raises both
        raise ValueError(
            f"device {name} was asked for, but torch cannot use it on this machine; use device cpu"
        ) from None
    return device


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """ValueError if the device has no tensors of this dtype."""
    if dtype == torch.float64 and not has_float64(device):
        raise ValueError(
            f"device {device} has no float64, which this precision needs; use device cpu, or fp32"
        )


_lock = threading.Lock()
_turns: Iterator[str] | None = None


@contextlib.contextmanager
def over(devices: Sequence[torch.device | str] | None) -> Iterator[None]:
    """A context in which estimators without their own device take these devices in turn.

    None, or no devices, changes nothing for them: `next_device` then returns None. ValueError for a
    device that this machine does not have.
    """
    global _turns
    before = _turns
    names = [str(existing(device)) for device in devices or ()]
    _turns = itertools.cycle(names) if names else None
    try:
        yield
    finally:
        _turns = before


def next_device() -> str | None:
    """The next device inside `over`, for any thread. None outside of it."""
    with _lock:
        return None if _turns is None else next(_turns)


def share(values: Sequence[Any], device: int, devices: int) -> list[Any]:
    """The values for one device's networks: those at device, device + devices, …"""
    return list(values[device::devices])


def side_by_side(functions: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
    """Call each function in its own thread, and return their results in order.

    device: the device of the first function. Under Triton's interpreter, the functions run one
    after another, because it works in one thread only.
    """
    on_cpu = device.type == "cpu"
    interpreted = on_cpu and kernels.backend(torch.empty(1, device=device)) == "triton"
    with ThreadPoolExecutor(1 if interpreted else len(functions)) as pool:
        return [future.result() for future in [pool.submit(one) for one in functions]]


class Gathered:
    """Calls on_epoch(epoch, losses) when all shares have ended the epoch.

    losses: (networks,), on the CPU. networks, devices: their numbers in the whole sweep.
    """

    def __init__(self, on_epoch: Callable[[int, torch.Tensor], Any], networks: int, devices: int):
        self.on_epoch, self.networks, self.devices = on_epoch, networks, devices
        self._lock = threading.Lock()
        self._found: dict[int, dict[int, torch.Tensor]] = {}

    def told(self, device: int, epoch: int, losses: torch.Tensor) -> None:
        """Add one share's losses of an epoch, (networks of the share,)."""
        with self._lock:
            found = self._found.setdefault(epoch, {})
            found[device] = losses
            if len(found) < self.devices:
                return
            together = torch.empty(self.networks, dtype=losses.dtype)
            for i, part in self._found.pop(epoch).items():
                together[i :: self.devices] = part.cpu()
            self.on_epoch(epoch, together)
