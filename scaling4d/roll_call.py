"""The roll call: that all processes of a run are there, before JAX's service waits for them.

Responsible for: who is missing, who came twice, who counts the processes otherwise, and a port that is taken, each in
one line that all processes say. JAX's own service would wait, abort in C++ without naming anyone, or share its port
with another run. Not responsible for: what the processes say to each other afterwards (``cluster.py``), or runs whose
scheduler tells them of each other: it starts all of their processes or none.

Process 0 listens on the port that JAX's service opens next; each other one sends it a line of JSON with its number and
gets a line back, which is the verdict.
"""

import contextlib
import errno
import json
import socket
import time
from typing import Any

from scaling4d import exits
from scaling4d.errors import UserError

_RETRY_S = 0.2
_LINE_S = 5.0
"""A line is there after this time, or whoever connected is none of ours."""
_PORT_S = 10.0
"""The process that had the port may be about to end."""
_NO_ROLL_CALL = (OSError, ValueError, TypeError, KeyError)
"""What asking raises where nothing answers, or something that holds no roll call."""
_NAMED = 8
"""So many processes are named in an error; of more, the number."""


class Absent(UserError):
    """Processes did not come in time; they may at the next start."""

    code = exits.STUCK


def roll_call(address: str, count: int, index: int, start_s: float) -> None:
    """Returns, in all of them at once, when processes 0 to ``count`` - 1 are there.

    Args:
      address: HOST:PORT of process 0.
      index: of this process.
      start_s: how long this process waits.

    Raises:
      UserError: one is there twice, or counts them otherwise, or the port is taken.
      Absent: not all came, or process 0 does not answer.
    """
    if index == 0:
        _call(address, count, start_s)
    else:
        _answer(address, count, index, start_s)


def _call(address: str, count: int, start_s: float) -> None:
    """Process 0: collects the others and tells them what came of it."""
    deadline = time.monotonic() + start_s
    verdict: UserError | None = None
    with contextlib.ExitStack() as connections:
        told: list[socket.socket] = []
        came: dict[int, tuple[str, socket.socket]] = {}
        with _listen(address, count, min(start_s, _PORT_S)) as listener:
            while len(came) < count - 1 and verdict is None:
                listener.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    told.append(connections.enter_context(listener.accept()[0]))
                    verdict = _admit(told[-1], came, count)
                except TimeoutError:
                    verdict = _absent(came, count, start_s)
        for connection in told:
            _send(connection, {"error": str(verdict or ""), "absent": isinstance(verdict, Absent)})
    if verdict:
        raise verdict


def _listen(address: str, count: int, patience_s: float) -> socket.socket:
    port = int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    deadline = time.monotonic() + patience_s
    while True:
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                with contextlib.suppress(*_NO_ROLL_CALL):
                    _ask(address, count, 0, timeout_s=1.0)  # of a second process 0 both say that there are two
                time.sleep(_RETRY_S)
                continue
            why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
            raise UserError(
                f"--coordinator_address={address}: port {port} {why} on {socket.gethostname()}; give all processes of "
                "this run another one"
            ) from None


def _admit(connection: socket.socket, came: dict[int, tuple[str, socket.socket]], count: int) -> UserError | None:
    """Puts a process that connected into ``came``; the error where it should not have come."""
    connection.settimeout(_LINE_S)
    try:
        index, theirs, host = _receive(connection)
    except _NO_ROLL_CALL:  # a port scan, a health check, a process that ended
        return None
    if theirs != count:
        return UserError(
            f"process {index} ({host}) was started with --num_processes={theirs}, process 0 ({socket.gethostname()}) "
            f"with --num_processes={count}; start all with the same"
        )
    if index == 0 or (index in came and not _has_ended(came[index][1])):
        first = came[index][0] if index else socket.gethostname()
        return UserError(
            f"--process_id={index} came twice, from {first} and from {host}; give each process its own one of 0 to "
            f"{count - 1}"
        )
    came[index] = (host, connection)
    return None


def _has_ended(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_LINE_S)


def _absent(came: dict[int, tuple[str, socket.socket]], count: int, start_s: float) -> Absent:
    hosts = {0: socket.gethostname()} | {index: host for index, (host, _) in came.items()}
    missing = [str(index) for index in range(count) if index not in hosts]
    here = [f"{index} on {host}" for index, host in sorted(hosts.items())]
    return Absent(
        f"{len(hosts)} of --num_processes={count} came in --start_s={start_s:g} seconds; process(es) {_some(missing)} "
        f"did not, {_some(here)} did; look at why, or raise --start_s"
    )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _answer(address: str, count: int, index: int, start_s: float) -> None:
    """Any other process: tells process 0 that it is there, and waits for the verdict."""
    deadline = time.monotonic() + start_s
    why = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            # Process 0 began to count before it could be reached, so its verdict comes within this time.
            return _ask(address, count, index, timeout_s=start_s + _LINE_S)
        except _NO_ROLL_CALL as error:
            system = isinstance(error, OSError)
            why = getattr(error, "strerror", None) or ("no answer" if system else "something else answers there")
        time.sleep(min(left, _RETRY_S))
    raise Absent(
        f"process 0 does not answer at --coordinator_address={address} ({why}) in --start_s={start_s:g} seconds; "
        f"process {index} on {socket.gethostname()} ends: is process 0 there, and is its port open to this host?"
    )


def _ask(address: str, count: int, index: int, timeout_s: float) -> None:
    """Tells process 0, once, and waits for its verdict; raises that, or one of ``_NO_ROLL_CALL``."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as connection:
        _send(connection, [index, count, socket.gethostname()])
        verdict = _receive(connection)
    if verdict["error"]:
        raise (Absent if verdict["absent"] else UserError)(verdict["error"])


def _send(connection: socket.socket, value: object) -> None:
    try:
        connection.sendall(json.dumps(value).encode() + b"\n")
    except OSError:
        pass  # it ended, or will hear the end of this connection


def _receive(connection: socket.socket) -> Any:
    """One line's value; ValueError where it is none."""
    with connection.makefile("rb") as lines:
        line = lines.readline(1 << 16)
    if not line.endswith(b"\n"):
        raise ValueError("not a whole line")
    return json.loads(line)
