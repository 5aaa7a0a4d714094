"""Few processes: one peer without any keeper, a bootstrap node that comes late, a service that goes away, a second keeper, private data."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from processes import Command, Lab, confirmed, ctrl_c, lab, ledger_records

from decentra.cli.rundir import RunDir
from decentra.gossip.blobs import BlobStore
from decentra.identity import load_or_create_key
from decentra.ids import Digest
from decentra.protocol import ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def averager(world: Lab, run: RunDir, port: int) -> Command:
    return world.command("averager", "averager", str(run.root), "--listen", f"127.0.0.1:{port}", "--address", "127.0.0.1", "--log-json")


def progress(peer: Command) -> int:
    """Inner steps, as the peer itself said last."""
    return max((e["step"] for e in peer.events("progress")), default=0)


def test_a_peer_alone_outlives_its_service(tmp_path: Path) -> None:
    """Bootstrap node, averaging service and one peer as three commands; the bootstrap node comes last, the service is killed and returns."""
    with lab(tmp_path) as world:
        run = world.init()
        bootstrap_port, service_port = free_port(), free_port()
        bootstrap_dir = tmp_path / "bootstrap"
        name = f"/ip4/127.0.0.1/tcp/{bootstrap_port}/p2p/{load_or_create_key(bootstrap_dir / 'identity.key').peer_id}"
        code, made, err = world.run(
            "invite", str(run.root), "--bootstrap", name, "--service", f"127.0.0.1:{service_port}", "--uses", "2", "--json"
        )
        assert code == 0, err
        invite = made["invite"]

        # nobody is there yet: the peer says so and keeps trying
        peer = world.member("join", invite, "loner", "--genesis", str(run.genesis)).start()
        world.wait_for("the peer waits for the service", lambda: peer.events("waiting"))
        service = averager(world, run, service_port).start()
        world.wait_for("the peer misses the bootstrap node", lambda: peer.events("bootstrap-waiting"))
        world.wait_for("thin rounds", lambda: service.heights().get("trunk/0", 0) >= 2)
        listen = f"/ip4/127.0.0.1/tcp/{bootstrap_port}"
        bootstrap = world.command("bootstrap", "bootstrap", "--dir", str(bootstrap_dir), "--listen", listen, "--log-json").start()
        world.wait_for("the peer found the bootstrap node", lambda: peer.events("bootstrap-attached"))
        assert bootstrap.out.strip() == name

        service.kill()
        before = confirmed(ledger_records(run, tmp_path / "ledger-1"))
        world.wait_for("the peer noticed", lambda: peer.events("service-away"))
        steps = progress(peer)
        world.wait_for(
            "it trains on without the service", lambda: progress(peer) > steps and "is away" in peer.events("progress")[-1]["state"]
        )
        service.start()
        world.wait_for("the service resumed", lambda: service.events("service-resumed"))
        height = max(h for f, _, h, _ in before if f == "trunk/0")
        world.wait_for("rounds go on", lambda: service.heights()["trunk/0"] >= height + 2)

        code, seconds = ctrl_c(peer)
        assert (code, seconds < 5.0) == (0, True), peer.tail()
        assert ctrl_c(service)[0] == 0
        assert ctrl_c(bootstrap)[0] == 0
        records = ledger_records(run, tmp_path / "ledger-2")
        after = confirmed(records)
        assert after[: len(before)] == before
        assert all(r.thin for r in records if isinstance(r, ledger.Confirmed)), "one attester is thin, and has to be called so"
        heights = [h for f, _, h, _ in after if f == "trunk/0"]
        assert heights == list(range(1, len(heights) + 1))
        # a peer may leave between its attestation and the word that it counted: the anchor is on its disk all the same
        store = BlobStore(tmp_path / "loner" / "blobs", 1 << 30)
        assert all(store.has(Digest(anchor)) for anchor in {f: a for f, _, _, a in after}.values())
        world.assert_nothing_left()


def test_private_text_a_second_keeper_and_the_model_at_home(tmp_path: Path) -> None:
    """`join --data`, `keep`, `status`, `show`, `pull`, `generate`, `eval`, `stop`; the run ends by the organiser's word and all exit 0."""
    with lab(tmp_path) as world:
        (tmp_path / "texts").mkdir()
        for number in range(3):
            (tmp_path / "texts" / f"{number}.txt").write_text(f"The {number}. letter says: all work and no play is dull.\n" * 40)
        run = world.init()
        host = world.host(run)
        invite = world.invite_of(host.start())
        peer = world.member("join", invite, "writer", "--data", str(tmp_path / "texts"), "--shared-fraction", "0").start()
        keeper = world.member("keep", invite, "second").start()
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 3)
        world.wait_for("the second keeper follows", lambda: len(keeper.events("recovered")) >= 6)

        code, shown, err = world.run("show", invite, "--json")
        assert (code, shown["run"], shown["model"]["num_experts"]) == (0, run.manifest().run_id(), 4), err
        assert "never text" in shown["leaves_your_machine"]
        code, pulled, err = world.run("pull", invite, str(tmp_path / "model"), "--json")
        assert code == 0, err
        assert pulled["heights"]["trunk/0"] >= 3
        code, text, err = world.run("generate", str(tmp_path / "model"), "The ", "--num-tokens", "8", "--json")
        assert (code, text["ok"], text["prompt"]) == (0, True, "The "), err
        code, result, err = world.run("eval", str(tmp_path / "model"), "--json")
        assert code == 0, err
        assert set(result["loss_per_domain"]) == {"code", "prose", "headers", "math"}
        code, status, _ = world.run("status", invite, "--json")
        roles = {m["name"]: m["role"] for m in status["members"]}
        assert (code, roles) == (0, {"host": "keeper", "writer": "trainer", "second": "keeper"})

        code, answer, err = world.run("stop", str(run.root), "--why", "enough for today", "--json")
        assert code == 0, err
        assert "enough for today" in answer["answer"]
        assert [c.exit_code(60) for c in (peer, keeper)] == [0, 0]
        for member in (peer, keeper):
            assert "enough for today" in member.last_json()["why"]
        newest = {f: a for f, _, _, a in confirmed(ledger_records(run, tmp_path / "ledger"))}
        assert peer.last_json()["anchors"] == keeper.last_json()["anchors"]
        assert newest.items() <= peer.last_json()["anchors"].items()

        # the host stays for those who come late: the result can still be pulled, also after a restart
        assert ctrl_c(host)[0] == 0
        world.host_again(host, run, invite)
        world.invite_of(host)
        code, late, err = world.run("pull", invite, str(tmp_path / "late"), "--json")
        assert code == 0, err
        assert newest.items() <= late["anchors"].items()
        code, refused, _ = world.run("join", invite, "--dir", str(tmp_path / "newcomer"), "--max-steps", "1", "--json")
        assert (code, "the run is over" in refused["error"]) == (4, True)
        assert ctrl_c(host)[0] == 0
        world.assert_nothing_left()
