"""A star as in SPES (arXiv 2602.11543): every peer sends its whole fp32 weights to one server, which averages and sends the mean back.

    python tests/bench/rival_star.py server NUM_PARAMS NUM_PEERS NUM_ROUNDS ADDRESS
    python tests/bench/rival_star.py peer NUM_PARAMS NUM_PEERS NUM_ROUNDS ADDRESS PORT

Bare sockets, no serialisation, no check, no disk: the least that a star can cost. The server prints its port; peers print how long each round took.
"""

from __future__ import annotations

import json
import socket
import sys
import time

import numpy as np


def receive(connection: socket.socket, values: np.ndarray) -> None:
    view = memoryview(values).cast("B")
    at = 0
    while at < len(view):
        num_bytes = connection.recv_into(view[at:])
        if not num_bytes:
            raise SystemExit("the other end is gone")
        at += num_bytes


def serve(num_params: int, num_peers: int, num_rounds: int, address: str) -> None:
    with socket.create_server((address, 0)) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        peers = [listener.accept()[0] for _ in range(num_peers)]
        values = np.empty(num_params, np.float32)
        for _ in range(num_rounds):
            total = np.zeros(num_params, np.float32)
            for peer in peers:
                receive(peer, values)
                total += values
            total /= num_peers
            for peer in peers:
                peer.sendall(memoryview(total).cast("B"))
    sys.stdin.readline()


def take_part(num_params: int, num_rounds: int, address: str, port: int) -> None:
    values, durations = np.random.default_rng(0).standard_normal(num_params).astype(np.float32), []
    with socket.create_connection((address, port), timeout=600) as server:
        for _ in range(num_rounds):
            start = time.perf_counter()
            server.sendall(memoryview(values).cast("B"))
            receive(server, values)
            durations.append(time.perf_counter() - start)
    print(json.dumps({"durations_s": durations}), flush=True)
    sys.stdin.readline()  # the CPU times of a process are read while it lives


def main() -> None:
    role, num_params, num_peers, num_rounds, address = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    if role == "server":
        serve(num_params, num_peers, num_rounds, address)
    else:
        take_part(num_params, num_rounds, address, int(sys.argv[6]))


if __name__ == "__main__":
    main()
