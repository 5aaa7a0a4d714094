"""The node starts and ends clean, and comes back from a dead daemon, a dead bootstrap node and a taken port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import uvloop
from gossip_world import LOOPBACK, RUN, Recorder, World, eventually, fetch, world

from decentra.errors import ConfigError, PortTaken, Unreachable
from decentra.gossip import records
from decentra.gossip.address import claim_ports
from decentra.gossip.bootstrap import run_bootstrap
from decentra.gossip.daemon import SocketDir
from decentra.gossip.node import GossipNode
from decentra.identity import load_key, load_or_create_key
from decentra.ids import digest_of


def stray_sockets() -> set[Path]:
    """Where hivemind would put them by itself."""
    return set(Path("/tmp").glob("hivemind-*"))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_start_and_close_leave_nothing(tmp_path: Path, run: object) -> None:
    before = stray_sockets()

    async def main() -> tuple[tuple[int, int], list[Path]]:
        async with world(tmp_path) as w:
            first = await w.node("first")
            second = await w.node("second", initial_peers=first.addresses)
            pids = first.daemon.pid, second.daemon.pid
            assert all(map(is_running, pids))
            assert first.peer_id == load_key(w.key_file("first")).peer_id
            assert [a.rsplit("/", 1)[1] for a in first.addresses] == [first.peer_id]
            assert "/tcp/0" not in first.addresses[0]
            assert second.peer_id in await first.connected()
            # Ctrl-C in a terminal goes to our session; p2pd has its own
            assert os.getsid(pids[0]) == pids[0] != os.getsid(0)
            folders = [first.daemon._sockets.path, second.daemon._sockets.path]
            assert all(len(list(folder.glob("*.sock"))) >= 1 for folder in folders)
            await second.close()
            await second.close()
        return pids, folders

    pids, folders = run(main())  # type: ignore[operator]
    assert not any(map(is_running, pids))
    assert not any(folder.exists() for folder in folders)
    assert stray_sockets() == before


def test_a_peer_that_listens_nowhere_is_a_dht_client(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            quiet = await w.node("quiet", listen=(), initial_peers=first.addresses)
            assert quiet.addresses == ()
            assert quiet.is_client
            assert quiet.is_attached
            listening = [c for c in psutil.Process(quiet.daemon.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
            assert listening == []
            key = records.service_key(RUN)
            assert await records.publish(quiet, key, b"from behind a router", 60)
            assert await records.lookup(first, key) == [(quiet.peer_id, b"from behind a router")]

    asyncio.run(main())


def test_a_killed_daemon_comes_back_with_its_port_handlers_and_records(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            events = Recorder()
            first = await w.node("first", events=events)
            second = await w.node("second", initial_peers=first.addresses)
            serving, asking = await w.exchange(first), await w.exchange(second)
            data = b"weights" * 1000
            digest = digest_of(data)
            await serving.put(digest, data)
            key = records.service_key(RUN)
            await records.publish(first, key, b"here", 60)
            addresses, pid = first.addresses, first.daemon.pid
            os.kill(pid, signal.SIGKILL)
            died = await events.seen("p2p-died")
            assert "signal 9" in died["why"]
            await events.seen("p2p-restarted")
            assert first.daemon.pid != pid
            assert first.addresses == addresses

            async def is_served() -> bool:
                try:
                    return await fetch(asking, first, digest) == data
                except Unreachable:
                    asking._dialer._unreachable_until.clear()
                    return False

            await eventually(is_served, 20, "the blob is served again")
            assert await records.lookup(second, key) == [(first.peer_id, b"here")]

    asyncio.run(main())


def test_a_frozen_daemon_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            events = Recorder()
            node = await w.node("first", events=events)
            pid = node.daemon.pid
            os.kill(pid, signal.SIGSTOP)
            died = await events.seen("p2p-died")
            assert "did not answer" in died["why"]
            await events.seen("p2p-restarted")
            assert node.daemon.pid != pid
            assert not is_running(pid)

    asyncio.run(main())


def test_bootstrap_down_at_start_is_said_and_attached_when_it_comes_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            (listen,) = claim_ports(LOOPBACK)
            address = f"{listen}/p2p/{load_key(w.key_file('late')).peer_id}"
            events = Recorder()
            node = await w.node("early", initial_peers=[address], events=events)
            waiting = await events.seen("bootstrap-waiting")
            assert f"bootstrap {address} does not answer, trying again in " in waiting["why"]
            assert not node.is_attached
            with pytest.raises(Unreachable, match="check the address"):
                await node.wait_attached(0.1)
            late = await w.node("late", listen=[listen])
            await node.wait_attached(20)
            await events.seen("bootstrap-attached")
            key = records.service_key(RUN)
            await records.publish(late, key, b"up", 60)
            assert await records.lookup(node, key) == [(late.peer_id, b"up")]
            await late.close()
            num_said = len(events.named("bootstrap-waiting"))
            await eventually(lambda: len(events.named("bootstrap-waiting")) > num_said, 20, "the loss is said")

    asyncio.run(main())


def test_known_peers_replace_a_dead_bootstrap(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            second = await w.node("second", initial_peers=first.addresses)
            third = await w.node("third", initial_peers=first.addresses)
            await third.connect(second.peer_id, second.addresses, 5)
            known = third.known_peers()
            assert set(known) == {*first.addresses, *second.addresses}
            bootstrap = first.addresses
            await third.close()
            await first.close()
            again = await w.node("third", initial_peers=bootstrap, known_peers=known)
            assert again.is_attached
            assert second.peer_id in await again.connected()

    asyncio.run(main())


def test_a_third_peer_is_found_by_id_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            first = await w.node("first")
            second = await w.node("second", initial_peers=first.addresses)
            third = await w.node("third", initial_peers=first.addresses)
            await third.connect(second.peer_id, (), 5)
            assert second.peer_id in await third.connected()

    asyncio.run(main())


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    async def main(w: World, listen: str, port: int) -> None:
        with pytest.raises(PortTaken, match=f"port {port} .*in use.*/tcp/0"):
            await w.node("late", listen=[listen])
        node = await w.node("other")
        with pytest.raises(PortTaken, match="in use"):
            await w.node("late", listen=[node.addresses[0].split("/p2p/")[0]])

    async def run_all() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            async with world(tmp_path) as w:
                await main(w, f"/ip4/127.0.0.1/tcp/{port}", port)

    asyncio.run(run_all())


def test_wrong_input_is_a_config_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            for bad in ({"listen": ["/ip4/127.0.0.1/udp/0/quic-v1"]}, {"initial_peers": ["/ip4/127.0.0.1/tcp/7410"]}):
                with pytest.raises(ConfigError):
                    await w.node("first", **bad)
            with pytest.raises(ConfigError, match="key file"):
                await GossipNode.start(tmp_path / "missing.key", listen=(), events=Recorder())
            with pytest.raises(ConfigError, match="their port"):
                await GossipNode.start(w.key_file("first"), listen=LOOPBACK, announce=["/ip4/1.2.3.4/tcp/0"], events=Recorder())

    asyncio.run(main())


def test_announced_addresses_replace_the_visible_ones(tmp_path: Path) -> None:
    async def main() -> None:
        announce = ["/ip4/203.0.113.7/tcp/7410", "/dns4/swarm.example.org/tcp/7410"]
        events = Recorder()
        node = await run_bootstrap(tmp_path / "boot.key", LOOPBACK, announce, events)
        try:
            assert node.addresses == tuple(f"{a}/p2p/{node.peer_id}" for a in announce)
            assert events.named("bootstrap-listening")[0]["addresses"] == node.addresses
        finally:
            await node.close()
        with pytest.raises(ConfigError, match="has to listen"):
            await run_bootstrap(tmp_path / "boot.key", (), (), events)

    asyncio.run(main())


SCRIPT = """
import asyncio, sys
from pathlib import Path
from decentra.gossip.node import GossipNode
class Silent:
    def emit(self, event, **fields): pass
async def main():
    node = await GossipNode.start(Path(sys.argv[1]), listen=["/ip4/127.0.0.1/tcp/0"], events=Silent())
    print(node.daemon.pid, node.daemon._sockets.path, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_p2pd_ends_by_itself_after_kill_9_and_its_sockets_are_swept(tmp_path: Path) -> None:
    load_or_create_key(tmp_path / "victim.key")
    victim = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "victim.key")], stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdout is not None
        pid_text, folder_text = victim.stdout.readline().split()
        pid, folder = int(pid_text), Path(folder_text)
        assert is_running(pid)
        SocketDir().close()
        assert folder.is_dir(), "a living node's sockets are not swept"
    finally:
        victim.kill()
        victim.communicate()
    asyncio.run(eventually(lambda: not is_running(pid), 15, "p2pd ends when its owner is killed"))
    SocketDir().close()
    assert not folder.exists()
