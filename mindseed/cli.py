"""The command line: `mindseed <recipe> [preset.toml] --section.option value`.

A recipe is one module of `mindseed/recipes`: a docstring, a dataclass `Options` and `main(options)`. It is imported
only when it is called, so that `mindseed --help` answers at once. A user's mistake is one or two lines on stderr and
exit code 2; an interrupt is 130; neither shows a traceback. A traceback means a bug of ours.
"""
from __future__ import annotations

import importlib
import os
import sys
import time

from mindseed import __version__
from mindseed.base.config import parse, suggestion
from mindseed.base.errors import UserError

RECIPES = {                                       # in the order in which a newcomer meets them
    "demo": "grow a chat model from nothing on embedded data, in minutes, and write a report",
    "chat": "talk to a model in the terminal",
    "generate": "answer prompts from stdin, one JSON object a line, for scripts",
    "serve": "answer over HTTP, as OpenAI's API: many at once, streaming, with tools",
    "ui": "the studio in the browser: chat, compare, runs, tokens, the inside of a model",
    "tokenizer": "train a tokenizer on your text and report how well it compresses",
    "prepare": "tokenise files once into memory-mapped shards",
    "show-batch": "print what a batch trains on, in colour",
    "plan": "parameters, FLOPs, memory and time of a run before its first step",
    "train": "pretrain or fine-tune a model",
    "rl": "learn from rewards: GRPO and its relatives, PPO, with or without tools",
    "synthesize": "have a teacher answer prompts, and write what is worth learning from",
    "r1": "from a base model to a reasoner and its small student, stage by stage",
    "extend": "lengthen a model's context, and measure how far it sees",
    "scaling-law": "fit how loss falls over small runs, and predict a larger one",
    "convert": "read and write other model formats",
}
ELSEWHERE = {                                     # what other projects call them
    **dict.fromkeys(("pretrain", "sft", "full-sft", "finetune", "fine-tune"), "train"),
    **dict.fromkeys(("grpo", "ppo", "train-grpo", "train-ppo", "train-spo", "train-agent"), "rl"),
    **dict.fromkeys(("train-pretrain", "train-full-sft"), "train"),
    **dict.fromkeys(("eval-llm", "talk", "run"), "chat"), "train-tokenizer": "tokenizer", "tokenize": "prepare",
    **dict.fromkeys(("export", "convert-model"), "convert"),
    **dict.fromkeys(("web-demo", "webui", "studio", "gradio"), "ui"),
    **dict.fromkeys(("serve-openai-api", "api", "api-server", "server"), "serve"),
}
EXAMPLES = """\
  mindseed demo                                      from nothing to a chat model on this machine
  mindseed plan --depth 8                            what would a model of depth 8 cost?
  mindseed train --help                              every option of a recipe, with its default"""


def main(argv: list[str] | None = None) -> int:
    """Run one recipe and return the exit code: 0 well, 2 a user's mistake, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")     # at once, for several ranks may be writing
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                       # `mindseed generate | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:                      # a place that cannot be read or written; never of our own making
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; choose another place, or mend its rights", file=sys.stderr)
        return 2
    except Exception as error:
        if not out_of_memory(error):
            raise
        print(f"error: out of memory: {str(error).splitlines()[0]}\n"
              "Lower the batch size or the sequence length, or recompute activations; `mindseed plan` estimates the "
              "need beforehand.", file=sys.stderr)
        return 2


def run(argv: list[str]) -> int:
    """Choose the recipe, parse its options, call it. Raises what `main` turns into exit codes."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"mindseed {__version__}")
        return 0
    name, rest = argv[0].replace("_", "-"), argv[1:]
    if name not in RECIPES:
        meant = f"; here it is called {ELSEWHERE[name]}" if name in ELSEWHERE else suggestion(name, RECIPES)
        raise UserError(f"{argv[0]!r} is not a recipe{meant}\nThe recipes are {', '.join(RECIPES)}")
    share_cores()
    recipe = load(name)
    under = {"under": recipe.options_of_run} if hasattr(recipe, "options_of_run") else {}
    options = parse(recipe.Options, rest, prog=f"mindseed {name}", description=recipe.__doc__, **under)
    return recipe.main(options) or 0


def share_cores() -> None:
    """Let torch's threads sleep while they wait for each other, if other programs are using the cores.

    By default they spin, which is twice as fast on an idle machine, and ten times slower beside one busy program:
    measured on two cores, 9600 tokens/s idle and 300 to 1000 beside another, against 4100 and 4400 asleep. It must be
    decided before torch is loaded, changes no result, and OMP_WAIT_POLICY overrides it.
    """
    if "OMP_WAIT_POLICY" not in os.environ and os.environ.get("OMP_NUM_THREADS") != "1" and busy_share() > 0.3:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def busy_share(seconds: float = 0.2) -> float:
    """The share of all cores' time that is in use just now; 0 where the system does not tell."""
    def read() -> tuple[int, int]:
        with open("/proc/stat", encoding="ascii") as file:
            times = [int(t) for t in file.readline().split()[1:9]]
        return sum(times), times[3] + times[4]                # all; idle and waiting for a disk

    try:
        total, idle = read()
        time.sleep(seconds)
        total, idle = (now - before for now, before in zip(read(), (total, idle)))
    except (OSError, ValueError, IndexError):
        return 0.0
    return 1 - idle / total if total else 0.0


def load(name: str):
    """The module of a recipe, by its name on the command line."""
    return importlib.import_module(f"mindseed.recipes.{name.replace('-', '_')}")


def overview() -> str:
    """The text of `mindseed --help`."""
    width = max(map(len, RECIPES)) + 2
    lines = [f"  {name:{width}}{what}" for name, what in RECIPES.items()]
    return "\n".join(["usage: mindseed <recipe> [preset.toml] --section.option value ...", "",
                      "Grow a language model from a seed.", "", "recipes:", *lines, "", "examples:", EXAMPLES])


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine ran out of memory; asks torch only if it is loaded already."""
    torch = sys.modules.get("torch")
    known = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "DefaultCPUAllocator: can't allocate memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
