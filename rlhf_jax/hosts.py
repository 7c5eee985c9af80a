"""Several processes of one run, one on each host: they find each other, end together, and the first one writes.

Every process runs the same program on the same rows, and holds its own shards of each array (training/sharding.py).
What needs no device goes through JAX's coordination service: barriers, values that process 0 computes for all, a stop,
and how a process has ended. The workdir must be a folder that all hosts share.

A run of one process has none of this: every function here then returns at once.
"""

import _thread
import atexit
import contextlib
import dataclasses
import functools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from rlhf_jax import command, fields
from rlhf_jax.errors import AGAIN, BAD_INPUT, STOPPED, InputError

POLL = 0.5  # seconds between two looks at what the other hosts say
LONGEST = 7 * 24 * 3600 * 1000  # milliseconds that a host waits for another one, which lives: `_watch` finds the dead
GREETING = b"rlhf_jax\n"  # of process 0, where all meet
LAST = 5  # seconds that the last word of a process may take
GRACE = 10  # seconds after `lost` in which the others have ended, where process 0 was killed
HEARTBEAT = 30  # seconds after `lost` before which JAX does not end the process itself, with many lines
FOLDER = "rlhf_jax/"  # of our keys in the coordination service

# The coordination service has a process of its own: it outlives process 0, so that the others learn of its end. On a
# line of its input it stops at once; at the end of its input, after the seconds that the others need.
SERVICE = """
import sys, time
from jaxlib import _jax  # without JAX itself, which takes seconds
address, count, grace, heartbeat = sys.argv[1], *map(int, sys.argv[2:])
try:
    service = _jax.get_distributed_runtime_service(address, count, heartbeat_timeout=heartbeat, shutdown_timeout=300)
except Exception as error:
    print(str(error).splitlines()[0], flush=True)
    sys.exit()
print(flush=True)
if not sys.stdin.readline():
    time.sleep(grace)
service.shutdown()
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The processes of a run, one on each host. No number of a run depends on it."""

    # HOST:PORT of process 0, whose port is free; empty: found on Cloud TPU, SLURM and GKE
    coordinator: str = fields.neutral("")
    count: int = fields.number(0, least=0, neutral=True)  # of processes; 0: found, and 1 where there is no cluster
    index: int = fields.number(-1, least=-1, neutral=True)  # of this process, from 0; -1: found
    wait: int = fields.number(300, least=1, neutral=True)  # seconds to wait for the others at the start
    lost: int = fields.number(60, least=5, neutral=True)  # seconds without a sign of life after which a host is lost

    def problems(self):
        """Checks that no field can make alone."""
        alone = self.count == 1
        found = re.fullmatch(r"(?:[^\s:]+|\[[^\]\s]+\]):(\d+)", self.coordinator)
        if self.coordinator and not (found and 0 < int(found[1]) < 2**16):
            yield "coordinator", "HOST:PORT, such as 10.0.0.2:8476"
        if self.coordinator and alone:
            yield "coordinator", "nothing where hosts.count is 1"
        if self.coordinator and self.count == 0:
            yield "count", "the number of processes, where hosts.coordinator is given"
        if self.coordinator and self.index < 0:
            yield "index", f"0 to {self.count - 1}, where hosts.coordinator is given"
        if self.count and self.index >= self.count:
            yield "index", f"less than hosts.count = {self.count}"


@dataclasses.dataclass
class _Group:
    """This process among the others."""

    client: Any  # of the coordination service
    index: int
    count: int
    address: str
    lost: int
    calls: int = 0  # of what all processes do in the same order; it names barriers and values
    alone: bool = False  # whether process 0 does something that the others do not
    leaving: bool = False  # whether this process ends, and says nothing more
    silent: float = 0.0  # seconds since the service has answered
    # Of a stop: calls of `stops`, the first one at which all stop, and the line of the process that had the signal.
    looks: int = 0
    stop_at: int | None = None
    agreeing: bool = False
    leave: Callable[[], None] | None = None  # of `pauses`: what `pause` calls
    lock: Any = dataclasses.field(default_factory=threading.RLock)


