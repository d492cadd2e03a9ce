"""Calls on threads: when it is over, none is running."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from shardio.errors import ChunkError
from shardio.format.threads import Threads, for_each


@pytest.mark.parametrize("pool_of", [lambda: ThreadPoolExecutor(2), lambda: Threads(2, "test")], ids=["pool", "own"])
def test_a_call_that_fails_leaves_none_behind_that_still_writes(pool_of):
    buffer, begun = [0] * 8, []

    def write(place):
        begun.append(place)
        if place == 0:
            raise ChunkError("the first is damaged")
        time.sleep(0.2)
        buffer[place] = 1

    with pool_of() as pool:
        with pytest.raises(ChunkError, match="the first is damaged"):
            for_each(write, range(8), pool)
        now, known = list(buffer), list(begun)
        time.sleep(0.4)
        assert (buffer, begun) == (now, known)  # the owner may use the buffer again
        assert sum(now) == len(known) - 1
        assert len(known) < 8


def test_all_calls_are_made_without_a_pool_and_with_one():
    with ThreadPoolExecutor(3) as pool:
        for where in (None, pool):
            found = []
            for_each(found.append, iter(range(20)), where)
            assert sorted(found) == list(range(20))


@pytest.mark.parametrize("pool_of", [lambda: ThreadPoolExecutor(1), lambda: Threads(1, "test")], ids=["pool", "own"])
def test_a_pool_that_ends_ends_those_who_wait_for_it(pool_of):
    pool, begun, given, free, told = pool_of(), threading.Event(), threading.Event(), threading.Event(), []

    def call(_):
        begun.set()
        free.wait()

    def items():
        yield from range(3)
        given.set()

    def wait_for_all():
        with pytest.raises(CancelledError):  # two items were never begun: that is no success
            for_each(call, items(), pool)
        told.append("ended")

    waiting = threading.Thread(target=wait_for_all, daemon=True)
    waiting.start()
    assert begun.wait(10)
    assert given.wait(10)
    pool.shutdown(wait=False, cancel_futures=True)  # what an interrupted rechunk does
    free.set()
    waiting.join(10)
    assert told == ["ended"]
