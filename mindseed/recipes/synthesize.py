"""Have a teacher answer prompts, and write what is worth learning as conversations: distillation through text.

  mindseed synthesize problems.jsonl --teacher runs/big/model --n 4 --graded --out answers.jsonl
  mindseed synthesize questions.txt --endpoint http://127.0.0.1:8998/v1 --out answers.jsonl
  mindseed synthesize chats.jsonl --endpoint https://api.example.org/v1 --model NAME --key_env EXAMPLE_KEY --out a.jsonl
  mindseed train --data.train answers.jsonl --model.start runs/small/model          the student reads them

Prompts are lines of a .txt file, rows with "prompt" or "question", or conversations, of which every turn of the
assistant is said anew. Dropped are answers that are empty, unfinished, too long, repeated or loop, and with --graded
those that are wrong. The teacher is a model directory, or whatever speaks OpenAI's API. A run that was stopped goes on
with the same command; what was dropped, and why, stands in a summary beside the file.
"""
from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mindseed.agents.chat_client import ChatClient
from mindseed.base.config import option, to_dict
from mindseed.base.errors import UserError
from mindseed.base.files import locked, read_json, write_json
from mindseed.base.journal import Journal, beside, changes
from mindseed.base.log import notes, say, table, warn
from mindseed.data.dedup import Seen
from mindseed.data.formats import BadRow, check, parse, payloads
from mindseed.data.readers import expand, read_rows
from mindseed.recipes.answer import AnswerOptions, warn_of_foreign_chat
from mindseed.rl.endpoint import ask_endpoint
from mindseed.rl.prompts import Prompt, prompt_of
from mindseed.rl.rejection import Answer, Sampled, sample_answers
from mindseed.tasks.verify import grade, kind_of
from mindseed.tokenizers.chat import to_json

THINKING = {"on": True, "off": False, "auto": None}
MAY_CHANGE = ("device", "dtype", "batch_size", "concurrency", "timeout_s", "retries", "key_env", "overwrite", "out")
DROPPED = {"refused": "wrong"}                    # what `keep` refuses here


@dataclass(frozen=True, kw_only=True)
class Options:
    prompts: tuple[str, ...] = option((), help="files, folders or globs of prompts", positional=True)
    teacher: str | None = option(None, help="the model directory that answers")
    endpoint: str | None = option(None, help="or the address of a server of OpenAI's API, up to its /v1",
                                  elsewhere=("api_base", "base_url"))
    model: str | None = option(None, help="the server's name of the model [its only one]")
    key_env: str = option("OPENAI_API_KEY", help="the environment variable that holds the server's key; the key itself "
                                                 "is written nowhere", elsewhere=("api_key environment variable",))
    out: str | None = option(None, help="the file of conversations to write, a .jsonl")
    n: int = option(1, help="answers to each prompt")
    graded: bool = option(False, help="keep right answers only, where a row holds what to check them against")
    run_code: bool = option(False, help="with graded: run code that is answered against the row's tests, in a limited "
                                        "process of its own, but as you")
    longest: int | None = option(None, help="longest answer to be kept, in characters")
    near: float = option(0.0, help="drop conversations that share at least so much of their text with an earlier one "
                                   "(0.8 is usual; needs datasketch); 0: only equal ones")
    turns: Literal["every", "last"] = option("every", help="of a conversation answer every turn of the user, or the "
                                                           "last")
    limit: int | None = option(None, help="answer the first so many prompts")
    system: str = option("", help="system message before every prompt; it is written along")
    think: Literal["on", "off", "auto"] = option("auto", help="think first, don't, or as the model likes")
    temperature: float | None = option(None, help="0: always the likeliest token; higher: bolder [the model's]")
    top_k: int | None = option(None, help="choose among the k likeliest tokens; 0: all [the model's]")
    top_p: float | None = option(None, help="choose among the likeliest with this much probability [the model's]")
    min_p: float | None = option(None, help="drop tokens less likely than this times the likeliest [the model's]")
    max_new: int = option(512, help="longest turn of an answer, in tokens", elsewhere=("max_new_tokens", "max_tokens"))
    seed: int = option(0, help="the same seed gives the same answers, whatever else is asked")
    batch_size: int = option(64, help="answers that a model directory writes at once")
    concurrency: int = option(16, help="requests to the server at once")
    timeout_s: float = option(300.0, help="the longest a server may take for one answer")
    retries: int = option(5, help="attempts after the first, each after twice the wait, where a server is busy or gone")
    device: str = option("auto", help="cpu, cuda, mps, or auto")
    dtype: str = option("auto", help="fp32, bf16, or auto: fp32 on a CPU, bf16 elsewhere")
    overwrite: bool = option(False, help="start anew where the file exists")


