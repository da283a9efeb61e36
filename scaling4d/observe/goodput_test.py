"""Every second of a run is booked once, whatever happens to its starts."""

import json
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling4d.observe import goodput
from scaling4d.observe.goodput import CATEGORIES, DOWN, GoodputBook
from scaling4d.run_folder import RunFolder
from tests import gcs_server


class Time:
    """A machine's clocks; ``skew`` is what its wall clock is off by."""

    def __init__(self):
        self.now, self.skew = 1_700_000_000.0, 0.0

    def monotonic(self):
        return self.now - 1_600_000_000.0

    def wall(self):
        return self.now + self.skew


def make_book(run, clock, age_s=0.0, **options):
    return GoodputBook(run, 100, clock=clock.monotonic, wall=clock.wall, age_s=age_s, **options)


def test_categories_of_a_start(tmp_path):
    clock, run = Time(), RunFolder(tmp_path)
    clock.now += 5
    with make_book(run, clock, age_s=5) as book:
        clock.now += 1  # start-up
        with book.during("restore"):
            clock.now += 2
        with book.during("compile"):
            clock.now += 4
            with book.during("data wait"):
                clock.now += 8
            clock.now += 16
        clock.now += 512  # start-up again
        book.loop_begins(40)
        clock.now += 32
        book.step_done(41)
        with book.during("data wait", only_if=lambda: False):  # the device had work: that is time of steps
            clock.now += 64
        with book.during("data wait", only_if=lambda: True):
            clock.now += 128
        clock.now += 1024
        book.finishing()
        clock.now += 256
    [account] = goodput.read(run)
    booked = {category: seconds for category, seconds in account.seconds.items() if seconds}
    assert booked == {
        "start-up": 518, "restore": 2, "compile": 20, "data wait": 136, "step": 1120, "finish": 256
    }  # fmt: skip
    assert (account.first_step, account.step, account.total_steps, account.ended) == (40, 41, 100, "ok")
    assert account.began == 1_700_000_000.0 and account.last_sign == clock.now
    assert book.table().startswith("wall time    34m 12s in 1 start\n  start-up     8m 38s  25.2%\n")
    assert "eval" not in book.table()


def test_an_error_is_kept_and_time_of_a_phase_it_ends_is_booked(tmp_path):
    clock, run = Time(), RunFolder(tmp_path)
    with pytest.raises(ValueError), make_book(run, clock) as book, book.during("eval"):
        clock.now += 3
        raise ValueError("no such clip\nand more")
    [account] = goodput.read(run)
    assert account.ended == "ValueError: no such clip" and account.seconds["eval"] == 3


def test_steps_done_again_and_time_between_starts(tmp_path):
    clock, run = Time(), RunFolder(tmp_path)
    book = make_book(run, clock)
    book.loop_begins(0)
    for step in range(1, 6):
        clock.now += 10
        book.step_done(step)
    book.write()  # and is killed 7 s later
    clock.now += 7 + 100
    book = make_book(run, clock, age_s=30)
    book.loop_begins(3)
    for step in (4, 5, 6):
        clock.now += 10
        book.step_done(step)
    table = goodput.summarize(book.accounts())
    booked = {category: seconds for category, seconds in table.items() if seconds}
    assert booked == {"start-up": 30, "step": 60, "repeated": 20, DOWN: 77}


