import threading
import time

import pytest

from scaling4d.data.retries import Counter, Patience, ReadError, TransientError, persist

QUICK = Patience(tries=4, first_wait_s=0.001, longest_wait_s=0.002)


def test_patience_ends_by_number_by_time_and_at_the_end_of_the_program():
    def fail():
        raise TransientError("503")

    retries = Counter()
    with pytest.raises(ReadError, match=r"503 \(tried 4 times\)"):
        persist(fail, QUICK, retries)
    assert retries.value == 3
    begun = time.monotonic()
    with pytest.raises(ReadError):
        persist(fail, Patience(tries=10**6, first_wait_s=0.01, longest_wait_s=0.02, total_s=0.2), retries)
    assert 0.1 < time.monotonic() - begun < 2
    ending = threading.Event()
    threading.Timer(0.1, ending.set).start()
    with pytest.raises(ReadError, match="the program ends"):
        forever = Patience(tries=2, first_wait_s=10**6, longest_wait_s=10**6, total_s=10**7)
        persist(fail, forever, retries, ending)
    assert time.monotonic() - begun < 10
    with pytest.raises(ZeroDivisionError):
        persist(lambda: 1 // 0, QUICK, retries)
