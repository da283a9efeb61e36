"""A terminal gets one line, a log a few."""

import io

from scaling4d.status_line import StatusLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_and_a_log_few():
    now = [0.0]
    terminal, log = Terminal(), io.StringIO()
    lines = [StatusLine(stream, every_s=10.0, clock=lambda: now[0]) for stream in (terminal, log)]
    for done in range(101):
        now[0] = done / 2
        for line in lines:
            line.show(lambda done=done: f"{done} done", now=done == 100)
    for line in lines:
        line.close()
        line.close()
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().count("\r") == 101
    assert terminal.getvalue().endswith("100 done\x1b[K\n")
    assert [line for line in log.getvalue().splitlines()] == [f"{done} done" for done in (0, 20, 40, 60, 80, 100)]


def test_text_is_only_made_when_it_is_shown():
    line = StatusLine(io.StringIO(), clock=lambda: 0.0)
    line.show(lambda: "first")
    line.show(lambda: 1 / 0)