def main(options: Options) -> int:
    check_options(options)
    out = Path(options.out)
    summary = out.with_name(out.name.removesuffix(".jsonl") + ".summary.json")
    prompts, left_out = read_prompts(options)
    busy = f"{out} is being written by another process; end it first, or choose another place"
    with locked(out.with_name(f".{out.name}.lock"), wait_s=0, busy=busy):
        about = {**to_dict(options), "prompts": mark_of([[p.messages, p.tools] for p in prompts]),
                 "weights": weights_of(options)}
        about = {key: value for key, value in about.items() if key not in MAY_CHANGE}
        if options.overwrite:
            for path in (out, beside(out), summary):
                path.unlink(missing_ok=True)
        elif out.exists() and not beside(out).exists():
            return finished(out, summary, about)
        journal = Journal(out, about)
        try:
            if journal.done:
                say(f"going on after {journal.done:,} of {len(prompts):,} prompts")
            write_all(options, prompts, journal)
        except KeyboardInterrupt:
            say(f"stopped after {journal.done:,} of {len(prompts):,} prompts; give the same command to go on")
            return 130
        finally:
            journal.close()
            if not journal.done:                  # nothing has come of it
                out.unlink()
                beside(out).unlink()
        write_json(summary, {"answers": str(out.name), **journal.figures, "left_out": left_out, "about": about})
        beside(out).unlink()
    report(out, summary, journal.figures, left_out)
    return 0


def write_all(options: Options, prompts: list[Prompt], journal: Journal) -> None:
    """Answer the prompts that are not answered yet, and write what is kept, prompt by prompt."""
    seen, figures = Seen(options.near), Figures.of(journal.figures)
    if journal.size:
        for row in read_rows([journal.path]):
            seen.add(text_of(row.row["conversations"]))
    columns = (TextColumn("{task.fields[kept]:,} kept, {task.fields[dropped]:,} dropped"), BarColumn(),
               MofNCompleteColumn(), TimeRemainingColumn())
    with closing(answered(options, prompts[journal.done:], journal.done)) as results, \
            Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("", total=len(prompts), completed=journal.done, kept=figures.kept,
                            dropped=sum(figures.dropped.values()))
        for sampled in results:
            rows = []
            for answer in sampled.answers:
                if seen.add(text_of(answer.messages)):
                    rows.append(row_of(sampled.prompt, answer))
                else:
                    sampled.dropped["near duplicate" if options.near else "repeated"] += 1
            figures.count(sampled, rows)
            journal.add(rows, figures.plain())
            bar.update(task, advance=1, kept=figures.kept, dropped=sum(figures.dropped.values()))


def answered(options: Options, prompts: list[Prompt], first: int) -> Iterator[Sampled]:
    """Every prompt with the answers of whoever is the teacher."""
    if not prompts:
        return
    keep = right if options.graded else None
    same = {"n": options.n, "keep": keep, "every_turn": options.turns == "every", "longest": options.longest,
            "first": first}
    given = {name: value for name in ("temperature", "top_k", "top_p", "min_p")
             if (value := getattr(options, name)) is not None}
    if options.endpoint:
        client = ChatClient(endpoint=options.endpoint, key_env=options.key_env, timeout_s=options.timeout_s,
                            retries=options.retries)
        thinking = THINKING[options.think]
        template = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
        yield from ask_endpoint(client, prompts, model=model_at(client, options.model), seed=options.seed,
                                concurrency=options.concurrency, **same,
                                settings={"max_tokens": options.max_new, **given, **template})
        return
    asked = AnswerOptions(model=options.teacher, device=options.device, dtype=options.dtype, seed=options.seed, **given)
    loaded = asked.load("synthesize")
    warn_of_foreign_chat(loaded, options.teacher)
    engine = asked.engine(loaded, max_seqs=options.batch_size)
    yield from sample_answers(engine, prompts, sampling=asked.sampling(loaded), max_new=options.max_new,
                              template=loaded.template, thinking=THINKING[options.think], **same)


