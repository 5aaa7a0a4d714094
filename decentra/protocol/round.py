"""One round of one fragment as a value machine: ``step(round, event, now) -> (round, effects)``. No I/O, no clock, no randomness.

The law of this file:

    open ----------> settled ----> tentative ----> confirmed
      |                 |              |
      +-> abandoned     +--> void <----+

- Only an offer for which another member of the roster has a receipt can be settled (a roster of one needs none).
- A settlement is frozen and carries every scalar; nothing after it screens, clips or weighs. With reducers it is written twice: once for them, and
  once with the packet both of them made of it, or without them (one died, was late, or they disagree): only the second is applied. A round that
  lacks receipts at its cut-off goes on without reducers, too: everybody fetches then.
- Confirmed: min(2, size of the roster at open) members attested the same digest. One attester is *thin*.
- Where holders judge, an offer to which more than two thirds of the other holders object is condemned: it is not settled, nobody waits for its sender, and
  until the cut-off the round waits for words that could still condemn one. With fewer than three holders nobody is condemned: one liar would decide.
- Suspicion removes a member from those waited for and never adds one; giving up is allowed at any time before settling (abandon) or confirming
  (void). Safety rests on every replica keeping its last confirmed anchor beside the tentative one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from decentra.bits import ONE_BITS, bits_float
from decentra.config import OuterSpec
from decentra.ids import TRUNK, Digest, FragmentId, PeerId, expert_of, module_of_fragment, short
from decentra.protocol import settling
from decentra.protocol.messages import Abstention, Attestation, Entry, Merge, Merged, Offer, Phase, Receipt, Settlement
from decentra.protocol.settling import INFINITE_BITS, MAX_OFFER_BYTES, MAX_OFFER_TOKENS

MIN_JUDGES = 2  # with one other holder a liar would decide alone

ACTIVE = frozenset({Phase.OPEN, Phase.SETTLED, Phase.TENTATIVE})


@dataclass(frozen=True, slots=True)
class Rules:
    """What the manifest says about rounds. Times are seconds."""

    cut_off_s: float
    grace_s: float
    attest_s: float
    outer: OuterSpec
    merge_s: float = 20.0
    outer_experts: OuterSpec | None = None
    is_judged: bool = False  # holders judge the packets of the trunk

    def judges(self, fragment: FragmentId) -> bool:
        """True where holders judge each other's packets by what they do to the loss."""
        return self.is_judged and module_of_fragment(fragment) == TRUNK

    def outer_of(self, fragment: FragmentId) -> OuterSpec:
        is_expert = expert_of(module_of_fragment(fragment)) is not None
        return self.outer_experts if is_expert and self.outer_experts is not None else self.outer