_group: _Group | None = None


def several() -> bool:
    """Whether the run has more than one process."""
    return _group is not None


def first() -> bool:
    """Whether this process writes and prints: process 0, or the only one."""
    return _group is None or _group.index == 0


def count() -> int:
    """The number of processes."""
    return _group.count if _group else 1


def start(config: Config) -> None:
    """Joins the other processes of the run, before any device is used. Alone, it does nothing.

    Raises InputError where they cannot be found or do not answer.
    """
    global _group
    fields.check(config, "hosts.")
    if _group is not None or config.count == 1 or (not config.coordinator and not _cluster(config)):
        return
    if config.coordinator:
        _meet(config)
    import jax
    from jax._src import distributed
    from jax._src.lib import _jax

    jax.config.update("jax_enable_preemption_service", False)  # its handler would take the place of ours
    state = distributed.global_state

    def give_up():
        where = state.coordinator_address or config.coordinator
        what = f"process 0 at {where}, which does not answer"
        if state.process_id == 0:
            what = f"{config.count or 'all'} processes to come to {where}, and some have not"
        command.end(f"hosts.coordinator: expected {what}; waited {config.wait} s", BAD_INPUT)

    # JAX would end the process with many lines.
    timer = threading.Timer(config.wait, give_up)
    timer.daemon = True
    timer.start()
    service = mock.patch.object(_jax, "get_distributed_runtime_service", lambda *args, **_: _Service(config, *args))
    try:
        with service:
            jax.distributed.initialize(
                config.coordinator or None,
                config.count or None,
                None if config.index < 0 else config.index,
                # On CPUs a process has all of its virtual devices, whatever SLURM says.
                local_device_ids=[] if config.coordinator else None,
                initialization_timeout=config.wait + 2 * HEARTBEAT,
                heartbeat_timeout_seconds=_heartbeat(config),
            )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        command.end(
            f"hosts.coordinator: {state.coordinator_address or config.coordinator}: {_first_line(error)}", BAD_INPUT
        )
    finally:
        timer.cancel()
    if state.num_processes == 1:
        return
    _group = _Group(state.client, state.process_id, state.num_processes, state.coordinator_address or "", config.lost)
    command.others = _Others()
    atexit.register(_leave)
    _beat()
    for watch in _watch, _watch_service:
        threading.Thread(target=watch, daemon=True).start()
    _connect_devices(_group.address)


def _heartbeat(config):
    """JAX sends a sign of life in each half of these seconds, and ends the process if it has no answer for as long."""
    return 2 * (config.lost + HEARTBEAT)


def _cluster(config):
    """The cluster of several processes that this one is in, as JAX finds it; None where it is alone."""
    from jax._src.clusters import ClusterEnv

    name = "no cluster"
    try:
        with warnings.catch_warnings(action="ignore"):  # of Kubernetes without its package
            kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
            kind = next((kind for kind in kinds if kind.is_env_present()), None)
        if kind is not None:
            name = kind.name or kind.__name__
            return kind if (config.count or kind.get_process_count()) > 1 else None
    except Exception as error:
        why = f"{name} does not say how many processes there are ({_first_line(error)})"
        raise InputError(f"hosts.count: {why}; expected their number, or 1 to run alone") from None
    if config.count or config.index >= 0:
        raise InputError("hosts.coordinator: expected HOST:PORT of process 0, as no cluster was found, got none")
    return None


