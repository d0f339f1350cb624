"""Tasks side by side: each once, in threads that compute with one thread, and nothing of it left behind."""

import os
import signal
import threading
import time

import pytest
import torch

from sparsegate.moe.kernels.workers import in_parallel


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_tasks", [0, 1, 2, 3, 100])
def test_every_task_is_done_once(num_tasks):
    done = []
    in_parallel(done.append, range(num_tasks))
    assert sorted(done) == list(range(num_tasks))


def test_tasks_run_at_the_same_time_with_one_thread_each_and_without_autograd():
    meeting, seen = threading.Barrier(3), []

    def meet(task):
        meeting.wait(timeout=30)  # nobody gets past it alone
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()))

    in_parallel(meet, range(3))
    assert {(threads, grad) for threads, grad, _ in seen} == {(1, False)}
    assert len({thread for *_, thread in seen}) == 3
    assert torch.get_num_threads() == 3


def test_threads_that_start_later_have_the_callers_number_of_threads():
    in_parallel(lambda task: None, range(3))
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [3]


@pytest.mark.parametrize("inference", [True, False])
def test_the_callers_inference_mode_holds(inference):
    seen = []
    with torch.inference_mode(inference):
        in_parallel(lambda task: seen.append(torch.is_inference_mode_enabled()), range(2))
    assert seen == [inference] * 2


def test_an_error_is_raised_once_the_threads_have_stopped():
    running = []

    def fail(task):
        running.append(task)
        if task == 1:
            raise ZeroDivisionError("task 1")

    with pytest.raises(ZeroDivisionError, match="task 1"):
        in_parallel(fail, range(50))
    in_parallel(running.append, [100, 101])
    assert {100, 101} <= set(running)


class Interrupted(BaseException):
    pass


def test_once_the_caller_was_interrupted_no_task_begins():
    def interrupt(signum, frame):
        raise Interrupted

    def work(task):
        if task == 10:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        done.append(task)

    done, before = [], signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted):
            in_parallel(work, range(1000))
    finally:
        signal.signal(signal.SIGUSR1, before)
    num_done = len(done)
    assert num_done < 1000
    time.sleep(0.1)
    assert len(done) == num_done


@pytest.mark.parametrize("num_threads", [1, 3])
def test_autocast_is_off_in_every_thread(num_threads):
    torch.set_num_threads(num_threads)
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_parallel(lambda task: seen.append(torch.is_autocast_enabled("cpu")), range(2))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 2


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("before", [False, True])
def test_denormal_numbers_are_zero_in_every_thread_and_afterwards_what_they_were(num_threads, before):
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(before)
    try:
        seen = []
        in_parallel(lambda task: seen.append(half_of_the_smallest()), range(4))
        assert seen == [0.0] * 4
        assert (half_of_the_smallest() == 0.0) == before
    finally:
        torch.set_flush_denormal(False)


def half_of_the_smallest() -> float:
    return (torch.full((1,), torch.finfo(torch.float32).tiny) / 2).item()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own():
    in_parallel(lambda task: None, range(3))
    child = os.fork()
    if child == 0:
        done = []
        in_parallel(done.append, range(5))
        os._exit(len(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