def test_a_start_that_waited_for_the_earlier_one_begins_at_its_last_sign(tmp_path):
    clock, run = Time(), RunFolder(tmp_path)
    book = make_book(run, clock)
    clock.now += 50
    book.write("ok")
    clock.now += 5
    waited = make_book(run, clock, age_s=40)
    clock.skew = -1000.0
    behind = make_book(run, clock, age_s=40)
    clock.now += 1
    for book in (waited, behind):
        first, second = book.accounts()
        assert second.began == first.last_sign == 1_700_000_050.0
    assert behind.accounts()[-1].seconds["start-up"] == 1


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_rows_add_up_whatever_happens(seed):
    """Against a ledger kept second by second, over starts that end, are killed, tear their last line, or go back."""
    chance = random.Random(seed)
    with gcs_server.serve():
        clock, run = Time(), RunFolder("gs://bucket/run")
        expected = dict.fromkeys((*CATEGORIES, DOWN), 0.0)
        first, sign, furthest, saved = clock.now, None, 0, 0

        def spend(category, ledger):
            seconds = chance.randrange(100)
            clock.now += seconds
            ledger[category] += seconds

        for _ in range(chance.randrange(1, 6)):
            age = chance.randrange(20)
            clock.now += age + chance.randrange(3) * 1000
            clock.skew = chance.choice([0, 0, -5000])
            book = make_book(run, clock, age_s=age)
            known = clock.wall() - age
            began = known if sign is None else max(known, sign)
            first = began if sign is None else first
            ledger = dict.fromkeys(CATEGORIES, 0.0)
            ledger["start-up"] += max(0.0, clock.wall() - began)
            spend("start-up", ledger)
            with book.during("restore"):
                spend("restore", ledger)
            written, written_step = None, 0
            step = chance.randrange(saved + 1)
            book.loop_begins(step)
            for _ in range(chance.randrange(10)):
                kind = "repeated" if step < furthest else "step"
                with book.during("data wait", only_if=lambda: False):
                    spend(kind, ledger)
                phase = chance.choice(["data wait", "save", "eval"])
                with book.during(phase):
                    spend(phase, ledger)
                    if chance.random() < 0.3:
                        book.write()
                        written, written_step = dict(ledger), step
                spend(kind, ledger)
                step += 1
                book.step_done(step)
                saved = step if chance.random() < 0.3 else saved
            if chance.random() < 0.5:
                book.finishing()
                spend("finish", ledger)
                book.write("ok")
                written, written_step = dict(ledger), step
            if chance.random() < 0.3:
                whole = run.read_bytes(goodput.NAME) if run.exists(goodput.NAME) else b""
                run.write_bytes(goodput.NAME, whole + b'{"start": 1, "beg')
            if written is None:  # killed before its first line: no sign of it
                continue
            expected[DOWN] += 0.0 if sign is None else began - sign
            first = began if sign is None else first
            sign = began + sum(written.values())
            furthest = max(furthest, written_step)
            for category, seconds in written.items():
                expected[category] += seconds
        accounts = goodput.read(run)
        table = goodput.summarize(accounts)
        assert min(table.values()) >= 0
        assert table == pytest.approx(expected, abs=0.01)
        if accounts:
            assert accounts[0].began == first
            assert sum(table.values()) == pytest.approx(sign - first, abs=0.01)


def test_lines_are_whole_accounts_and_others_are_passed_over(tmp_path):
    clock, run = Time(), RunFolder(tmp_path)
    with make_book(run, clock):
        clock.now += 1
    lines = run.read_text(goodput.NAME).splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["ended"] is None
    other = lines[0].replace('"start": 1', '"start": 2')
    for bad in ("{", "3", "null", '{"start": 2}', other[:-3], other.replace("0.0", '"x"'), other.replace("{", "[")):
        assert goodput.parse("\n".join([*lines, bad])) == goodput.read(run), bad


def test_the_thread_writes_while_the_loop_does_not_turn_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "_PERIOD_S", 0.01)
    run = RunFolder(tmp_path)
    with GoodputBook(run, 100) as book, book.during("compile"):
        deadline = time.monotonic() + 30
        while not goodput.read(run)[-1].seconds["compile"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert goodput.read(run)[-1].seconds["compile"] > 0


def test_lines_get_rarer_as_a_start_grows_old(tmp_path, monkeypatch):
    clock, waits = Time(), []
    book = make_book(RunFolder(tmp_path), clock)
    clock.now += 10_000

    def wait(seconds):
        waits.append(seconds)
        return True

    monkeypatch.setattr(book._stop, "wait", wait)
    book._write_forever()
    assert waits == [50.0]


def test_a_folder_that_takes_no_line_is_no_reason_to_end(tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    book = make_book(RunFolder(tmp_path / "file"), Time(), say=said.append)
    book.write()
    assert len(said) == 1 and "goodput.jsonl could not be written" in said[0]


def test_a_trainer_that_lost_its_run_folder_writes_no_more(tmp_path):
    clock, run, lost = Time(), RunFolder(tmp_path), []
    with make_book(run, clock, may_write=lambda: not lost):
        clock.now += 60
        lost.append("frozen, and woken up")
    [account] = goodput.read(run)
    assert account.ended is None and account.last_sign == 1_700_000_000.0


def test_other_processes_count_and_write_nothing():
    clock = Time()
    with make_book(None, clock) as book:
        clock.now += 2
        assert goodput.summarize(book.accounts())["start-up"] == 2


def test_a_process_knows_its_age():
    program = "import time; time.sleep(0.5); from scaling4d.observe.goodput import process_age_s as f; print(f())"
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 0.48 <= age <= time.monotonic() - began + 0.02