def _meet(config):
    """Returns when all processes have come to the coordinator's address, each once: JAX would wait for others in vain.

    Raises InputError where one does not come, comes twice, or expects another number of them. Process 0 comes to its
    own address, too, so that a second process 0 on another host is found.
    """
    meeting = _Meeting(config) if config.index == 0 else None
    until, why = time.monotonic() + config.wait, ""
    while time.monotonic() < until and not (meeting and meeting.problem):
        try:
            with socket.create_connection(_host_and_port(config.coordinator), timeout=5) as there:
                there.sendall(json.dumps([config.index, config.count]).encode() + b"\n")
                lines = there.makefile("rb")
                if lines.readline() != GREETING:  # the service of the last run, which ends soon; or another program
                    raise OSError("something else answers there")
                there.settimeout(config.wait + 5)  # process 0 says something before that
                if not (line := lines.readline()):
                    raise OSError("it has left")
                problem = json.loads(line)
        except OSError as error:
            why = error.strerror or str(error)
        else:
            if problem:
                raise InputError(problem)
            break
        time.sleep(POLL)
    else:
        if not (meeting and meeting.problem):
            where = f"{config.coordinator}, waited {config.wait} s ({why})"
            raise InputError(f"hosts.coordinator: expected process 0 at {where}")
    if meeting:
        meeting.thread.join()  # until the others know it, too, and the port is free again
        if meeting.problem:  # before process 0 has come itself
            raise InputError(meeting.problem)


class _Meeting:
    """The thread of process 0 that listens where all processes come."""

    def __init__(self, config):
        self._config, self.problem = config, ""
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self):
        config, (_, port) = self._config, _host_and_port(self._config.coordinator)
        until = time.monotonic() + config.wait
        # A run that was killed holds the port until the others have ended.
        busy = min(until, time.monotonic() + config.lost + GRACE + 5)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        while True:
            try:
                with socket.create_server(("", port), family=family, dualstack_ipv6=both) as listener:
                    return self._meet(listener, until)
            except OSError as error:
                if time.monotonic() > busy:
                    why = os.strerror(error.errno) if error.errno else error
                    self.problem = f"hosts.coordinator: expected a free port, got {port} ({why})"
                    return
            time.sleep(POLL)

    def _meet(self, listener, until):
        """Waits for all, and says to each what is wrong, or nothing."""
        count = self._config.count
        guests: list[socket.socket] = []
        places: dict[int, socket.socket] = {}  # by index
        listener.settimeout(POLL)
        while len(places) < count and not self.problem:
            if time.monotonic() > until:
                none = ", ".join(str(i) for i in range(count) if i not in places)
                when = f"within {self._config.wait} s"
                self.problem = f"hosts.index: expected 0 to {count - 1} {when}, did not come: {none}"
                break
            with contextlib.suppress(OSError, ValueError, TypeError):  # nobody; another program
                guests.append(guest := listener.accept()[0])
                guest.settimeout(5)
                index, theirs = json.loads(guest.makefile("rb").readline())
                guest.sendall(GREETING)
                if theirs != count:
                    self.problem = f"hosts.count: expected {count}, as process 0 has, got {theirs} in process {index}"
                elif index in places and not _gone(places[index]):
                    two = " and ".join(each.getpeername()[0].removeprefix("::ffff:") for each in (places[index], guest))
                    once = f"each of 0 to {count - 1} once"
                    self.problem = f"hosts.index: expected {once}, got {index} twice (from {two})"
                places[index] = guest
        for guest in guests:
            with guest, contextlib.suppress(OSError):
                guest.sendall(json.dumps(self.problem).encode() + b"\n")


def _gone(guest):
    """Whether the other side of a connection has closed it."""
    guest.settimeout(0)
    try:
        return not guest.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Service:
    """The coordination service, in its own process: what `jax.distributed` calls of it."""

    def __init__(self, config, address, processes):
        args = (address, processes, config.lost + GRACE, _heartbeat(config))
        line = [sys.executable, "-c", SERVICE, *map(str, args)]
        until = time.monotonic() + config.wait * 2 / 3
        while True:
            self._process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
            assert self._process.stdout
            said = self._process.stdout.readline()
            if said == "\n":
                return
            self._process.wait()
            if time.monotonic() > until:
                break
            time.sleep(2)  # a run that was killed holds the port until the others have ended
        why = f"({said.strip()}) " * bool(said.strip())
        raise InputError(f"hosts.coordinator: cannot listen at {address} {why}for {config.wait * 2 // 3} s")

    def shutdown(self):
        with contextlib.suppress(OSError):
            self._process.communicate("\n", timeout=10)


