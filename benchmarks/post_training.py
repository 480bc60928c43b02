"""What post-training gains on the embedded world: every method from the same fine-tuned model, over three seeds.

Per seed a world is written and a model of 2M parameters pretrained on its texts, as the demo does. It is fine-tuned on
conversations only as long as it takes to answer in the right form, so that there is something left to learn. From that
one model start DPO, a reward model, GRPO, PPO and so on, each by its recipe, and are graded on the held-out questions
of the world. Everything is kept in runs/post-training and found there the next time; a run that was stopped goes on.

    python -m benchmarks.post_training                   all seeds, then the table in docs/RESULTS.md
    python -m benchmarks.post_training 0 dpo grpo        some stages of one seed, and what they came to
"""
from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import torch

from benchmarks.common import report
from mindseed.base.files import read_json, write_json
from mindseed.base.log import say
from mindseed.data.toy import World, write_world
from mindseed.interop.directory import load_directory
from mindseed.models.heads import score
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.recipes import demo, rl, train
from mindseed.recipes.grade import grade
from mindseed.recipes.model_options import ModelOptions
from mindseed.recipes.options import DataOptions, LoopOptions, TrainOptions
from mindseed.recipes.post_options import DPOOptions
from mindseed.recipes.rl_options import PolicyOptions, PromptOptions, RLLoop, RLOptions, SamplingOptions, StartOptions
from mindseed.tasks.toy import ToyTask
from mindseed.tokenizers.chat import encode_chat, normalise

NAME, FOLDER, SEEDS = "post-training", Path("runs/post-training"), (0, 1, 2)
CPU = torch.device("cpu")
START_STEPS = 220                                 # of fine-tuning: half of the demo's
PAIRS = 400                                       # held-out preference pairs, of another stream than the training's
RESULTS = Path(__file__).parents[1] / "docs" / "RESULTS.md"


def base(seed: int) -> TrainOptions:
    """The demo's pretraining, in this seed's folder."""
    folder = FOLDER / str(seed)
    return demo.pretraining(demo.Options(out=str(folder), seed=seed), folder)


def start(seed: int) -> TrainOptions:
    """A short fine-tuning: the model that everything begins with."""
    folder = FOLDER / str(seed)
    options = demo.fine_tuning(demo.Options(out=str(folder), seed=seed), folder)
    return replace(options, out=str(folder / "start"), loop=replace(options.loop, steps=START_STEPS))


