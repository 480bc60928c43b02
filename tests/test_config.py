"""Options from defaults, presets and flags; the command line's manners; log lines and sinks."""
from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindseed import cli
from mindseed.base.config import diff, from_dict, load_toml, option, parse, to_dict, to_toml
from mindseed.base.errors import UserError
from mindseed.base.files import atomic, write_text
from mindseed.base.hardware import (PEAKS, describe_machine, listed_peak, measured_peak, peak_memory,
                                     timed_matmul, total_memory)
from mindseed.base.log import (JsonlSink, StepBar, bytes_text, duration, extra, open_sinks, read_jsonl, si, step_line,
                               units)
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.recipes.options import DataOptions, LoopOptions, TrainOptions, without_effect


@dataclass(frozen=True, kw_only=True)
class Cosine:
    floor: float = option(0.1, help="lowest rate, as a share of the peak")


@dataclass(frozen=True, kw_only=True)
class Constant:
    pass


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = option(1e-3, help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.95), help="moments")
    kind: Literal["adamw", "muon"] = option("adamw", help="which optimiser")
    clip: float | None = option(1.0, help="largest gradient norm")
    warmup_steps: int = option(10, help="steps of linear growth")

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")


@dataclass(frozen=True, kw_only=True)
class Train:
    compile: bool = option(False, help="compile the model")
    ema: bool = option(True, help="average the weights")
    tied: bool | None = option(None, help="share the head")


