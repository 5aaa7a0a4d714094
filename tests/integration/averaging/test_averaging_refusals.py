"""Why a service refuses is told by the error's class, also across gRPC: members act on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from averaging_world import ALICE, MemoryDoor, World, hello, run, world

from decentra.errors import AlreadyHere, Expired, NotAMember, Refused, RunOver
from decentra.protocol.messages import Hello, Role
from decentra.service.mailbox import Mailbox


class StrictDoor(MemoryDoor):
    """Refuses hellos with ``refusals``, one after the other, and then lets in."""

    def __init__(self, *refusals: Refused) -> None:
        super().__init__()
        self.refusals = list(refusals)

    async def attend(self, hello: Hello, mailbox: Mailbox) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        await super().attend(hello, mailbox)


@asynccontextmanager
async def strict(*refusals: Refused) -> AsyncIterator[World]:
    async with world(is_started=False) as w:
        w.door = StrictDoor(*refusals)
        await w.start()
        yield w


@pytest.mark.parametrize("kind", [RunOver, AlreadyHere, Expired, Refused])
def test_a_refusal_arrives_as_what_it_was(kind: type[Refused]) -> None:
    async def story() -> None:
        async with strict(kind("because")) as w:
            client = await w.member()
            with pytest.raises(kind, match="refused: because") as caught:
                await client.attend(hello())
            assert type(caught.value) is kind

    run(story())


def test_who_is_not_known_to_a_service_that_took_over_joins_again_with_its_invite() -> None:
    async def story() -> None:
        async with strict(NotAMember("alice is not a member of this run")) as w:
            client = await w.member()
            session = await client.attend(hello())
            assert [(peer, role) for peer, role, *_ in w.door.joined] == 2 * [(ALICE.peer_id, Role.TRAINER)]
            await session.close()

    run(story())


def test_who_has_no_invite_any_more_is_told() -> None:
    async def story() -> None:
        async with strict(NotAMember("alice is not a member of this run")) as w:
            papers = (await w.member()).credentials
            with pytest.raises(NotAMember):
                await w.client(token=b"", credentials=papers).attend(hello())

    run(story())
