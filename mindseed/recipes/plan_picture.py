"""Plans as a picture: what fills the memory of a device, and where the time of a step goes, setting by setting."""
from __future__ import annotations

from pathlib import Path

from mindseed.base.errors import UserError
from mindseed.base.extras import install
from mindseed.models.config import LMConfig
from mindseed.plan.machines import Machine
from mindseed.plan.params import count_params
from mindseed.plan.search import ROOM, Plan
from mindseed.recipes.plan_tables import MEMORY_ROWS, TIME_ROWS, describe_plan

COLOURS = ("#4c6ef5", "#15aabf", "#40c057", "#fab005", "#fd7e14", "#e64980", "#7950f2", "#868e96", "#adb5bd", "#12b886",
           "#ced4da", "#f783ac", "#343a40")


def draw(config: LMConfig, plans: list[Plan], board: Machine, path: Path) -> None:
    """Write the picture. UserError where matplotlib is missing or the ending is not one it knows."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"a picture needs matplotlib: {install('[plots]')}") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    if path.suffix.lstrip(".") not in ("png", "svg", "pdf"):
        raise UserError(f"picture={path} must end in .png, .svg or .pdf")
    figure, sides = pyplot.subplots(1, 2, figsize=(13, 2.6 + 0.5 * len(plans)), sharey=True)
    names = [describe_plan(plan.job) for plan in plans]
    stack(sides[0], names, [{k: v / 1e9 for k, v in plan.memory.parts.items()} for plan in plans], MEMORY_ROWS)
    sides[0].set_xlim(0, 1.06 * max(ROOM * board.memory, *(plan.memory.total for plan in plans)) / 1e9)
    sides[0].axvline(ROOM * board.memory / 1e9, color="#e03131", linestyle="--", linewidth=1)
    sides[0].set_xlabel(f"GB of a device at its worst moment; dashed: {ROOM:.0%} of {board.name}'s memory")
    stack(sides[1], names, [plan.time.kinds for plan in plans], TIME_ROWS)
    sides[1].set_xlabel("seconds of a step")
    for bar, plan in enumerate(plans):
        sides[1].text(plan.time.total, bar, f" {plan.time.tokens_per_s / plan.job.world:,.0f} tok/s a device, mfu "
                                            f"{plan.time.mfu:.0%}", va="center", fontsize=8)
    sides[1].set_xlim(0, 1.45 * max(plan.time.total for plan in plans))
    sides[0].invert_yaxis()
    job = plans[0].job
    figure.suptitle(f"{count_params(config).total / 1e9:.3g}B parameters on {job.world:,} x {board.name}, "
                    f"{job.tokens_per_step:,} tokens a step", fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def stack(side, names: list[str], bars: list[dict[str, float]], rows: dict[str, str]) -> None:
    """Bars made of parts, in the order of `rows`, with a legend of those that are seen."""
    left = [0.0] * len(bars)
    whole = max(sum(bar.values()) for bar in bars)
    for colour, (kind, text) in zip(COLOURS, rows.items()):
        widths = [bar.get(kind, 0.0) for bar in bars]
        if max(widths, default=0) > 0.002 * whole:
            side.barh(names, widths, left=left, color=colour, label=text, height=0.7)
        left = [at + width for at, width in zip(left, widths)]
    side.tick_params(labelsize=8)
    side.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1 - 0.6 / len(bars)), ncol=3, frameon=False)
    side.spines[["top", "right"]].set_visible(False)
