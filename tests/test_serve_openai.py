"""The server as OpenAI's own client sees it: every field, streamed and whole, against the engine asked directly."""
from __future__ import annotations

import asyncio
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from mindseed.infer.engine import Engine, Request
from mindseed.infer.sample import Sampling
from mindseed.serve.answer import ChatChoice, Usage
from mindseed.serve.ask import chat_ask
from mindseed.serve.schema import ChatRequest
from mindseed.tokenizers.chat import encode_chat
from tests.serving import (ASK, CALLS, CLOCK, LESSONS, RESULTS, WEATHER, events, random_folder, running, served,
                           taught_folder)

HI = [{"role": "user", "content": "hi"}]
GREEDY = {"model": "mini", "messages": HI, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def server():
    with running(served(random_folder()), served(taught_folder(), "taught")) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    return server.client


def alone(server, prompt=None, messages=HI, model="mini", **request):
    """The answers of an engine that nobody else uses."""
    loaded = server.models[model].loaded
    if prompt is None:
        prompt, _ = encode_chat(loaded.tokenizer, messages, generation_prompt=True)
    return Engine.of(loaded).generate([Request(prompt=prompt, **request)])[0]


def joined(chunks, index=0):
    """The message that the deltas of a stream make, and why it ended."""
    message, finish = {"content": "", "reasoning_content": "", "tool_calls": {}}, None
    for choice in (c for chunk in chunks for c in chunk.choices if c.index == index):
        delta = choice.delta.model_dump()
        for key in ("content", "reasoning_content"):
            message[key] += delta.get(key) or ""
        for call in delta.get("tool_calls") or []:
            if call["id"]:
                assert call["type"] == "function" and call["index"] not in message["tool_calls"]
                message["tool_calls"][call["index"]] = [call["id"], call["function"]["name"], ""]
            message["tool_calls"][call["index"]][2] += call["function"]["arguments"] or ""
        finish = choice.finish_reason or finish
    return message, finish


# ------------------------------------------------------------------------------------------------------------ answers

def test_models(client):
    assert [m.id for m in client.models.list()] == ["mini", "taught"]
    card = client.models.retrieve("mini")
    assert card.object == "model" and card.max_model_len == 1024 and card.owned_by == "mindseed"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("maxi")


def test_an_answer_is_the_engines(server, client):
    got = client.chat.completions.create(**GREEDY)
    [want] = alone(server, sampling=Sampling(temperature=0), max_new=24)
    assert got.choices[0].message.content == want.text.lstrip() and got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == "length" and got.object == "chat.completion"
    assert got.id.startswith("chatcmpl-") and got.model == "mini" and got.created > 1.7e9
    prompt, _ = encode_chat(server.models["mini"].tokenizer, HI, generation_prompt=True)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(prompt), 24)
    assert got.usage.total_tokens == len(prompt) + 24


