"""Answer prompts for scripts: one prompt a line in, one JSON object a line out, in the order given.

With `--mode fim` a prompt is a text with a gap, `def area(r): return <fill> * r`, and the answer is what belongs there;
the model must have been trained with --data.fim_rate.

Prompts come from --prompt, from --file or from stdin. With `--input jsonl` a line is {"prompt": "..."} or
{"messages": [...], "tools": [...]}. In chat mode a prompt is a user's question; in text mode the model goes on with it.
Prompt i draws with seed + i, so neither the batch size nor the other prompts change an answer.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Literal, TextIO

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.files import atomic, parse_json
from mindseed.core import Tokenizer
from mindseed.data import fim
from mindseed.infer.beam import beam_search
from mindseed.infer.engine import Engine, Request
from mindseed.infer.rows import Completion
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import Loaded
from mindseed.recipes.answer import AnswerOptions, not_unicode, warn_of_foreign_chat
from mindseed.tokenizers.base import document_marks
from mindseed.tokenizers.chat import encode_chat, normalise


HOLE = "<fill>"                                   # where a text is to be filled in


@dataclass(frozen=True, kw_only=True)
class Options(AnswerOptions):
    prompt: tuple[str, ...] = option((), help="prompts to answer instead of stdin")
    file: str | None = option(None, help="read prompts from this file instead of stdin")
    input: Literal["text", "jsonl"] = option("text", help="a line is a prompt, or JSON with prompt or messages")
    mode: Literal["chat", "text", "fim"] = option("chat", help="ask the prompt as a user's question, continue it as "
                                                               f"text, or fill in the middle, where {HOLE} stands")
    system: str = option("", help="system prompt (chat mode)")
    think: Literal["on", "off", "auto"] = option("auto", help="think first, don't, or as the model likes (chat mode)",
                                                 elsewhere=("open_thinking on",))
    samples: int = option(1, help="answers per prompt")
    batch_size: int = option(16, help="answers written at once")
    beams: int = option(0, help="find the likeliest answer by keeping this many beginnings at a time; 0: draw one")
    logps: bool = option(False, help="also write the log-probability of every token")
    out: str | None = option(None, help="write here instead of stdout")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One answer to make: the row it belongs to, its prompt's ids, its seed; or why there can be none."""

    row: dict[str, Any]
    ids: list[int]
    seed: int
    error: str | None = None


