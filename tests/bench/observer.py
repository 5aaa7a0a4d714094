"""Who the averaging service says is here, once a second, one JSON line each: {at_s, version, live: {name: bool}, states: {name: text}}. Reads only.

    python -m tests.bench.observer INVITE

``version`` counts changes of the membership, also those between two looks.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from decentra.cli.look import watching
from decentra.errors import DecentraError
from decentra.invite import parse_invite

PERIOD_S = 1.0


async def observe(invite: str) -> None:
    async with watching(parse_invite(invite)) as client:
        while True:
            try:
                swarm, _ = await client.status()
            except DecentraError as error:
                print(json.dumps({"at_s": time.time(), "failed": str(error)}), flush=True)
            else:
                live = {m.name: m.is_live for m in swarm.members}
                states = {m.name: m.counters.state for m in swarm.members}
                look = {"at_s": time.time(), "version": swarm.version, "live": live, "states": states}
                print(json.dumps(look), flush=True)
            await asyncio.sleep(PERIOD_S)


if __name__ == "__main__":
    asyncio.run(observe(sys.argv[1]))
