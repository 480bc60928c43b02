"""The command `plan` for machines that are not here, for the one that is, and for users who make mistakes."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mindseed import cli
from mindseed.plan import measure
from mindseed.plan.job import Job
from mindseed.plan.machines import machine
from mindseed.plan.memory import memory_of
from mindseed.plan.published import published
from mindseed.plan.time import step_time

BIG = ["plan", "llama3.1-8b", "--gpus", "8", "--hardware", "h100", "--optim.kind", "adamw", "--loop.batch", "16"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No measurements of this machine but those that a test makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shown(capsys, *words: str) -> str:
    assert cli.main(list(words)) == 0
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_a_published_model_on_many_devices(capsys):
    text = shown(capsys, *BIG, "--parallel.zero", "3", "--loop.recompute", "--tokens", "15e12")
    from mindseed.base.mesh import ParallelOptions
    job = Job(rows=1, seq_len=8192, world=8, parallel=ParallelOptions(zero=3), recompute=True, accumulate=2, paged=True)
    time = step_time(published("llama3.1-8b"), job, machine("H100"))
    assert "8,030,261,248" in text and "8 x H100, 989 TFLOP/s in bf16 (data sheet)" in text
    assert f"{time.mfu:.1%}" in text and f"{time.tokens_per_s / 8 / 1000:.2f}k a device" in text
    assert f"{memory_of(published('llama3.1-8b'), job).total / 1e9:.1f} GB" in text
    for part in ("weights gathered whole", "buffers of collectives", "waiting for other ranks", "matrix products",
                 "shard │ gradients", "device hours", "cost at $2.5 an hour (an assumption)"):
        assert part in text, part
    days = 15e12 / time.tokens_per_s / 86_400
    assert abs(int(re.search(r"time │ ([\d.]+) years", text)[1].split(".")[0]) - int(days / 365.25)) <= 1


def test_what_fits_is_nothing_that_a_run_refuses(capsys):
    """States in 8 bits are not for a mesh, so none is advised."""
    text = shown(capsys, "plan", "llama-13b", "--gpus", "8", "--hardware", "l40s", "--data.seq_len", "64",
                 "--loop.batch", "8", "--optim.kind", "adamw", "--optim.states", "8bit")
    assert "this needs" in text and "what fits is none of the settings near to it" in text


def test_old_names_of_the_flags_mean_the_same(capsys):
    line = ["plan", "--depth", "4", "--loop.steps", "10", "--loop.batch", "64"]
    assert shown(capsys, *line, "--gpus", "8", "--hardware", "h100") == shown(
        capsys, *line, "--world", "8", "--gpu", "h100")


def test_prices_links_and_nodes_can_be_given(capsys):
    free = shown(capsys, *BIG, "--parallel.zero", "3", "--loop.recompute", "--price", "0")
    assert "cost at" not in free
    slow = shown(capsys, *BIG, "--parallel.zero", "3", "--loop.recompute", "--node", "1", "--network", "10", "--price",
                 "1")
    assert "cost at $1 an hour │" in slow
    speed = [float(re.search(r"speed at mfu (\d+)%", text)[1]) for text in (free, slow)]
    assert speed[1] < 0.5 * speed[0]


def test_what_does_not_fit_comes_with_the_nearest_that_does(capsys):
    text = shown(capsys, *BIG, "--loop.micro_batch", "2")
    found = re.search(r"this needs ([\d.]+) GB, and a H100 has 80.0 GB, of which 94% are to be had; what fits is (.*)",
                      text)
    assert float(found[1]) > 75 and found[2].startswith("parallel.zero=1, loop.recompute=true")
    remedy = ["--loop.micro_batch", "2", "--parallel.zero", "1", "--loop.recompute"]
    assert "this needs" not in shown(capsys, *BIG, *remedy)
    none = shown(capsys, "plan", "llama3.1-405b", "--gpus", "1", "--hardware", "t4", "--loop.precision", "fp16",
                 "--loop.batch", "1")
    assert "--search tries every mesh, and --gpus takes more" in none


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble", "dualpipe-v", "gpipe"])
def test_a_pipeline_is_planned_with_pieces_enough(schedule, capsys):
    text = shown(capsys, "plan", "llama3.1-8b", "--gpus", "16", "--hardware", "h100", "--parallel.pipe", "4",
                 "--parallel.zero", "1", "--parallel.schedule", schedule, "--loop.steps", "10")
    assert "bubble of the pipeline" in text and "pipe │ activations and their gradients" in text
    pieces = 8 if schedule in ("1f1b", "gpipe") else 16
    assert f"micro-batch {pieces} x 8192, pipe 4 x shard 4" in text


def test_everything_wrong_with_a_mesh_is_said_at_once(capsys):
    assert cli.main([*BIG, "--parallel.tensor", "16", "--parallel.expert", "2", "--parallel.replicas", "2"]) == 2
    error = capsys.readouterr().err
    for line in ("does not divide the 8 ranks", "parallel.replicas=2 has a meaning with parallel.zero",
                 "this model has no experts", "kv_heads=8 is no multiple of parallel.tensor=16"):
        assert line in error, line


def test_a_search_shows_the_best_and_its_flags(capsys):
    line = ["plan", "qwen3-small", "--gpus", "8", "--hardware", "a100", "--loop.batch", "64", "--data.seq_len", "1024",
            "--loop.steps", "1000", "--keep", "3"]
    text = shown(capsys, *line, "--search")
    assert re.search(r"the best of [\d,]+ plans for 8 x A100, 64 rows of 1024 a step, 1,000 steps", text)
    assert "plans fit into 94% of 80.0 GB" in text
    flags = re.search(r"the first as options: (--.*)", text)[1].split()
    assert "--loop.micro_batch" in flags
    assert "time of a step" in shown(capsys, *line, *flags)                       # which can be planned as they stand
    none = shown(capsys, "plan", "llama3.1-70b", "--gpus", "2", "--hardware", "t4", "--search", "--loop.batch", "8",
                 "--loop.precision", "fp16", "--loop.steps", "1")
    assert "nothing fits into 94% of 16.0 GB: take more devices" in none and "the nearest need" in none


def test_a_search_takes_rows_that_meshes_divide(capsys):
    text = shown(capsys, "plan", "qwen3-small", "--gpus", "24", "--hardware", "a100", "--search")
    rows = int(re.search(r"(\d+) rows of", text)[1])
    assert any(rows in (times << k, 24 * times << k) for k in range(20) for times in (1, 3))
    assert "the first as options" in text
    odd = shown(capsys, "plan", "qwen3-small", "--gpus", "8", "--hardware", "a100", "--search", "--loop.batch", "9",
                "--loop.steps", "5")
    assert "9 rows of a step are no multiple of 8 data-parallel ranks (loop.batch)" in odd


@pytest.mark.parametrize("words, says", [
    (["--parallel.zero", "3", "--optim.states", "8bit", "--optim.kind", "adamw"], "optim.states=8bit"),
    (["--parallel.tensor", "8", "--lora.rank", "8"], "adapters (lora.rank) run data-parallel"),
    (["--parallel.backend", "deepspeed", "--parallel.zero", "3"], "updates with AdamW alone")])
def test_what_training_would_refuse_is_not_planned(words, says, capsys):
    assert cli.main(["plan", "llama3.1-8b", "--gpus", "8", "--hardware", "h100", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("search", [False, True])
def test_plans_are_drawn(search, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for ending in ("png", "svg"):
        path = tmp_path / "deep" / f"plan.{ending}"
        shown(capsys, "plan", "toy", "--gpus", "4", "--hardware", "h100", "--loop.batch", "32", "--loop.steps", "5",
              "--picture", str(path), *(["--search"] if search else []))
        assert path.stat().st_size > 5000
    text = path.read_text(encoding="utf-8")
    assert "dashed: 94% of H100" in text and "seconds of a step" in text
    assert cli.main(["plan", "toy", "--hardware", "h100", "--loop.steps", "1", "--picture", "plan.txt"]) == 2
    assert "must end in .png, .svg or .pdf" in capsys.readouterr().err


def test_a_model_directory_is_planned_by_its_config(tmp_path, capsys):
    from mindseed.interop.directory import save_directory
    from mindseed.models.lm import build
    from mindseed.models.presets import TOY
    from mindseed.tokenizers.byte import Byte
    model = build(TOY.lm_config(vocab_size=Byte().vocab_size, seq_len=64))
    save_directory(model, Byte(), tmp_path / "model")
    text = shown(capsys, "plan", str(tmp_path / "model"), "--loop.steps", "1", "--hardware", "l4")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text


# ------------------------------------------------------------------------------------------------------- this machine

@pytest.fixture
def small(monkeypatch):
    """Measurements in seconds instead of half a minute."""
    monkeypatch.setitem(measure.SIZES, "cpu", ((32, 128), (32, 128), 1e9))
    monkeypatch.setitem(measure.LENGTHS, "cpu", (32, 128))
    monkeypatch.setattr(measure, "STEPS", ((1, 1), (2, 2)))
    monkeypatch.setattr(measure, "LONG_ENOUGH_S", 0.0)


def test_a_measured_machine_is_remembered_and_planned_with(small, tmp_path, capsys):
    line = ["plan", "--depth", "2", "--loop.steps", "10", "--loop.batch", "8", "--device", "cpu", "--loop.precision",
            "fp32"]
    assert "speed at mfu 40%" in shown(capsys, *line) and "time of a step" not in shown(capsys, *line)
    assert "remembered in" in shown(capsys, "plan", "--measure", "--device", "cpu")
    path = measure.cache_path(torch.device("cpu"))
    board = measure.load_machine(path)
    again = tmp_path / "again.json"
    measure.save_machine(board, again)
    assert vars(measure.load_machine(again)) == vars(board) and str(path).startswith(str(tmp_path))
    text = shown(capsys, *line)
    assert "time of a step" in text and "FLOP/s in fp32 (measured)" in text
    assert "time of a step" in shown(capsys, *line, "--machine", str(again))
    assert "speed at mfu 25%" in shown(capsys, *line, "--mfu", "0.25")


def test_a_damaged_file_of_measurements_is_refused(small, tmp_path, capsys):
    board = measure.measure_machine(torch.device("cpu"))
    path = tmp_path / "machine.json"
    measure.save_machine(board, path)
    whole = json.loads(path.read_text())
    for change in ({"rates": {"fp32": whole["rates"]["fp32"][:-1]}}, {"peaks": 3}, {"attention_rates": [[1]]}):
        path.write_text(json.dumps(whole | change))
        assert cli.main(["plan", "--depth", "2", "--loop.steps", "1", "--machine", str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error and len(error.splitlines()) <= 2


def test_calibration_finds_the_passes_and_the_overhead_that_steps_were_made_with(monkeypatch):
    """On a machine whose steps take what a plan says, no more and no less."""
    sizes = tuple((m, k, n, 1e9) for m in (64, 4096) for k in (64, 4096) for n in (64, 4096))
    true = measure.Machine(name="x", source="measured", peaks={"fp32": 1e9}, rates={"fp32": sizes}, bandwidth=1e9,
                           attention_rates=((32, 1e9, 1e9), (512, 1e9, 1e9)), update_rate=1e8, logit_s=1e-8,
                           passes=2.5, overhead=0.003, gpu=False)
    plans = iter(measure.STEPS)

    def pretended(*_: object) -> float:
        rows, layers = next(plans)
        config = measure.replace(measure.TOY, layers=layers).lm_config(vocab_size=2048, seq_len=256)
        return measure.step_time(config, Job(rows=rows, seq_len=256, precision="fp32", cpu=True), true).total

    monkeypatch.setattr(measure, "best_s", pretended)
    found = measure.calibrated(measure.replace(true, passes=0.0, overhead=0.0), torch.device("cpu"))
    assert found.passes == pytest.approx(2.5, rel=1e-3) and found.overhead == pytest.approx(0.003, rel=1e-3)


def test_the_presets_of_the_repository_can_be_planned(capsys):
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.toml")):
        if not re.search(r"^(prompts|stage|source)|\[rollout\]|\[world\]", path.read_text(), re.M) and "start" not in \
                path.read_text() and path.name.startswith(("small", "mini")):
            assert "tokens per parameter" in shown(capsys, "plan", str(path), "--hardware", "h100")
