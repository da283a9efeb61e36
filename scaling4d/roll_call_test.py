"""All are there, or all say why not: threads in place of processes, over real connections."""

import concurrent.futures
import socket
import threading
import time

import pytest

from scaling4d import exits
from scaling4d.errors import UserError
from scaling4d.roll_call import Absent, roll_call


@pytest.fixture
def address() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


def each(address, *processes: tuple[int, int], start_s: float = 20) -> list[UserError | None]:
    """What the call raises in processes of the given (process_id, num_processes)."""

    def one(index, count):
        try:
            roll_call(address, count, index, start_s)
        except UserError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(one, *zip(*processes, strict=True)))


def test_all_are_there_and_the_port_is_free_again(address):
    for _ in range(2):
        assert each(address, (2, 4), (0, 4), (1, 4), (3, 4)) == [None] * 4


def test_the_one_that_is_missing_is_named_by_all(address):
    began = time.monotonic()
    errors = each(address, (0, 3), (2, 3), start_s=0.5)
    assert time.monotonic() - began < 15
    assert all(isinstance(error, Absent) and error.code == exits.STUCK for error in errors)
    here = socket.gethostname()
    assert str(errors[0]) == str(errors[1]) and "2 of --num_processes=3 came in --start_s=0.5" in str(errors[0])
    assert f"process(es) 1 did not, 0 on {here}, 2 on {here} did" in str(errors[0])


def test_of_many_some_are_named(address):
    [error] = each(address, (0, 100), start_s=0.2)
    assert "1, 2, 3, 4, 5, 6, 7, 8 and 91 more did not" in str(error)


def test_nobody_answers(address):
    [error] = each(address, (1, 2), start_s=0.3)
    assert isinstance(error, Absent) and "Connection refused" in str(error) and address in str(error)
    [error] = each("no.such.host.invalid:1234", (1, 2), start_s=0.3)
    assert isinstance(error, Absent) and "no.such.host.invalid:1234 (" in str(error)


@pytest.mark.parametrize("twice, others", [(1, [0]), (0, [])])
def test_one_that_came_twice_is_named_by_all(address, twice, others):
    errors = each(address, *((index, 3) for index in [*others, twice, twice]))
    assert len({str(error) for error in errors}) == 1 and not isinstance(errors[0], Absent)
    assert f"--process_id={twice} came twice" in str(errors[0]) and "0 to 2" in str(errors[0])


def test_other_numbers_of_processes(address):
    errors = each(address, (0, 3), (1, 2))
    assert str(errors[0]) == str(errors[1]) and not isinstance(errors[0], Absent)
    assert "process 1 (" in str(errors[0]) and "--num_processes=2" in str(errors[0])
    assert "--num_processes=3; start all with the same" in str(errors[0])


def test_a_port_that_something_else_has(address):
    port = int(address.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        [error] = each(address, (0, 2), start_s=0.3)
        assert not isinstance(error, Absent)
        assert f"--coordinator_address={address}: port {port} is taken" in str(error)


def test_something_else_answers(address):
    def answer(listener):
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 10)
                connection.sendall(b"SSH-2.0\r\n")

    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as listener:
        threading.Thread(target=answer, args=[listener], daemon=True).start()
        [error] = each(address, (1, 2), start_s=0.3)
    assert isinstance(error, Absent) and "something else answers there" in str(error)


def test_strangers_and_one_that_was_started_again_do_no_harm(address):
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        main = threads.submit(each, address, (0, 3))
        for said in (b"GET / HTTP/1.1\r\n", b"", b'[2, 3, "here"]\n'):  # the last is process 2, which then ends
            with connected(address) as connection:
                connection.sendall(said)
        assert each(address, (2, 3), (1, 3)) == [None, None]
        assert main.result() == [None]


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            time.sleep(0.01)