@dataclass(frozen=True, kw_only=True)
class Options:
    model: Path = option(Path("model"), help="model directory", positional=True)
    files: tuple[str, ...] = option((), help="what to read", positional=True)
    depth: int | None = option(None, help="the one dial")
    resume: str | None = option(None, help="continue a run", bare="newest")
    name: str = option("", help="free text")
    schedules: tuple[Cosine | Constant, ...] = ()
    optim: Optim = Optim()
    train: Train = Train()


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Like Options, without what a command line cannot say."""

    model: Path = option(Path("model"), help="model directory", positional=True)
    files: tuple[str, ...] = option((), help="what to read", positional=True)
    depth: int | None = option(None, help="the one dial")
    resume: str | None = option(None, help="continue a run", bare="newest")
    optim: Optim = Optim()
    train: Train = Train()


def preset(tmp_path: Path, text: str) -> str:
    path = tmp_path / "preset.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def complaint(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- presets

def test_a_preset_overrides_defaults_and_flags_override_the_preset(tmp_path):
    path = preset(tmp_path, 'depth = 3\n[optim]\nlr = 1\nclip = "none"\nbetas = [0, 0.5]\n[train]\ncompile = true\n')
    options = parse(Flags, [path, "--optim.lr", "2e-3", "--no-train.compile"])
    assert options == Flags(depth=3, optim=Optim(lr=2e-3, clip=None, betas=(0.0, 0.5)))
    assert type(load_toml(Flags, path).optim.lr) is float


def test_every_problem_of_a_preset_is_reported_at_once(tmp_path):
    path = preset(tmp_path, 'dept = 3\n[optim]\nlr = "fast"\nwarmup_step = 3\nbetas = [1]\nwarmup_steps = 1.5\n'
                            'kind = "sgd"\n[trian]\n[train]\ncompile = 1\n')
    assert complaint(load_toml, Flags, path).splitlines() == [
        f"{path} has 8 problems:",
        "  dept is not an option; did you mean depth?",
        "  optim.lr must be a number, not the string 'fast'",
        "  optim.warmup_step is not an option; did you mean optim.warmup_steps?",
        "  optim.betas must be a list of 2 (a number each), not the list [1]",
        "  optim.warmup_steps must be a whole number, not the number 1.5",
        "  optim.kind must be one of adamw, muon, not the string 'sgd'",
        "  trian is not an option; did you mean train?",
        "  train.compile must be true or false, not the number 1"]


@pytest.mark.parametrize("text, message", [
    ("optim = 3", "optim is a section of options, not the number 3"),
    ("[optim]\nlr = -1.0", "optim: lr=-1.0 must be positive"),
    ("[optim]\nlr = true", "optim.lr must be a number, not the boolean true"),
    ("depth = 'x'", 'depth must be a whole number or "none", not the string \'x\''),
    ("lr = 3", "lr is not an option; did you mean optim.lr?"),
])
def test_a_single_problem_is_one_line(tmp_path, text, message):
    path = preset(tmp_path, text)
    assert complaint(load_toml, Flags, path) == f"{path}: {message}"


def test_a_preset_that_cannot_be_read(tmp_path):
    path = preset(tmp_path, "depth = ")
    assert "is not a readable TOML file" in complaint(load_toml, Flags, path)
    assert f"did you mean {path}?" in complaint(load_toml, Flags, path.replace("preset.toml", "prset.toml"))


@dataclass(frozen=True, kw_only=True)
class Needed:
    lr: float
    steps: int = 3


def test_missing_values_and_wrong_tags_are_named():
    assert complaint(from_dict, Needed, {}) == "options: lr is required"
    assert "schedules[0].type is 'Sine'; it may be Cosine, Constant" in complaint(
        from_dict, Options, {"schedules": [{"type": "Sine"}]})


# -------------------------------------------------------------------------------------------------------- round trips

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda s: s != "none")
values = st.builds(
    Options, model=st.just(Path("a/b c")), files=st.lists(text, max_size=3).map(tuple), name=text,
    depth=st.none() | st.integers(-2**60, 2**60), resume=st.none() | text,
    schedules=st.lists(st.builds(Cosine, floor=st.floats(allow_nan=False)) | st.just(Constant()),
                       max_size=3).map(tuple),
    optim=st.builds(Optim, lr=st.floats(1e-300, allow_infinity=False), clip=st.none() | st.floats(allow_nan=False),
                    kind=st.sampled_from(["adamw", "muon"])),
    train=st.builds(Train, compile=st.booleans(), ema=st.booleans(), tied=st.none() | st.booleans()))


@settings(max_examples=50, deadline=None)
@given(values)
def test_any_options_survive_toml_and_json(tmp_path_factory, options):
    path = tmp_path_factory.mktemp("toml") / "x.toml"
    path.write_text(to_toml(options), encoding="utf-8", newline="")
    assert load_toml(Options, path) == options
    assert from_dict(Options, json.loads(json.dumps(to_dict(options)))) == options
    assert diff(options, from_dict(Options, to_dict(options))) == {}


def test_diff_names_what_differs():
    a, b = Flags(depth=3), Flags(optim=Optim(lr=0.5), files=("x",))
    assert diff(a, b) == {"depth": (3, None), "files": ([], ["x"]), "optim.lr": (0.001, 0.5)}


# -------------------------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize("line, expected", [
    ("--depth 3", Flags(depth=3)),
    ("--depth=3 --depth none", Flags()),
    ("--optim.warmup-steps 5", Flags(optim=Optim(warmup_steps=5))),
    ("--optim.warmup_steps=5", Flags(optim=Optim(warmup_steps=5))),
    ("--optim.betas 0.1 0.2 --optim.clip none", Flags(optim=Optim(betas=(0.1, 0.2), clip=None))),
    ("--optim.clip -1.5", Flags(optim=Optim(clip=-1.5))),
    ("--train.compile --train.no-ema", Flags(train=Train(compile=True, ema=False))),
    ("--no-train.ema --train.compile", Flags(train=Train(compile=True, ema=False))),
    ("--train.compile true --train.ema off", Flags(train=Train(compile=True, ema=False))),
    ("--train.compile=TRUE --train.ema=0 --depth 1", Flags(depth=1, train=Train(compile=True, ema=False))),
    ("--train.tied true", Flags(train=Train(tied=True))),
    ("--no-train.tied", Flags(train=Train(tied=False))),
    ("--train.tied=off", Flags(train=Train(tied=False))),
    ("--train.tied none", Flags()),
    ("--resume", Flags(resume="newest")),
    ("--resume --depth 3", Flags(resume="newest", depth=3)),
    ("--resume auto", Flags(resume="auto")),
    ("runs/x a b --depth 3", Flags(model=Path("runs/x"), files=("a", "b"), depth=3)),
    ("--files a b --model runs/x", Flags(model=Path("runs/x"), files=("a", "b"))),
])
def test_flags(line, expected):
    assert parse(Flags, line.split()) == expected


@pytest.mark.parametrize("line, message", [
    ("--optim.warmup_step 3", "--optim.warmup_step is not an option; did you mean --optim.warmup_steps?"),
    ("--lr 3", "--lr is not an option; did you mean --optim.lr?"),
    ("--zzz", "--zzz is not an option"),
    ("--dept 3 --lr 3", "--dept is not an option; did you mean --depth?\n"
                        "--lr is not an option; did you mean --optim.lr?"),
    ("--no-depth", "--no-depth is not an option; did you mean --depth?"),
    ("--optim.lr fast", "--optim.lr must be a number, not 'fast'"),
    ("--optim.lr=fast", "--optim.lr must be a number, not 'fast'"),
    ("--depth 1.5", "--depth must be a whole number or \"none\", not '1.5'"),
    ("--optim.lr -3", "optim: lr=-3.0 must be positive"),
    ("--train.ema=maybe", "--train.ema is true or false, not 'maybe'"),
])
def test_a_wrong_flag_is_a_short_error_with_a_suggestion(line, message):
    assert complaint(parse, Flags, line.split()) == message


@pytest.mark.parametrize("line", [
    "--optim.betas 1", "--optim.lr", "--optim.kind sgd", "--train.ema maybe", "--depth 1 2"])
def test_other_wrong_flags_are_one_line_without_boxes(line):
    message = complaint(parse, Flags, line.split())
    assert "\n" not in message and "│" not in message and 10 < len(message) < 160


def test_a_stray_word_is_refused():
    assert "'a' is neither a preset (*.toml) nor an option" in complaint(parse, Needed, ["a"])


def test_help_shows_every_option_with_help_and_the_presets_default(tmp_path, capsys):
    path = preset(tmp_path, "[optim]\nwarmup_steps = 123\n")
    with pytest.raises(SystemExit) as caught:
        parse(Flags, [path, "--help"], prog="mindseed train", description="What it does.")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "What it does." in shown
    for name in ("--model", "--depth", "--resume", "--optim.lr", "--optim.warmup_steps", "--train.compile"):
        assert name in shown
    assert "steps of linear growth (default: 123)" in shown and "(the flag alone means newest)" in shown


# --------------------------------------------------------------------------------------------------- the command line

@pytest.fixture
def recipe(monkeypatch):
    """A recipe `train` that runs the function put into it."""
    module = types.ModuleType("mindseed.recipes.train", "Teach a model.")
    module.Options, module.main = Flags, lambda options: None
    monkeypatch.setattr(cli, "load", lambda name: module)
    return module


def test_a_recipe_gets_its_options_and_returns_its_code(recipe):
    recipe.main = lambda options: options.depth
    assert cli.main(["train", "--depth", "7"]) == 7
    recipe.main = lambda options: None
    assert cli.main(["train"]) == 0


def raising(error):
    def main(options):
        raise error
    return main


def test_mistakes_end_with_code_2_and_no_traceback(recipe, capsys):
    recipe.main = raising(UserError("corpus.jsonl:3: no text"))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "error: corpus.jsonl:3: no text\n"
    recipe.main = raising(MemoryError("out of memory trying to allocate"))
    assert cli.main(["train"]) == 2
    assert "Lower the batch size" in capsys.readouterr().err
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_our_own_bugs_keep_their_traceback(recipe):
    recipe.main = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_an_interrupt_is_130(recipe, capsys):
    recipe.main = raising(KeyboardInterrupt())
    assert cli.main(["train"]) == 130


def test_overview_lists_every_recipe_and_loads_no_torch():
    code = ("import sys; from mindseed.cli import main; main(['--help']); "
            "sys.exit(bool({'torch', 'tyro', 'rich', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and all(f"\n  {name} " in done.stdout for name in cli.RECIPES)


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "mindseed", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("mindseed ") and done.stderr == ""


FAKE = ("import sys, time; from mindseed import cli; from types import SimpleNamespace; "
        "from dataclasses import make_dataclass; "
        "cli.load = lambda name: SimpleNamespace(Options=make_dataclass('O', []), __doc__='x', main={main}); "
        "sys.exit(cli.main(['train']))")


def test_a_closed_pipe_is_quiet():
    code = FAKE.format(main="lambda o: print('line\\n' * 10**6)")
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" | head -1; echo ${PIPESTATUS[0]}', sys.executable, code],
                          capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line\n141\n", "")


def test_ctrl_c_ends_with_130_and_no_traceback():
    code = FAKE.format(main="lambda o: (print('ready', flush=True), time.sleep(60))")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # `&` ignores it
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == "interrupted\n"


# ---------------------------------------------------------------------------------------------------------------- log

def test_the_step_line_has_a_fixed_order_and_units():
    values = dict(memory_bytes=11.3e9, lr=3e-4, grad_norm=0.82, mfu=0.371, tokens_per_s=41_234.0, loss=3.4121)
    line = "step 120/2000  loss 3.412  41.2k tok/s  mfu 37.1%  grad 0.82  lr 3.0e-04  mem 11.3 GB"
    assert step_line(120, 2000, values) == line
    assert step_line(1, 2, {"skipped": 3, "loss": 1.0}) == "step 1/2  loss 1.000  skipped 3"
    assert step_line(1, 2, {"load/0/1": 3, "reward/form": 0.5}, "prompt") == "prompt 1/2  reward/form 0.5"


def test_figures():
    assert [si(x) for x in (0, 7, 999, 1000, 41_234, 999_999, 25.8e6, 1.5)] == [
        "0", "7", "999", "1.00k", "41.2k", "1.00M", "25.8M", "1.50"]
    assert [bytes_text(x) for x in (512, 11.34e9)] == ["512 B", "11.3 GB"] and units(9.7e10, "FLOP/s") == "97.0 GFLOP/s"
    assert [duration(x) for x in (42, 307, 7389, 3e5, math.inf)] == ["0:42", "5:07", "2:03:09", "3d 11:20:00", "?"]
    assert [duration(x) for x in (3e7, 4e7, 7.5886e18)] == ["347d 05:20:00", "1.3 years", "240,000,000,000 years"]


def test_jsonl_survives_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    first = JsonlSink(path)
    first.write(1, {"loss": 2.5, "bad": math.nan})
    assert [r["loss"] for r in read_jsonl(path)] == [2.5]                # flushed before it is closed
    first.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert len(read_jsonl(path)) == 1
    again = JsonlSink(path)
    again.write(2, {"loss": 1.5})
    again.close()
    rows = read_jsonl(path)
    assert [r["step"] for r in rows] == [1, 2] and rows[0]["bad"] == "nan" and abs(rows[0]["time"] - time.time()) < 60


def test_sinks_unknown_and_not_installed(tmp_path, monkeypatch):
    assert "tracker 'wnb' is not known; choose from tensorboard" in complaint(open_sinks, ("wnb",), tmp_path, {}, "x")
    monkeypatch.setitem(sys.modules, "trackio", None)                    # as if it were not installed
    assert complaint(open_sinks, ("trackio",), tmp_path, {}, "x") == (
        f"trackio is not installed: {sys.executable} -m pip install trackio")
    with pytest.raises(ZeroDivisionError), extra("x"):
        1 / 0


def test_the_bar_degrades_to_plain_lines(capsys):
    with StepBar(3, every_s=1e9) as bar:
        for step in (1, 2, 3):
            bar.update(step, {"loss": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "step 1/3  loss 1.000  left 0:00", "step 3/3  loss 1.000  left 0:00"]
    with StepBar(3, enabled=False) as bar:
        bar.update(3, {})
        bar.say("nothing")
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------- hardware

@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
    ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA GeForce RTX 4090", 165.2), ("Other", None)])
def test_listed_peaks_match_whole_words(name, tflops):
    peak = listed_peak(name, "bf16")
    assert peak == (tflops and pytest.approx(tflops * 1e12))


def test_peaks_are_dense_figures():
    for name, peaks in PEAKS:
        if "fp8" in peaks:
            assert peaks["fp8"] == pytest.approx(2 * peaks["bf16"], rel=0.05), name


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system only tells what a process began with")
def test_peak_memory_is_that_of_the_process_alone():
    held = b"x" * 300_000_000
    assert peak_memory("cpu") > len(held)
    code = "from mindseed.base.hardware import peak_memory; print(peak_memory('cpu'))"
    assert 1e6 < int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) < len(held)


def test_the_machine_is_described_and_measured():
    import torch
    machine = describe_machine()
    assert machine["cores"] >= 1 and machine["torch"] == torch.__version__ and machine["memory_gb"] > 0.1
    assert 1e8 < measured_peak("cpu", torch.float32, seconds=0.01) < 1e15
    assert total_memory("cpu") > 1e8


def test_a_peak_is_that_of_the_dtype_asked_for_even_inside_autocast():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default:
                seen.append(result.dtype)
            return result

    with torch.autocast("cpu", torch.bfloat16), Watch():
        timed_matmul(torch.ones(4, 4))
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert seen == [torch.float32, torch.bfloat16]


def test_options_without_effect_are_named():
    assert without_effect(TrainOptions()) == []
    idle = TrainOptions(optim=OptimConfig(kind="adamw", momentum=0.5),
                        schedule=ScheduleConfig(kind="cosine", decay=0.1),
                        loop=LoopOptions(steps=3, tokens_per_param=5.0, validate_every=0, validate_documents=9),
                        data=DataOptions(tokenizer="t", vocab_size=99))
    assert without_effect(idle) == [
        "optim.momentum has no effect: optim.kind is adamw", "schedule.decay has no effect: schedule.kind is cosine",
        "loop.tokens_per_param has no effect: loop.steps says how long to train",
        "loop.validate_documents has no effect: loop.validate_every is 0",
        "data.vocab_size has no effect: data.tokenizer is given"]
    assert without_effect(replace(idle, optim=OptimConfig(momentum=0.5), schedule=ScheduleConfig(decay=0.1),
                                  loop=LoopOptions(tokens_per_param=5.0), data=DataOptions(vocab_size=99))) == []


def test_a_list_is_given_once(capsys):
    assert cli.main(["train", "--data.train", "a", "--data.train", "b"]) == 2
    assert "--data.train is given twice; give all its values after one" in capsys.readouterr().err
    assert cli.main(["train", "--seed", "-1"]) == 2 and "seed=-1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- places to write

def test_a_folder_is_never_replaced_by_a_file_nor_a_file_by_a_folder(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").write_text("x")
    with pytest.raises(UserError, match="precious is a folder and would be replaced by a file"):
        write_text(tmp_path / "precious", "y")
    assert (tmp_path / "precious" / "thesis").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file and would be replaced by a folder"), \
            atomic(tmp_path / "file") as temp:
        temp.mkdir()
    assert (tmp_path / "file").read_text() == "x" and len(list(tmp_path.iterdir())) == 2


def test_a_link_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link or a device"):
        write_text(tmp_path / "link", "y")
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("words", [
    ["train", "--data.train", "FILE", "--out", "FILE/run", "--loop.steps", "1"], ["demo", "--out", "FILE"],
    ["convert", "FILE/model", "FILE/copy"], ["train", "--data.train", "FILE", "--out", "/proc/nowhere/run"]])
def test_places_that_cannot_be_are_two_lines(tmp_path, capsys, words):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    capsys.readouterr()
    code = cli.main([word.replace("FILE", str(tmp_path / "text.jsonl")) for word in words])
    error = capsys.readouterr().err
    assert code == 2 and "error: " in error and "Traceback" not in error
