"""The netbox: ranks on hosts of their own with a link between them, and nothing left behind on any way out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import netbox as boxes
import pytest
import torch
import torch.distributed as dist
from moefx.codegen.all_to_all import Topology, make_all_to_all
from ranks import RankError

MEGABYTE = 1_000_000


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest):
    yield
    if "netbox" in request.fixturenames:
        assert not left_by(os.getpid())


def left_by(process: int) -> list[str]:
    return [path.name for path in boxes.NAMESPACES.glob(f"{boxes.PREFIX}-{process}-*")]


def sent_bytes(interface: str) -> int:
    """What this network namespace has sent on an interface."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise AssertionError(f"no interface {interface}")


def send_a_megabyte(source: int, target: int) -> dict[str, int]:
    """How much more eth0 and lo have sent after a message from one rank to another."""
    message = torch.zeros(MEGABYTE, dtype=torch.uint8)
    dist.barrier()
    before = {name: sent_bytes(name) for name in ("eth0", "lo")}
    if dist.get_rank() == source:
        dist.send(message, target)
    if dist.get_rank() == target:
        dist.recv(message, source)
    dist.barrier()
    return {name: sent_bytes(name) - before[name] for name in before}


def test_ranks_of_a_host_talk_inside_it_and_others_over_the_link(netbox) -> None:
    with netbox(hosts=2, ranks_per_host=2) as box:
        near, far = box.run(send_a_megabyte, 0, 1)[0], box.run(send_a_megabyte, 0, 2)[0]
    assert near["lo"] > MEGABYTE > 10 * near["eth0"]
    assert far["eth0"] > MEGABYTE > 10 * far["lo"]


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_the_links_are_limited(netbox, hosts: int) -> None:
    with netbox(hosts=hosts, inter_rate="123mbit") as box:
        for host in range(hosts):
            process = box.start(["tc", "qdisc", "show", "dev", "eth0"], host)
            assert "tbf" in (text := process.communicate()[0]) and "rate 123Mbit" in text
        assert box.run(dist.get_rank) == list(range(hosts))
    with netbox(hosts=hosts, inter_rate=None, intra_rate="77mbit") as box:
        assert "tbf" not in box.start(["tc", "qdisc", "show", "dev", "eth0"], 0).communicate()[0]
        assert "rate 77Mbit" in box.start(["tc", "qdisc", "show", "dev", "lo"], 0).communicate()[0]


def exchange(name: str) -> tuple[tuple[int, ...], list[float]]:
    group = dist.distributed_c10d._get_default_group()
    topology = Topology.discover(group)
    send = torch.arange(4.0)[:, None] + 10 * dist.get_rank()
    return topology.nodes, make_all_to_all(name, group, topology).start(
        send, [1] * 4, [1] * 4
    ).wait().flatten().tolist()


@pytest.mark.parametrize("name", ["direct", "hierarchical", "pipe"])
def test_all_to_alls_find_out_who_shares_a_host(netbox, name: str) -> None:
    with netbox(hosts=2, ranks_per_host=2) as box:
        for rank, (nodes, rows) in enumerate(box.run(exchange, name)):
            assert nodes == (0, 0, 1, 1) and rows == [rank, 10 + rank, 20 + rank, 30 + rank]


def test_torchrun_on_every_host(netbox, tmp_path: Path) -> None:
    script = tmp_path / "sum.py"
    script.write_text(
        textwrap.dedent("""
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        x = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(x)
        # One write a rank: ranks share the pipe, and print writes piece by piece where output is unbuffered.
        os.write(1, f"sum {x.item()} on {os.environ['GROUP_RANK']}\\n".encode())
        dist.destroy_process_group()
        """)
    )
    with netbox(hosts=2, ranks_per_host=2) as box:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
        command += ["--master-addr", box.address(0), "--master-port", str(boxes.PORT)]
        processes = [box.start([*command, f"--node-rank={host}", str(script)], host) for host in range(2)]
        for host, process in enumerate(processes):
            text, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert text.count(f"sum 6.0 on {host}") == 2


