"""Links slower than loopback: the kernel's netem between two network namespaces where it can be had, else a relay.

netem needs Linux with the module sch_netem, iproute2 and root: services listen at one end of a pair of virtual cards, the client runs in a
namespace of its own at the other, both ends delay by half a round trip and pace. The relay needs nothing; it ends TCP on loopback.
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.relay import echo_server, relayed, round_trips, throughput
from protocol.errors import InputError, PeerError
from protocol.links import LINKS, Link

EMULATIONS = ("auto", "netem", "relay")
NETWORK = ipaddress.IPv4Network("10.83.0.0/16")
"""Every emulated link has four of these addresses, chosen by the process."""
PROBE_S = 2.0
"""How long a probe of the throughput takes."""
QUEUED_PACKETS = 100_000
"""No packet is lost for want of room: netem's own limit of 1,000 is below what a fast sender has under way."""


@dataclass(frozen=True)
class Way:
    """How a client reaches services on this machine over a link.

    emulation: "netem", "relay", or "" for loopback itself. host: the address that services listen at. prefix: what goes before a command
    that is to run at the client's end.
    """

    link: Link
    emulation: str = ""
    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()

    @contextmanager
    def to(self, target: str) -> Iterator[str]:
        """The address at which a client reaches `target`, "host:port"."""
        if self.emulation == "relay":
            with relayed(target, self.link) as address:
                yield address
        else:
            yield target


@contextmanager
def emulated(link: Link, how: str = "auto") -> Iterator[Way]:
    """The link, set up. how: of EMULATIONS. Raises InputError."""
    if link.rtt_s == 0 and link.bits_per_s == 0:
        yield Way(link)
    elif choose_emulation(how) == "relay":
        yield Way(link, "relay")
    else:
        with _namespace(link) as way:
            yield way


def check_emulation(how: str) -> None:
    """Raise InputError if `how` is unknown, needed or not."""
    if how not in EMULATIONS:
        raise InputError(f"unknown emulation {how!r}", f"known are {', '.join(EMULATIONS)}")


def choose_emulation(how: str) -> str:
    """"netem" or "relay"; "auto" takes netem if it works here. Raises InputError if `how` is unknown or cannot be used."""
    check_emulation(how)
    if how == "netem" and not netem_works():
        raise InputError("netem cannot be used here", "it needs Linux with sch_netem, iproute2 and root; or pass --emulation relay")
    return "netem" if how != "relay" and netem_works() else "relay"


@cache
def netem_works() -> bool:
    """Whether this process may make network namespaces, and the kernel has netem; tried in a namespace that is gone afterwards."""
    name = f"relucent-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", "near", "type", "veth", "peer", "name", "far")
            _run("tc", "-n", name, "qdisc", "add", "dev", "near", "root", "netem", "delay", "1ms")
        finally:
            _run("ip", "netns", "delete", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _remove_leftovers() -> None:
    """Namespaces of processes that were killed; a virtual card goes with its namespace, and the other card with it."""
    for left in Path("/run/netns").glob("relucent-*"):
        if not Path("/proc", left.name.split("-")[1]).exists():
            with suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "delete", left.name)


@contextmanager
def _namespace(link: Link) -> Iterator[Way]:
    """A namespace for the client, joined to this one by virtual cards that behave like the link."""
    process = os.getpid()
    name, near, far = f"relucent-{process}", f"rl{process}a", f"rl{process}b"
    host, guest = (str(NETWORK[4 * (process & 0x3FFF) + i]) for i in (1, 2))
    netem = ["root", "netem", "delay", f"{1e6 * link.rtt_s / 2:.0f}us", "rate", f"{link.bits_per_s:.0f}bit", "limit", str(QUEUED_PACKETS)]
    _remove_leftovers()
    try:
        for command in (
                ["ip", "netns", "add", name], ["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name],
                ["ip", "address", "add", f"{host}/30", "dev", near], ["ip", "-n", name, "address", "add", f"{guest}/30", "dev", far],
                ["tc", "qdisc", "add", "dev", near, *netem], ["tc", "-n", name, "qdisc", "add", "dev", far, *netem],
                ["ip", "link", "set", near, "up"], ["ip", "-n", name, "link", "set", far, "up"]):
            _run(*command)
        yield Way(link, "netem", host, ("ip", "netns", "exec", name))
    except subprocess.CalledProcessError as error:
        raise PeerError(f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}") from error
    finally:
        for command in (["ip", "link", "delete", near], ["ip", "netns", "delete", name]):
            with suppress(subprocess.CalledProcessError):
                _run(*command)


def probe(address: str, name: str) -> dict[str, float]:
    """What the link to an echo server gives from here: median round trip in seconds, and bits per second."""
    link = LINKS[name]
    times = sorted(round_trips(address, 300 if link.rtt_s < 0.01 else 8))
    return {"rtt_s": times[len(times) // 2], "bits_per_s": throughput(address, int(link.bits_per_s / 8 * PROBE_S))}


def measure_link(name: str, how: str = "auto") -> None:
    """Print what an emulated link really gives, as JSON. Meant for a process of its own, which has nothing else to do."""
    with emulated(LINKS[name], how) as way, echo_server(way.host) as address, way.to(address) as through:
        if way.prefix:
            code = f"import json; from benchmarks.emulation import probe; print(json.dumps(probe({through!r}, {name!r})))"
            done = subprocess.run([*way.prefix, sys.executable, "-c", code], check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
        else:
            found = probe(through, name)
    print(json.dumps(found | {"emulation": way.emulation}))
