"""One member of a hivemind averaging group, for tests.bench.round: averages a vector a few times and prints how long each took.

    python tests/bench/rival_hivemind.py NUM_PARAMS NUM_PEERS NUM_ROUNDS INDEX HOST_ADDRESS [INITIAL_PEER]

The first member prints its DHT address; all begin a round at the same full second.
"""

from __future__ import annotations

import json
import sys
import time

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import Float16Compression

ROUND_TIMEOUT_S = 300.0


def main() -> None:
    num_params, num_peers, num_rounds, index = map(int, sys.argv[1:5])
    address, initial = sys.argv[5], sys.argv[6:]
    torch.set_num_threads(1)
    dht = hivemind.DHT(initial_peers=initial, host_maddrs=[f"/ip4/{address}/tcp/0"], start=True)
    print(json.dumps({"maddr": str(dht.get_visible_maddrs()[0])}), flush=True)
    values = torch.randn(num_params, generator=torch.Generator().manual_seed(index))
    averager = DecentralizedAverager(
        [values], dht=dht, prefix="bench", target_group_size=num_peers, min_group_size=num_peers, compression=Float16Compression(),
        min_matchmaking_time=2.0, request_timeout=2.0, start=True,
    )  # fmt: skip
    sys.stdin.readline()  # everybody is here
    durations = []
    for _ in range(num_rounds):
        while time.time() % 1.0 > 0.05:
            time.sleep(0.005)
        start = time.perf_counter()
        group = averager.step(timeout=ROUND_TIMEOUT_S)
        durations.append(time.perf_counter() - start if group is not None and len(group) == num_peers else None)
    print(json.dumps({"durations_s": durations}), flush=True)
    sys.stdin.readline()  # the CPU times of a process are read while it lives
    averager.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    main()
