"""A cluster in a box: hosts with real, slow links between them, out of network namespaces on one machine.

    with netbox(hosts=2, ranks_per_host=2, inter_rate="200mbit") as box:
        results = box.run(function, *args)          # on every rank, inside a process group, as `run_ranks` does
        process = box.start(["torchrun", ...], 0)   # any program on a host

Each host is a namespace with an interface eth0, whose way out is limited to `inter_rate`; two hosts are joined directly,
others by a bridge in a namespace of its own. Ranks of a host share its namespace and talk over lo, by default as fast as
it goes. Needs root and iproute2 (`apt-get install iproute2`): `why_not` says what is missing.

Namespaces, links and processes go at the end of the `with`, on exceptions, KeyboardInterrupt, SIGTERM and at exit. What a killed
process leaves is removed by the next box. Names contain the process's id, so that boxes do not collide.
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from ranks import Place, run_ranks

PREFIX = "moefx-box"
NAMESPACES = Path("/run/netns")
PORT = 29500  # free in every new namespace
# Packets as large as they get, as network cards take them from the kernel: each wakes tbf, the kernel and the reader, on cores
# that shall compute. With packets of 9000 or 25000 bytes four messages of 128 KiB at 100 Mbit/s take 42 to 62 ms, with these 41 to
# 43, and what is computed beside them loses nothing to speak of. What tbf lets through at full speed holds one: small against
# messages.
MTU = 65_000
BUCKET_BYTES, BUCKET_S = 66_000, 1e-3
LATENCY = "200ms"  # the longest time in its queue
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}

_numbers = itertools.count()
_open: list[Netbox] = []


@cache
def why_not() -> str | None:
    """What keeps this machine from having a netbox, or None."""
    if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
        return f"a netbox needs {' and '.join(missing)}: apt-get install iproute2"
    if os.geteuid() != 0:
        return "a netbox needs root, for network namespaces"
    try:
        with netbox(hosts=3):
            return None
    except subprocess.CalledProcessError as error:
        return f"no netbox on this kernel: {' '.join(error.cmd)}: {error.stderr.strip()}"


class Netbox:
    """Hosts that are up; see `netbox`."""

    def __init__(self, hosts: int, ranks_per_host: int, inter_rate: str | None, intra_rate: str | None) -> None:
        self.hosts, self.ranks_per_host = hosts, ranks_per_host
        name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.namespaces = [f"{name}-{host}" for host in range(hosts)]
        self._bridge = f"{name}-bridge" if hosts != 2 else None
        self._rates = {"eth0": inter_rate, "lo": intra_rate}
        self._processes: list[subprocess.Popen[str]] = []

    @property
    def world(self) -> int:
        return self.hosts * self.ranks_per_host

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would set for a rank, and the interface for gloo."""
        host, local = divmod(rank, self.ranks_per_host)
        numbers = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": host, "MASTER_PORT": PORT}
        numbers |= {"WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.ranks_per_host}
        names = {"MASTER_ADDR": self.address(0), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        return {**{name: str(number) for name, number in numbers.items()}, **names}

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """`run_ranks` with the ranks on their hosts."""
        places = [
            Place(self.environment(rank), self.namespaces[rank // self.ranks_per_host]) for rank in range(self.world)
        ]
        return run_ranks(self.world, function, *args, places=places, **options)

    def start(
        self, command: Sequence[str], host: int, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a program on a host, with its output in pipes. It is killed when the box closes."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespaces[host], *command],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def open(self) -> None:
        _open.append(self)
        if self._bridge:
            ip("netns", "add", self._bridge)
            ip("-n", self._bridge, "link", "add", "bridge", "up", "type", "bridge")
        for namespace in self.namespaces:
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        if self._bridge:
            for host, namespace in enumerate(self.namespaces):
                self._join(namespace, "eth0", self._bridge, f"port{host}")
                ip("-n", self._bridge, "link", "set", f"port{host}", "up", "master", "bridge")
        else:
            self._join(self.namespaces[0], "eth0", self.namespaces[1], "eth0")
        for host, namespace in enumerate(self.namespaces):
            ip("-n", namespace, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
            for interface, rate in self._rates.items():
                if rate:
                    ip("-n", namespace, "link", "set", interface, "mtu", str(MTU))
                    limit = ("root", "tbf", "rate", rate, "burst", bucket(rate), "latency", LATENCY)
                    command("tc", "-n", namespace, "qdisc", "add", "dev", interface, *limit)

    @staticmethod
    def _join(namespace: str, interface: str, other: str, its: str) -> None:
        ip("link", "add", interface, "netns", namespace, "type", "veth", "peer", "name", its, "netns", other)

    def close(self) -> None:
        """Everything goes; what is gone already does not matter."""
        for process in self._processes:
            process.kill()
            process.communicate()
        for namespace in [*self.namespaces, *([self._bridge] if self._bridge else [])]:
            remove(namespace)
        if self in _open:
            _open.remove(self)


@contextmanager
def netbox(
    hosts: int = 2, ranks_per_host: int = 1, inter_rate: str | None = "200mbit", intra_rate: str | None = None
) -> Iterator[Netbox]:
    """A box of hosts. inter_rate: bits a second out of each host, as `tc` writes it ("200mbit"); None: no limit.

    intra_rate: bits a second of all that the ranks of a host send each other.
    """
    sweep()
    box = Netbox(hosts, ranks_per_host, inter_rate, intra_rate)
    with _terminated_in_order():
        try:
            box.open()
            yield box
        finally:
            box.close()


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM raises SystemExit here, so that every `finally` runs; where it is handled otherwise, that is kept."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if default:
            signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: signals do not come here
        default = False
    try:
        yield
    finally:
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@atexit.register
def close_all() -> None:
    for box in list(_open):
        box.close()


def bucket(rate: str) -> str:
    """Bytes of tbf's bucket for a rate such as "200mbit"; larger packets than that never pass."""
    known = re.fullmatch(r"([\d.]+)(kbit|mbit|gbit)", rate)  # what else tc takes gets the least
    bits = float(known[1]) * UNITS[known[2]] if known else 0.0
    return str(round(max(BUCKET_BYTES, BUCKET_S * bits / 8)))


def sweep() -> None:
    """Remove what processes that are gone have left."""
    for path in NAMESPACES.glob(f"{PREFIX}-*"):
        owner = re.match(rf"{PREFIX}-(\d+)-", path.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            remove(path.name)


def remove(namespace: str) -> None:
    """Kill what still runs in a namespace, all of it started by its box, and delete it. Its links go with it."""
    if not (NAMESPACES / namespace).exists():
        return
    inside = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for process in map(int, inside.stdout.split()):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    command("ip", *arguments)


def command(*arguments: str) -> None:
    """Run it; CalledProcessError has what it wrote."""
    subprocess.run(arguments, check=True, capture_output=True, text=True)
