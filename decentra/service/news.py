"""What of a fragment's state somebody acts on, and what of it concerns one member. Pure values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from decentra.ids import PeerId
from decentra.protocol.fragment import FragmentBook
from decentra.protocol.messages import FragmentView, Phase


def of_own(view: FragmentView, peer: PeerId) -> FragmentView:
    """What a member needs that fetches no offered packets: its own offer, and who has it."""
    return replace(view, offers=tuple(o for o in view.offers if o.peer == peer), receipts=tuple(r for r in view.receipts if r[0] == peer))


@dataclass(frozen=True, slots=True)
class News:
    """The part of a fragment's state that makes members do something."""

    to_all: tuple[object, ...]
    offers: tuple[object, ...]
    arrived: frozenset[PeerId]  # senders whose packets somebody has
    audience: frozenset[PeerId]  # who acts on offers; none: everybody

    @staticmethod
    def of(book: FragmentBook) -> News:
        one = book.round
        is_held = any(digest == book.anchor for digest in book.holdings.values())
        if one is None:
            return News((book.anchor, book.number, Phase.IDLE, is_held), (), frozenset(), frozenset())
        merging = one.settlement is not None and one.settlement.is_final
        reducers = one.live_reducers
        return News(
            (book.anchor, book.number, one.phase, reducers, merging, is_held), one.offers, frozenset(sender for sender, _ in one.receipts),
            frozenset(reducers),
        )  # fmt: skip