def test_a_stream_joins_to_the_answer_and_has_openais_shape(server, client):
    asked = GREEDY | {"n": 2, "temperature": 1, "seed": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and all(c.delta.role is None for c in mine[1:])
        message, finish = joined(chunks, index)
        assert message["content"] == whole.choices[index].message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [whole.choices[index].finish_reason]
        assert mine[-1].finish_reason == finish
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    raw = server.chat(stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream")
    bare = events(raw.text)
    assert all(set(e) == {"id", "object", "created", "model", "system_fingerprint", "choices"} for e in bare)
    assert all(set(e["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"} for e in bare)


@pytest.mark.parametrize("field", [
    {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 1.8}, {"frequency_penalty": 1.5},
    {"presence_penalty": -1.5}, {"temperature": 1.7}, {"logit_bias": {"101": 30}}], ids=lambda field: next(iter(field)))
def test_every_way_to_draw_reaches_the_engine(server, client, field):
    extra = {key: field[key] for key in ("top_k", "min_p", "repetition_penalty") if key in field}
    plain = {key: value for key, value in field.items() if key not in extra}
    asked = {"model": "mini", "messages": HI, "max_tokens": 30, "seed": 11, "temperature": 1.0}
    got = client.chat.completions.create(**asked | plain, extra_body=extra).choices[0].message.content
    sampling = {"temperature": 1.0} | field
    if "logit_bias" in field:
        sampling["logit_bias"] = ((101, 30.0),)
    [want] = alone(server, sampling=Sampling(**sampling, seed=11), max_new=30)
    [other] = alone(server, sampling=Sampling(temperature=1.0, seed=11), max_new=30)
    assert got == want.text.lstrip() != other.text.lstrip()


def test_seeds(client):
    def ask(**more):
        return [c.message.content for c in client.chat.completions.create(
            **{**GREEDY, "temperature": 1, **more}).choices]

    assert ask(seed=4, n=3) == [ask(seed=4 + i)[0] for i in range(3)]
    assert ask(seed=-1) == ask(seed=-1) != ask(seed=4)
    assert ask() != ask()                         # without a seed every answer is another one
    assert ask(seed=4, top_p=0) == ask(temperature=0)


def test_stop_and_the_two_names_of_the_longest_answer(client):
    text = client.chat.completions.create(**GREEDY | {"max_tokens": 60}).choices[0].message.content
    stop = text[8:10]
    for value in (stop, ["never said", stop]):
        for stream in (False, True):
            got = client.chat.completions.create(**GREEDY | {"max_tokens": 60}, stop=value, stream=stream)
            message, finish = joined(list(got)) if stream else (got.choices[0].message.model_dump(),
                                                               got.choices[0].finish_reason)
            assert message["content"] == text[:text.index(stop)] and finish == "stop"
    short = client.chat.completions.create(model="mini", messages=HI, temperature=0, max_completion_tokens=5)
    assert short.usage.completion_tokens == 5
    long = client.chat.completions.create(model="mini", messages=[{"role": "user", "content": "x" * 980}],
                                          temperature=0)
    assert long.usage.total_tokens == 1024 and long.choices[0].finish_reason == "length"     # the context is full


def test_roles_parts_and_thoughts_of_the_past(server):
    def count(**message):
        body = {"model": "taught", "messages": [message, {"role": "user", "content": "x"}]}
        return server.post("/tokenize", body).json()["tokens"]

    assert count(role="developer", content="Be brief.") == count(role="system", content="Be brief.")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert count(role="user", content=parts) == count(role="user", content="a\nb")
    named = [count(role="assistant", content="4", **{key: "two"}) for key in ("reasoning_content", "reasoning",
                                                                              "reasoning_text")]
    assert named[0] == named[1] == named[2] != count(role="assistant", content="4")
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    assert count(role="assistant", content=None, tool_calls=[call]) == count(role="assistant", tool_calls=[call],
                                                                             content="")


def test_the_async_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(**GREEDY)
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            return (await whole).choices[0].message.content, joined([chunk async for chunk in stream])[0]["content"]

    whole, pieces = asyncio.run(ask())
    assert whole == pieces == server.client.chat.completions.create(**GREEDY).choices[0].message.content


# ------------------------------------------------------------------------------------------------ log-probabilities

def own_logps(server, ids):
    """The model's log-probabilities (T, V) of what follows each of the ids."""
    model = server.models["mini"].loaded.model
    x = torch.tensor([ids])
    with torch.no_grad():
        return model(x, torch.arange(len(ids))[None]).logits()[0].log_softmax(-1)


def test_logprobs_of_a_chat_are_the_models_own(server, client):
    asked = GREEDY | {"temperature": 0.7, "seed": 2, "max_tokens": 12}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, top_p=0.9)
    tokenizer = server.models["mini"].tokenizer
    prompt, _ = encode_chat(tokenizer, HI, generation_prompt=True)
    [want] = alone(server, sampling=Sampling(temperature=0.7, top_p=0.9, seed=2), max_new=12)
    logps = own_logps(server, prompt + want.ids)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 12
    for i, (id, entry) in enumerate(zip(want.ids, entries)):
        row = logps[len(prompt) - 1 + i]
        assert bytes(entry.bytes) == tokenizer.token_bytes(id)
        assert entry.logprob == pytest.approx(row[id].item(), abs=2e-4)
        best = row.topk(3)
        assert [bytes(t.bytes) for t in entry.top_logprobs] == [tokenizer.token_bytes(i) for i in best.indices.tolist()]
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=2e-4)
    chunks = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, top_p=0.9, stream=True)
    pieces = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [(e.token, e.logprob) for e in pieces] == [(e.token, e.logprob) for e in entries]


