"""Signed statements, frames and papers: a table of forgeries, each refused with its own reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decentra.bits import ONE_BITS
from decentra.config import Manifest
from decentra.errors import ConfigError, InviteError, Refused, RejectedPayload
from decentra.identity import Keypair
from decentra.ids import Digest, FragmentId, PeerId, RunId, digest_of
from decentra.invite import Invite
from decentra.pb import messages_pb2 as pb
from decentra.protocol.messages import (
    Abstention,
    Attestation,
    Counters,
    Entry,
    FragmentView,
    Goodbye,
    Heartbeat,
    Hello,
    Holding,
    Offer,
    Outcome,
    Phase,
    Receipt,
    Rejected,
    Role,
    Settlement,
    SwarmView,
)
from decentra.wire import trust
from decentra.wire.convert import dump, encode
from decentra.wire.frames import (
    ProofChecker,
    is_proven,
    is_welcome,
    member_frame,
    offer_of,
    open_fact,
    open_hello,
    parse_member_frame,
    parse_service_frame,
    seal_fact,
    service_frame,
    welcome_frame,
)
from decentra.wire.signed import open_sealed, seal
from decentra.wire.trust import Admission, ServiceCertificate, Token, TrustChain

MANIFEST = Manifest(name="test")
RUN = MANIFEST.run_id()
OTHER_RUN = RunId("f" * 64)
RUN_KEY, SERVICE_KEY, ALICE, MALLORY = (Keypair.from_seed(bytes([i]) * 32) for i in range(1, 5))
NOW_S = 1_800_000_000.0
FRAGMENT = FragmentId("trunk/0")
HASH = Digest("a" * 64)


def offer(key: Keypair = ALICE, **changes: Any) -> Offer:
    return replace(Offer(FRAGMENT, 3, key.peer_id, HASH, Digest("b" * 64), 100, 2000, 10, ONE_BITS), **changes)


# ---------------------------------------------------------------- statements


@given(st.binary(max_size=200), st.sampled_from(["offer", "hello"]), st.integers(0, 1 << 40))
def test_what_is_sealed_opens(body: bytes, kind: str, expiry_s: int) -> None:
    opened = open_sealed(seal(ALICE, kind, RUN, body, not_after_s=expiry_s), kind, RUN, signer=ALICE.peer_id, now_s=0)
    assert (opened.body, opened.peer, opened.not_after_s) == (body, ALICE.peer_id, expiry_s)


def statement(**changes: Any) -> bytes:
    real = pb.SignedStatement.FromString(seal(ALICE, "offer", RUN, b"body", not_after_s=NOW_S + 60))
    for name, value in changes.items():
        setattr(real, name, value)
    return dump(real)


FORGERIES: list[tuple[str, bytes, str]] = [
    ("no signature", statement(signature=b""), "malformed"),
    ("no signer", statement(signer=b""), "malformed"),
    ("zero signature", statement(signature=bytes(64)), "signature"),
    ("zero key", statement(signer=bytes(32)), "signer"),
    ("another body", statement(body=b"other"), "signature"),
    ("a longer life", statement(not_after_s=int(NOW_S) + 6000), "signature"),
    ("life without end", statement(not_after_s=0), "signature"),
    ("negative expiry", statement(not_after_s=-1), "malformed"),
    ("wrong key", seal(MALLORY, "offer", RUN, b"body"), "signer"),
    ("own key, other's name", statement(signer=MALLORY.public), "signer"),
    ("other run", seal(ALICE, "offer", OTHER_RUN, b"body"), "run"),
    ("other run, relabelled", statement(purpose=f"offer/{OTHER_RUN}"), "run"),
    ("other purpose", seal(ALICE, "receipt", RUN, b"body"), "purpose"),
    (
        "relabelled purpose",
        dump(pb.SignedStatement.FromString(seal(ALICE, "receipt", RUN, b"body"))).replace(b"receipt/", b"offer/", 1),
        "m",
    ),
    ("expired", seal(ALICE, "offer", RUN, b"body", not_after_s=NOW_S - 5), "expired"),
    ("truncated", statement()[:-10], "malformed"),
    ("empty", b"", "malformed"),
    ("too large", seal(ALICE, "offer", RUN, bytes(5 << 20)), "size"),
]


@pytest.mark.parametrize(("data", "reason"), [row[1:] for row in FORGERIES], ids=[row[0] for row in FORGERIES])
def test_forgeries(data: bytes, reason: str) -> None:
    with pytest.raises(RejectedPayload) as caught:
        open_sealed(data, "offer", RUN, signer=ALICE.peer_id, now_s=NOW_S)
    assert caught.value.reason.startswith(reason)


def test_a_relabelled_statement_with_intact_protobuf_is_a_forgery() -> None:
    real = pb.SignedStatement.FromString(seal(ALICE, "receipt", RUN, b"body"))
    real.purpose = f"offer/{RUN}"
    with pytest.raises(RejectedPayload) as caught:
        open_sealed(dump(real), "offer", RUN, signer=None)
    assert caught.value.reason == "signature"


@given(st.data())
@settings(max_examples=300)
def test_one_changed_byte_never_opens_as_something_else(data: st.DataObject) -> None:
    real = seal(ALICE, "offer", RUN, b"body", not_after_s=NOW_S)
    index = data.draw(st.integers(0, len(real) - 1))
    damaged = bytearray(real)
    damaged[index] ^= data.draw(st.integers(1, 255))
    try:
        opened = open_sealed(bytes(damaged), "offer", RUN, signer=ALICE.public)
    except RejectedPayload:
        return
    assert (opened.body, opened.not_after_s) == (b"body", int(NOW_S))  # a changed tag may turn a field into an unknown one, no more


def test_a_name_that_is_no_key_is_a_signer_fault() -> None:
    with pytest.raises(RejectedPayload) as caught:
        open_sealed(seal(ALICE, "offer", RUN, b""), "offer", RUN, signer="QmNotEd25519")  # type: ignore[arg-type]
    assert caught.value.reason == "signer"


# ---------------------------------------------------------------- frames

HELLO = Hello(ALICE.peer_id, Role.TRAINER, "alice", "n1", holdings=(Holding(ALICE.peer_id, FRAGMENT, HASH),))
MESSAGES = [
    offer(),
    Receipt(FRAGMENT, 3, ALICE.peer_id, MALLORY.peer_id, HASH),
    Attestation(FRAGMENT, 3, ALICE.peer_id, HASH),
    Abstention(FRAGMENT, 3, ALICE.peer_id, "loss is not finite"),
    Holding(ALICE.peer_id, FRAGMENT, HASH),
    Heartbeat(ALICE.peer_id, 7, Counters(loss=2.5)),
    Goodbye(ALICE.peer_id, "Ctrl-C"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_member_frames(message: Any) -> None:
    frame = member_frame(ALICE, RUN, message)
    assert parse_member_frame(frame, RUN, ALICE.peer_id) == message
    with pytest.raises(RejectedPayload) as caught:
        parse_member_frame(frame, RUN, MALLORY.peer_id)
    assert caught.value.reason == "signer"
    assert caught.value.peer == MALLORY.peer_id  # whoever sent it here is to blame


def test_the_first_frame_is_a_hello_signed_for_these_minutes() -> None:
    def frame(not_after_s: float, key: Keypair = ALICE) -> bytes:
        return member_frame(key, RUN, replace(HELLO, peer=key.peer_id), not_after_s=not_after_s)

    assert open_hello(frame(NOW_S + 60), RUN, ALICE.peer_id, NOW_S) == HELLO
    table = [
        (frame(NOW_S - 1), "expired"),
        (frame(0), "expired"),
        (frame(NOW_S + 86400), "expired"),
        (frame(NOW_S + 60, MALLORY), "signer"),
        (member_frame(ALICE, RUN, offer()), "malformed"),
        (b"", "malformed"),
    ]
    for data, reason in table:
        with pytest.raises(RejectedPayload) as caught:
            open_hello(data, RUN, ALICE.peer_id, NOW_S)
        assert caught.value.reason == reason
    with pytest.raises(RejectedPayload, match="a hello comes once"):
        parse_member_frame(frame(NOW_S + 60), RUN, ALICE.peer_id)


def test_a_fact_about_another_peer_is_refused() -> None:
    body = encode(offer(ALICE))
    forged = seal(MALLORY, "offer", RUN, body)
    for peer in (MALLORY.peer_id, ALICE.peer_id, None):
        with pytest.raises(RejectedPayload) as caught:
            open_fact(Offer, forged, RUN, peer)
        assert caught.value.reason == "signer"


def test_the_proof_of_an_offer_is_what_travelled_and_checks_alone() -> None:
    received = parse_member_frame(member_frame(ALICE, RUN, offer()), RUN, ALICE.peer_id)
    assert isinstance(received, Offer)
    assert len(received.proof) == 64
    assert is_proven(received, RUN)
    assert not is_proven(received, RunId("b" * 64))
    assert not is_proven(replace(received, num_steps=received.num_steps + 1), RUN)
    for peer in (MALLORY.peer_id, PeerId("no peer id")):
        assert not is_proven(replace(received, peer=peer), RUN)


def test_a_fact_whose_proof_nobody_could_check_is_refused() -> None:
    """Signed with an expiry, or in other bytes than we would write: its values and the signature are not enough."""
    body = encode(offer())
    for data in (seal(ALICE, "offer", RUN, body, not_after_s=NOW_S + 60), seal(ALICE, "offer", RUN, body + encode(offer())[:2] + body[2:])):
        with pytest.raises(RejectedPayload, match="in its canonical bytes"):
            open_fact(Offer, data, RUN, ALICE.peer_id)


@pytest.mark.parametrize("data", [b"", b"\xff\xff", dump(pb.MemberFrame(hello=b"x")), dump(pb.MemberFrame(offer=bytes(5000)))])
def test_foreign_frames_are_rejected(data: bytes) -> None:
    with pytest.raises(RejectedPayload) as caught:
        parse_member_frame(data, RUN, ALICE.peer_id)
    assert caught.value.reason in ("malformed", "size")
    assert caught.value.peer == ALICE.peer_id


def test_service_frames() -> None:
    for message in (view(), SwarmView(1, ()), Rejected(ALICE.peer_id, "signature", "no")):
        assert parse_service_frame(service_frame(message)) == message
    assert is_welcome(welcome_frame(NOW_S))
    assert not is_welcome(service_frame(SwarmView(1, ())))
    for data in (b"", welcome_frame(NOW_S), b"\xff"):
        with pytest.raises(RejectedPayload, match=r"malformed"):
            parse_service_frame(data)


def view(*offers: Offer) -> FragmentView:
    return FragmentView(FRAGMENT, 1, 0, HASH, 3, Phase.OPEN, "waiting", offers=offers)


def test_relayed_offers_are_checked_against_their_senders() -> None:
    checker = ProofChecker(RUN, num_remembered=2)
    good = open_fact(Offer, seal_fact(ALICE, RUN, offer()), RUN, None)
    second = open_fact(Offer, seal_fact(ALICE, RUN, offer(round=4)), RUN, None)
    bad = {
        "no proof": replace(good, proof=b""),
        "another packet than signed": replace(good, packet=HASH),
        "another weight than signed": replace(good, num_tokens=10**9),
        "another peer's proof": replace(good, peer=MALLORY.peer_id),
        "self made": replace(offer(), proof=seal(MALLORY, "offer", RUN, encode(offer()))),
    }
    for _ in range(2):  # the second time the good one is remembered
        kept, errors = checker.check(view(good, *bad.values(), second))
        assert kept.offers == (good, second)
        assert len(errors) == len(bad)
    untouched = view(good)
    assert checker.check(untouched) == (untouched, [])


def test_a_settlement_of_what_nobody_offered_is_not_shown_to_the_member() -> None:
    good = open_fact(Offer, seal_fact(ALICE, RUN, offer()), RUN, None)
    entry = Entry(good.peer, good.packet, good.num_bytes, good.num_tokens, 1, good.norm_bits, 1, good.num_steps, good.proof)
    settlement = Settlement(good.fragment, good.round, 4, good.base, (entry,), 1, 1, "all in")
    assert offer_of(settlement, entry) == good
    shown = replace(view(good), phase=Phase.SETTLED, settlement=settlement, recent=(Outcome(2, Phase.CONFIRMED, "", settlement, HASH),))
    assert ProofChecker(RUN).check(shown) == (shown, [])
    lies = {
        "another packet": (replace(settlement, entries=(replace(entry, packet=HASH),))),
        "more tokens": replace(settlement, entries=(replace(entry, num_tokens=10**9),)),
        "another norm": replace(settlement, entries=(replace(entry, norm_bits=1),)),
        "another round": replace(settlement, round=9),
        "another anchor": replace(settlement, base=Digest("d" * 64)),
        "nobody's word": replace(settlement, entries=(replace(entry, proof=b""),)),
        "one of two": replace(settlement, entries=(entry, replace(entry, peer=MALLORY.peer_id))),
    }
    for what, lie in lies.items():
        kept, errors = ProofChecker(RUN).check(replace(shown, settlement=lie, recent=(Outcome(2, Phase.CONFIRMED, "", lie, HASH),)))
        assert (kept.settlement, kept.recent[0].settlement, kept.offers) == (None, None, (good,)), what
        assert len(errors) == 2
        assert kept.recent[0].anchor == HASH, "it can be fetched whole"


# ---------------------------------------------------------------- papers

CHAIN = TrustChain(RUN, RUN_KEY.public)
EXPIRY_S = int(NOW_S) + 3600
CERTIFICATE = ServiceCertificate(SERVICE_KEY.public, bytes(32), EXPIRY_S)
ADMISSION = Admission(RUN, ALICE.peer_id, Role.TRAINER, EXPIRY_S)


def credentials(
    *,
    run_key: Keypair = RUN_KEY,
    service_key: Keypair = SERVICE_KEY,
    run: RunId = RUN,
    certificate: ServiceCertificate = CERTIFICATE,
    admission: Admission = ADMISSION,
) -> bytes:
    return trust.pack_credentials(trust.seal_certificate(run_key, run, certificate), trust.seal_admission(service_key, admission))


def test_the_chain_accepts_what_it_should() -> None:
    assert CHAIN.check_certificate(trust.seal_certificate(RUN_KEY, RUN, CERTIFICATE), NOW_S) == CERTIFICATE
    assert CHAIN.check_credentials(credentials(), ALICE.peer_id, NOW_S) == ADMISSION
    assert CHAIN.check_bearer(credentials(), NOW_S) == ADMISSION
    assert CHAIN.check_manifest(trust.seal_manifest(RUN_KEY, MANIFEST)) == MANIFEST
    sealed = trust.seal_command(RUN_KEY, RUN, "stop", "enough", expires_at_s=NOW_S + 60)
    command = CHAIN.check_command(sealed, NOW_S)
    assert (command.kind, command.argument, command.expires_at_s, len(command.nonce)) == ("stop", "enough", int(NOW_S) + 60, 16)


def test_the_way_to_a_successor_is_the_run_keys_word() -> None:
    line = Invite(OTHER_RUN, MALLORY.public, ("/ip4/127.0.0.1/tcp/1",), ("127.0.0.1:2",), b"t").encode()
    sealed = trust.seal_successor(RUN_KEY, RUN, line)
    assert CHAIN.check_successor(sealed).encode() == line
    forged = [trust.seal_successor(MALLORY, RUN, line), trust.seal_successor(RUN_KEY, OTHER_RUN, line), line, "", f"zz.{line}", sealed[:-1]]
    for one in forged:
        with pytest.raises(Refused, match="not named by its organiser's key"):
            CHAIN.check_successor(one)
    with pytest.raises(InviteError):
        CHAIN.check_successor(trust.seal_successor(RUN_KEY, RUN, "no invite"))


@pytest.mark.parametrize("role", [None, *Role])
def test_tokens(role: Role | None) -> None:
    token = Token.generate(5, EXPIRY_S, role)
    sealed = trust.seal_token(RUN_KEY, RUN, token)
    assert len(sealed) == 86
    assert CHAIN.check_token(sealed, NOW_S) == token


def test_credentials_fit_into_metadata() -> None:
    assert len(credentials()) < 1000


def revoked(name: str) -> TrustChain:
    chain = TrustChain(RUN, RUN_KEY.public)
    chain.revoke(name)
    return chain


BAD_CREDENTIALS: list[tuple[str, Callable[[], object], str]] = [
    ("none", lambda: CHAIN.check_credentials(b"", ALICE.peer_id, NOW_S), "join the run first"),
    ("rubbish", lambda: CHAIN.check_credentials(b"\xff" * 9, ALICE.peer_id, NOW_S), "expected a Credentials"),
    ("huge", lambda: CHAIN.check_credentials(bytes(9000), ALICE.peer_id, NOW_S), "at most 4096"),
    ("another peer shows them", lambda: CHAIN.check_credentials(credentials(), MALLORY.peer_id, NOW_S), "belong to"),
    ("not the run key", lambda: CHAIN.check_credentials(credentials(run_key=MALLORY), ALICE.peer_id, NOW_S), "signed by"),
    ("not the service key", lambda: CHAIN.check_credentials(credentials(service_key=MALLORY), ALICE.peer_id, NOW_S), "signed by"),
    ("certificate of another run", lambda: CHAIN.check_credentials(credentials(run=OTHER_RUN), ALICE.peer_id, NOW_S), "of run ffff"),
    (
        "admission to another run",
        lambda: CHAIN.check_credentials(credentials(admission=replace(ADMISSION, run=OTHER_RUN)), ALICE.peer_id, NOW_S),
        "of run ffff",
    ),
    (
        "admission expired",
        lambda: CHAIN.check_credentials(credentials(admission=replace(ADMISSION, expires_at_s=int(NOW_S) - 9)), ALICE.peer_id, NOW_S),
        r"admission \(expired\)",
    ),
    (
        "certificate expired",
        lambda: CHAIN.check_credentials(credentials(certificate=replace(CERTIFICATE, not_after_s=int(NOW_S) - 9)), ALICE.peer_id, NOW_S),
        r"certificate \(expired\)",
    ),
    ("revoked peer", lambda: revoked(ALICE.peer_id).check_credentials(credentials(), ALICE.peer_id, NOW_S), "revoked"),
    ("manifest of another run", lambda: CHAIN.check_manifest(seal(RUN_KEY, "manifest", RUN, b"{}")), "with digest"),
    ("manifest by somebody", lambda: CHAIN.check_manifest(trust.seal_manifest(MALLORY, MANIFEST)), "signed by"),
    (
        "command by somebody",
        lambda: CHAIN.check_command(trust.seal_command(MALLORY, RUN, "stop", "", expires_at_s=NOW_S + 9), NOW_S),
        "signed by",
    ),
    (
        "command expired",
        lambda: CHAIN.check_command(trust.seal_command(RUN_KEY, RUN, "stop", "", expires_at_s=NOW_S - 9), NOW_S),
        "expired",
    ),
    (
        "command for ever",
        lambda: CHAIN.check_command(trust.seal_command(RUN_KEY, RUN, "stop", "", expires_at_s=0), NOW_S),
        "has to expire",
    ),
    (
        "command for a year",
        lambda: CHAIN.check_command(trust.seal_command(RUN_KEY, RUN, "stop", "", expires_at_s=NOW_S + 3e7), NOW_S),
        "has to expire",
    ),
    (
        "a token used as a command",
        lambda: CHAIN.check_command(trust.seal_token(RUN_KEY, RUN, Token.generate(1, EXPIRY_S)), NOW_S),
        "command",
    ),
]


@pytest.mark.parametrize(("check", "says"), [row[1:] for row in BAD_CREDENTIALS], ids=[row[0] for row in BAD_CREDENTIALS])
def test_bad_papers_are_refused_with_the_reason(check: Callable[[], object], says: str) -> None:
    with pytest.raises(Refused, match=says):
        check()


def test_bad_tokens_are_refused_with_the_reason() -> None:
    token = Token.generate(3, EXPIRY_S)
    sealed = trust.seal_token(RUN_KEY, RUN, token)
    table = [
        (CHAIN, b"", "none of format"),
        (CHAIN, sealed[:-1], "none of format"),
        (CHAIN, b"\x02" + sealed[1:], "none of format"),
        (CHAIN, trust.seal_token(MALLORY, RUN, token), "forged"),
        (CHAIN, trust.seal_token(RUN_KEY, OTHER_RUN, token), "forged"),
        (CHAIN, sealed[:9] + (999).to_bytes(4, "big") + sealed[13:], "forged"),
        (CHAIN, trust.seal_token(RUN_KEY, RUN, replace(token, expires_at_s=int(NOW_S) - 1)), "expired"),
        (revoked(token.id), sealed, "revoked this invite"),
    ]
    for chain, data, says in table:
        with pytest.raises(Refused, match=says):
            chain.check_token(data, NOW_S)


def test_tokens_that_cannot_be_written() -> None:
    for token in (Token("xyz", 1, 1), Token("ab", 1, 1), Token("ab" * 8, 0, 1), Token("ab" * 8, 1 << 32, 1), Token("ab" * 8, 1, -1)):
        with pytest.raises(ConfigError):
            trust.seal_token(RUN_KEY, RUN, token)


def test_the_run_is_its_manifest() -> None:
    assert digest_of(MANIFEST.canonical_bytes()) == RUN
