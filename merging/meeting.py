"""How the processes that a launcher started find each other: the launcher's store tells where the first one listens."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import struct
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from common.errors import FailureError
from merging.company import Company

JOIN = 600.0
"""Seconds that the processes have to find each other: machines start at different times, and read one disk."""
STUCK = 60
"""Seconds for the rest of a message that has begun."""
DOOR = "merging/door"


def meet(rank: int, count: int, local: int) -> Company:
    """Join the other processes. Raises FailureError where they do not come within JOIN seconds."""
    import torch
    from torch.distributed import rendezvous

    if "OMP_NUM_THREADS" not in os.environ:  # the launcher's way to share the cores; else each would take all
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    deadline = time.monotonic() + JOIN
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN))))
        if rank == 0:
            machines, links = _received(store, count, deadline)
        else:
            machines, links = _introduced(store, rank, deadline)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        why = " ".join(str(error).split())[:200]
        raise FailureError(
            f"The {count} processes of this run did not find each other at {where} within {JOIN / 60:.0f} minutes "
            f"({why}); start all of them, with the same address and port."
        ) from error
    return Company(rank, count, local, machines, links, keep=store)


def _received(store: Any, count: int, deadline: float) -> tuple[dict[int, str], dict[int, Connection]]:
    """Open the door and let the others in; what does not know the word is sent away."""
    word = secrets.token_hex(16)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    machines: dict[int, str] = {0: socket.gethostname()}
    links: dict[int, Connection] = {}
    with socket.create_server(("", 0), family=family, backlog=count, dualstack_ipv6=dual) as door:
        store.set(DOOR, json.dumps({"address": _own_address(), "port": door.getsockname()[1], "word": word}))
        while len(links) < count - 1:
            door.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                stranger, _ = door.accept()
            except TimeoutError:
                raise TimeoutError(f"{count - 1 - len(links)} of them did not come") from None
            try:
                link = _linked(stranger)
                hello = json.loads(link.recv_bytes(4096))
                if not hmac.compare_digest(str(hello["word"]), word):
                    raise ValueError("another word")
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                continue
            machines[hello["rank"]] = hello["machine"]
            links[hello["rank"]] = link
    for link in links.values():
        link.send_bytes(json.dumps(machines).encode())
    return machines, links


def _introduced(store: Any, rank: int, deadline: float) -> tuple[dict[int, str], dict[int, Connection]]:
    """Go to the first process and say who this is."""
    store.wait([DOOR], timedelta(seconds=JOIN))
    door = json.loads(store.get(DOOR))
    addresses = [door["address"], os.environ["MASTER_ADDR"]]
    for address in addresses:
        try:
            link = _linked(socket.create_connection((address, door["port"]), timeout=STUCK))
        except OSError:
            continue
        hello = {"rank": rank, "machine": socket.gethostname(), "word": door["word"]}
        link.send_bytes(json.dumps(hello).encode())
        if not link.poll(max(0.1, deadline - time.monotonic())):
            raise TimeoutError("some of them did not come")
        machines = json.loads(link.recv_bytes())
        return {int(number): machine for number, machine in machines.items()}, {0: link}
    raise OSError(f"the first process does not answer at {' or '.join(addresses)}, port {door['port']}")


def _own_address() -> str:
    """The address by which this machine reaches the launcher's: the one that the others reach it by."""
    name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, target = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # a datagram's: nothing is sent
        return str(probe.getsockname()[0])


def _linked(stream: socket.socket) -> Connection:
    """A socket as a connection of whole messages, none of which takes longer than STUCK seconds once begun."""
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        stream.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STUCK, 0))
    return Connection(stream.detach())
