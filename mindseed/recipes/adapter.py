"""An adapter in a run, whatever it learns by: put on before the first step, written alone and merged at the end."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from mindseed.adapt.lora import Coverage, adaptable, add_adapter, chosen, merge
from mindseed.adapt.peft import save_adapter
from mindseed.base.errors import UserError
from mindseed.base.log import say, table
from mindseed.interop.peft import remember_identity
from mindseed.models.lm import LM
from mindseed.quant.linear import quantize_model, unquantize
from mindseed.recipes.post_options import LoRAOptions


def adapt(model: LM, lora: LoRAOptions, seed: int) -> Coverage | None:
    """Freeze the model beneath an adapter, if one is asked for; in 4 bits, if that is."""
    if not lora.rank:
        return None
    there = adaptable(model)
    most = max(min(there[name].matrix().shape[-2:]) for name in chosen(list(there), lora.targets))
    if lora.rank > most:
        raise UserError(f"an adapter of rank {lora.rank} is no smaller than what it stands beside: these matrices have "
                        f"ranks up to {most}; 4 to 64 are usual")
    if lora.nf4:
        remember_identity(model)
        quantize_model(model)
    return add_adapter(model, lora.config(), seed=seed)


def show(cover: Coverage | None, lora: LoRAOptions) -> None:
    """What is adapted, as a table and in a line."""
    if cover:
        table("adapter", cover.HEADER, cover.rows)
        say(f"adapter    {cover}" + (", on a base in 4 bits" if lora.nf4 else ""))


def fingerprint(lora: LoRAOptions) -> dict[str, Any]:
    """What a run cannot go on with if it has changed."""
    return {"lora": vars(lora) | {"targets": list(lora.targets)}} if lora.rank else {}


def hang_up(model: LM, folder: Path, *, base: str | None, seed: int) -> None:
    """Write the adapter alone, and merge it into the model that is saved whole."""
    if model.value_head is None:
        save_adapter(model, folder / "adapter", base=base, info={"seed": seed})
        say(f"the adapter alone is in {folder / 'adapter'}")
    unquantize(model)
    merge(model, keep=False)
