"""What is loaded stays loaded: models keep their memory until another one needs it.

Who loads a model asks for room first. While its device has none, the others give their memory back, the one that was not used
for the longest time first. A model on a GPU takes that GPU's memory, one on the CPU the host's, whichever process it is in.
"""

import gc
from typing import Protocol

import psutil
import torch

SPARE = 0.25  # share of a device's memory beside the weights, for activations and caches of keys and values


class Loaded(Protocol):
    """A model in memory. It is loaded again when it is next used."""

    device: torch.device

    def give_back(self) -> None:
        """Release the memory."""
        ...


_held: dict[Loaded, None] = {}  # the one that was not used for the longest time first


def hold(model: Loaded) -> None:
    """Note that a model is in memory, and in use now."""
    _held.pop(model, None)
    _held[model] = None


def drop(model: Loaded) -> None:
    """Note that a model is in memory no more."""
    _held.pop(model, None)


def make_room(device: torch.device, need: float, *, spare: float = SPARE) -> None:
    """Have models give their memory back until `need` bytes, and the share `spare` of the whole, are free on `device`.

    Where all of them have done so it is tried nevertheless: what is needed is an estimate.
    """
    wanted = need + spare * total_memory(device)
    if free_memory(device) < wanted:
        collect()  # what nobody refers to any more
    for model in list(_held):
        if free_memory(device) >= wanted:
            return
        if model.device.type == device.type and (device.type == "cpu" or (model.device.index or 0) == (device.index or 0)):
            drop(model)
            model.give_back()
            collect()


def collect() -> None:
    """Free what nobody refers to, for other processes too: a vLLM beside this one needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that any process can have on a device; of the CPU, the host's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def total_memory(device: torch.device) -> int:
    """A device's memory in bytes, free or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)
