"""An engine in a thread, asked by many at once: what they get, what happens when they leave, and when it breaks."""
from __future__ import annotations

import asyncio
import threading
import time

import pytest

from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig, QueueFull, Request
from mindseed.infer.generate import generate_uncached
from mindseed.infer.rows import TooLong
from mindseed.infer.sample import Sampling
from mindseed.infer.service import EngineDead, PassFailed, Service
from tests.oracle import check_empty, sharp_model
from tests.tiny import KITS

PATIENCE = 60.0                                   # seconds after which a test has hung


@pytest.fixture(scope="module")
def model():
    return sharp_model(KITS["gqa"])


@pytest.fixture
def service(model):
    made = []

    def make(**settings) -> Service:
        made.append(Service(Engine(model, None, EngineConfig(**settings))))
        return made[-1]

    yield make
    for one in made:
        one.close()
        assert not one.thread.is_alive()
        if one.error is None:
            check_empty(one.engine)


def run(task):
    return asyncio.run(asyncio.wait_for(task, PATIENCE))


def request(i: int = 0, **changes) -> Request:
    return Request(**{"prompt": [i + 1, 2, 3], "sampling": Sampling(seed=i), "max_new": 12, "stop_ids": ()} | changes)


async def collect(service: Service, asked: Request) -> list[int]:
    return [token.id async for token in service.stream(asked)]


def free_soon(service: Service) -> None:
    """Wait until nothing is running, then check that nothing is held."""
    deadline = time.monotonic() + PATIENCE
    while (stats := service.stats()).running + stats.waiting or stats.blocks_free < stats.blocks:
        assert time.monotonic() < deadline, stats
        time.sleep(0.005)


def test_many_at_once_get_each_their_own_answer(service, model):
    one = service(max_seqs=4, block_size=2)

    async def main():
        return await asyncio.gather(*(collect(one, request(i)) for i in range(24)))

    want = generate_uncached(model, None, [request(i).prompt for i in range(24)], max_new=12, stop_ids=())
    assert run(main()) == [answer.ids for answer in want]
    free_soon(one)
    assert one.stats().generated_tokens == 24 * 12 and one.stats().steps < 24 * 12


def test_several_answers_come_in_one_stream(service):
    async def main():
        return [token async for token in one.stream(request(n=3))]

    one = service()
    tokens = run(main())
    assert len(tokens) == 36 and {t.row for t in tokens} == {0, 1, 2} and sum(t.finish is not None for t in tokens) == 3


@pytest.mark.parametrize("way", ["aclose", "task", "exception"])
def test_who_leaves_frees_the_blocks_at_once(service, way):
    one = service(block_size=2)

    async def main():
        asked = request(max_new=27)
        started = asyncio.Event()

        async def listen():
            stream = one.stream(asked)
            async for _ in stream:
                started.set()
                if way == "aclose":
                    await stream.aclose()
                    return
                if way == "exception":
                    try:
                        await stream.athrow(KeyError("client"))
                    except KeyError:
                        return

        task = asyncio.ensure_future(listen())
        await started.wait()
        if way == "task":
            task.cancel()
        await asyncio.wait([task])
        await asyncio.get_running_loop().run_in_executor(None, free_soon, one)     # the loop lives on

    hold = threading.Event()
    real = one.engine.step

    def slow():                                   # so that it can't be finished before anybody leaves
        tokens = real()
        hold.wait(0.02)
        return tokens

    one.engine.step = slow
    run(main())
    assert one.stats().generated_tokens < 27 and not one.lines


def test_a_request_that_is_given_up_before_it_begins(service):
    one, entered, go = service(), threading.Event(), threading.Event()

    async def main():
        one.call(lambda: (entered.set(), go.wait(PATIENCE)))          # the thread is busy with something else
        entered.wait(PATIENCE)
        tasks = [asyncio.ensure_future(collect(one, request(i))) for i in range(3)]
        await asyncio.sleep(0.01)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.wait(tasks[:2])
        go.set()
        return await tasks[2]

    assert len(run(main())) == 12
    free_soon(one)
    assert one.stats().generated_tokens == 12 and not one.lines


def test_errors_come_before_the_first_token(service):
    one = service(max_queue=2, max_seqs=1)

    async def main():
        for asked, error, words in ((request(prompt=[1] * 32), TooLong, "context is 32"),
                                    (request(prompt=[]), UserError, "empty"),
                                    (request(max_new=0), UserError, "max_new=0"),
                                    (request(prompt=[61]), UserError, "id 61"), (request(n=2), UserError, "n=2"),
                                    (request(top_logps=-1), UserError, "top_logps=-1"),
                                    (request(sampling=Sampling(logit_bias=((99, 1.0),))), UserError, "token 99")):
            with pytest.raises(error, match=words):
                await anext(one.stream(asked))
        results = await asyncio.gather(*(collect(one, request(i)) for i in range(40)), return_exceptions=True)
        full = [r for r in results if isinstance(r, QueueFull)]
        assert full and "2 requests are waiting" in str(full[0])
        assert all(len(r) == 12 for r in results if r not in full) and len(full) < 40
        return await collect(one, request())

    assert len(run(main())) == 12