def _connect_devices(address):
    """Connects the devices of all processes now, while they are at the same place: later, one may compile for long."""
    from jax._src.lib import _jax
    from jax.experimental import multihost_utils

    # CPUs send with Gloo, which would announce what this host's own name stands for, often 127.0.1.1.
    gloo = functools.partial(_jax.make_gloo_tcp_collectives, hostname=_own_address(*_host_and_port(address)))
    with mock.patch.object(_jax, "make_gloo_tcp_collectives", gloo):
        multihost_utils.sync_global_devices("start")


def _own_address(host, port):
    """The address of this host in the network through which it reaches another one."""
    family, *_, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect(there)  # nothing is sent
        return way.getsockname()[0]


def _host_and_port(address):
    """10.0.0.2:8476 or [fd00::2]:8476"""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def wait(name: str) -> None:
    """Returns when all processes have come here."""
    if (group := _group) and not group.alone:
        group.calls += 1
        group.client.wait_at_barrier(f"{FOLDER}{group.calls}/{name}", LONGEST)


def from_first(compute: Callable[[], Any]) -> Any:
    """What process 0 computes, a value of JSON, on all of them. An error there ends all."""
    if not (group := _group) or group.alone:
        return compute()
    group.calls += 1
    key = f"{FOLDER}value/{group.calls}"
    if group.index == 0:
        value = compute()
        group.client.key_value_set(key, json.dumps(value))
        return json.loads(json.dumps(value))
    return json.loads(group.client.blocking_key_value_get(key, LONGEST))


