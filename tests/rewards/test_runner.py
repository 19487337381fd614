"""Running rewards: what runs at the same time, deadlines, retries, the breaker."""

import asyncio
import logging
import subprocess
import sys
import threading
import time

import pytest
import torch

from unidiff import backoff
from unidiff.rewards import runner
from unidiff.rewards.reward import Cause, RewardError, reward
from unidiff.rewards.table import Pending, reward_table


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)


def ones(segments):
    return [1.0] * len(segments)


# ---------------------------------------------------------------------------------------------- at the same time


def napper(name, threads, asynchronous, **options):
    def nap(segments):
        threads.append(threading.current_thread())
        time.sleep(0.5)
        return ones(segments)

    async def nap_async(segments):
        threads.append(asyncio.get_running_loop())
        await asyncio.sleep(0.5)
        return ones(segments)

    return reward(nap_async if asynchronous else nap, name=name, **options)


def test_rewards_of_a_batch_run_side_by_side(responses):
    seen = []
    rewards = [napper(f"async{i}", seen, True) for i in range(3)]
    rewards += [napper(f"thread{i}", seen, False, timeout=20) for i in range(3)]
    rewards += [napper("retried", seen, False, retries=1), napper("here", seen, False)]
    start = time.perf_counter()
    assert reward_table(rewards, responses()).values_BSF.nansum() == 6 * 8
    assert time.perf_counter() - start < 3  # one after the other: 4 s
    assert len(set(seen)) == 8 and threading.current_thread() in seen
    loops = {one for one in seen if isinstance(one, asyncio.AbstractEventLoop)}
    seen.clear()
    reward_table(rewards, responses())
    assert loops <= set(seen)  # each async reward keeps its loop


@pytest.mark.parametrize("asynchronous", [False, True])
def test_rewards_begin_before_their_values_are_asked_for(responses, asynchronous):
    began = threading.Event()

    def notes(segments):
        began.set()
        return ones(segments)

    async def notes_async(segments):
        return notes(segments)

    pending = Pending([reward(notes_async if asynchronous else notes, timeout=30)], responses())
    assert began.wait(20)
    assert pending.table().values_BSF.nansum() == 6


def test_single_segments_of_an_async_reward_run_side_by_side(responses, monkeypatch):
    monkeypatch.setattr(runner, "SIDE_BY_SIDE", 4)
    working, most = 0, 0

    @reward(batched=False)
    async def one(segment, answer):
        nonlocal working, most
        working += 1
        most = max(most, working)
        await asyncio.sleep(0.05)
        working -= 1
        return answer + len(segment.text)

    table = reward_table([one], responses())
    assert table.values_BSF[:, ::2, 0].tolist() == [[2, 2], [3, 3], [4, 4]] and most == 4


def test_works_inside_a_running_loop(responses):
    async def one(segments):
        return ones(segments)

    async def notebook():
        return reward_table([reward(one)], responses())

    assert asyncio.run(notebook()).values_BSF.nansum() == 6


def test_a_plain_function_may_hand_on_a_coroutine(responses):
    async def one(segments):
        return ones(segments)

    async def never(segments):
        await asyncio.sleep(60)

    assert not reward_table([reward(lambda segments: one(segments), name="f")], responses()).lost
    assert not reward_table([reward(lambda segments: one(segments), name="f", timeout=5)], responses()).lost
    slow = reward(lambda segments: never(segments), name="f", timeout=0.1)
    assert reward_table([slow], responses()).lost == {("f", Cause.TIMEOUT): 6}


# ---------------------------------------------------------------------------------------------- single segments


def test_a_function_of_one_segment(responses):
    @reward(on="image", batched=False)
    def gray(segment, board, answer, missing=7):
        return segment.pixels[0, 0, 0] + 10.0 * answer + len(board["cells"]) + missing

    @reward(on="sequence", batched=False, credit="both")
    async def texts(response, **columns):
        return float(len(response.texts) + len(columns))

    table = reward_table([gray, texts], responses())
    assert not table.lost, table.messages
    assert table.values_BSF[:, 1, 0].tolist() == [10, 21, 32] and table.sequence_BF[:, 1].tolist() == [4, 4, 4]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("timeout", [None, 20])