def test_logprobs_end_where_the_text_does(client):
    asked = GREEDY | {"max_tokens": 40, "logprobs": True}
    text = client.chat.completions.create(**asked).choices[0].message.content
    got = client.chat.completions.create(**asked, stop=text[8:10]).choices[0]
    spelt = b"".join(bytes(e.bytes) for e in got.logprobs.content).decode("utf-8", "replace")
    assert spelt.lstrip().startswith(got.message.content) and len(spelt) <= len(got.message.content) + 8
    taught = client.chat.completions.create(model="taught", messages=LESSONS[2][0][:1], temperature=0, logprobs=True)
    assert b"".join(bytes(e.bytes) for e in taught.choices[0].logprobs.content).decode() == "你好！今天怎么样？"


def test_completions_measure_a_text(server, client):
    """What evaluation programs do: the log-probability of every token of a prompt, and no new one."""
    tokenizer = server.models["mini"].tokenizer
    ids = tokenizer.encode("to be or not")
    for prompt, before in (("to be or not", [tokenizer.bos_id]), (ids, [])):
        got = client.completions.create(model="mini", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        [choice] = got.choices
        assert choice.text == "to be or not" and got.usage.completion_tokens == 0
        logps = own_logps(server, before + ids)
        want = [logps[i - 1, id].item() if i else None for i, id in enumerate(before + ids)][len(before):]
        found = choice.logprobs.token_logprobs
        assert (found[0] is None) == (want[0] is None) and found[1:] == pytest.approx(want[1:], abs=2e-4)
        likeliest = [logps[i - 1].max().item() for i in range(len(before) + 1, len(before + ids))]
        assert [max(top.values()) for top in choice.logprobs.top_logprobs[1:]] == pytest.approx(likeliest, abs=2e-4)
        assert choice.logprobs.tokens == list("to be or not") and choice.logprobs.text_offset == list(range(12))


# ------------------------------------------------------------------------------------------------ plain completions

def test_completions_take_four_forms_of_prompts(server, client):
    tokenizer = server.models["mini"].tokenizer
    ids = [tokenizer.encode("one"), tokenizer.encode("two!")]

    def ask(prompt, **more):
        return client.completions.create(model="mini", prompt=prompt, temperature=0, max_tokens=9, **more)

    single = [ask(p).choices[0].text for p in ids]
    assert single == [alone(server, prompt=p, sampling=Sampling(temperature=0), max_new=9)[0].text for p in ids]
    assert [c.text for c in ask(ids).choices] == single and ask(ids).usage.prompt_tokens == 7
    both = ask(["one", "two!"], n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    begun = alone(server, prompt=[tokenizer.bos_id, *ids[0]], sampling=Sampling(temperature=0), max_new=9)[0].text
    assert both.choices[0].text == both.choices[1].text == ask("one").choices[0].text == begun
    assert ask("one", extra_body={"add_special_tokens": False}).choices[0].text == single[0]
    never = {str(id): -100 for id in server.models["mini"].stop_ids}
    assert client.completions.create(model="mini", prompt="one", logit_bias=never).usage.completion_tokens == 16


def test_completions_stream(client):
    asked = dict(model="mini", prompt=["one", "two"], temperature=0, max_tokens=9, echo=True, logprobs=2)
    whole = client.completions.create(**asked)
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text and choice.text.startswith(asked["prompt"][choice.index])
        assert [t for c in mine for t in c.logprobs.tokens] == choice.logprobs.tokens
        assert [o for c in mine for o in c.logprobs.text_offset] == choice.logprobs.text_offset
        assert [c.finish_reason for c in mine if c.finish_reason] == ["length"]
        assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs[-9:])
    assert chunks[-1].usage == whole.usage and chunks[0].object == "text_completion"


def test_what_was_read_before_is_found_in_the_cache(client):
    words = [{"role": "user", "content": "a long story " * 10}]
    first, second = (client.chat.completions.create(model="mini", messages=words, max_tokens=2).usage for _ in range(2))
    assert second.prompt_tokens_details.cached_tokens >= 128 > first.prompt_tokens_details.cached_tokens
    n = client.chat.completions.create(model="mini", messages=words, max_tokens=2, n=3).usage
    assert n.prompt_tokens == first.prompt_tokens > n.prompt_tokens_details.cached_tokens


# ------------------------------------------------------------------------------------------------- embeddings, tokens

def test_embeddings(server, client):
    loaded = server.models["mini"].loaded
    inputs = ["red", "green"]
    got = client.embeddings.create(model="mini", input=inputs)                    # the client asks for base64
    floats = client.embeddings.create(model="mini", input=inputs, encoding_format="float")
    for text, one, other in zip(inputs, got.data, floats.data):
        ids = torch.tensor([loaded.tokenizer.encode(text)])
        with torch.no_grad():
            mean = loaded.model(ids, torch.arange(ids.shape[1])[None]).hidden[0].mean(0)
        assert one.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)
    assert got.usage.prompt_tokens == got.usage.total_tokens == 8 and got.data[1].index == 1
    by_ids = client.embeddings.create(model="mini", input=loaded.tokenizer.encode("red"), dimensions=32)
    assert by_ids.data[0].embedding == pytest.approx(got.data[0].embedding, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="mini", input="red", dimensions=16)


