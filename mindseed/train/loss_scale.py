"""By what a loss is multiplied in fp16, so that small gradients do not vanish (1710.03740).

float16 has nothing below 6e-8, and most gradients of a language model lie there. A loss times 2^16 has gradients times
2^16, which are divided again before the update. Where some overflow instead, the step is left out and the scale halved;
after many steps without one it is doubled. All ranks see the same norm of the whole gradient, so all of them decide
alike, however weights are shared out.
"""
from __future__ import annotations

from typing import Any

GROW_AFTER = 2000                                 # steps without an overflow after which more is tried


class LossScale:
    """Moved as torch's GradScaler moves it, and saved in its form. 1 where it is not needed."""

    def __init__(self, enabled: bool, start: float = 2.0 ** 16) -> None:
        self.enabled, self.scale, self.good = enabled, start if enabled else 1.0, 0

    def update(self, finite: bool) -> None:
        """After a step whose gradients were `finite`, or not."""
        if not self.enabled:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good == GROW_AFTER:
            self.scale, self.good = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": GROW_AFTER,
                "_growth_tracker": self.good} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.enabled and state:
            self.scale, self.good = state["scale"], state["_growth_tracker"]