def preferences(seed: int, name: str, steps: int, lr: float, **more: Any) -> TrainOptions:
    """DPO or the reward model on the world's pairs."""
    folder = FOLDER / str(seed)
    return TrainOptions(
        out=str(folder / name), resume="auto", seed=seed, device="cpu",
        model=ModelOptions(start=str(folder / "start/model")),
        data=DataOptions(train=(str(folder / "world/preferences.jsonl"),), seq_len=demo.CONTEXT // 2, heldout=0.02),
        optim=OptimConfig(lr=lr, kind="adamw", weight_decay=0.0),
        schedule=ScheduleConfig(kind="linear", warmup_steps=10),
        loop=LoopOptions(steps=steps, batch=32, micro_batch=16, sample_every=0, validate_every=0), **more)


def reinforced(seed: int, name: str, steps: int, lr: float, **more: Any) -> RLOptions:
    """GRPO or PPO on the world's problems, which are of the training side of its border."""
    folder = FOLDER / str(seed)
    return RLOptions(
        out=str(folder / name), resume="auto", seed=seed, device="cpu",
        model=StartOptions(start=str(folder / "start/model")),
        data=PromptOptions(train=(str(folder / "world/problems.jsonl"),), limit=60),
        optim=OptimConfig(lr=lr, kind="adamw", weight_decay=0.0),
        schedule=ScheduleConfig(kind="constant", warmup_steps=5),
        loop=RLLoop(steps=steps, micro_batch=64, validate_every=0, sample_every=0, save_every=20), **more)


STAGES: dict[str, Callable[[int], TrainOptions | RLOptions]] = {
    "pretrain": base, "start": start,
    "dpo": lambda seed: preferences(seed, "dpo", 120, 1e-4, method="dpo", dpo=DPOOptions(beta=0.1)),
    "reward": lambda seed: preferences(seed, "reward", 200, 5e-4, method="reward"),
    "grpo": lambda seed: reinforced(seed, "grpo", 240, 5e-4, algorithm="grpo",
                                    rollout=SamplingOptions(max_new=64, prompts=32, answers=8, minibatches=2)),
    "ppo": lambda seed: reinforced(seed, "ppo", 240, 5e-4, algorithm="ppo",
                                   rollout=SamplingOptions(max_new=64, prompts=256, answers=1, minibatches=2, epochs=2),
                                   policy=PolicyOptions(kl=0.01, kl_in="reward")),
}


def model_of(seed: int, name: str) -> Path:
    """The model directory of a stage, which is run if it has not been."""
    folder = FOLDER / str(seed)
    if not (folder / "world/heldout.jsonl").exists():
        write_world(folder / "world", seed)
    if not (folder / "tokenizer").exists():
        demo.make_tokenizer(demo.Demo(options=demo.Options(seed=seed), folder=folder))
    done = folder / name / "model"
    if not done.exists():
        if name != "pretrain":
            model_of(seed, "start" if name != "start" else "pretrain")
        options = STAGES[name](seed)
        (rl if isinstance(options, RLOptions) else train).train(options, CPU)
    return done


def figures(seed: int, name: str) -> dict[str, float]:
    """What the model of a stage does: exact match, preference accuracy."""
    kept = FOLDER / str(seed) / f"{name}.json"
    if kept.exists():
        return read_json(kept)
    loaded, world = load_directory(model_of(seed, name)), World(seed)
    if loaded.model.value_head is not None:
        found = {"pairs": preferred(loaded, world)}
    else:
        scores, _ = grade(loaded.model, loaded.tokenizer, ToyTask(world))
        found = {"exact": scores["overall"], "format": scores["format"], "pairs": preferred(loaded, world),
                 **{f"exact/{family}": value for family, value in scores["families"].items()}}
    write_json(kept, found)
    return found


def preferred(loaded: Any, world: World) -> float:
    """Percent of pairs never trained on, of which the chosen answer is likelier per token, or better rewarded."""
    rows = list(world.preferences(2000 + PAIRS))[2000:]
    sides = [[encode_chat(loaded.tokenizer, normalise({"messages": row[side]})[0]) for row in rows]
             for side in ("chosen", "rejected")]
    if loaded.model.value_head is not None:
        rewards = [score(loaded.model, [ids for ids, _ in some]) for some in sides]
    else:
        rewards = [[likelihood(loaded.model, *one) for one in some] for some in sides]
    return 100 * statistics.mean(a > b for a, b in zip(*rewards))


@torch.no_grad()
def likelihood(model: Any, ids: list[int], learned: list[bool]) -> float:
    """log p per token of the answers in a conversation."""
    x, mask = torch.tensor([ids]), torch.tensor([learned])[:, 1:]
    logps = model(x[:, :-1], torch.arange(len(ids) - 1)[None]).logps(x[:, 1:])
    return (logps[mask].sum() / mask.sum()).item()


def main() -> None:
    words = sys.argv[1:]
    seeds = [int(word) for word in words if word.isdigit()] or SEEDS
    names = [word for word in words if not word.isdigit()] or [name for name in STAGES if name != "pretrain"]
    found = {name: [figures(seed, name) for seed in seeds] for name in names}
    rows = [[name, *(told([one[key] for one in some if key in one]) for key in ("exact", "pairs"))]
            for name, some in found.items()]
    if words:
        say("\n".join(" | ".join(row) for row in rows))
        return
    report(NAME, "Post-training on the embedded world, three seeds", [
        "model", "held-out questions right, %", "held-out pairs the right way round, %"], rows, page=RESULTS,
        command="python -m benchmarks.post_training",
        notes=f"Mean (lowest to highest) over seeds {', '.join(map(str, seeds))}. All begin with `start`, a "
              f"fine-tuning of {START_STEPS} steps. A pair is the right way round if the chosen answer is likelier per "
              "token, or better rewarded.")


def told(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else ""


if __name__ == "__main__":
    main()
