"""Preparing: the same folder from any number of workers and after any kill; every bad line accounted for."""
from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy

from mindseed.base.errors import UserError
from mindseed.base.files import sha256
from mindseed.data import pack
from mindseed.data import prepare as preparing
from mindseed.data.loader import Evaluation, PackedSource
from mindseed.data.prepare import prepare, write_prepared
from mindseed.data.shards import Mapped, Prepared, ShardedDocuments
from mindseed.tokenizers.base import BOS_ID, EOS_ID
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import encode_chat, template_hash

TOKENIZER = Byte()
CHAT = [{"role": "user", "content": "你好 <|im_end|>"}, {"role": "assistant", "content": "hello"}]


def write(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def story(i):
    return {"text": f"Story {i}. " + "春天 came early. " * (i * 7919 % 23)}


def tree(folder):
    """What a folder holds, except plans of packing."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*"))
            if p.is_file() and "plans" not in p.parts}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("mindseed.data.encode.CHUNK_ROWS", 16)
    monkeypatch.setattr(preparing, "INLINE_BYTES", 0)


def test_documents_come_back_whole(tmp_path, small_chunks):
    rows = [story(i) for i in range(200)]
    prepared = prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "out", TOKENIZER, heldout=0.2, shard_tokens=9000,
                       workers=1)
    assert len(prepared.manifest["splits"]["train"]["shards"]) > 2 and prepared.kind == "text"
    found = {}
    for split in ("train", "heldout"):
        documents = prepared.split(split)
        for i in range(len(documents)):
            ids, trainable = documents.get(i)
            text = rows[int(documents.name(i).rsplit(":", 1)[1]) - 1]["text"]
            assert ids.tolist() == [BOS_ID, *TOKENIZER.encode(text), EOS_ID] and trainable is None
            assert documents.bytes[i] == len(text.encode()) and documents.lengths[i] == len(ids)
            found[documents.name(i)] = split
    assert len(found) == 200 and 15 < list(found.values()).count("heldout") < 65
    totals = prepared.manifest["splits"]["train"]
    assert totals["supervised"] == totals["tokens"] - totals["documents"]
    assert prepared.tokenizer().hash() == TOKENIZER.hash() == prepared.tokenizer_hash


def test_shards_are_safetensors(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"messages": CHAT}, story(3)])
    prepared = prepare(file, tmp_path / "out", TOKENIZER, heldout=0)
    path = tmp_path / "out" / prepared.manifest["splits"]["train"]["shards"][0]["file"]
    theirs, ours = safetensors.numpy.load_file(path), Mapped(path).arrays
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[k], ours[k]) for k in ours)
    assert ours["ids"].dtype == np.uint16 and all(a.dtype == theirs[k].dtype for k, a in ours.items())


def test_conversations_have_the_renderers_mask_and_bytes(tmp_path):
    rows = [{"conversations": CHAT}, {"messages": CHAT[:1]}, {"instruction": "do", "input": "", "output": "done!"},
            {"messages": [*CHAT[:1], {"role": "assistant", "reasoning_content": "嗯", "content": "x"}]}]
    prepared = prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "out", TOKENIZER, heldout=0)
    documents = prepared.split("train")
    assert prepared.kind == "chat" and len(documents) == 3
    ids, trainable = documents.get(0)
    expected = encode_chat(TOKENIZER, CHAT)
    assert ids.tolist() == expected[0] and trainable.astype(bool).tolist() == expected[1]
    assert documents.bytes[:2].tolist() == [5, 5]
    assert documents.bytes[2] == len("<think>\n嗯\n</think>\n\nx".encode()) - len("<think></think>")
    assert prepared.manifest["skipped"] == [f"{tmp_path}/a.jsonl:2: no assistant turn, so there is nothing to learn"]
    assert prepared.manifest["splits"]["train"]["supervised"] == sum(documents.get(i)[1][1:].sum() for i in range(3))
    Prepared(tmp_path / "out", template_hash=template_hash())
    with pytest.raises(UserError, match="another chat template"):
        Prepared(tmp_path / "out", template_hash="f" * 64)


def test_preferences_are_pairs_of_conversations(tmp_path):
    good, bad = ([*CHAT[:1], {"role": "assistant", "content": c}] for c in ("good", "bad"))
    rows = [{"chosen": good, "rejected": bad}, {"prompt": "q", "chosen": "yes", "rejected": "no"}] * 2
    prepared = prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "out", TOKENIZER, heldout=0)
    documents = prepared.split("train")
    assert prepared.kind == "preference" and len(documents) == 8
    texts = [TOKENIZER.decode(documents.get(i)[0].tolist()) for i in range(4)]
    assert ["good" in texts[0], "bad" in texts[1], "yes" in texts[2], "no" in texts[3]] == [True] * 4
    write(tmp_path / "b.jsonl", [*rows, story(1)])
    with pytest.raises(UserError, match="preference rows and others"):
        prepare(tmp_path / "b.jsonl", tmp_path / "out2", TOKENIZER)


def test_the_split_follows_content_not_order(tmp_path):
    rows = [story(i) for i in range(300)]
    sides = []
    for order in (rows, random.Random(0).sample(rows, 300) + rows[:50]):
        prepared = prepare(write(tmp_path / "a.jsonl", order), tmp_path / f"out{len(sides)}", TOKENIZER, heldout=0.1)
        heldout = prepared.split("heldout")
        sides.append({bytes(heldout.get(i)[0].tobytes()) for i in range(len(heldout))})
    assert sides[0] == sides[1] and sides[0]


def test_any_number_of_workers_makes_the_same_bytes(tmp_path, small_chunks):
    rows = [story(i) if i % 3 else {"messages": CHAT} for i in range(300)] + ["{bad"]
    files = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:40])]
    trees = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}"
        prepare(files, out, TOKENIZER, workers=workers, shard_tokens=9000, heldout=0.1)
        trees.append(tree(out))
    assert trees[0] == trees[1] == trees[2] and len(trees[0]) > 6


def test_a_second_call_does_nothing_and_other_inputs_are_refused(tmp_path, monkeypatch):
    file, out = write(tmp_path / "a.jsonl", [story(i) for i in range(50)]), tmp_path / "out"
    prepare(file, out, TOKENIZER)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    monkeypatch.setattr(preparing, "in_order", None)                  # any work would fail
    prepare(file, out, TOKENIZER, workers=2)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    monkeypatch.undo()
    with pytest.raises(UserError, match="heldout was 0.01, is 0.5"):
        prepare(file, out, TOKENIZER, heldout=0.5)
    other = Byte(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    with pytest.raises(UserError, match="tokenizer_hash was .* vocab_size was 292, is 259"):
        prepare(file, out, other)
    write(file, [story(1)])
    with pytest.raises(UserError, match=r"changed since: .*a\.jsonl\. Choose"):
        prepare(file, out, TOKENIZER)
    assert len(prepare(file, out, TOKENIZER, overwrite=True, heldout=0).split("train")) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("years of work")
    with pytest.raises(UserError, match="no prepared folder"):
        prepare(file, tmp_path / "mine", TOKENIZER, overwrite=True)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from mindseed.data import encode, prepare as preparing
    from mindseed.tokenizers.byte import Byte
    if __name__ == "__main__":
        encode.CHUNK_ROWS, preparing.INLINE_BYTES = 16, 0
        file, out, workers = sys.argv[1:]
        preparing.prepare(file, out, Byte(), workers=int(workers), shard_tokens=4000, heldout=0.1,
                          progress=lambda rows, parts, skipped: print(rows, flush=True))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_and_restart_make_the_same_bytes(tmp_path, small_chunks, workers):
    rows = [story(i) if i % 100 else "{bad" for i in range(800)]
    file, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out"
    prepare(file, tmp_path / "whole", TOKENIZER, workers=1, shard_tokens=4000, heldout=0.1)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    for after in (200, 500):                                          # rows; in the middle of a part
        process = subprocess.Popen([sys.executable, script, file, out, str(workers)], stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=os.getcwd())
        for line in process.stdout:
            if int(line) >= after:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        with pytest.raises(UserError, match="run the same prepare command again"):
            Prepared(out)
    kept = sorted((out / ".parts").glob("0*.json"))
    (out / "train" / f"{len(kept):05}.safetensors").write_bytes(b"half a shard")     # a part cut short
    times = [p.stat().st_mtime_ns for p in kept]
    assert len(kept) > 2 and times == sorted(times)
    prepare(file, out, TOKENIZER, workers=workers, shard_tokens=4000, heldout=0.1)
    assert tree(out) == tree(tmp_path / "whole")


def test_finished_parts_are_not_redone(tmp_path, small_chunks, monkeypatch):
    file, out = write(tmp_path / "a.jsonl", [story(i) for i in range(400)]), tmp_path / "out"

    def stop(rows, parts, skipped):
        if rows >= 300:
            raise KeyboardInterrupt

    settings = dict(shard_tokens=4000, workers=1)
    with pytest.raises(KeyboardInterrupt):
        prepare(file, out, TOKENIZER, progress=stop, **settings)
    rows = []
    prepare(file, out, TOKENIZER, progress=lambda *seen: rows.append(seen[0]), **settings)
    assert 200 < rows[0] <= 304 and rows[-1] == 400
    with pytest.raises(UserError, match="seed was 0, is 1"):
        prepare(file, out, TOKENIZER, seed=1, **settings)


def test_bad_lines_are_listed_and_have_a_budget(tmp_path):
    good = [story(i) for i in range(100)]
    bad = ["{", {"text": ""}, {"question": "?"}, '{"text": "\\ud800"}', {"messages": CHAT[:1]}, {"messages": "hi"}]
    prepared = prepare(write(tmp_path / "a.jsonl", bad + good), tmp_path / "out", TOKENIZER)
    assert prepared.manifest["rows"] == {"total": 106, "skipped": 6, "text": 100}
    lines = prepared.manifest["skipped"]
    for number, (line, reason) in enumerate(zip(lines, ("corrupt JSON", "empty", '"question"', "surrogate",
                                                        "no assistant", "not a conversation")), 1):
        assert line.startswith(f"{tmp_path}/a.jsonl:{number}: ") and reason in line
    for budget, message in ((5, "6 of the first 106 rows"), (0, "0 are allowed")):
        with pytest.raises(UserError, match=f"{message}(.|\n)*a.jsonl:4: .*surrogate"):
            prepare(tmp_path / "a.jsonl", tmp_path / f"strict{budget}", TOKENIZER, max_skipped=budget)
    with pytest.raises(UserError, match=r"11 of the first 11 rows .* 10 are allowed"):
        prepare(write(tmp_path / "b.jsonl", ["{"] * 11), tmp_path / "out3", TOKENIZER)
    with pytest.raises(UserError, match="nothing to train on: of 2 rows 2 were skipped"):
        prepare(write(tmp_path / "c.jsonl", ["{"] * 2), tmp_path / "out4", TOKENIZER)
    write(tmp_path / "c.jsonl", good)                                 # mended: no need to clean up first
    prepare(tmp_path / "c.jsonl", tmp_path / "out3", TOKENIZER)


def test_a_full_disk_is_an_error_from_which_one_goes_on(tmp_path):
    file, out = write(tmp_path / "a.jsonl", [story(i) for i in range(2000)]), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match="could not write .*00000.safetensors: .*free some space"):
            prepare(file, out, TOKENIZER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [p for p in out.rglob("*") if ".tmp-" in p.name]
    assert prepare(file, out, TOKENIZER).manifest["rows"]["total"] == 2000


def test_damage_is_found_when_opening(tmp_path):
    file, out = write(tmp_path / "a.jsonl", [story(i) for i in range(50)]), tmp_path / "out"
    with pytest.raises(UserError, match="holds no prepared data"):
        Prepared(out)
    prepare(file, out, TOKENIZER)
    with pytest.raises(UserError, match="another tokenizer"):
        Prepared(out, tokenizer=Byte(("<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    with pytest.raises(UserError, match="no split 'test'"):
        Prepared(out).split("test")
    shard = out / "train" / "00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Prepared(out).split("train")
    with pytest.raises(UserError, match="has changed since"):
        Prepared(out, verify=True)
    for damaged in (whole[:-1], whole[:100], whole[:5], b""):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match="truncated or damaged|cannot be read"):
            Prepared(out).split("train")
    shard.unlink()
    with pytest.raises(UserError, match="00000.safetensors is missing"):
        Prepared(out).split("train")


def test_plans_are_kept_on_disk_and_follow_the_data(tmp_path, monkeypatch):
    out = tmp_path / "out"
    documents = prepare(write(tmp_path / "a.jsonl", [story(i) for i in range(99)]), out, TOKENIZER).split("train")
    first = PackedSource(documents, seq_len=128, batch_size=4)
    assert len(list((out / "plans").glob("best-*"))) == 1
    monkeypatch.setattr("mindseed.data.pack._Windows", None)          # must come from the disk now
    again = PackedSource(documents, seq_len=128, batch_size=4)
    assert all((next(first).ids == next(again).ids).all() for _ in range(30))
    assert first.rows.stats == again.rows.stats and first.rows.stats.fill > 0.9
    monkeypatch.undo()
    (out / "plans").rename(tmp_path / "aside")
    os.chmod(out, 0o555)                                              # a folder one may only read
    monkeypatch.setattr(os, "access", lambda *_: False)
    memory = PackedSource(documents, seq_len=128, batch_size=4)
    os.chmod(out, 0o755)
    again.load_state_dict(memory.state_dict())
    assert all((next(memory).ids == next(again).ids).all() for _ in range(30))


def test_an_empty_heldout_split_is_explained(tmp_path):
    prepared = prepare(write(tmp_path / "a.jsonl", [story(1)]), tmp_path / "out", TOKENIZER, heldout=0)
    assert len(prepared.split("heldout")) == 0
    with pytest.raises(UserError, match="held-out split is empty"):
        Evaluation(prepared.split("heldout"), seq_len=8, batch_size=1)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures resident memory through /proc")
def test_memory_stays_constant(tmp_path, monkeypatch):
    """24 MB of text, 53 MB of shards, are made and gone through with 25 MB on top of what was resident before."""
    monkeypatch.setattr("mindseed.data.shards.TOUCHED_BYTES", 4 << 20)
    monkeypatch.setattr("mindseed.data.encode.CHUNK_BYTES", 1 << 16)
    line = json.dumps({"text": "memory " * 600}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * (24_000_000 // len(line)))
    page = os.sysconf("SC_PAGE_SIZE")
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page    # noqa: E731
    peak = [resident()] * 2

    def watch(*_):
        peak[1] = max(peak[1], resident())

    settings = dict(heldout=0, shard_tokens=1 << 19, workers=1, progress=watch)
    documents = prepare(tmp_path / "a.jsonl", tmp_path / "out", TOKENIZER, **settings).split("train")
    source = PackedSource(documents, seq_len=1024, batch_size=64)
    assert sum(len(shard.map) for shard in documents.shards) > 45_000_000
    while source.epoch < 1:
        next(source)
        watch()
    assert peak[1] - peak[0] < 25_000_000
    assert isinstance(documents, ShardedDocuments)


def test_workers_do_not_outlive_a_killed_parent(tmp_path, small_chunks):
    file = write(tmp_path / "a.jsonl", [story(i) for i in range(5000)])
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED).replace("print(rows", "print(rows, *[p.pid for p in __import__("
                                                      "'multiprocessing').active_children()]"))
    process = subprocess.Popen([sys.executable, script, file, tmp_path / "out", "2"], stdout=subprocess.PIPE, text=True)
    children = [int(pid) for pid in process.stdout.readline().split()[1:]]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) == 2
    for _ in range(100):
        alive = [pid for pid in children if os.path.exists(f"/proc/{pid}/stat")
                 and open(f"/proc/{pid}/stat").read().split()[2] != "Z"]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


def test_another_programs_manifest_is_left_alone(tmp_path):
    write(tmp_path / "a.jsonl", [story(1)])
    (tmp_path / "ext").mkdir()
    (tmp_path / "ext" / "manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(UserError, match="another program's"):
        prepare(tmp_path / "a.jsonl", tmp_path / "ext", TOKENIZER, overwrite=True)
    assert (tmp_path / "ext" / "manifest.json").exists()


def test_of_many_who_want_a_plan_one_makes_it(tmp_path, monkeypatch):
    prepare(write(tmp_path / "a.jsonl", [story(i) for i in range(60)]), tmp_path / "out", TOKENIZER)
    made, make = [], pack._to_disk
    monkeypatch.setattr(pack, "_to_disk", lambda *args: (made.append(args[0]), time.sleep(0.1), make(*args)))
    documents = [Prepared(tmp_path / "out").split("train") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        plans = list(pool.map(lambda some: pack.plan(some, 32), documents))
    assert len(made) == 1 and len({len(plan) for plan in plans}) == 1


def test_overwrite_makes_damaged_shards_again(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50)))
    prepare(file, tmp_path / "out", TOKENIZER)
    shard = next((tmp_path / "out" / "train").glob("*.safetensors"))
    whole = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(whole[:-40] + bytes(40)), lambda: shard.write_bytes(whole[:-9]),
                   shard.unlink):
        damage()
        prepare(file, tmp_path / "out", TOKENIZER, overwrite=True)
        assert shard.read_bytes() == whole


def test_documents_made_by_a_program_keep_what_each_token_counts(tmp_path):
    documents = [([1, 70, 71, 72], [0, 0, 16, 1]), ([80, 81, 82], None)]
    made = write_prepared(tmp_path / "made", Byte(), {"train": documents, "heldout": documents[:1]}, "memory")
    assert made.manifest["splits"]["train"]["supervised"] == 4 and made.split("heldout").lengths.tolist() == [4]
    batch = next(PackedSource(made.split("train"), seq_len=8, batch_size=1))
    counted = {int(t): float(w) for t, w in zip(batch.targets[0], batch.weights[0]) if w}
    assert counted == {71: 16.0, 72: 1.0, 81: 1.0, 82: 1.0}
    assert write_prepared(tmp_path / "made", Byte(), {}, "memory").manifest == made.manifest       # finished: kept
