"""Real ``decentra`` processes on hosts that cannot all reach each other: homes behind routers, a cut cable, a restarted organiser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from crew import ORGANISER, Crew, tale_of
from lab import KernelLab, left_over, why_impossible

WHY_NOT = why_impossible(needs_filter=True)
pytestmark = [
    pytest.mark.netlab, pytest.mark.slow, pytest.mark.timeout(170), pytest.mark.skipif(WHY_NOT is not None, reason=f"no network lab: {WHY_NOT}"),
]  # fmt: skip
HOMES = ("a", "b")
SHARED = ("trunk/0", "router/0")


def two_homes(lab: KernelLab) -> None:
    """Only the organiser can be reached; the two homes neither accept connections nor have a route to each other."""
    lab.block(*HOMES)
    for home in HOMES:
        lab.outbound_only(home)


def check_agreement(crew: Crew, said: dict[str, dict[str, object]]) -> None:
    """Everybody ended on the anchors that the ledger confirmed, of every fragment."""
    records = crew.ledger()
    for name, result in said.items():
        anchors = result["anchors"]
        assert isinstance(anchors, dict)
        for fragment, anchor in anchors.items():
            assert anchor == tale_of(records, fragment).anchor, f"{name} ended on another anchor of {fragment}"


@pytest.mark.parametrize("options", [("--outbound-only",), ()], ids=["outbound-only", "listening-in-vain"])
def test_three_hosts(tmp_path: Path, options: tuple[str, ...]) -> None:
    with KernelLab((ORGANISER, *HOMES)) as lab:
        two_homes(lab)
        with Crew(lab, tmp_path, ["stop.rounds=6"]) as crew:
            invite = crew.start_host()
            for home in HOMES:
                crew.join(home, invite, *options)
            said = crew.until_over(120)
            check_agreement(crew, said)
            for fragment in SHARED:
                tale = tale_of(crew.ledger(), fragment)
                assert len(tale.contributors) >= 6
                together = {frozenset(str(result["peer"]) for result in said.values())}
                assert set(tale.contributors.values()) >= together, f"no round of {fragment} has both"
        assert {host: lab.pids(host) for host in lab.hosts} == {host: [] for host in lab.hosts}
    assert left_over(os.getpid()) == []
