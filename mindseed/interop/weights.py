"""Files of weights: safetensors, one or in shards with an index, read without holding more than a tensor twice."""
from __future__ import annotations

import contextlib
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.base.files import read_json, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INDEX = "model.safetensors.index.json"
NOISE = "{file} is truncated or not a file that torch.save wrote ({why}); copy it again"


def save_tensors(tensors: dict[str, Tensor], folder: Path, *, max_shard: int) -> None:
    """One file, or, where that would be larger than `max_shard` bytes, shards and the index that names them."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, x in tensors.items():
        if shards[-1] and sum(y.nbytes for y in shards[-1].values()) + x.nbytes > max_shard:
            shards.append({})
        shards[-1][name] = x
    if len(shards) == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    home = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        home |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
                                "weight_map": home})


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names; else the same of pytorch_model.bin."""
    for single, index in ((folder / "model.safetensors", folder / INDEX),
                          (folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json")):
        if single.exists():
            return [single]
        if index.exists():
            home = read_json(index, {"weight_map": {str: str}})["weight_map"]
            files = [folder / name for name in sorted(set(home.values()))]
            if not home:
                raise UserError(f"{index} names no tensor; restore the file")
            if away := sorted({name for name in home.values() if Path(name).name != name}):
                raise UserError(f"{index} names {', '.join(away)}, outside its folder; such files are not read")
            if gone := [file.name for file in files if not file.exists()]:
                raise UserError(f"{index} names {', '.join(gone)}, which {'is' if len(gone) == 1 else 'are'} not there")
            return files
    other = sorted(p.name for p in folder.glob("*.pth"))
    why = f"; {other[0]} is a bare state dict: give that file itself to `mindseed convert`" if other else ""
    raise UserError(f"{folder} has no model.safetensors{why}")


class TensorFiles:
    """Several files of weights as one: `shapes` of all tensors, and a call that reads one of them. Safetensors, or
    torch's pickles, which are read with `weights_only`, so that they cannot run code."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.home: dict[str, Any] = {}            # name -> how to read it
        self.shapes: dict[str, torch.Size] = {}

    def __enter__(self) -> TensorFiles:
        with contextlib.ExitStack() as stack:
            for file in self.files:
                self.open(file, stack)
            self.stack = stack.pop_all()
        return self

    def open(self, file: Path, stack: contextlib.ExitStack) -> None:
        if file.suffix != ".safetensors":
            for name, x in read_pickle(file).items():
                self.add(name, lambda name, x=x: x, x.shape, file)
            return
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or not a safetensors file ({error}); copy it again") from None
        for name in opened.keys():
            self.add(name, opened.get_tensor, torch.Size(opened.get_slice(name).get_shape()), file)

    def add(self, name: str, read: Callable[[str], Tensor], shape: torch.Size, file: Path) -> None:
        if name in self.home:
            raise UserError(f"{file} holds {name}, which another of these files holds too; delete the wrong one")
        self.home[name], self.shapes[name] = read, shape

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def __call__(self, name: str) -> Tensor:
        x = self.home[name](name)
        require_dtype(name, x)
        return x


def require_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES.values():
        raise UserError(f"{name} is stored as {x.dtype}; only weights in {', '.join(DTYPES)} can be read")


def read_pickle(file: Path) -> dict[str, Tensor]:
    """A state dict that torch.save wrote. UserError for a truncated file, one that would run code, or other contents.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if re.search("Unsupported operand|String is too long|Can only (append|extend|set)", str(error)):
            raise UserError(NOISE.format(file=file, why="no pickle")) from None
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(f"{file} holds more than tensors{what}, and reading that could run a stranger's code, so it is "
                        "not read; save the model's state_dict() alone") from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
            struct.error, zipfile.BadZipFile) as error:   # whatever torch's reader stumbles over
        why = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(NOISE.format(file=file, why=why)) from None
    if not isinstance(state, dict):
        raise UserError(f"{file} is no bare state dict: it holds a {type(state).__name__}")
    if odd := [name for name, x in state.items() if not (isinstance(name, str) and isinstance(x, Tensor))]:
        raise UserError(f"{file} is no bare state dict: beside tensors it holds {', '.join(map(str, odd[:5]))} (is it "
                        "a checkpoint for resuming? The weights alone are what can be read)")
    if not state:
        raise UserError(f"{file} is no bare state dict: it is empty")
    return state
