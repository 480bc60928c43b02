"""Options of what comes after pretraining: by which loss, and with which adapter on what base.

Each group belongs to one `--method`, and is without effect under another, which is told.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from mindseed.adapt.lora import LoRAConfig
from mindseed.base.config import option
from mindseed.objectives.distill import Distance
from mindseed.objectives.dpo import NEEDS_REFERENCE, DPO, Margin
from mindseed.objectives.kto import KTO
from mindseed.objectives.reward import Reward

Method = Literal["sft", "dpo", "kto", "reward", "process-reward", "distill"]


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    reference: str | None = option(None, help="model directory of the reference [what the run begins with]")
    reference_logps: Literal["once", "live"] = option(
        "once", help="once: the reference is asked before training, and what it says is kept; live: at every step")


# (beta, target margin). IPO's margin per token is 1 / (2 beta): half a nat. SimPO's are those of its paper.
USUAL: dict[Margin, tuple[float, float]] = {"dpo": (0.1, 0.0), "orpo": (0.1, 0.0), "ipo": (1.0, 0.0),
                                            "simpo": (2.0, 1.0)}


@dataclass(frozen=True, kw_only=True)
class DPOOptions(ReferenceOptions):
    kind: Margin = option("dpo", help="what the margin between chosen and rejected is made of",
                          elsewhere=("loss_type",))
    beta: float | None = option(None, help="how far the policy may move from the reference: smaller is further [0.1; "
                                           "ipo 1, simpo 2]")
    label_smoothing: float = option(0.0, help="share of the pairs taken to be labelled the wrong way round (cDPO)")
    target_margin: float | None = option(None, help="simpo: log-probability per token, times beta, that chosen should "
                                                    "be ahead [1]", elsewhere=("simpo_gamma", "gamma"))
    sft: float = option(0.0, help="weight of the chosen answer's own loss per token beside it",
                        elsewhere=("rpo_alpha",))

    def __post_init__(self) -> None:
        self.objective()                          # which checks the rest

    def objective(self, reference=None) -> DPO:
        beta, margin = USUAL[self.kind]
        return DPO(kind=self.kind, beta=beta if self.beta is None else self.beta, label_smoothing=self.label_smoothing,
                   target_margin=margin if self.target_margin is None else self.target_margin, sft=self.sft,
                   reference=reference)

    @property
    def needs_reference(self) -> bool:
        return self.kind in NEEDS_REFERENCE


@dataclass(frozen=True, kw_only=True)
class KTOOptions(ReferenceOptions):
    beta: float = option(0.1, help="how far the policy may move from the reference: smaller is further")
    desirable: float = option(1.0, help="weight of good answers", elsewhere=("desirable_weight",))
    undesirable: float = option(1.0, help="weight of bad ones", elsewhere=("undesirable_weight",))

    def __post_init__(self) -> None:
        KTO(policy=lambda ids, positions: None, beta=self.beta, desirable=self.desirable,
            undesirable=self.undesirable)         # which checks them


@dataclass(frozen=True, kw_only=True)
class RewardModelOptions:
    centre: float = option(0.0, help="weight of the squared sum of both rewards, to hold them near 0; 0.01 is usual",
                           elsewhere=("center_rewards_coefficient",))

    def __post_init__(self) -> None:
        Reward(**vars(self))


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    teacher: str | None = option(None, help="the teacher's model directory, of the same vocabulary")
    distance: Distance = option("forward", help="forward: cover all that the teacher may say; reverse: keep to what it "
                                                "surely says; jsd: between both")
    beta: float = option(0.5, help="jsd: towards forward near 0, towards reverse near 1")
    temperature: float = option(1.0, help="of both distributions; above 1 shows more of what is unlikely")
    hard: float = option(0.0, help="share of the ordinary loss of the text itself")
    states: float = option(0.0, help="weight of matching the layers' states, through projections learnt along")
    relations: float = option(0.0, help="weight of matching which tokens the last layer takes to be alike")

    layers: tuple[int, ...] = option((), help="match the states after so many of the student's blocks [all]")
    related: int | None = option(None, help="the student's layer whose relations are matched [the last]")
    on_policy: float = option(0.0, help="share of the batches that the student writes itself, for the teacher to read; "
                                        "best with reverse or jsd")
    prompts: tuple[str, ...] = option((), help="files of prompts that it answers [data.train]")
    answers: int = option(1, help="answers to each prompt")
    max_new: int = option(128, help="longest of its answers, in tokens")
    sampling_temperature: float = option(1.0, help="of its answers")

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1 or self.answers < 1 or self.max_new < 1 or self.sampling_temperature <= 0:
            raise ValueError(f"on_policy={self.on_policy} is a share, answers={self.answers} and max_new="
                             f"{self.max_new} are at least 1, sampling_temperature={self.sampling_temperature} above 0")
        if self.temperature <= 0 or not 0 < self.beta < 1 or not 0 <= self.hard <= 1:
            raise ValueError(f"temperature={self.temperature} must be above 0, beta={self.beta} between 0 and 1, "
                             f"hard={self.hard} a share")
        if self.states < 0 or self.relations < 0:
            raise ValueError(f"states={self.states} and relations={self.relations} must not be negative")


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(LoRAConfig):
    rank: int = option(0, help="learn an adapter of this rank on a frozen base (LoRA); 0: learn the whole model",
                       elsewhere=("lora_rank", "lora_r"))
    alpha: float = option(16.0, help="size of the update, which is multiplied by alpha / rank",
                          elsewhere=("lora_alpha",))
    dropout: float = option(0.0, help="share of a matrix's inputs that its update does not see, in training",
                            elsewhere=("lora_dropout",))
    targets: tuple[str, ...] = option((), help="which matrices: last names (q, k, v, o, gate, up, down), or patterns "
                                               "of whole ones (blocks.0.*) [all of the blocks]",
                                      elsewhere=("target_modules", "lora_target_modules"))
    rs: bool = option(False, help="multiply by alpha / sqrt(rank) instead (rsLoRA)", elsewhere=("use_rslora",))
    dora: bool = option(False, help="learn the lengths of rows apart from their directions (DoRA)",
                        elsewhere=("use_dora",))
    nf4: bool = option(False, help="keep the base in 4 bits (QLoRA)", elsewhere=("load_in_4bit", "use_qlora"))

    def __post_init__(self) -> None:
        if self.rank:
            super().__post_init__()
        elif self.nf4:
            raise ValueError("nf4 keeps a base that does not learn: give lora.rank as well")

    def config(self) -> LoRAConfig:
        return LoRAConfig(**{f.name: getattr(self, f.name) for f in fields(LoRAConfig)})