def test_a_limited_host_passes_large_messages(netbox) -> None:
    with netbox(hosts=2, ranks_per_host=2, inter_rate="100mbit", intra_rate="100mbit") as box:
        near = box.run(send_a_megabyte, 0, 1, group_timeout_s=20)[0]
    assert near["lo"] > MEGABYTE


def test_boxes_side_by_side(netbox) -> None:
    with netbox() as one, netbox() as other:
        assert not set(one.namespaces) & set(other.namespaces)
        assert one.run(dist.get_world_size) == other.run(dist.get_world_size) == [2, 2]


# ------------------------------------------------------------------------------------------------ every way out


def crash(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def test_a_rank_that_crashes(netbox) -> None:
    with pytest.raises(RankError, match="rank 1: died"), netbox() as box:
        box.run(crash, 1)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exceptions(netbox, error: type[BaseException]) -> None:
    with pytest.raises(error), netbox() as box:
        process = box.start(["sleep", "600"], 1)
        assert left_by(os.getpid())
        raise error
    assert process.returncode == -signal.SIGKILL


def test_the_bucket_holds_a_millisecond_and_a_packet() -> None:
    assert [boxes.bucket(rate) for rate in ("10kbit", "200mbit", "1gbit", "1.6gbit")] == ["66000", "66000", "125000", "200000"]
    assert int(boxes.bucket("3bit")) > boxes.MTU  # of what is not understood too


def test_half_a_box(netbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure while it is built."""
    with pytest.raises(subprocess.CalledProcessError), netbox(inter_rate="much"):
        raise AssertionError("it came up")


PROGRAM = """
import os, sys, time
sys.path[:0] = {paths!r}
from netbox import netbox
context = netbox()
box = context.__enter__()
inside = box.start(["sleep", "600"], 0)
while not os.popen(f"ip netns pids {{box.namespaces[0]}}").read():
    time.sleep(0.01)
print(inside.pid, flush=True)
{then}
"""


def program(then: str) -> subprocess.Popen[str]:
    """A process with an open box and a program in it, whose number it has printed. It hears of SIGINT, which whatever runs the
    tests in the background has been told to ignore."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(paths=paths, then=then)], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "exit"])
def test_the_end_of_the_process(netbox, way: str) -> None:
    process = program("sys.exit(0)" if way == "exit" else "time.sleep(600)")
    assert process.stdout is not None
    inside = int(process.stdout.readline())
    if way != "exit":
        process.send_signal(signal.Signals[way])
    process.wait(timeout=60)
    assert not left_by(process.pid) and gone(inside)


def test_what_a_killed_process_leaves_is_swept_by_the_next_box(netbox) -> None:
    process = program("time.sleep(600)")
    assert process.stdout is not None
    inside = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert len(left_by(process.pid)) == 2 and not gone(inside)
    with netbox():
        assert not left_by(process.pid) and gone(inside)


# ------------------------------------------------------------------------------------------------ where it cannot be


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = boxes.why_not.__wrapped__
    with monkeypatch.context() as without:
        without.setattr(shutil, "which", lambda tool: None if tool == "tc" else tool)
        assert reason() == "a netbox needs tc: apt-get install iproute2"
    with monkeypatch.context() as without:
        without.setattr(shutil, "which", lambda tool: tool)
        without.setattr(os, "geteuid", lambda: 1000)
        assert reason() == "a netbox needs root, for network namespaces"
    with monkeypatch.context() as without:

        def refuse(*arguments: str) -> None:
            raise subprocess.CalledProcessError(1, arguments, stderr="Operation not permitted\n")

        without.setattr(shutil, "which", lambda tool: tool)
        without.setattr(os, "geteuid", lambda: 0)
        without.setattr(boxes, "command", refuse)
        assert reason().startswith("no netbox on this kernel: ip netns add") and reason().endswith("not permitted")