# ----------------------------------------------------------------------------------------------------------- the parts

@dataclass
class Figures:
    """What became of all prompts so far."""

    prompts: int
    sampled: int
    kept: int
    tokens: int
    answered: int                                 # prompts of which at least one answer is kept
    dropped: Counter[str]

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Figures:
        names = ("prompts", "sampled", "kept", "tokens", "answered")
        return cls(**{name: plain.get(name, 0) for name in names}, dropped=Counter(plain.get("dropped", {})))

    def plain(self) -> dict[str, Any]:
        return vars(self) | {"dropped": dict(self.dropped.most_common())}

    def count(self, sampled: Sampled, rows: list[str]) -> None:
        self.prompts += 1
        self.sampled += len(rows) + sampled.dropped.total()
        self.kept += len(rows)
        self.tokens += sampled.tokens
        self.answered += bool(rows)
        for why, count in sampled.dropped.items():
            self.dropped[DROPPED.get(why, why)] += count


def check_options(options: Options) -> None:
    """UserError for options that cannot be meant."""
    if not options.prompts:
        raise UserError("which prompts? mindseed synthesize FILE --teacher DIRECTORY --out answers.jsonl")
    if bool(options.teacher) == bool(options.endpoint):
        raise UserError("who answers? Give --teacher DIRECTORY or --endpoint http://HOST:PORT/v1, one of them")
    if not options.out or not options.out.endswith(".jsonl"):
        raise UserError(f"--out must name the file to write, a .jsonl{f', not {options.out}' if options.out else ''}")
    if options.model and not options.endpoint:
        raise UserError("--model is the name of a model at --endpoint; a directory is named by --teacher")
    for name in ("n", "max_new", "batch_size", "concurrency", "limit", "longest"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be at least 1")
    if options.retries < 0 or options.timeout_s <= 0 or options.seed < 0:
        raise UserError(f"retries={options.retries} and seed={options.seed} must not be negative, "
                        f"timeout_s={options.timeout_s:g} above 0")
    if options.n > 1 and options.temperature == 0:
        raise UserError(f"n={options.n} answers at temperature 0 would all be the same; raise one, or lower the other")
    Seen(options.near)                            # is datasketch there?


def read_prompts(options: Options) -> tuple[list[Prompt], dict[str, int]]:
    """All prompts, each once, and how many rows are none and why. UserError if nothing is left, or if nothing could be
    graded that was to be."""
    prompts, bad, seen, repeated = [], [], set(), 0
    for path in expand(options.prompts):
        for place, row in rows_of(path):
            try:
                if isinstance(row, BadRow):
                    raise row
                prompt = prompt_of(asked_of(row), place, options.system)
            except (UserError, BadRow) as error:
                bad.append(str(error) if isinstance(error, UserError) else f"{place}: {error}")
                continue
            mark = mark_of([prompt.messages, prompt.tools])
            repeated += mark in seen
            if mark not in seen:
                seen.add(mark)
                prompts.append(Prompt(messages=prompt.messages, tools=prompt.tools, row=row, name=place))
    prompts = prompts[:options.limit]
    if not prompts:
        raise UserError("no prompt was found" + (f"; the first row that is none: {bad[0]}" if bad else ""))
    if bad:
        warn(f"{len(bad)} rows are no prompts and are left out, the first: {bad[0]}")
    unchecked = sum(not gradable(prompt.row) for prompt in prompts) if options.graded else 0
    if unchecked == len(prompts):
        raise UserError('--graded has nothing to check answers against: no row has an "answer", "tests" or a "schema"')
    if options.graded and not options.run_code:
        for prompt in prompts:
            if gradable(prompt.row) and kind_of(prompt.row) == "code":
                raise UserError(f"{prompt.name} has tests, for which code that the teacher writes would be run, in a "
                                "limited process of its own but as you: if you want that, add --run_code")
    if unchecked:
        warn(f"{unchecked} of {len(prompts)} prompts hold nothing to check answers against; theirs are kept unchecked")
    return prompts, {"no prompt": len(bad), "repeated prompt": repeated}


def rows_of(path: Path) -> Iterator[tuple[str, dict | BadRow]]:
    """(place, row) of a file; a line of a .txt file is a prompt."""
    check(path)
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None
        yield from ((f"{path}:{i}", {"prompt": line.strip()}) for i, line in enumerate(lines, 1) if line.strip())
        return
    for line, payload in payloads(path):
        try:
            yield f"{path}:{line}", parse(path, payload)
        except BadRow as reason:
            yield f"{path}:{line}", reason


def asked_of(row: dict) -> dict:
    """The row as `prompt_of` reads it: of instructions without their output, of a preference its chosen side."""
    if isinstance(row.get("instruction"), str) and not {"messages", "conversations"} & row.keys():
        return {"prompt": "\n".join(part for part in (row["instruction"], row.get("input")) if part)}
    if isinstance(row.get("chosen"), list) and not {"messages", "conversations", "prompt"} & row.keys():
        return {**row, "messages": row["chosen"]}
    return row


def gradable(row: dict) -> bool:
    try:
        return bool(kind_of(row))
    except UserError:
        return False


def right(prompt: Prompt, answer: Answer) -> bool:
    """Whether the row's own grader gives the answer full marks; what cannot be graded counts as right."""
    return not gradable(prompt.row) or grade(prompt.row, answer.text)["score"] == 1


def row_of(prompt: Prompt, answer: Answer) -> str:
    """A line of the file, as `mindseed train` reads it."""
    tools = {"tools": prompt.tools} if prompt.tools else {}
    return to_json({"conversations": answer.messages, **tools, "source": Path(prompt.name).name})     # file:line


def mark_of(value: Any) -> str:
    """Equal for equal values."""
    return hashlib.blake2b(to_json(value).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def text_of(messages: list[dict]) -> str:
    """All that is said in a conversation."""
    return "\n".join(f"{m.get('reasoning_content') or ''} {m.get('content') or ''} {to_json(m.get('tool_calls') or [])}"
                     for m in messages)


def model_at(client: ChatClient, name: str | None) -> str:
    """The model to ask for. UserError at once if no server is there, or if it leaves the choice open."""
    names = client.models()
    if name is None and len(names) != 1:
        raise UserError(f"--model NAME: {client.endpoint} " + (
            f"serves {', '.join(names[:20])}; choose one" if names else "does not say what it serves"))
    if name is not None and names and name not in names:
        warn(f"{client.endpoint} does not list a model {name}; it lists {', '.join(names[:20])}")
    return name or names[0]


def weights_of(options: Options) -> list:
    """By what a teacher's directory is known again."""
    files = sorted(Path(options.teacher).glob("*.safetensors")) if options.teacher else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def finished(out: Path, summary: Path, about: dict[str, Any]) -> int:
    """A file without a journal: done already, or somebody else's."""
    there = read_json(summary, {"about": {str: Any}})["about"] if summary.exists() else None
    if there is None:
        raise UserError(f"{out} exists; choose another --out, or write over it with --overwrite")
    if changed := changes(there, about):
        raise UserError(f"{out} exists and was made otherwise ({'; '.join(changed)}); choose another --out, or write "
                        "over it with --overwrite")
    say(f"{out} is finished: nothing is left to do")
    return 0


def report(out: Path, summary: Path, figures: dict[str, Any], left_out: dict[str, int]) -> None:
    """What was kept, and what was dropped and why."""
    rows = [["kept", f"{figures['kept']:,}"], *([f"dropped: {why}", f"{count:,}"] for why, count in
                                               figures["dropped"].items())]
    rows += [[f"rows left out: {why}", f"{count:,}"] for why, count in left_out.items() if count]
    table("", ["answers", ""], rows)
    say(f"{out}: {figures['kept']:,} conversations of {figures['answered']:,} of {figures['prompts']:,} prompts; "
        f"figures in {summary}")
    if figures["kept"]:
        say(f"\nA smaller model learns from them:\n\n    mindseed train --data.train {shlex.quote(str(out))} "
            "--model.start DIRECTORY\n")
    else:
        warn("no answer was worth keeping; look at a few with mindseed generate, or lower what is asked (--graded, "
             "--longest, --max_new)")
