"""Real ``decentra`` processes on hosts that cannot all reach each other: homes behind routers, a cut cable, a restarted organiser."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crew import ORGANISER, Crew, tales_of
from lab import KernelLab, Lab, left_over, why_impossible
from wan import Link, WanLab, why_no_wan

WHY_NOT = why_impossible(needs_filter=True)
pytestmark = [
    pytest.mark.netlab, pytest.mark.slow, pytest.mark.timeout(170), pytest.mark.skipif(WHY_NOT is not None, reason=f"no network lab: {WHY_NOT}"),
]  # fmt: skip
needs_wan = pytest.mark.skipif(why_no_wan() is not None, reason=f"no lab with slow links: {why_no_wan()}")
HOMES = ("a", "b")
SHARED = ("trunk/0", "router/0")
SLOW_FETCH_S = 5.0  # what a dial into nothing takes
CUT_S = 20.0


def two_homes(lab: Lab) -> None:
    """Only the organiser can be reached; the two homes neither accept connections nor have a route to each other."""
    lab.block(*HOMES)
    for home in HOMES:
        lab.outbound_only(home)


def one_router(lab: Lab) -> None:
    """The two homes share a router that translates their addresses: what they say of themselves is true for nobody else."""
    assert isinstance(lab, KernelLab)
    lab.masquerade(*HOMES)


def check_agreement(crew: Crew, said: dict[str, dict[str, object]]) -> None:
    """Everybody ended on the anchors that the ledger confirmed, of every fragment."""
    tales = tales_of(crew.ledger())
    for name, result in said.items():
        anchors = result["anchors"]
        assert anchors == {fragment: tale.anchor for fragment, tale in tales.items()}, f"{name} ended on other anchors"


def num_shared_rounds(crew: Crew, fragment: str) -> int:
    """Rounds settled with the offers of both homes, as the host tells it."""
    return sum(event["fragment"] == fragment and event["num_offers"] == len(HOMES) for event in crew.host.events("round-settled"))


def check_left_alone(lab: Lab) -> None:
    """No process of ours is left on any host."""
    assert {host: lab.pids(host) for host in lab.hosts} == {host: [] for host in lab.hosts}


def wired(hosts: tuple[str, ...]) -> Lab:
    return KernelLab(hosts)


def home_links(hosts: tuple[str, ...]) -> Lab:
    """30 ms each way, some jitter and loss, 20 Mbit/s: two good home links."""
    return WanLab(hosts, Link(delay_s=0.03, jitter_s=0.005, loss=0.002, rate_bytes_per_s=2.5e6))


@pytest.mark.parametrize(
    ("make_lab", "hide", "options"),
    [(wired, two_homes, ()), pytest.param(home_links, two_homes, ("--outbound-only",), marks=needs_wan), (wired, one_router, ())],
    ids=["wired-listening-in-vain", "home-links-outbound-only", "translated-addresses"],
)  # fmt: skip
def test_three_hosts(
    tmp_path: Path, make_lab: Callable[[tuple[str, ...]], Lab], hide: Callable[[Lab], None], options: tuple[str, ...]
) -> None:
    """Two homes contribute through the organiser alone, and nobody waits for a host that cannot be reached."""
    with make_lab((ORGANISER, *HOMES)) as lab:
        hide(lab)
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
        check_left_alone(lab)
    assert left_over(os.getpid()) == []


def test_partition(tmp_path: Path) -> None:
    """A peer whose cable is pulled for a while is not waited for, and comes back and contributes without anybody's help."""
    with KernelLab((ORGANISER, *HOMES)) as lab:
        two_homes(lab)
        with Crew(lab, tmp_path) as crew:
            invite = crew.start_host()
            for home in HOMES:
                crew.join(home, invite)
            crew.until(lambda: num_shared_rounds(crew, "trunk/0") >= 2, 90, "both homes contribute")
            lab.set_link("b", is_up=False)
            cut_at, num_before = time.monotonic(), crew.num_confirmed()
            crew.until(
                lambda: time.monotonic() > cut_at + CUT_S and crew.num_confirmed() >= num_before + 3,
                2 * CUT_S,
                "rounds go on without one home",
            )
            lab.set_link("b", is_up=True)
            num_shared = num_shared_rounds(crew, "trunk/0")
            crew.until(lambda: num_shared_rounds(crew, "trunk/0") >= num_shared + 2, 60, "the home that was cut off contributes again")
            crew.stop_run()
            check_agreement(crew, crew.until_over(30))
        check_left_alone(lab)
    assert left_over(os.getpid()) == []


def test_restarted_organiser(tmp_path: Path) -> None:
    """The organiser's host is killed and started again: two homes that nobody can dial find back to it, and rounds go on from the ledger."""
    with KernelLab((ORGANISER, *HOMES)) as lab:
        two_homes(lab)
        with Crew(lab, tmp_path) as crew:
            invite = crew.start_host()
            for home in HOMES:
                crew.join(home, invite, "--outbound-only")
            crew.until(lambda: num_shared_rounds(crew, "trunk/0") >= 2, 90, "both homes contribute")
            crew.host.end_now()
            num_shared, num_before = num_shared_rounds(crew, "trunk/0"), crew.num_confirmed()
            assert crew.start_host() == invite
            crew.until(lambda: num_shared_rounds(crew, "trunk/0") >= num_shared + 3, 60, "both homes contribute after the restart")
            crew.stop_run()
            check_agreement(crew, crew.until_over(30))
            tale = tales_of(crew.ledger())["trunk/0"]
            assert len(tale.contributors) >= num_before + 3, "confirmed rounds were lost in the restart"
        check_left_alone(lab)
    assert left_over(os.getpid()) == []
