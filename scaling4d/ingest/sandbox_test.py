import os
import threading
import time

import pytest

from scaling4d.ingest.sandbox import Limits, SandboxError, run

HERE = "scaling4d.ingest.sandbox_test"
SMALL = Limits(memory_bytes=1 << 30, seconds=20, message_bytes=1 << 24)


# The functions whose names begin with "work_" run in the child.
def work_count(arguments):
    for number in range(arguments["count"]):
        yield {"number": number}, bytes([number % 256]) * arguments["size"]


def work_refuse(arguments):
    yield {"number": 0}, b""
    raise SandboxError("corrupt", "found out late")


def work_eat_memory(arguments):
    yield {"bytes": len(bytearray(600 << 20))}, b""


def work_spin(arguments):
    while True:
        pass
    yield


def work_sleep(arguments):
    time.sleep(60)
    yield {}, b""


def work_abort(arguments):
    yield {"number": 0}, b""
    os.abort()


def work_mistake(arguments):
    yield {"number": 1 / arguments["zero"]}, b""


def work_print(arguments):
    print("this must not get into the messages")
    os.write(1, b"neither must this")
    yield {"number": 1}, b"payload"


def work_write_file(arguments):
    with open(arguments["path"], "wb") as file:
        file.write(b"x" * (4 << 20))
    yield {}, b""


def results(work, limits=SMALL, **arguments):
    return list(run(f"{HERE}:{work}", arguments, limits))


def failure(work, limits=SMALL, **arguments) -> SandboxError:
    with pytest.raises(SandboxError) as error:
        results(work, limits, **arguments)
    return error.value


def test_results_come_in_order_and_whole():
    found = results("work_count", count=300, size=10_000)
    assert [header["number"] for header, _ in found] == list(range(300))
    assert all(bytes(payload) == bytes([i % 256]) * 10_000 for i, (_, payload) in enumerate(found))


def test_the_reason_of_the_work_comes_through_after_its_results():
    seen = []
    with pytest.raises(SandboxError) as error:
        for header, _ in run(f"{HERE}:work_refuse", {}, SMALL):
            seen.append(header)
    assert seen == [{"number": 0}] and (error.value.reason, error.value.detail) == ("corrupt", "found out late")


def test_memory_is_limited():
    assert failure("work_eat_memory", Limits(memory_bytes=500 << 20)).reason == "memory"
    assert len(results("work_eat_memory", Limits(memory_bytes=2 << 30))) == 1


@pytest.mark.parametrize("work", ["work_spin", "work_sleep"])
def test_time_is_limited(work):
    began = time.monotonic()
    assert failure(work, Limits(seconds=1)).reason == "timeout"
    assert time.monotonic() - began < 15


def test_the_consumers_own_time_does_not_count():
    for _ in run(f"{HERE}:work_count", {"count": 3, "size": 1}, Limits(seconds=1)):
        time.sleep(0.6)


def test_a_child_that_dies_is_named():
    assert failure("work_abort").reason == "crashed" and "signal 6" in failure("work_abort").detail
    mistake = failure("work_mistake", zero=0)
    assert mistake.reason == "crashed" and "ZeroDivisionError" in mistake.detail


def test_messages_are_limited():
    assert failure("work_count", count=1, size=(1 << 24) + 1).reason == "too_large"


def test_what_the_work_prints_stays_out_of_the_messages():
    assert results("work_print") == [({"number": 1}, b"payload")]


def test_files_it_may_write_are_small(tmp_path):
    assert failure("work_write_file", path=str(tmp_path / "big")).reason == "crashed"
    assert (tmp_path / "big").stat().st_size <= 1 << 20


def test_leaving_early_ends_the_child():
    running = run(f"{HERE}:work_count", {"count": 10**9, "size": 1000}, SMALL)
    next(running)
    running.close()  # would wait for ever if the child lived on


def test_stopping_from_another_thread_ends_a_wait():
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    with pytest.raises(SandboxError) as error:
        list(run(f"{HERE}:work_sleep", {}, SMALL, stop))
    assert error.value.reason == "stopped" and time.monotonic() - began < 10
