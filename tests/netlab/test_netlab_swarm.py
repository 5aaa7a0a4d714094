"""Real ``decentra`` processes on hosts that cannot all reach each other: homes behind routers, a cut cable, a restarted organiser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from crew import ORGANISER, Crew, tales_of
from lab import KernelLab, left_over, why_impossible

WHY_NOT = why_impossible(needs_filter=True)
pytestmark = [
    pytest.mark.netlab, pytest.mark.slow, pytest.mark.timeout(170), pytest.mark.skipif(WHY_NOT is not None, reason=f"no network lab: {WHY_NOT}"),
]  # fmt: skip
HOMES = ("a", "b")
SHARED = ("trunk/0", "router/0")
SLOW_FETCH_S = 4.0  # a dial into nothing takes 5


def two_homes(lab: KernelLab) -> None:
    """Only the organiser can be reached; the two homes neither accept connections nor have a route to each other."""
    lab.block(*HOMES)
    for home in HOMES:
        lab.outbound_only(home)


def check_agreement(crew: Crew, said: dict[str, dict[str, object]]) -> None:
    """Everybody ended on the anchors that the ledger confirmed, of every fragment."""
    tales = tales_of(crew.ledger())
    for name, result in said.items():
        anchors = result["anchors"]
        assert anchors == {fragment: tale.anchor for fragment, tale in tales.items()}, f"{name} ended on other anchors"


def num_shared_rounds(crew: Crew, fragment: str) -> int:
    """Rounds settled with the offers of both homes, as the host tells it."""
    return sum(event["fragment"] == fragment and event["num_offers"] == len(HOMES) for event in crew.host.events("round-settled"))


@pytest.mark.parametrize("options", [("--outbound-only",), ()], ids=["outbound-only", "listening-in-vain"])
def test_three_hosts(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Two homes contribute through the organiser alone, at the pace of rounds on a network where everybody reaches everybody."""
    with KernelLab((ORGANISER, *HOMES)) as lab:
        two_homes(lab)
        with Crew(lab, tmp_path) as crew:
            invite = crew.start_host()
            for home in HOMES:
                crew.join(home, invite, *options)
            crew.until(lambda: num_shared_rounds(crew, "trunk/0") >= 6, 90, "6 rounds of the trunk have the offers of both homes")
            crew.stop_run()
            said = crew.until_over(30)
            check_agreement(crew, said)
            both = {str(result["peer"]) for result in said.values()}
            tales = tales_of(crew.ledger())
            for fragment in SHARED:
                together = [number for number, peers in tales[fragment].contributors.items() if peers == both]
                assert len(together) >= 3, f"{fragment}: {tales[fragment].contributors}"
            slowest_s = max(event["seconds"] for child in crew.children() for event in child.events("fetched"))
            assert slowest_s < SLOW_FETCH_S, "a fetch waited for a peer that cannot be reached"
        assert {host: lab.pids(host) for host in lab.hosts} == {host: [] for host in lab.hosts}
    assert left_over(os.getpid()) == []
