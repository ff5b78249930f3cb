"""The weights in a folder of Hugging Face's layout, by safetensors and torch's weights_only loader. No models."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from llmcomp.errors import Error, named, reason, shown
from llmcomp.models.engines.torch_device import DTYPES

try:
    import torch
    from safetensors.torch import load_file
except ImportError as error:
    raise Error(
        f"the torch engine needs PyTorch and transformers ({error}): pip install llmcomp-exact[torch]"
    ) from None

# Buffers that old checkpoints store beside the weights.
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def read_host_weights(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in host memory, as they are stored; may run on any thread beside a model at work.

    `load_torch` itself may not: while transformers makes a module, it changes torch's default dtype for all threads.
    """
    folder = Path(folder)
    paths = [folder / "model.safetensors"]
    if not paths[0].is_file():
        paths = sorted(folder.glob("model-*-of-*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise Error(f"{folder}: found neither model.safetensors nor pytorch_model.bin")
    weights: dict[str, torch.Tensor] = {}
    for path in paths:
        if path.suffix == ".bin":
            weights |= _read_pickle(path)
            continue
        try:
            # Mapped tensors are read when they are first used; a copy is read now.
            weights |= {name: tensor.clone() for name, tensor in load_file(path).items()}
        # As in `load_torch`.
        except Exception as error:
            raise Error(f"{path}: cannot read these weights: {reason(error)}") from error
    return weights


def read_pickled_weights(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of pytorch_model.bin or of its shards as arrays; bfloat16 is widened to float32.

    Read by torch's weights_only loader, which runs no code from the file. Buffers that are not weights are left out.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise Error(f"{folder}: found no pytorch_model.bin")
    weights: dict[str, np.ndarray] = {}
    for path in paths:
        for name, tensor in _read_pickle(path, mapped=True).items():
            if name.endswith(_BUFFERS):
                continue
            if tensor.dtype not in DTYPES.values():
                found = str(tensor.dtype).removeprefix("torch.")
                raise Error(f"{path}: {named(name)} has dtype {found}, expected one of {', '.join(DTYPES)}")
            weights[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return weights


def _read_pickle(path: Path, mapped: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of one pickled state, by name, parameters as plain tensors. No code of the file is run.

    `Error` for a file that is torn or foreign, or holds anything but dense tensors that have all their bytes there.
    """
    # Files of torch before 1.6 are no zip archives, and cannot be mapped.
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    # A torn or foreign file ends in errors of zipfile, pickle or torch.
    except Exception as error:
        if "weights_only" in str(error):  # torch's message tells how to run the file's code all the same
            asked = re.search(r"GLOBAL (\S+)", str(error))
            found = f"asks for {named(asked[1])}" if asked else "is torn or no pickle"
            raise Error(f"{path}: it {found}; expected a pickle of nothing but tensors") from None
        raise Error(f"{path}: torch cannot read these weights: {reason(error)}") from error
    if not isinstance(state, dict):
        raise Error(f"{path}: found a pickled {type(state).__name__}, expected tensors by their names")
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise Error(f"{path}: {shown(name)} is a {type(value).__name__}, expected tensors by their names")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise Error(f"{path}: {named(name)} is {kind}; expected a dense tensor of numbers")
        # A stride of 0 lets a few bytes stand for any number of them.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise Error(f"{path}: {named(name)}, shape {list(value.shape)}, has fewer bytes than values")
        tensors[name] = value.detach()
    return tensors
