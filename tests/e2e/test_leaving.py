"""Leaving and being sent away: Ctrl-C, SIGTERM, a second Ctrl-C, revoked tokens and peers, open admission, and one peer whose loss breaks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from processes import TINY, confirmed, ctrl_c, lab, ledger_records

from decentra.cli.rundir import RunDir
from decentra.invite import Invite, parse_invite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

MODEL = Path(__file__).parents[2] / "peers" / "bring_your_own_model.py"
# The same bytes for everybody, as the manifest's hash demands; which peer breaks, and when, says its environment.
BREAKING = """
import os

_calls = 0
_whole_build = build


def build(spec, seed):
    model = _whole_build(spec, seed)
    first, last = (int(x) for x in os.environ.get("BREAK_STEPS", "-1 -1").split())

    def break_some(module, inputs, output):
        global _calls
        _calls += module.training
        if first <= _calls <= last:
            return output._replace(logits_BTV=output.logits_BTV * float("nan"))
        return output

    model.register_forward_hook(break_some)
    return model
"""


def test_every_way_to_leave(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM leave with a goodbye and exit 0; a second Ctrl-C ends at once; what a peer did is kept for its return."""
    with lab(tmp_path) as world:
        run = world.init()
        host = world.host(run)
        invite = world.invite_of(host.start())
        polite, killed, hasty = (world.member("join", invite, name).start() for name in ("polite", "killed", "hasty"))
        world.wait_for("rounds", lambda: host.heights().get("trunk/0", 0) >= 2)
        world.wait_for("all train", lambda: all(p.events("training") for p in (polite, killed, hasty)))

        code, seconds = ctrl_c(polite)
        assert (code, seconds < 5.0) == (0, True), polite.tail()
        assert polite.last_json()["why"] == "Ctrl-C"
        code, seconds = ctrl_c(killed, number=signal.SIGTERM)
        assert (code, seconds < 5.0) == (0, True), killed.tail()
        assert killed.last_json()["why"] == "SIGTERM"
        hasty.signal(signal.SIGINT)
        hasty.signal(signal.SIGINT)
        assert hasty.exit_code(30) in (0, 130)  # 0 when it had left before the second came

        # a goodbye is heard at once, not after the lease
        code, status, _ = world.run("status", invite, "--json")
        live = {m["name"]: m["is_live"] for m in status["members"]}
        assert (code, live["polite"], live["killed"]) == (0, False, False)
        steps = polite.last_json()["num_steps"]
        polite.start()
        world.wait_for("the peer resumed its checkpoint", lambda: polite.events("resumed"))
        assert polite.events("resumed")[-1]["num_steps"] == steps
        assert ctrl_c(polite)[0] == 0

        # Ctrl-C before anything has begun
        early = world.member("join", invite, "early").start()
        world.wait_for("its log or state directory", lambda: (tmp_path / "early" / "lock").exists())
        assert ctrl_c(early)[0] == 0
        code, seconds = ctrl_c(host)
        assert (code, seconds < 5.0) == (0, True), host.tail()
        world.assert_nothing_left()


