"""States of an optimiser in the CPU's memory, on the GPU only while they are used (as in QLoRA, 2305.14314).

An optimiser's states are read and written once a step, in one go; for the rest of the time, while activations need the
room, they need not lie on the GPU. QLoRA lets the driver move pages when memory runs out. Here it is done by hand and
always: parameters are taken in pages of some hundred megabytes; a page's states come over from pinned memory, the
optimiser updates its parameters, and the states go home. A transfer each way per step is the price.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PAGE_BYTES = 256 << 20                            # of states on the GPU at a time; a larger parameter has its own page


class Paged(torch.optim.Optimizer):
    """Any optimiser, with its states at home on the CPU. States and groups are those of `inner`, so that checkpoints
    are the same with and without pages."""

    def __init__(self, inner: torch.optim.Optimizer, page_bytes: int = PAGE_BYTES) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.page_bytes = inner, page_bytes
        self.share()

    def share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        groups, devices = self.inner.param_groups, set()
        try:
            for group in groups:
                for page in self.pages(group["params"]):
                    homes = [self.state.get(p) for p in page]
                    for p, home in zip(page, homes):
                        if home:
                            self.state[p] = {name: self.fetch(x, p) for name, x in home.items()}
                    self.inner.param_groups = [group | {"params": page}]
                    self.inner.step()
                    for p, home in zip(page, homes):
                        if p in self.state:
                            self.state[p] = {name: self.send(x, (home or {}).get(name))
                                             for name, x in self.state[p].items()}
                    devices |= {p.device for p in page if p.device.type == "cuda"}
        finally:
            self.inner.param_groups = groups
        for device in devices:                    # before anybody reads what is at home
            torch.cuda.synchronize(device)

    def pages(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters with a gradient, in pages; what a state will take is known once it has been made."""
        page, held = [], 0
        for p in params:
            if p.grad is None:
                continue
            size = sum(x.nbytes for x in self.state.get(p, {}).values() if isinstance(x, Tensor)) or 2 * p.nbytes
            if page and held + size > self.page_bytes:
                yield page
                page, held = [], 0
            page.append(p)
            held += size
        if page:
            yield page

    @staticmethod
    def fetch(x, param: Tensor):
        """A part of a state where its parameter is."""
        return x.to(param.device, non_blocking=True) if isinstance(x, Tensor) else x

    @staticmethod
    def send(x, home: Tensor | None):
        """The same at home, in the pinned memory that it came from."""
        if not isinstance(x, Tensor) or x is home:
            return x
        if home is None:
            home = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        return home.copy_(x, non_blocking=True)

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's own would bring every state to the GPU at once."""
        self.inner.load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        params = [p for group in self.inner.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, params, strict=True):
            if i in state_dict["state"]:
                self.inner.state[p] = {name: self.keep(x, p) for name, x in state_dict["state"][i].items()}
        self.share()

    @staticmethod
    def keep(x, param: Tensor):
        """A copy at home of a part of a saved state."""
        if not isinstance(x, Tensor):
            return x
        return torch.empty_like(x, device="cpu", pin_memory=param.is_cuda).copy_(x)