def test_answers_go_on_while_texts_become_vectors(server, client):
    """The engine computes one text at a time, and a pass of the others' answers after each."""
    service, order = server.models["mini"].service, []
    step, embed = service.engine.step, service.engine.embed
    service.engine.step = lambda: time.sleep(0.01) or order.append("step") or step()     # or it ends before the texts
    service.engine.embed = lambda prompts, *more: order.append(len(prompts)) or embed(prompts, *more)
    try:
        never = {str(id): -100 for id in server.models["mini"].stop_ids}
        stream = client.chat.completions.create(**GREEDY | {"max_tokens": 900}, stream=True, logit_bias=never)
        next(iter(stream))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: client.embeddings.create(model="mini", input=["some words"] * 5), range(4)))
        stream.close()
    finally:
        del service.engine.step, service.engine.embed
    assert [n for n in order if n != "step"] == [1] * 20
    busy = order[order.index(1):len(order) - order[::-1].index(1)]
    assert (1, 1) not in zip(busy, busy[1:])


def test_tokens_and_back(server):
    tokenizer = server.models["taught"].tokenizer
    text = "Hi 你好 <|im_end|> 🙂"
    got = server.post("/tokenize", {"model": "taught", "prompt": text, "return_token_strs": True}).json()
    assert got["tokens"] == tokenizer.encode(text) and got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert got["max_model_len"] == 512 and tokenizer.eos_id not in got["tokens"]  # what a text spells is only text
    assert server.post("/detokenize", {"model": "taught", "tokens": got["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"model": "taught", "messages": ASK, "tools": [WEATHER, CLOCK],
                                     "chat_template_kwargs": {"enable_thinking": True}}).json()["tokens"]
    assert chat == encode_chat(tokenizer, ASK, tools=[WEATHER, CLOCK], generation_prompt=True, thinking=True)[0]


# ---------------------------------------------------------------------------------------------- answers with a form

SCHEMA = {"type": "object", "required": ["size", "good"], "additionalProperties": False, "properties": {
    "size": {"enum": ["small", "large"]}, "good": {"type": "boolean"}}}


def test_json_by_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    asked = dict(model="mini", messages=HI, response_format=form, n=3, seed=5)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for index, choice in enumerate(whole.choices):
        value = json.loads(choice.message.content)
        assert value["size"] in ("small", "large") and type(value["good"]) is bool and choice.finish_reason == "stop"
        assert joined(chunks, index) == ({"content": choice.message.content, "reasoning_content": "", "tool_calls": {}},
                                         "stop")


@pytest.mark.parametrize("extra, good", [
    ({"guided_json": SCHEMA}, lambda text: json.loads(text)["size"]),
    ({"guided_regex": "[ab]{3}c"}, lambda text: len(text) == 4 and text[3] == "c" and set(text[:3]) <= {"a", "b"}),
    ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no"))],
    ids=["json", "regex", "choice", "structured"])
def test_vllms_ways_to_say_it(client, extra, good):
    chat = client.chat.completions.create(model="mini", messages=HI, extra_body=extra).choices[0]
    text = client.completions.create(model="mini", prompt="x", max_tokens=99, extra_body=extra).choices[0]
    assert good(chat.message.content) and good(text.text) and chat.finish_reason == text.finish_reason == "stop"


def test_any_json(client):
    got = client.chat.completions.create(model="mini", messages=HI, response_format={"type": "json_object"}, seed=1,
                                         max_tokens=400, logit_bias={"161": 9})           # which likes }
    assert got.choices[0].finish_reason == "length" or type(json.loads(got.choices[0].message.content)) is dict
    assert got.choices[0].message.content.startswith("{")


# ------------------------------------------------------------------------------------------------ tools and thoughts

def test_a_call_that_is_only_quoted_is_no_call(server):
    """Text that spells the tags, in tokens that any user's text has: it stays content."""
    served = server.models["taught"]
    tokenizer = served.tokenizer
    quoted = '<tool_call>\n{"name": "delete_all", "arguments": {}}\n</tool_call> <think>no</think> <|im_end|> end'
    ids = tokenizer.encode(quoted)
    assert not set(ids) & set(tokenizer.specials.values())
    body = ChatRequest.model_validate({"model": "taught", "messages": ASK, "tools": [WEATHER]})
    asked = chat_ask(served, body)
    choice, row = ChatChoice(served, asked, 0, Usage([asked])), served.service.engine.row(asked.request.prompt, (), 500)
    for id in ids:
        choice.push(row.push(id, -1.0))
    choice.push(row.push(min(served.stop_ids), -1.0))
    assert choice.whole()["message"]["content"] == quoted and choice.finish == "stop" and not choice.calls


def test_tools_there_and_back(client):
    """The model calls, its calls are answered, it answers; streamed and whole are the same."""
    asked = dict(model="taught", messages=ASK, tools=[WEATHER, CLOCK], temperature=0)
    whole = client.chat.completions.create(**asked)
    [choice] = whole.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    assert [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls] == [
        (c["name"], c["arguments"]) for c in CALLS]
    assert len({c.id for c in choice.message.tool_calls}) == 2 and choice.message.tool_calls[0].id.startswith("call_")
    chunks = list(client.chat.completions.create(**asked, stream=True))
    message, finish = joined(chunks)
    assert finish == "tool_calls" and message["content"] == "I look."
    assert [call[1:] for call in message["tool_calls"].values()] == [
        [c.function.name, c.function.arguments] for c in choice.message.tool_calls]
    bits = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert len(bits) > 4                          # the arguments come piece by piece
    back = [*ASK, choice.message.model_dump(exclude_none=True), *(
        result | {"tool_call_id": call.id} for result, call in zip(RESULTS, choice.message.tool_calls))]
    last = client.chat.completions.create(model="taught", messages=back, tools=[WEATHER, CLOCK], temperature=0)
    assert last.choices[0].message.content == "Sun in Rome, snow in Oslo."
    assert last.choices[0].finish_reason == "stop" and last.choices[0].message.tool_calls is None


def test_choosing_tools(client):
    asked = dict(model="taught", messages=ASK, tools=[WEATHER, CLOCK], temperature=0)
    none = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert none.message.tool_calls is None and none.finish_reason != "tool_calls"
    must = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert must.message.tool_calls and must.message.content is None and must.finish_reason == "tool_calls"
    only = client.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "clock"}},
                                          parallel_tool_calls=False).choices[0]
    assert [c.function.name for c in only.message.tool_calls] == ["clock"]
    one = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    assert [json.loads(c.function.arguments) for c in one.message.tool_calls] == [{"city": "Rome"}]


