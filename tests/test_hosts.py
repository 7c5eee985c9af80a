"""Several processes that meet, and stop together. tests/experiments/test_kill.py has runs of two real ones."""

import contextlib
import socket
import threading
import time
from unittest import mock

import pytest
from jax._src.lib import _jax
from jax.experimental import multihost_utils

from rlhf_jax import command, hosts
from rlhf_jax.errors import InputError
from rlhf_jax.training import loop

TWO = "127.0.0.1 and 127.0.0.1"


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def meet(port, *members, wait=2):
    """What each of the processes, (index, count), is refused with; "" of one that has met the others."""
    found = [None] * len(members)

    def come(i, index, count):
        try:
            hosts._meet(hosts.Config(f"localhost:{port}", count, index, wait=wait, lost=5))
            found[i] = ""
        except InputError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=come, args=(i, *member)) for i, member in enumerate(members)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    return found


def test_all_meet_in_any_order_and_leave_the_port_free(port):
    assert meet(port, (1, 3), (0, 3), (2, 3), wait=10) == [""] * 3
    socket.create_server(("", port)).close()


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ([(0, 3), (1, 3), (1, 3)], f"hosts.index: expected each of 0 to 2 once, got 1 twice (from {TWO})"),
        ([(0, 2), (0, 2)], f"hosts.index: expected each of 0 to 1 once, got 0 twice (from {TWO})"),
        ([(0, 2), (1, 3)], "hosts.count: expected 2, as process 0 has, got 3 in process 1"),
    ],
)
def test_who_is_wrong_is_known_at_once(members, line, port):
    """To all of them. JAX hangs, or ends with many lines."""
    began = time.monotonic()
    assert set(meet(port, *members, wait=90)) == {line}
    assert time.monotonic() - began < 60


def test_who_does_not_come_is_named(port):
    missing = "hosts.index: expected 0 to 3 within 2 s, did not come: 1, 3"
    assert meet(port, (0, 4), (2, 4)) == [missing, missing]
    alone = f"hosts.coordinator: expected process 0 at localhost:{port}, waited 2 s (Connection refused)"
    assert meet(port, (1, 2)) == [alone]


def test_a_process_that_has_started_again_is_no_second_one(port):
    found = []
    first = threading.Thread(target=lambda: found.extend(meet(port, (0, 3), wait=30)))
    first.start()

    received = b""
    while not received:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)) as there:
            there.sendall(b"[1, 3]\n")
            received = there.recv(99)
    assert received == hosts.GREETING
    with socket.create_connection(("localhost", port)) as another_program:
        another_program.sendall(b"GET / HTTP/1.1\n")
    assert meet(port, (1, 3), (2, 3), wait=30) == ["", ""]
    first.join()
    assert found == [""]


def test_a_port_in_use_is_refused(port, monkeypatch):
    """Not before a run that was killed has freed it. Who answers there is no process of ours."""
    monkeypatch.setattr(hosts, "GRACE", -9)
    with socket.create_server(("", port)) as other:

        def answer():
            guest, _ = other.accept()
            with guest:
                guest.sendall(b"HTTP/1.1 400\n")

        threading.Thread(target=answer, daemon=True).start()
        refused = f"hosts.coordinator: expected a free port, got {port} (Address already in use)"
        assert meet(port, (0, 2), wait=30) == [refused]


def test_an_evaluation_stops_between_two_batches_where_all_do(monkeypatch):
    """At the same call of `stops` in all processes, and only inside of an evaluation."""
    monkeypatch.setattr(hosts, "_group", hosts._Group(None, 0, 2, "", 60, stop_at=4))
    stop, reached = loop.Stop(), []
    hosts.pause()  # of what is measured before training
    with pytest.raises(loop.Stopped), stop.evaluating():
        for i in range(9):
            hosts.pause()
            reached.append(i)
    assert reached == [0, 1, 2]
    hosts.pause()
    assert stop()  # then the step is saved


def test_no_process_passes_the_call_that_is_agreed_on_while_another_is_slow():
    """`_watch` goes on meanwhile, and finds out which host has ended."""
    group, said = hosts._Group(mock.Mock(), 0, 2, "", 60, looks=3), {}
    group.client.key_value_set = lambda key, value, **_: said.update({key: value})
    group.client.key_value_dir_get = lambda _: list(said.items())
    passed = threading.Event()
    hosts._agree(group)
    hosts._agree(group)
    assert group.stop_at is None
    waiting = threading.Thread(target=lambda: group.lock.acquire() and passed.set(), daemon=True)
    waiting.start()
    assert not passed.wait(0.1)
    said["rlhf_jax/looks/1"] = "5"
    hosts._agree(group)
    assert group.stop_at == 6 and passed.wait(60)


def test_a_host_announces_the_address_by_which_it_reaches_the_first(monkeypatch):
    """Its own name often stands for 127.0.1.1, where no other host finds it."""
    announced = []

    def connect(name):
        _jax.make_gloo_tcp_collectives(distributed_client=None)

    monkeypatch.setattr(_jax, "make_gloo_tcp_collectives", lambda **how: announced.append(how["hostname"]))
    monkeypatch.setattr(multihost_utils, "sync_global_devices", connect)
    for address in "127.0.0.1:8476", "[::1]:8476":
        hosts._connect_devices(address)
    assert announced == ["127.0.0.1", "::1"]


def test_over_a_link_that_was_cut_a_process_ends_without_the_last_word(monkeypatch):
    group = hosts._Group(mock.Mock(), 1, 2, "10.0.0.2:8476", lost=60)
    monkeypatch.setattr(hosts, "_group", group)
    monkeypatch.setattr(hosts, "LAST", 0.1)
    never = threading.Event()
    group.client.key_value_set = lambda *_: never.wait(60)
    began = time.monotonic()
    hosts._Others().ending("stopped by SIGINT", 3)
    assert time.monotonic() - began < 30 and group.leaving
    never.set()

    group.leaving = False  # while Python ends, where it has no new threads
    monkeypatch.setattr(hosts._thread, "start_new_thread", mock.Mock(side_effect=RuntimeError))
    hosts._Others().ending("stopped by SIGINT", 3)


def test_a_service_that_says_nothing_is_lost_though_a_call_waits_for_it(monkeypatch):
    """As behind a link that was cut; JAX ends the process later, with many lines."""
    ended = []
    monkeypatch.setattr(hosts, "_group", hosts._Group(None, 1, 2, "10.0.0.2:8476", lost=1))
    monkeypatch.setattr(hosts, "POLL", 0.1)
    monkeypatch.setattr(command, "end", lambda *what: ended.append(what))
    hosts._watch_service()
    assert ended == [("host 0: 10.0.0.2:8476 does not answer any more; the same command goes on from there", 3)]