def test_one_sample_that_fails_loses_its_own_value_only(responses, asynchronous, timeout):
    def judge(segment, answer):
        if answer == 1:
            raise KeyError("sample 1")
        return float("inf") if segment.last and answer == 2 else answer

    async def judge_async(segment, answer):
        return judge(segment, answer)

    given = reward(judge_async if asynchronous else judge, name="f", batched=False, timeout=timeout)
    table = reward_table([given], responses())
    assert table.lost == {("f", Cause.RAISED): 2, ("f", Cause.NOT_FINITE): 1}
    assert table.values_BSF[0, ::2, 0].tolist() == [0, 0] and table.values_BSF[2, 0, 0] == 2
    assert "raised KeyError: 'sample 1'" in table.messages["f", Cause.RAISED]
    assert "test_runner.py:" in table.messages["f", Cause.RAISED]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_there_at_the_deadline_counts(responses, asynchronous):
    def judge(segment, answer):
        time.sleep(5 if answer == 2 else 0)
        return 1.0

    async def judge_async(segment, answer):
        await asyncio.sleep(5 if answer == 2 else 0)
        return 1.0

    given = reward(judge_async if asynchronous else judge, name="f", batched=False, timeout=0.3)
    table = reward_table([given], responses())
    assert table.lost == {("f", Cause.TIMEOUT): 2} and table.values_BSF[:2].nansum() == 4


# ---------------------------------------------------------------------------------------------- deadlines


def hang(segments):
    time.sleep(5)


async def hang_politely(segments):
    await asyncio.sleep(30)


async def block_the_loop(segments):
    time.sleep(2.5)


async def leave(segments):
    raise SystemExit("bye")


async def cancel(segments):
    raise asyncio.CancelledError


@pytest.mark.parametrize("function", [hang, hang_politely, block_the_loop])
def test_timeout(function, responses):
    @reward
    async def patient(segments):
        await asyncio.sleep(0.2)
        return ones(segments)

    start = time.perf_counter()
    given = [reward(function, name="slow", timeout=0.1), reward(ones, name="quick", timeout=5), patient]
    table = reward_table(given, responses())
    assert time.perf_counter() - start < 2
    assert table.lost == {("slow", Cause.TIMEOUT): 6}
    assert table.messages["slow", Cause.TIMEOUT] == "took longer than 0.1 s"
    assert table.values_BSF[..., 1:].nansum() == 12


def test_a_call_that_was_given_up_is_not_joined_by_another(responses):
    release, threads = threading.Event(), []

    def stuck(segments):
        threads.append(threading.current_thread())
        release.wait(20)
        return ones(segments)

    given = reward(stuck, name="f", timeout=0.05)
    assert reward_table([given], responses()).lost == {("f", Cause.TIMEOUT): 6}
    again = reward_table([given], responses())
    assert "its call in an earlier batch has not come back yet" in again.messages["f", Cause.TIMEOUT]
    assert len(threads) == 1
    release.set()
    threads[0].join()
    assert not reward_table([given], responses()).lost


def test_a_late_result_changes_nothing(responses):
    release, done = threading.Event(), threading.Event()

    def late(segments, log_metric):
        log_metric("early", 1.0)
        release.wait(20)
        log_metric("late", 1.0)
        done.set()
        return ones(segments)

    table = reward_table([reward(late, timeout=0.05)], responses())
    release.set()
    assert done.wait(20)
    assert table.values_BSF.isnan().all() and not table.metrics


def test_a_hung_reward_does_not_hold_up_the_exit():
    code = (
        "import time, torch\n"
        "from unidiff.rewards.reward import reward\n"
        "from unidiff.rewards.runner import Job\n"
        "async def nap(s): time.sleep(60)\n"
        "slow = [reward(lambda s: time.sleep(60), name='x', timeout=0.05), reward(nap, timeout=0.05)]\n"
        "class View: columns = {}\n"
        "jobs = [Job(each, [View()]).start() for each in slow]\n"
        "print([str(job.finish()[0].cause) for job in jobs])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['timeout', 'timeout']", done.stderr


def test_waiting_without_a_deadline_is_said(responses, monkeypatch, caplog):
    monkeypatch.setattr(runner, "PATIENCE_SECONDS", 0.05)

    @reward
    async def slow(segments):
        await asyncio.sleep(0.3)
        return ones(segments)

    with caplog.at_level(logging.WARNING):
        assert not reward_table([slow], responses()).lost
    assert "still waiting for reward 'slow', which has no timeout" in caplog.text


@pytest.mark.parametrize("function", [leave, cancel, lambda segments: sys.exit(3), lambda segments: leave(segments)])
@pytest.mark.parametrize("timeout", [None, 5])
def test_what_would_end_a_thread_or_the_program_is_a_fault_like_others(function, timeout, responses):
    table = reward_table([reward(function, name="f", timeout=timeout), reward(ones)], responses())
    assert table.lost == {("f", Cause.RAISED): 6} and table.values_BSF[..., 1].nansum() == 6


# ---------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_retries(responses, asynchronous, batched):
    tries = []

    def flaky(given):
        tries.append(time.perf_counter())
        if len(tries) < 3:
            raise ConnectionError("no server")
        return ones(given) if batched else 1.0

    async def flaky_async(given):
        return flaky(given)

    def table(retries):
        tries.clear()
        function = flaky_async if asynchronous else flaky
        return reward_table([reward(function, name="f", on="image", batched=batched, retries=retries)], responses(1))

    assert table(retries=2).values_BSF.nansum() == 1 and len(tries) == 3
    first, second = tries[1] - tries[0], tries[2] - tries[1]
    assert first >= 0.005 and second >= 0.01  # half of FIRST_SECONDS at least, then twice that
    assert table(retries=1).lost == {("f", Cause.RAISED): 1} and len(tries) == 2


def test_retries_end_with_the_deadline(responses, monkeypatch):
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 10.0)
    start = time.perf_counter()
    table = reward_table([reward(lambda s: 1 / 0, name="f", retries=5, timeout=3)], responses())
    assert time.perf_counter() - start < 2
    assert "division by zero" in table.messages["f", Cause.RAISED]  # and not "took longer": it is known why


