"""Every interleaving of a small swarm (``small_swarm``), breadth-first, and what must hold in every state that can be reached:

- lost: the confirmed anchor is on the disk of somebody alive, unless the roll-back was recorded;
- foreign: a member's anchor was confirmed once, and no chain holds a packet twice (that a restored service has the same anchor, height and
  round is asserted on the way);
- stuck: the run's end can be reached without another fault;
- unconfirmable: a settled round can be confirmed as long as enough of its roster is alive.

``python tests/sim/exhaustive.py`` prints the number of states of the standard cases.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from small_swarm import GENESIS, Case, Member, State, Swarm

from decentra.protocol.messages import Phase
from decentra.protocol.round import Round


@dataclass
class Result:
    num_states: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    num_rolled_back: int = 0  # steps
    violations: dict[str, list[State]] = field(default_factory=lambda: {k: [] for k in ("lost", "foreign", "stuck", "unconfirmable")})

    @property
    def is_sound(self) -> bool:
        return not any(self.violations.values())


class Explorer(Swarm):
    """Searches all states of a case and judges them."""

    def explore(self, max_states: int = 3_000_000) -> Result:
        began, result = time.process_time(), Result()
        first = self.start()
        seen: dict[State, int] = {first: 0}
        order, queue = [first], deque([first])
        back: list[list[int]] = [[]]  # states before, along steps that are no fault
        while queue:
            state = queue.popleft()
            here = seen[state]
            for name, after in self.steps(state):
                result.num_steps += 1
                if after not in seen:
                    assert len(order) < max_states, "the case is too large"
                    seen[after] = len(order)
                    order.append(after)
                    back.append([])
                    queue.append(after)
                if not name.isupper():
                    back[seen[after]].append(here)
        result.num_states, result.num_rolled_back = len(order), self.num_rolled_back
        self._judge(order, back, result)
        result.seconds = time.process_time() - began
        return result

    # ------------------------------------------------------------ judgement

    def _judge(self, order: list[State], back: list[list[int]], result: Result) -> None:
        for state in order:
            if not self._is_kept(state):
                result.violations["lost"].append(state)
            if self._is_foreign(state):
                result.violations["foreign"].append(state)
        ends = _reaching([i for i, s in enumerate(order) if self._is_done(s)], back)
        for index, state in enumerate(order):
            if index not in ends and self._may_still_end(state):
                result.violations["stuck"].append(state)
        for number in range(1, self.max_number + 1):
            good = _reaching([i for i, s in enumerate(order) if self._has_confirmed(s, number)], back)
            for index, state in enumerate(order):
                if index not in good and self._must_be_confirmable(state, number):
                    result.violations["unconfirmable"].append(state)

    def describe(self, state: State) -> str:
        """A state in words, for a person who looks for the hole."""
        book = self.services[state.service].book
        phase = "no round" if book.round is None else f"round {book.number} {book.round.phase} of {sorted(book.round.roster)}"
        words = [f"anchor {book.anchor}, {phase}"]
        for name, i in zip(self.names, state.members, strict=True):
            if i < 0:
                words.append(f"{name} dead")
                continue
            me = self.members[i]
            words.append(
                f"{name} at {me.life.anchor}, disk {sorted(me.anchors)}, busy {me.life.busy!r}, says {[type(q).__name__ for q in me.queue]}"
            )
        return "; ".join(words)

    def _alive(self, state: State) -> list[Member]:
        return [self.members[i] for i in state.members if i >= 0]

    def _is_kept(self, state: State) -> bool:
        anchor, alive = self.services[state.service].book.anchor, self._alive(state)
        return not alive or any(anchor in me.anchors for me in alive) or self._is_thin_or_joiners(state)

    def _is_thin_or_joiners(self, state: State) -> bool:
        """A roster of one is no promise; and a machine that never had an anchor cannot keep one."""
        service = self.services[state.service]
        book = service.book
        thin = any(o.anchor == book.anchor and o.round in service.lone for o in book.recent)
        genesis_died = book.anchor == GENESIS and all(me.life.anchor is None for me in self._alive(state))
        return thin or genesis_died

    def _is_foreign(self, state: State) -> bool:
        book = self.services[state.service].book
        confirmed = {GENESIS, *(o.anchor for o in book.recent if o.phase is Phase.CONFIRMED)}
        for me in self._alive(state):
            if me.life.anchor is not None and me.life.anchor not in confirmed:
                return True
        packets = [p for link in book.anchor.split(">")[1:] for p in link.split("+")]
        return len(packets) != len(set(packets))

    def _is_done(self, state: State) -> bool:
        """The last round is confirmed and everybody alive has its anchor, nothing pending."""
        book = self.services[state.service].book
        return book.height >= self.case.confirmed and all(
            me.life.anchor == book.anchor and me.life.pending is None for me in self._alive(state)
        )

    def _may_still_end(self, state: State) -> bool:
        book, alive = self.services[state.service].book, self._alive(state)
        has_holder = any(me.life.trains for me in alive)
        # the bound on rounds is ours, not the protocol's: the round that is open may have to be given up, too
        num_given_up = book.number - book.height
        return has_holder and self._is_kept(state) and not self._is_thin_or_joiners(state) and num_given_up <= self.case.given_up

    def _has_confirmed(self, state: State, number: int) -> bool:
        return any(o.round == number and o.phase is Phase.CONFIRMED for o in self.services[state.service].book.recent)

    def _must_be_confirmable(self, state: State, number: int) -> bool:
        active = self.services[state.service].book.active
        if active is None or active.number != number or active.settlement is None:
            return False
        alive = {n for n, i in zip(self.names, state.members, strict=True) if i >= 0}
        attested = {a.peer for a in active.attestations}
        return len((alive & active.roster) | attested) >= min(2, len(active.roster)) and bool(alive & active.roster)


def _reaching(goals: list[int], back: list[list[int]]) -> set[int]:
    good, queue = set(goals), deque(goals)
    while queue:
        for before in back[queue.popleft()]:
            if before not in good:
                good.add(before)
                queue.append(before)
    return good


# ---------------------------------------------------------------- rules made weaker, to see that the check can fail


@contextmanager
def weakened(rule: str) -> Iterator[None]:
    """``no-receipts``: every offer counts as sound. ``one-attester``: one attester confirms any round."""
    if rule == "no-receipts":
        name, weak = "sound_offers", lambda self: self.offers
    else:
        assert rule == "one-attester"
        name, weak = "num_attesters_needed", property(lambda self: 1)
    honest = Round.__dict__[name]
    setattr(Round, name, weak)
    try:
        yield
    finally:
        setattr(Round, name, honest)


CASES = {
    "two holders, a death": Case(2, deaths=1),
    "two holders and a keeper, a death": Case(2, 1, given_up=0, deaths=1),
    "a holder and a keeper, two rounds, a death": Case(1, 1, confirmed=2, deaths=1),
    "two holders, a false suspicion": Case(2, given_up=0, suspicions=1),
    "a holder and a keeper, a false suspicion and a death": Case(1, 1, suspicions=1, deaths=1),
    "two holders, a restart": Case(2, given_up=0, restarts=1),
    "a holder and a keeper, a restart and a death": Case(1, 1, restarts=1, deaths=1),
    "two holders, the service restarts": Case(2, given_up=0, service_restarts=1),
    "a holder and a keeper, the service restarts and a death": Case(1, 1, service_restarts=1, deaths=1),
    "a holder and a keeper, a broken stream and a restart": Case(1, 1, given_up=0, breaks=1, restarts=1),
    "a holder, a keeper and a joiner, a death": Case(1, 1, 1, given_up=0, deaths=1),
    "two holders, two rounds, a death": Case(2, confirmed=2, given_up=0, deaths=1),
    "two reducers": Case(2, given_up=0, reduces=True),
    "two reducers, a death": Case(2, given_up=0, deaths=1, reduces=True),
    "two reducers, a restart": Case(2, given_up=0, restarts=1, reduces=True),
    "two reducers, a false suspicion": Case(2, given_up=0, suspicions=1, reduces=True),
    "two reducers, the service restarts": Case(2, given_up=0, service_restarts=1, reduces=True),
    "two reducers, two rounds, a death": Case(2, confirmed=2, given_up=0, deaths=1, reduces=True),
}


def main() -> int:
    is_sound = True
    for name, case in CASES.items():
        result = Explorer(case).explore()
        found = ", ".join(f"{kind} {len(states)}" for kind, states in result.violations.items())
        print(f"{name}: {result.num_states} states, {result.num_steps} steps, {result.seconds:.1f} s: {found}", flush=True)
        is_sound &= result.is_sound
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