def test_revoking_a_token_and_a_peer(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init()
        host = world.host(run)
        invite = world.invite_of(host.start())
        good, bad, guest = (world.member("join", invite, name).start() for name in ("good", "bad", "guest"))
        world.wait_for("all train", lambda: all(p.events("training") for p in (good, bad, guest)))
        code, answer, err = world.run("drain", str(run.root), "guest", "--json")
        assert (code, answer["ok"]) == (0, True), err
        assert guest.exit_code(60) == 0, guest.tail()
        assert guest.last_json()["why"] == "the organiser asks this peer to leave"
        code, _, err = world.run("drain", str(run.root), "nobody")
        assert code == 4
        assert "here: bad, good, host" in err
        code, answer, err = world.run("kick", str(run.root), "bad", "--json")
        assert (code, answer["ok"]) == (0, True), err
        assert bad.exit_code(60) == 4, bad.tail()
        assert "it may come again" in bad.last_json()["error"]
        bad.start()
        world.wait_for("it came again", lambda: len(bad.events("training")) == 2)
        code, status, _ = world.run("status", invite, "--json")
        peer = next(m["peer"] for m in status["members"] if m["name"] == "bad")

        code, answer, err = world.run("revoke", str(run.root), peer, "--json")
        assert (code, answer["ok"]) == (0, True), err
        assert bad.exit_code(60) == 4, bad.tail()
        assert "revoked" in bad.last_json()["error"]
        height = host.heights().get("trunk/0", 0)
        world.wait_for("the others go on", lambda: host.heights().get("trunk/0", 0) >= height + 2)
        code, made, _ = world.run("invite", str(run.root), "--uses", "5", "--json")
        assert code == 0
        code, _, err = world.run("revoke", str(run.root), made["token"], "--json")
        assert code == 0, err
        late = world.member("join", made["invite"], "late").start()
        assert late.exit_code(60) == 4
        assert "revoked this invite" in late.last_json()["error"]

        # a revocation is in the ledger: it outlives the service
        assert ctrl_c(host)[0] == 0
        world.host_again(host, run, invite)
        world.invite_of(host)
        bad.start()
        assert bad.exit_code(60) == 4
        assert "revoked" in bad.last_json()["error"]
        assert ctrl_c(good)[0] == 0
        assert ctrl_c(host)[0] == 0
        world.assert_nothing_left()


def test_open_admission_needs_no_token_and_minds_none(tmp_path: Path) -> None:
    with lab(tmp_path) as world:
        run = world.init("admission.mode=open", "stop.rounds=3")
        host = world.host(run)
        line = parse_invite(world.invite_of(host.start()))
        without = Invite(line.run_id, line.run_public, line.bootstrap, line.services).encode()
        code, shown, err = world.run("show", without, "--json")
        assert (code, shown["admission"]) == (0, "open"), err
        peers = [world.member("join", text, name) for text, name in ((without, "without"), (line.encode(), "with"))]
        for peer in peers:
            peer.start()
        assert [p.exit_code(90) for p in peers] == [0, 0]
        assert ctrl_c(host)[0] == 0
        world.assert_nothing_left()


def test_a_peer_whose_loss_breaks_skips_its_rounds_and_the_others_go_on(tmp_path: Path) -> None:
    """Own model code, pinned by hash; in one peer it gives NaN for some steps."""
    code_file = tmp_path / "model.py"
    code_file.write_text(MODEL.read_text() + BREAKING)
    settings = [part for setting in TINY for part in ("--set", setting)]
    with lab(tmp_path) as world:
        code, _, err = world.run("init", str(tmp_path / "run"), "--model-code", str(code_file), *settings, "--json")
        assert code == 0, err
        run = RunDir(tmp_path / "run")
        host = world.host(run, "--model-code", str(code_file))
        invite = world.invite_of(host.start())
        own = ("--model-code", str(code_file))
        sound, broken = world.member("join", invite, "sound", *own), world.member("join", invite, "broken", *own)
        broken.env["BREAK_STEPS"] = "30 60"
        sound.start()
        broken.start()
        world.wait_for("the broken peer sat rounds out", lambda: broken.events("round-skipped"), 90)
        assert "not finite" in broken.events("round-skipped")[0]["why"]
        height = host.heights().get("trunk/0", 0)
        world.wait_for("the others go on", lambda: host.heights().get("trunk/0", 0) >= height + 3)

        other = tmp_path / "other.py"
        other.write_text(code_file.read_text() + "# one more line\n")
        code, refused, err = world.run("join", invite, "--dir", str(tmp_path / "other"), "--model-code", str(other), "--json")
        assert (code, "model code differs" in refused["error"]) == (6, True), err
        code, refused, err = world.run("join", invite, "--dir", str(tmp_path / "none"), "--json")
        assert (code, "--model-code" in refused["error"]) == (2, True), err

        assert ctrl_c(broken)[0] == 0
        assert broken.last_json()["skipped_rounds"] >= 1
        assert ctrl_c(sound)[0] == 0
        assert ctrl_c(host)[0] == 0
        assert confirmed(ledger_records(run, tmp_path / "ledger"))
        world.assert_nothing_left()