def on_first(act: Callable[[], Any]) -> Any:
    """Calls it on process 0 alone, while the others wait: its result there, None elsewhere."""
    if not (group := _group):
        return act()
    found = None
    if group.index == 0:
        with _by_itself(group):
            found = act()
    wait("on first")
    return found


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 goes first: the others enter when it has left, and find what it has written."""
    if first():
        yield
    wait("in turn")
    if not first():
        yield


@contextlib.contextmanager
def _by_itself(group):
    before, group.alone = group.alone, True
    try:
        yield
    finally:
        group.alone = before


def compare(record: dict[str, Any]) -> None:
    """Raises InputError where this process has another value in a record than process 0, which names it."""
    if not _group:
        return
    there, here = from_first(lambda: record), json.loads(json.dumps(record))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            ours, theirs = (str(values.get(name, "nothing"))[:60] for values in (here, there))
            raise InputError(f"hosts: {name}: expected {theirs}, as host 0 has, got {ours} on host {_group.index}")
    wait("compared")


# A stop


def spread_stop(line: str) -> None:
    """Says to all processes that this one has a signal to stop."""
    if _group:
        with contextlib.suppress(Exception):  # another process has said it, or the service has gone
            _group.client.key_value_set(f"{FOLDER}stop/{_group.index}", line)


def stops() -> bool:
    """Whether all processes stop here. They call it equally often, and get the same answer at the same call."""
    group = _group
    assert group is not None
    with group.lock:  # held while they agree
        group.looks += 1
        return group.stop_at is not None and group.looks >= group.stop_at


@contextlib.contextmanager
def pauses(leave: Callable[[], None]) -> Iterator[None]:
    """Inside this context `pause` calls leave() where all processes stop."""
    group = _group
    assert group is not None
    group.leave = leave
    try:
        yield
    finally:
        group.leave = None


def pause() -> None:
    """Between two batches of an evaluation, where all processes can stop: they come here equally often."""
    if (group := _group) and group.leave and stops():
        group.leave()


def _agree(group):
    """Finds the call of `stops` at which all stop: one that no process has made yet."""
    if not group.agreeing:
        group.lock.acquire()  # until all have said how many they have made, over several looks of `_watch`
        group.agreeing = True
    group.client.key_value_set(f"{FOLDER}looks/{group.index}", str(group.looks), allow_overwrite=True)
    said = group.client.key_value_dir_get(f"{FOLDER}looks/")
    if len(said) == group.count:
        group.stop_at = max(int(looks) for _, looks in said) + 1
        group.lock.release()


# Signs of life, and how processes end


class _Others:
    """What command.py knows of the other processes."""

    def ending(self, message, code):
        """This process ends: all others end with the same code."""
        group = _group
        if group and not group.leaving:
            group.leaving = True
            record = json.dumps({"host": group.index, "message": str(message), "code": code})
            said: list[bool] = []

            def say():
                with contextlib.suppress(Exception):
                    group.client.key_value_set(f"{FOLDER}end/{group.index}", record)
                said.append(True)

            try:  # without `threading`: in a handler, a lock of it may be held by what it interrupts
                _thread.start_new_thread(say, ())
            except RuntimeError:  # Python ends, and has no new threads; the others find out
                return
            until = time.monotonic() + LAST
            while not said and time.monotonic() < until:  # over a link that was cut, it does not return
                time.sleep(0.01)

    def cause(self, error):
        """Ends the process where the error is that another one has ended; returns where it is not."""
        import jax

        if _group and isinstance(error, jax.errors.JaxRuntimeError) and not command.out_of_memory(error):
            time.sleep(_group.lost + 5)  # `_watch` finds out, and ends this process


def _beat():
    assert _group is not None
    _group.client.key_value_set(f"{FOLDER}life/{_group.index}", str(time.time()), allow_overwrite=True)


def _watch():
    """Gives signs of life, and ends the process where another one has ended or gives none."""
    group = _group
    assert group is not None
    seen: dict[str, tuple[str, float]] = {}  # the last sign of each host, and when it came
    while not group.leaving:
        now = time.monotonic()
        try:
            _beat()
            keys = dict(group.client.key_value_dir_get(f"{FOLDER}life/"))
            ends = group.client.key_value_dir_get(f"{FOLDER}end/")
            stop = group.stop_at is None and group.client.key_value_dir_get(f"{FOLDER}stop/")
            group.silent = 0.0
            if stop:
                _agree(group)
        except Exception:  # `_watch_service` knows how long
            time.sleep(POLL)
            continue
        for _, record in ends:
            end = json.loads(record)
            _end(group, end["host"], end["message"], end["code"])
        for key, sign in keys.items():
            if seen.get(key, ("", 0.0))[0] != sign:
                seen[key] = sign, now
            elif now - seen[key][1] > group.lost:
                host = int(key.rsplit("/", 1)[1])
                _end(group, host, f"no sign of life for {group.lost} s; {AGAIN}", STOPPED)
        time.sleep(POLL)


def _watch_service():
    """Ends the process where the service does not answer. `_watch` may wait for it: a link that was cut says nothing.

    It counts its own steps, so that a machine that was asleep first hears the others again.
    """
    group = _group
    assert group is not None
    while not group.leaving:
        group.silent += POLL
        if group.silent > group.lost:
            _end(group, 0, f"{group.address} does not answer any more; {AGAIN}", STOPPED)
        time.sleep(POLL)


def _end(group, host, message, code):
    """Ends this process as another one has ended."""
    if group.leaving:
        return
    group.leaving = True
    command.end(f"host {host}: {message}", code)


def _leave():
    """Waits at the end of the program for the others, and gives signs of life until then."""
    wait("end")
    if _group:
        _group.leaving = True


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