def test_calls_of_a_model_that_knows_none_are_valid_all_the_same(server, client):
    """Random weights, nudged to begin a call: the grammar does the rest."""
    id = server.models["mini"].tokenizer.specials["<tool_call>"]
    tool = {"type": "function", "function": {"name": "set", "parameters": SCHEMA}}
    for seed in range(5):
        got = client.chat.completions.create(model="mini", messages=HI, tools=[tool], seed=seed, temperature=1.5,
                                             logit_bias={str(id): 100}, parallel_tool_calls=False).choices[0]
        [call] = got.message.tool_calls
        assert call.function.name == "set" and set(json.loads(call.function.arguments)) == {"size", "good"}
    text = client.chat.completions.create(model="mini", messages=HI, seed=1, logit_bias={str(id): 100}, max_tokens=2)
    assert text.choices[0].message.content == "<tool_call>" * 2                   # no tools: no calls


def test_thoughts(client):
    messages = LESSONS[1][0][:1]
    asked = dict(model="taught", messages=messages, temperature=0)
    said = client.chat.completions.create(**asked)
    assert said.choices[0].message.reasoning_content == "two and two" and said.choices[0].message.content == "4"
    assert 3 <= said.usage.completion_tokens_details.reasoning_tokens < said.usage.completion_tokens
    message, _ = joined(client.chat.completions.create(**asked, stream=True))
    assert (message["reasoning_content"], message["content"]) == ("two and two", "4")
    switches = [{"enable_thinking": True}, {"open_thinking": True}, {"chat_template_kwargs": {"open_thinking": True}},
                {"chat_template_kwargs": {"enable_thinking": True}}, {"thinking": {"type": "enabled"}},
                {"reasoning_effort": "high"}]
    first = None
    for on in switches:                           # the prompt has opened the block; the answer only closes it
        got = client.chat.completions.create(**asked, extra_body=on)
        assert got.choices[0].message.reasoning_content == "two and two"
        first = first or got.usage.prompt_tokens
        assert got.usage.prompt_tokens == first > said.usage.prompt_tokens
    off = [{"enable_thinking": False}, {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}]
    for body in off:
        got = client.chat.completions.create(**asked, extra_body=body)
        assert not hasattr(got.choices[0].message, "reasoning_content")
        assert got.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_form_holds_after_the_thoughts(server, client):
    got = client.chat.completions.create(model="taught", messages=LESSONS[1][0][:1], temperature=0, extra_body={
        "open_thinking": True, "guided_choice": ["four", "five"]}).choices[0]
    assert got.message.reasoning_content == "two and two" and got.message.content in ("four", "five")
    close = str(server.models["taught"].tokenizer.specials["</think>"])           # the only way out of the thought
    must = client.chat.completions.create(model="taught", messages=LESSONS[1][0][:1], tools=[CLOCK], temperature=0,
                                          tool_choice="required", parallel_tool_calls=False,
                                          logit_bias={close: 100}, extra_body={"open_thinking": True}).choices[0]
    assert [c.function.name for c in must.message.tool_calls] == ["clock"] and must.finish_reason == "tool_calls"
