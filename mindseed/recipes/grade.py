"""Grading a model on the embedded world's held-out questions, in one batched pass of greedy decoding."""
from __future__ import annotations

from typing import Any

from mindseed.core import Tokenizer
from mindseed.infer.generate import generate
from mindseed.infer.sample import Sampling
from mindseed.models.lm import LM
from mindseed.tasks.toy import ToyTask, score_table
from mindseed.tokenizers.chat import encode_chat, normalise

MAX_NEW = 96                       # the longest reference answer with its <think> block takes about half of that
BATCH = 64                         # questions answered at once


def grade(model: LM, tokenizer: Tokenizer, task: ToyTask) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The score table of `score_table`, and every question with what was expected, answered and scored."""
    examples = list(task.examples())
    prompts = []
    for example in examples:
        messages, tools = normalise({"messages": task.prompt(example)})
        prompts.append(encode_chat(tokenizer, messages, tools=tools, generation_prompt=True)[0])
    texts: list[str] = [""] * len(examples)
    by_length = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    for first in range(0, len(examples), BATCH):
        some = by_length[first:first + BATCH]
        answers = generate(model, tokenizer, [prompts[i] for i in some], sampling=Sampling(temperature=0.0),
                           max_new=MAX_NEW)
        for i, answer in zip(some, answers):
            texts[i] = answer.text
    grades = [task.grade(example, text) for example, text in zip(examples, texts)]
    answers = [{"family": e["family"], "lang": e["lang"], "question": e["question"], "expected": e["answer"],
                "answer": text, "score": g["score"]} for e, text, g in zip(examples, texts, grades)]
    return score_table(zip(examples, grades)), answers
