"""Who may be a member of a run, and what the averaging service knows of each. Pure values; every refusal says what to do.

What the ledger says is decided in ``rounds``; here are the rules by which somebody at the door is let in or not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from decentra.config import Manifest
from decentra.errors import AlreadyHere, ConfigError, NotAMember, Refused
from decentra.ids import PeerId, short
from decentra.protocol import placement
from decentra.protocol.messages import Counters, Hello, Role

PLACE_KEPT_S = 86_400.0  # an absent member's place is given away after this
Members = Mapping[PeerId, "Member"]


@dataclass(frozen=True, slots=True)
class Member:
    """One admitted peer."""

    peer: PeerId
    role: Role
    name: str
    experts: tuple[int, ...] = ()
    insists: bool = False  # on its experts or their number: it is given no others
    may_reduce: bool = True
    is_partial: bool = False  # holds only the experts it trains
    max_experts: int | None = None  # more do not fit into its machine
    addresses: tuple[str, ...] = ()
    nonce: str = ""
    heard_at: float = 0.0
    is_live: bool = False
    quarantined_until: int = 0  # height of the trunk
    num_quarantines: int = 0
    why_quarantined: str = ""
    has_greeted: bool = False  # said Hello since the service started
    counters: Counters = field(default_factory=Counters)


def check_admissible(
    manifest: Manifest, members: Members, revoked: Collection[str], token_uses: Mapping[str, Collection[PeerId]], peer: PeerId, role: Role,
    token: str | None, most_uses: int, now: float,
) -> None:  # fmt: skip
    """Raise Refused for somebody who may not come in: revoked, without a token that has a use left, or one too many."""
    if peer in revoked:
        raise Refused(f"the organiser revoked {short(peer)}")
    is_new = peer not in members and role is not Role.WATCHER
    is_host = token == f"host-{peer}"  # the service's own keeper; an invite's token is 16 hex characters
    if manifest.admission.mode == "invited":
        if token is None:
            raise Refused("this run admits invited peers only; ask its organiser for an invite")
        if token in revoked:
            raise Refused("the organiser revoked this invite; ask for a new one")
        if is_new and len(token_uses.get(token, ())) >= most_uses:
            raise Refused(f"this invite is used up ({most_uses} of {most_uses} peers); ask for a new one")
    if is_new and not is_host and num_counted(members, revoked, now) >= manifest.admission.max_members:
        raise Refused(f"the run is full: {manifest.admission.max_members} members")


def num_counted(members: Members, revoked: Collection[str], now: float) -> int:
    """Members that take up a place: here, or here within the last day."""
    return sum(m.peer not in revoked and (m.is_live or now - m.heard_at < PLACE_KEPT_S) for m in members.values())


def check_alone(manifest: Manifest, known: Member, nonce: str, now: float) -> None:
    """Raise AlreadyHere while another process with the same identity is heard of."""
    patience_s = manifest.rounds.heartbeat_s * 2
    if known.is_live and known.nonce and known.nonce != nonce and now - known.heard_at < patience_s:
        raise AlreadyHere(
            f"identity {short(known.peer)} is in use by a running process ({known.name}); every machine needs a state directory of its own"
            f" (a copied key file shows like this). If the old process was killed, this clears by itself in {patience_s:g} s"
        )


def check_role(known: Member, role: Role) -> None:
    if known.role is not role:
        raise Refused(f"{short(known.peer)} is a {known.role} of this run and asks to be a {role}; use another --name or --dir")


def check_hello(manifest: Manifest, members: Members, revoked: Collection[str], hello: Hello, now: float) -> None:
    """Raise Refused for a Hello that cannot be taken."""
    member = members.get(hello.peer)
    if member is None or hello.peer in revoked:
        raise NotAMember(f"{short(hello.peer)} is not a member of this run; join with an invite")
    if member.role is not hello.role:
        raise Refused(f"{short(hello.peer)} was admitted as {member.role}, not as {hello.role}")
    is_copy = member.nonce and member.nonce != hello.nonce
    if is_copy and member.is_live and member.has_greeted and now - member.heard_at < manifest.rounds.heartbeat_s * 2:
        raise AlreadyHere(
            f"identity {short(hello.peer)} is in use by another running process; every machine needs a state directory of its own"
        )
    if hello.experts is not None:
        try:
            placement.check_experts(hello.experts, manifest.model.num_experts, manifest.placement.frozen_experts)
        except ConfigError as error:
            raise Refused(str(error)) from None