def main(options: Options) -> None:
    for name in ("samples", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be at least 1")
    if options.beams < 0:
        raise UserError(f"beams={options.beams} must be at least 1, or 0 to draw answers")
    if options.prompt and options.file is not None:
        raise UserError("--prompt and --file both give prompts; use one of them")
    loaded = options.load("generate")
    if options.mode == "chat":
        warn_of_foreign_chat(loaded, options.model)
    if options.beams and (options.samples > 1 or options.logps):
        raise UserError("--beams finds the likeliest answer, one a prompt and without log-probabilities; leave out "
                        "--samples and --logps")
    engine, limit = options.engine(loaded, max_seqs=max(options.batch_size, options.beams)), loaded.model.config.seq_len
    with prompts(options) as lines, output(options.out) as out:
        count, refused = 0, []
        for job, answer in answers(engine, jobs(lines, options, loaded, limit), options, options.sampling(loaded)):
            row = job.row
            if answer is None:
                row, refused = row | {"error": job.error}, [*refused, job.error]
            else:
                row = row | {"text": answer.text, "tokens": len(answer.ids), "finish": answer.finish}
                if options.logps:
                    row |= {"ids": answer.ids, "logps": [round(p, 6) for p in answer.logps]}
            print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
            count += 1
    if refused:
        raise UserError(f"{len(refused)} of {count} prompts could not be answered; the first: {refused[0]}")


def answers(engine: Engine, todo: Iterator[Job], options: Options, sampling: Sampling
            ) -> Iterator[tuple[Job, Completion | None]]:
    """Every job with its answer, in order; others are begun while the first are still being written."""
    line: deque[tuple[Job, int | None, Completion]] = deque()
    known: dict[int, Completion] = {}
    while True:
        for job in itertools.islice(todo, 2 * options.batch_size - len(line)):
            if job.error is None and options.beams:
                yield job, best_of_beams(engine, job.ids, options)
                continue
            request = Request(prompt=job.ids, sampling=replace(sampling, seed=job.seed), max_new=options.max_new,
                              stop=options.stop)
            line.append((job, None if job.error else engine.submit(request), Completion()))
            known |= {number: done for _, number, done in [line[-1]] if number is not None}
        if not line:
            return
        while line and (line[0][1] is None or line[0][1] not in engine.jobs):
            job, number, done = line.popleft()
            yield job, None if number is None else done
        for number, token in engine.step():
            known[number].add(token)


def best_of_beams(engine: Engine, ids: list[int], options: Options) -> Completion:
    """The likeliest answer as a completion."""
    best = beam_search(engine, ids, beams=options.beams, max_new=options.max_new)[0]
    done, row = Completion(), engine.row(ids, options.stop, options.max_new)
    for id in best.ids:
        done.add(row.push(id, None))
        if row.finish:
            break
    return done


@contextlib.contextmanager
def prompts(options: Options) -> Iterator[Iterator[tuple[str, str]]]:
    """(where it stands, line) for every line that is not empty."""
    def numbered(lines: TextIO, name: str) -> Iterator[tuple[str, str]]:
        for n, line in enumerate(lines, 1):
            if line.strip():
                yield f"{name}:{n}", line.rstrip("\n")

    if options.prompt:
        yield ((f"--prompt {n}", text) for n, text in enumerate(options.prompt, 1))
    elif options.file is not None:
        if not Path(options.file).is_file():
            raise UserError(f"{options.file} does not exist or is not a file")
        with open(options.file, encoding="utf-8") as lines:
            yield numbered(lines, options.file)
    elif sys.stdin.isatty():
        raise UserError("no prompts: give --prompt or --file, or pipe lines in (to talk, use `mindseed chat`)")
    else:
        yield numbered(sys.stdin, "stdin")


@contextlib.contextmanager
def output(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with atomic(path) as temp, open(temp, "w", encoding="utf-8") as file:
        yield file


def jobs(lines: Iterator[tuple[str, str]], options: Options, loaded: Loaded, limit: int) -> Iterator[Job]:
    """Answers to make, in order; a line that cannot be answered keeps its place, with the reason."""
    try:
        for index, (where, line) in enumerate(lines):
            try:
                row, ids = read_prompt(line, options, loaded)
                if len(ids) >= limit:
                    raise UserError(f"the prompt has {len(ids)} tokens and the model's context is {limit}, which "
                                    "leaves no room for an answer; shorten it")
            except (UserError, ValueError) as error:
                yield Job(row={"index": index, "prompt": line}, ids=[], seed=0, error=f"{where}: {error}")
                continue
            for sample in range(options.samples):
                number = {"sample": sample} if options.samples > 1 else {}
                yield Job(row={"index": index, **row, **number}, ids=ids,
                          seed=options.seed + index * options.samples + sample)
    except UnicodeDecodeError as error:
        raise not_unicode("the prompts are", error) from None


def read_prompt(line: str, options: Options, loaded: Loaded) -> tuple[dict[str, Any], list[int]]:
    """What the output repeats of a prompt, and its ids."""
    data, tokenizer = {"prompt": line}, loaded.tokenizer
    if options.input == "jsonl" and not options.prompt:
        try:
            data = parse_json(line)
        except ValueError as error:
            raise UserError(f"not valid JSON: {error}") from None
        if not isinstance(data, dict) or not ({"prompt", "messages", "conversations"} & data.keys()):
            raise UserError('a line needs "prompt" or "messages"')
        if "prompt" in data and not isinstance(data["prompt"], str):
            raise UserError('"prompt" must be text')
    if options.mode == "fim":
        return data, fill_prompt(data.get("prompt", ""), tokenizer)
    if "prompt" in data and options.mode == "text":
        marks = document_marks(tokenizer.specials)
        begin = [tokenizer.specials[marks[0]]] if marks else []
        return data, begin + tokenizer.encode(data["prompt"])
    messages, tools = ([{"role": "user", "content": data["prompt"]}], None) if "prompt" in data else normalise(data)
    if options.system and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": options.system}, *messages]
    thinking = {"on": True, "off": False, "auto": None}[options.think]
    ids, _ = encode_chat(tokenizer, messages, tools=tools, generation_prompt=True, thinking=thinking,
                         template=loaded.template)
    return data, ids


def fill_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """The beginning and the end of a text around its gap, in the order in which training tells them."""
    if text.count(HOLE) != 1:
        raise UserError(f"to fill in the middle, a prompt needs {HOLE} once, where text is missing")
    before, after = text.split(HOLE)
    marks = document_marks(tokenizer.specials)
    begin = [tokenizer.specials[marks[0]]] if marks else []
    return begin + fim.fim_ids((tokenizer.encode(before), [], tokenizer.encode(after)), fim.markers(tokenizer))
