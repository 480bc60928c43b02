"""Resident memory while a large file is prepared and its batches are gone through: it must not grow with the file.

    python benchmarks/constant_memory.py --gb 2 --folder runs/constant-memory

Generates a JSONL file of the size asked for (different text on every line, seeded), prepares it with worker processes,
iterates over all batches, and trains a toy model on it for 30 steps, each in a process of its own, while this process
samples the resident memory (RSS) of that process and all its children ten times a second. RSS counts shared pages once
for every process, so the sum is an upper bound. `--command "mindseed train ..."` measures any other command the same
way.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

WORDS = ("春天", "river", "明月", "stone", "the", "of", "故人", "light", "and", "千里", "winter", "a", "长江", "house")

PREPARE = """
import sys
from mindseed.data.prepare import prepare
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import load_tokenizer
if __name__ == "__main__":
    file, out, tokenizer = sys.argv[1:]
    prepared = prepare(file, out, load_tokenizer(tokenizer) if tokenizer else Byte())
    train = prepared.manifest["splits"]["train"]
    print(f"{train['documents']:,} documents, {train['tokens']:,} tokens, {len(train['shards'])} shards")
"""
ITERATE = """
import sys
from mindseed.data.loader import PackedRows, RowSource
from mindseed.data.prefetch import Prefetch
from mindseed.data.shards import Prepared
if __name__ == "__main__":
    source = RowSource(PackedRows(Prepared(sys.argv[1]).split("train"), seq_len=512), batch_size=64)
    print(source.rows.stats, flush=True)
    ahead, tokens = Prefetch(source), 0
    while ahead.state_dict()["rows_seen"] < len(source.rows):
        tokens += int(next(ahead).weights.sum())
    print(f"{tokens:,} tokens went by")
"""


def generate(path: Path, size: int) -> None:
    """Lines of {"text": ...}, about 2 kB each, until the file has `size` bytes."""
    rng, written = random.Random(0), 0
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(5, 20))) + "。" for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        number = 0
        while written < size:
            text = f"{number}: " + " ".join(rng.choices(sentences, k=rng.randint(2, 40)))
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            number += 1


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += task.read_text().split()
    return [pid] + [p for child in children for p in family(int(child))]


def resident(pid: int) -> int:
    """Bytes of resident memory of a process and its descendants."""
    pages = 0
    for process in family(pid):
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except (OSError, IndexError):
            pass                                          # it has just ended
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, command: list[str]) -> int:
    """Run a command to its end; print and return the peak of its family's resident memory."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            peak = max(peak, resident(process.pid))
        except OSError:
            pass
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{name} failed with exit code {process.returncode}")
    print(f"{name}: peak resident memory {peak / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s", flush=True)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the generated file")
    parser.add_argument("--folder", default="runs/constant-memory", help="where to work; needs thrice the size")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json; by default one token per byte")
    parser.add_argument("--command", default="", help="measure this command instead")
    options = parser.parse_args()
    if options.command:
        measure(options.command, shlex.split(options.command))
        return
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    file, out = folder / "text.jsonl", folder / "prepared"
    if not file.exists():
        generate(file, int(options.gb * 1e9))
    print(f"{file}: {file.stat().st_size / 1e9:.2f} GB", flush=True)
    peaks = [measure("prepare", [sys.executable, "-c", PREPARE, str(file), str(out), options.tokenizer]),
             measure("iterate", [sys.executable, "-c", ITERATE, str(out)]),
             measure("train", [sys.executable, "-m", "mindseed", "train", "--data.train", str(out), "--out",
                               str(folder / "run"), "--loop.steps", "30", "--loop.batch", "4",
                               "--loop.validate_documents", "50"])]
    sys.exit("over 1 GB" if max(peaks) > 1e9 else 0)


if __name__ == "__main__":
    main()