def test_a_wrong_result_is_not_asked_for_again(responses):
    calls = []
    reward_table([reward(lambda s: calls.append(1) or [1.0], name="f", retries=3)], responses())
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------- breaker


def test_the_breaker(responses, caplog):
    calls, broken = [], True

    def server(segments):
        calls.append(1)
        if broken:
            raise ConnectionError("down")
        return ones(segments)

    given = reward(server, name="f", breaker=2)
    with caplog.at_level(logging.WARNING):
        causes = [{c for _, c in reward_table([given], responses()).lost} for _ in range(2 + 10 + 1)]
    assert causes == [{Cause.RAISED}] * 2 + [{Cause.SKIPPED}] * 10 + [{Cause.RAISED}] and len(calls) == 3
    assert caplog.text.count("reward 'f' lost all values of a batch: raised ConnectionError: down") == 1
    assert "reward 'f' failed 2 times in a row, is left out for 10 batches" in caplog.text
    skipped = reward_table([given], responses())
    assert skipped.values_BSF.isnan().all() and skipped.lost == {("f", Cause.SKIPPED): 6}
    assert skipped.messages["f", Cause.SKIPPED] == "was not called: it failed 3 times in a row"
    broken = False
    for _ in range(9):
        reward_table([given], responses())
    assert not reward_table([given], responses()).lost and given.state.failed == 0  # tried again, and well
    broken = True
    reward_table([given], responses())
    reward_table([reward(ones, name="f")], responses())  # another reward: a state of its own
    assert given.state.failed == 1 and given.state.resting == 0


def test_the_breaker_counts_batches_without_any_value(responses):
    def partly(segments):
        return [None, float("nan"), 1.0, *[None] * (len(segments) - 3)]

    for function, breaker in ((partly, 1), (lambda s: [None] * len(s), 1), (lambda s: 1 / 0, None)):
        given = reward(function, name="f", breaker=breaker)
        for _ in range(3):
            assert ("f", Cause.SKIPPED) not in reward_table([given], responses()).lost
    assert given.state.failed == 3


def test_a_required_reward_that_is_skipped_is_fatal(responses):
    given = reward(lambda s: 1 / 0, name="f", breaker=1)
    reward_table([given], responses())
    given.required = True
    with pytest.raises(RewardError, match="'f' is required and has no value for sample 0, segment 0: skipped"):
        reward_table([given], responses())


# ---------------------------------------------------------------------------------------------- modules


class Brightness(torch.nn.Module):
    """A reward model: one weight, and dropout that must not run."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Linear(1, 1, bias=False)
        self.drop = torch.nn.Dropout(0.9)
        torch.nn.init.constant_(self.scale.weight, 2.0)

    def forward(self, segments, answer):
        level = torch.tensor([[float(s.pixels.mean())] for s in segments])
        return self.drop(self.scale(level))[:, 0] + torch.tensor(answer)


def test_a_module_is_a_reward(responses):
    given = reward(Brightness(), on="image")
    assert given.name == "Brightness" and not given.asynchronous
    table = reward_table([given], responses())
    assert not table.lost, table.messages
    assert table.values_BSF[:, 1, 0].tolist() == [0, 3, 6] and not table.values_BSF.requires_grad
