"""One replica group of torchft's DiLoCo, for tests.bench.round: one inner step per sync on a bare vector; prints how long each sync took.

    python tests/bench/rival_torchft.py NUM_PARAMS NUM_PEERS NUM_ROUNDS INDEX LIGHTHOUSE ADDRESS

Runs in an environment of its own with torchft 0.2.0; nothing of decentra is imported.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta

import torch
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

TIMEOUT = timedelta(seconds=300)
LAB_INTERFACE = "net0"  # of every host of a netlab.WanLab


def main() -> None:
    num_params, num_peers, num_rounds, index = map(int, sys.argv[1:5])
    lighthouse, address = sys.argv[5], sys.argv[6]
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if address.startswith("127.") else LAB_INTERFACE  # gloo listens on 127.0.0.1 else
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1", "TORCHFT_LIGHTHOUSE": lighthouse}
    store = torch.distributed.TCPStore(address, port, is_master=True, wait_for_workers=False)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, num_params, bias=False)
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT), min_replica_size=num_peers, load_state_dict=lambda state: None, state_dict=dict,
        use_async_quorum=False, replica_id=f"bench_{index}_", timeout=TIMEOUT, quorum_timeout=TIMEOUT, connect_timeout=TIMEOUT,
        store_addr=address, store_port=port, rank=0, world_size=1, lighthouse_addr=lighthouse, hostname=address,
        init_sync=False,  # all begin with the same weights; its server of weights would be looked for at this machine's host name
    )  # fmt: skip
    durations = []
    with DiLoCo(manager, [model], inner, outer, sync_every=1, pin_memory=False):
        for _ in range(num_rounds):
            model.weight.grad = torch.full_like(model.weight, 0.1)
            before = manager.current_step()
            start = time.perf_counter()
            inner.step()
            durations.append(time.perf_counter() - start if manager.current_step() == before + 1 else None)
    print(json.dumps({"durations_s": durations}), flush=True)
    sys.stdin.readline()  # the CPU times of a process are read while it lives
    manager.shutdown()
    del store


if __name__ == "__main__":
    main()