@dataclass(frozen=True, slots=True)
class Round:
    """State of one round. ``holders`` may offer; ``keepers`` receipt and attest only; both together are the roster."""

    fragment: FragmentId
    number: int
    height: int  # of ``base``
    base: Digest
    holders: frozenset[PeerId]
    keepers: frozenset[PeerId]
    opened_at: float
    cut_off_at: float
    phase: Phase = Phase.OPEN
    offers: tuple[Offer, ...] = ()  # sorted by peer
    receipts: frozenset[tuple[PeerId, PeerId]] = frozenset()  # (sender, holder of the packet)
    objections: frozenset[tuple[PeerId, PeerId]] = frozenset()  # (sender, holder who says that its packet does not help)
    abstained: frozenset[PeerId] = frozenset()
    suspects: frozenset[PeerId] = frozenset()
    reducers: tuple[PeerId, ...] = ()  # sorted; as the round opened
    residual: Digest | None = None  # which their merge starts with
    merges: tuple[Merge, ...] = ()
    is_plain: bool = False  # the reducers are not counted on any more
    settlement: Settlement | None = None
    settled_at: float = 0.0
    attestations: tuple[Attestation, ...] = ()  # sorted by peer
    anchor: Digest | None = None
    thin: bool = False
    why: str = ""

    @property
    def roster(self) -> frozenset[PeerId]:
        return self.holders | self.keepers

    @property
    def quorum(self) -> int:
        """Offers that settle a round at its cut-off: half the holders, at least 2, 1 for a single holder."""
        return 1 if len(self.holders) == 1 else max(2, (len(self.holders) + 1) // 2)

    @property
    def due(self) -> frozenset[PeerId]:
        """Holders whose offers the round waits for."""
        return self.holders - self.suspects - self.abstained - self.condemned.keys()

    @property
    def condemned(self) -> dict[PeerId, int]:
        """Senders to whose packets more than two thirds of the other holders object, and how many do."""
        num_judges = len(self.holders) - 1
        counts = Counter(sender for sender, _ in self.objections)
        return {sender: n for sender, n in sorted(counts.items()) if num_judges >= MIN_JUDGES and _is_most(n, num_judges)}

    def unjudged(self) -> tuple[Offer, ...]:
        """Offers that the holders who are here and have said nothing yet could still condemn."""
        num_judges = len(self.holders) - 1
        if num_judges < MIN_JUDGES:
            return ()
        found = []
        for offer in self.offers:
            judges = self.holders - {offer.peer}
            said = {judge for sender, judge in self.receipts if sender == offer.peer} & judges
            against = sum(sender == offer.peer for sender, _ in self.objections)
            if not _is_most(against, num_judges) and _is_most(against + len(judges - said - self.suspects), num_judges):
                found.append(offer)
        return tuple(found)

    @property
    def live_reducers(self) -> tuple[PeerId, ...]:
        """The reducers while all of them are here: one alone proves nothing."""
        return () if self.is_plain or self.suspects & set(self.reducers) else self.reducers

    @property
    def is_merging(self) -> bool:
        return self.settlement is not None and not self.settlement.is_final

    @property
    def num_attesters_needed(self) -> int:
        return min(2, len(self.roster))

    @property
    def is_active(self) -> bool:
        return self.phase in ACTIVE

    def offer_of(self, peer: PeerId) -> Offer | None:
        return next((o for o in self.offers if o.peer == peer), None)

    def sound_offers(self) -> tuple[Offer, ...]:
        """Offers that would survive the death of their sender: another member of the roster holds the packet."""
        if len(self.roster) == 1:
            return self.offers
        condemned, held = self.condemned, {sender for sender, holder in self.receipts if holder != sender}
        return tuple(o for o in self.offers if o.peer not in condemned and o.peer in held)


def _is_most(num_objections: int, num_judges: int) -> bool:
    """More than two thirds: of eight holders three that lie and one that errs condemn nobody, and the five that are honest condemn each of the three."""
    return 3 * num_objections > 2 * num_judges


@dataclass(frozen=True, slots=True)
class Suspected:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class Returned:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


RoundEvent = Offer | Receipt | Merge | Abstention | Attestation | Suspected | Returned | Tick


@dataclass(frozen=True, slots=True)
class Reject:
    """A member's mistake: the message changed nothing."""

    peer: PeerId
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class DidSettle:
    """Also once more, when its reducers have merged it (``proofs``: their signed words) or will not."""

    settlement: Settlement
    proofs: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class DidCondemn:
    """More than two thirds of the other holders say that this packet does not help: it is left out."""

    peer: PeerId
    why: str


@dataclass(frozen=True, slots=True)
class DidConfirm:
    anchor: Digest
    attestations: tuple[Attestation, ...]
    thin: bool
    why: str


@dataclass(frozen=True, slots=True)
class DidGiveUp:
    phase: Phase
    why: str


RoundEffect = Reject | DidSettle | DidCondemn | DidConfirm | DidGiveUp


def step(round_: Round, event: RoundEvent, now: float, rules: Rules) -> tuple[Round, tuple[RoundEffect, ...]]:
    """The round after ``event`` at ``now`` and what follows from it: time first, then the event, then the decision."""
    if not round_.is_active:
        return round_, ()
    taken, rejects = _take(round_, event, rules)
    decided, effects = _decide(taken, now, rules)
    return decided, rejects + effects


def next_deadline(round_: Round, rules: Rules) -> float | None:
    """When time alone may change the round; None when it is over."""
    if round_.phase is Phase.OPEN:
        return round_.cut_off_at
    if round_.is_merging:
        return round_.settled_at + rules.merge_s
    return round_.settled_at + attest_s(round_, rules) if round_.is_active else None


def attest_s(round_: Round, rules: Rules) -> float:
    """How long a settled round waits for attestations: longer where everybody has to fetch first what only reducers have."""
    has_to_fetch = bool(round_.reducers) and round_.settlement is not None and round_.settlement.merged is None
    return rules.attest_s + (round_.cut_off_at - round_.opened_at if has_to_fetch else 0.0)


def waits_for(round_: Round) -> str:
    """Why the round is not further, in words."""
    if round_.phase is Phase.OPEN:
        due = round_.due
        if missing := due - {o.peer for o in round_.offers}:
            return f"waits for offers of {_names(missing)} ({len(round_.offers)} of {len(due)} in)"
        sound = {o.peer for o in round_.sound_offers()} | round_.condemned.keys()
        if {o.peer for o in round_.offers} <= sound:
            return f"waits for judgement of {_names(o.peer for o in round_.unjudged())}"
        return f"waits for a second holder of the packets of {_names({o.peer for o in round_.offers} - sound)}"
    if round_.is_merging:
        unheard = set(round_.reducers) - {m.peer for m in round_.merges}
        return f"settled; waits for the merged packet of {_names(unheard)}"
    if round_.is_active:
        needed = round_.num_attesters_needed - len(round_.attestations)
        return f"settled; waits for {max(needed, 1)} more to attest"
    return round_.why


def _names(peers: Iterable[PeerId]) -> str:
    return ", ".join(sorted(short(p) for p in peers))


def _take(round_: Round, event: RoundEvent, rules: Rules) -> tuple[Round, tuple[RoundEffect, ...]]:
    match event:
        case Offer():
            return _take_offer(round_, event)
        case Receipt():
            return _take_receipt(round_, event, can_object=rules.judges(round_.fragment))
        case Merge():
            return _take_merge(round_, event)
        case Attestation():
            return _take_attestation(round_, event)
        case Abstention(peer=peer):
            if peer in round_.holders and round_.phase is Phase.OPEN:
                round_ = replace(round_, abstained=round_.abstained | {peer})
        case Suspected(peer):
            round_ = replace(round_, suspects=round_.suspects | ({peer} & round_.roster))
        case Returned(peer):
            round_ = replace(round_, suspects=round_.suspects - {peer})
    return round_, ()


def _take_offer(round_: Round, offer: Offer) -> tuple[Round, tuple[RoundEffect, ...]]:
    if (known := round_.offer_of(offer.peer)) is not None:
        if known.packet != offer.packet:
            return round_, (Reject(offer.peer, "two-digests", f"already offered {known.packet[:12]}, now {offer.packet[:12]}"),)
        return round_, ()
    if offer.peer not in round_.holders:
        return round_, (Reject(offer.peer, "not-in-roster", "only a holder in the round's roster may offer"),)
    if offer.base != round_.base:
        return round_, (Reject(offer.peer, "base", f"delta from anchor {offer.base[:12]}, the round started at {round_.base[:12]}"),)
    if round_.phase is not Phase.OPEN:
        return round_, (Reject(offer.peer, "late", f"the round is {round_.phase}"),)
    if not (0 <= offer.num_tokens <= MAX_OFFER_TOKENS and 1 <= offer.num_bytes <= MAX_OFFER_BYTES):
        what = f"got {offer.num_bytes} bytes and {offer.num_tokens} tokens, expected 1 to {MAX_OFFER_BYTES} and 0 to {MAX_OFFER_TOKENS}"
        return round_, (Reject(offer.peer, "malformed", what),)
    if not 0 <= offer.norm_bits < INFINITE_BITS:
        return round_, (Reject(offer.peer, "malformed", f"{offer.norm_bits:#x} are not the float32 bits of a norm"),)
    offers = tuple(sorted((*round_.offers, offer), key=lambda o: o.peer))
    return replace(round_, offers=offers, abstained=round_.abstained - {offer.peer}), ()


def _take_receipt(round_: Round, receipt: Receipt, *, can_object: bool) -> tuple[Round, tuple[RoundEffect, ...]]:
    if receipt.peer not in round_.roster:
        return round_, (Reject(receipt.peer, "not-in-roster", "only the roster's members give receipts"),)
    offer = round_.offer_of(receipt.sender)
    if offer is None or offer.packet != receipt.packet:
        return round_, (Reject(receipt.peer, "receipt", f"no such offer of {short(receipt.sender)}"),)
    said = (receipt.sender, receipt.peer)
    is_first_word = round_.phase is Phase.OPEN and said not in round_.receipts
    is_objection = can_object and receipt.objects and is_first_word and receipt.peer in round_.holders and receipt.peer != receipt.sender
    return replace(round_, receipts=round_.receipts | {said}, objections=round_.objections | ({said} if is_objection else set())), ()


def _take_merge(round_: Round, merge: Merge) -> tuple[Round, tuple[RoundEffect, ...]]:
    if merge.peer not in round_.reducers:
        return round_, (Reject(merge.peer, "not-a-reducer", "only the round's reducers merge"),)
    if not round_.is_merging:
        return round_, ()  # it is late: the round went on without it, and the view says so
    if not 1 <= merge.num_bytes <= MAX_OFFER_BYTES:
        return round_, (Reject(merge.peer, "malformed", f"got {merge.num_bytes} bytes, expected 1 to {MAX_OFFER_BYTES}"),)
    if (known := next((m for m in round_.merges if m.peer == merge.peer), None)) is not None:
        if known != merge:
            return round_, (Reject(merge.peer, "two-digests", f"already merged {known.packet[:12]}, now {merge.packet[:12]}"),)
        return round_, ()
    return replace(round_, merges=tuple(sorted((*round_.merges, merge), key=lambda m: m.peer))), ()


def _take_attestation(round_: Round, attestation: Attestation) -> tuple[Round, tuple[RoundEffect, ...]]:
    if attestation.peer not in round_.roster:
        return round_, (Reject(attestation.peer, "not-in-roster", "only the roster's members attest"),)
    if round_.phase is Phase.OPEN or round_.is_merging:
        return round_, (
            Reject(attestation.peer, "early", "the round is not settled" if round_.phase is Phase.OPEN else "it is not merged"),
        )
    if any(a.peer == attestation.peer for a in round_.attestations):
        return round_, ()
    attestations = tuple(sorted((*round_.attestations, attestation), key=lambda a: a.peer))
    return replace(round_, attestations=attestations, phase=Phase.TENTATIVE), ()


def _decide(round_: Round, now: float, rules: Rules) -> tuple[Round, tuple[RoundEffect, ...]]:
    return _decide_open(round_, now, rules) if round_.phase is Phase.OPEN else _decide_settled(round_, now, rules)


def _decide_open(round_: Round, now: float, rules: Rules) -> tuple[Round, tuple[RoundEffect, ...]]:
    due, sound = round_.due, round_.sound_offers()
    is_judged = not rules.judges(round_.fragment) or not round_.unjudged()
    if sound and due <= {o.peer for o in sound} and (is_judged or now >= round_.cut_off_at):
        return _settle(round_, now, rules, sound, f"all {len(sound)} due offers are in")
    present = round_.roster - round_.suspects
    if not due and not sound:
        why = (
            f"objected to: {_names(round_.condemned)}; no holder is left to wait for"
            if round_.condemned
            else "no holder is left to wait for"
        )
        return _give_up(round_, Phase.ABANDONED, why)
    if len(present) == 1 < len(round_.roster) and not sound:
        return _give_up(round_, Phase.ABANDONED, "one member is left of the roster: nobody else can hold its packet")
    if now >= round_.cut_off_at and len(sound) >= round_.quorum:
        return _settle(round_, now, rules, sound, f"cut-off: {len(sound)} of {len(round_.holders)} offers, quorum {round_.quorum}")
    if now >= round_.cut_off_at and round_.live_reducers:
        # whoever is to hold the packets does not: everybody fetches them in the time that is left
        return replace(round_, is_plain=True), ()
    if now >= round_.cut_off_at + rules.grace_s:
        return _give_up(round_, Phase.ABANDONED, f"{len(sound)} offers at the deadline, quorum is {round_.quorum}")
    return round_, ()


def _settle(round_: Round, now: float, rules: Rules, offers: tuple[Offer, ...], why: str) -> tuple[Round, tuple[RoundEffect, ...]]:
    outer = rules.outer_of(round_.fragment)
    if (scalars := settling.scalars_of(offers, round_.height + 1, outer)) is None:
        return _give_up(round_, Phase.ABANDONED, "nobody trained a token of it")
    lr_bits, momentum_bits, weights = scalars
    entries = tuple(
        Entry(o.peer, o.packet, o.num_bytes, o.num_tokens, weight_bits, o.norm_bits, clip_bits, o.num_steps, o.proof)
        for o, (weight_bits, clip_bits) in zip(offers, weights, strict=True)
    )
    if clipped := ", ".join(f"{short(e.peer)} to {bits_float(e.clip_bits):.2g}" for e in entries if e.clip_bits != ONE_BITS):
        why += f"; clipped {clipped}"
    num_judges = len(round_.holders) - 1
    condemned = tuple(
        DidCondemn(p, f"{n} of {num_judges} other holders say that its packet of {round_.fragment}, round {round_.number}, does not help")
        for p, n in round_.condemned.items()
    )
    if condemned:
        why += f"; left out {_names(c.peer for c in condemned)}, to which most object"
    settlement = Settlement(
        round_.fragment, round_.number, round_.height + 1, round_.base, entries,
        lr_bits, momentum_bits, why, round_.live_reducers, round_.residual if round_.live_reducers else None,
    )  # fmt: skip
    settled = replace(round_, phase=Phase.SETTLED, settlement=settlement, settled_at=now, why=why)
    return settled, (DidSettle(settlement), *condemned)


def _decide_settled(round_: Round, now: float, rules: Rules) -> tuple[Round, tuple[RoundEffect, ...]]:
    round_, effects = _decide_merging(round_, now, rules)
    decided, more = _decide_attesting(round_, now, rules)
    return decided, effects + more


def _decide_merging(round_: Round, now: float, rules: Rules) -> tuple[Round, tuple[RoundEffect, ...]]:
    """The settlement as both reducers merged it; without them as soon as that will not happen."""
    settlement = round_.settlement
    if settlement is None or settlement.is_final:
        return round_, ()
    said = {Merged(m.packet, m.num_bytes, m.residual) for m in round_.merges}
    silent = set(settlement.reducers) - {m.peer for m in round_.merges}
    failed = silent
    if gone := {p for p in silent if p in round_.suspects}:
        failed, why = gone, f"reducer {_names(gone)} is gone"
    elif len(said) > 1:
        failed = set(settlement.reducers)
        why = f"reducers {_names(settlement.reducers)} made different packets"
    elif not silent:
        final = replace(settlement, merged=said.pop(), why=f"{settlement.why}; merged by {_names(settlement.reducers)}")
        proofs = tuple(m.proof for m in round_.merges)
        return replace(round_, settlement=final, settled_at=now), (DidSettle(final, proofs),)
    elif now >= round_.settled_at + rules.merge_s:
        why = f"reducer {_names(silent)} merged nothing in {rules.merge_s:g} s"
    else:
        return round_, ()
    final = replace(
        settlement, reducers=(), residual=None, failed=tuple(sorted(failed)), why=f"{settlement.why}; {why}: everybody fetches every packet"
    )
    return replace(round_, settlement=final, settled_at=now), (DidSettle(final),)


def _decide_attesting(round_: Round, now: float, rules: Rules) -> tuple[Round, tuple[RoundEffect, ...]]:
    needed = round_.num_attesters_needed
    votes = Counter(a.anchor for a in round_.attestations)
    for anchor, count in sorted(votes.items()):
        if count >= needed and _is_witnessed(round_, anchor):
            agreeing = tuple(a for a in round_.attestations if a.anchor == anchor)
            why = f"{count} attested {anchor[:12]}"
            confirmed = replace(round_, phase=Phase.CONFIRMED, anchor=anchor, thin=count == 1, why=why)
            return confirmed, (DidConfirm(anchor, agreeing, count == 1, why),)
    silent = round_.roster - round_.suspects - {a.peer for a in round_.attestations}
    best = max(votes.values(), default=0)
    if best + len(silent) < needed:
        why = "attesters disagree" if len(votes) > 1 else "too few members are left to attest"
        return _give_up(round_, Phase.VOID, f"{why}: {best} of {needed}")
    if not round_.is_merging and now >= round_.settled_at + attest_s(round_, rules):
        return _give_up(round_, Phase.VOID, f"{best} of {needed} attested in {attest_s(round_, rules):g} s")
    return round_, ()


def _is_witnessed(round_: Round, anchor: Digest) -> bool:
    """What two reducers made is confirmed with somebody else's word, as long as somebody else is here: they alone neither decide nor keep it."""
    if round_.settlement is None or round_.settlement.merged is None:
        return True
    others = round_.roster - set(round_.reducers)
    return any(a.anchor == anchor and a.peer in others for a in round_.attestations) or others <= round_.suspects


def _give_up(round_: Round, phase: Phase, why: str) -> tuple[Round, tuple[RoundEffect, ...]]:
    return replace(round_, phase=phase, why=why), (DidGiveUp(phase, why),)