def test_embeddings_between_the_passes(service):
    one = service()

    async def main():
        both = await asyncio.gather(collect(one, request()), one.embed([[1, 2], [3]]))
        with pytest.raises(UserError, match="empty"):
            await one.embed([[]])
        return both

    ids, vectors = run(main())
    assert len(ids) == 12 and len(vectors) == 2 and sum(x * x for x in vectors[0]) == pytest.approx(1)


def test_closing_waits_for_those_who_are_served_and_takes_no_others(service):
    one = service()
    real = one.engine.step
    one.engine.step = lambda: (time.sleep(0.01), real())[1]

    async def main():
        stream = one.stream(request(max_new=25))
        ids = [(await anext(stream)).id]
        closing = asyncio.get_running_loop().run_in_executor(None, lambda: one.close(drain_s=PATIENCE))
        await asyncio.sleep(0.03)
        with pytest.raises(EngineDead, match="about to stop"):
            await anext(one.stream(request()))
        ids += [token.id async for token in stream]
        await closing
        return ids

    assert len(run(main())) == 25
    with pytest.raises(EngineDead, match="it was closed"):
        run(collect(one, request()))


def test_closing_without_patience_cancels(service):
    one = service()
    real = one.engine.step
    one.engine.step = lambda: (time.sleep(0.01), real())[1]

    async def main():
        stream = one.stream(request(max_new=28))
        await anext(stream)
        await asyncio.get_running_loop().run_in_executor(None, one.close)
        with pytest.raises(EngineDead, match="it was closed"):
            async for _ in stream:
                pass

    run(main())
    assert one.error is None
    one.close()                                   # once more does nothing


def test_a_fault_of_ours_ends_what_runs_and_the_next_is_answered(service, model):
    """A pass that fails at any point in it: before, between the forward pass and the tokens, after them."""
    one = service(max_seqs=2)
    [want] = generate_uncached(model, None, [request(1).prompt], sampling=Sampling(seed=1), max_new=12, stop_ids=())

    async def main():
        for owner, name in ((one.engine, "step"), (one.engine.runner, "run"), (one.engine, "push"),
                            (one.engine.drafter, "learn")):
            real, calls = getattr(owner, name), []

            def broken(*arguments, **more):
                calls.append(1)
                if len(calls) == 4:
                    raise ZeroDivisionError("injected")
                return real(*arguments, **more)

            setattr(owner, name, broken)
            results = await asyncio.gather(*(collect(one, request(i)) for i in range(5)), return_exceptions=True)
            assert any(isinstance(r, PassFailed) and "injected" in str(r) for r in results), results
            setattr(owner, name, real)
            assert await collect(one, request(1)) == want.ids and one.error is None
            check_empty(one.engine)

    run(main())


def test_faults_in_a_row_end_the_engine_and_are_told_to_all_who_wait(service):
    one = service(max_seqs=2)

    def broken():
        raise ZeroDivisionError("injected")

    one.engine.step = broken

    async def main():
        for i in range(3):
            with pytest.raises((PassFailed, EngineDead), match="injected"):
                await collect(one, request(i))
        for late in (collect(one, request()), one.embed([[1]])):
            with pytest.raises(EngineDead, match="injected"):
                await late

    run(main())
    assert isinstance(one.error, ZeroDivisionError)


def test_a_users_error_in_a_pass_leaves_the_thread_alive(service):
    one, real = service(), None
    real = one.engine.step

    def broken():
        one.engine.step = real
        raise UserError("not finite")

    one.engine.step = broken

    async def main():
        with pytest.raises(UserError, match="not finite"):
            await collect(one, request())
        return await collect(one, request())

    assert len(run(main())) == 12
    free_soon(one)


def test_several_event_loops(service, model):
    one, found = service(), {}

    def loop(i):
        found[i] = run(collect(one, request(i)))

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for i in range(6):
        [want] = generate_uncached(model, None, [request(i).prompt], sampling=Sampling(seed=i), max_new=12, stop_ids=())
        assert found[i] == want.ids


def test_a_loop_that_is_gone_frees_the_blocks(service):
    one = service()
    real = one.engine.step
    one.engine.step = lambda: (time.sleep(0.01), real())[1]
    loop = asyncio.new_event_loop()
    stream = one.stream(request(max_new=28))
    loop.run_until_complete(anext(stream))
    loop.close()                                  # without a word
    free_soon(one)
    assert one.stats().generated_tokens < 28
    del stream


def test_nobody_waits_for_ever_while_the_thread_ends(model):
    """Calls from many threads at the moment of closing are answered, or refused."""
    for _ in range(30):
        one, futures, go = Service(Engine(model, None)), [], threading.Event()

        def ask():
            go.wait()
            for _ in range(50):
                futures.append(one.call(lambda: 1))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        go.set()
        one.close()
        for thread in threads:
            thread.join(PATIENCE)
        for future in futures:
            assert future.exception(timeout=PATIENCE) is None or isinstance(future.exception(), EngineDead)
