"""Everywhere that bytes from outside are read: a table of doors, each with good bytes to begin from, and a seeded hand that spoils them.

What a door may do with bytes: return a value, or raise DecentraError. Anything else is a find: another exception, a crash, an endless loop, memory,
or code that runs. ``repair`` makes the outer seal right again (checksum, signature with the attacker's own key), so that what lies inside is reached.
"""

from __future__ import annotations

import asyncio
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from decentra.config import DataSpec, Manifest, ModelSpec, manifest_from_bytes
from decentra.data.tokens import FileTokenizer
from decentra.delta.anchor import AnchorState, decode_anchor, encode_anchor
from decentra.delta.codec import CODECS
from decentra.delta.packet import decode_packet, encode_packet
from decentra.gossip import frames as blob_frames
from decentra.gossip import records as dht
from decentra.gossip.guard import install_guard
from decentra.hf.checkpoint import open_checkpoint, save_checkpoint
from decentra.identity import Keypair
from decentra.ids import Digest, FragmentId, RunId
from decentra.invite import Invite, parse_invite
from decentra.model.decoder import build_model
from decentra.modules import build_layout
from decentra.pb import messages_pb2 as pb
from decentra.protocol import ledger
from decentra.protocol.messages import (
    Counters,
    Entry,
    FragmentView,
    Heard,
    Heartbeat,
    Hello,
    Holding,
    MemberView,
    Merged,
    Offer,
    Outcome,
    Phase,
    Receipt,
    Role,
    Settlement,
    SwarmView,
    Told,
)
from decentra.wire import trust
from decentra.wire.convert import decode, dump, encode
from decentra.wire.frames import member_frame, open_hello, parse_member_frame, parse_service_frame, service_frame
from decentra.wire.signed import open_sealed, seal
from decentra.wire.trust import TrustChain

RUN = RunId("a" * 64)
ME, RUN_KEY, SERVICE_KEY = (Keypair.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
NOW_S = 1_000_000.0
FRAGMENT = build_layout([("a.norm", (64,)), ("b.weight", (40, 110)), ("c.rows", (8, 64))])[FragmentId("trunk/0")]
DIGEST = Digest("c" * 64)


@dataclass(frozen=True)
class Door:
    """``read`` takes bytes from outside; ``good`` are bytes it takes; ``repair`` makes spoilt ones pass the first check."""

    name: str
    read: Callable[[bytes], Any]
    good: tuple[bytes, ...]
    repair: Callable[[bytes], bytes] | None = None


def doors(scratch: Path) -> list[Door]:
    """The table. ``scratch``: an empty folder for what is read from files."""
    install_guard()
    chain = TrustChain(RUN, RUN_KEY.public)
    certificate = trust.seal_certificate(RUN_KEY, RUN, trust.ServiceCertificate(SERVICE_KEY.public, b"\7" * 32, int(NOW_S) + 900))
    admission = trust.seal_admission(SERVICE_KEY, trust.Admission(RUN, ME.peer_id, Role.TRAINER, int(NOW_S) + 900))
    token = trust.seal_token(RUN_KEY, RUN, trust.Token("12" * 8, 3, int(NOW_S) + 900))
    line = Invite(RUN, RUN_KEY.public, (f"/ip4/10.0.0.1/tcp/7410/p2p/{ME.peer_id}",), ("10.0.0.1:7411",), token).encode()
    hello = Hello(ME.peer_id, Role.TRAINER, "me", "n1", holdings=(Holding(ME.peer_id, FRAGMENT.id, DIGEST),))
    offer = Offer(FRAGMENT.id, 3, ME.peer_id, DIGEST, DIGEST, 100, 10, 5, 0x3F800000)
    messages = (offer, Receipt(FRAGMENT.id, 3, ME.peer_id, ME.peer_id, DIGEST), Heartbeat(ME.peer_id, 7, Counters(loss=2.5)))
    views = _views()
    key = dht.service_key(RUN)
    return [
        Door("packet", lambda b: decode_packet(b, FRAGMENT), tuple(_packets()), _with_crc),
        Door("anchor", lambda b: decode_anchor(FRAGMENT, b), (encode_anchor(FRAGMENT, AnchorState(torch.ones(FRAGMENT.num_elements))),)),
        Door("invite", lambda b: parse_invite(b.decode("utf-8", "replace")), (line.encode(),)),
        Door("token", lambda b: chain.check_token(b, NOW_S), (token,)),
        Door("manifest", manifest_from_bytes, (Manifest(name="m", genesis={FRAGMENT.id: DIGEST}).canonical_bytes(),)),
        Door("credentials", lambda b: chain.check_bearer(b, NOW_S), (trust.pack_credentials(certificate, admission),)),
        Door(
            "command", lambda b: chain.check_command(b, NOW_S), (trust.seal_command(RUN_KEY, RUN, "stop", "why", expires_at_s=NOW_S + 60),),
            lambda b: seal(RUN_KEY, trust.COMMAND, RUN, b, not_after_s=NOW_S + 60),
        ),
        Door("statement", lambda b: open_sealed(b, "offer", RUN, signer=None), (seal(ME, "offer", RUN, b"body"),)),
        Door("hello", lambda b: open_hello(b, RUN, ME.peer_id, NOW_S), (member_frame(ME, RUN, hello, not_after_s=NOW_S + 60),), _hello_of_mine),
        Door("member frame", lambda b: parse_member_frame(b, RUN, ME.peer_id), tuple(member_frame(ME, RUN, m) for m in messages), _offer_of_mine),
        Door("service frame", parse_service_frame, tuple(service_frame(v) for v in views)),
        Door("heard", lambda b: decode(Heard, b), (encode(Heard((_told(),))),)),
        Door("blob request", _read_request, (blob_frames.pack_request(blob_frames.Request(DIGEST, 7, b"papers")),)),
        Door("blob reply", _read_reply, (blob_frames.pack_reply(blob_frames.Reply(blob_frames.Status.REFUSED, 9, "no")),)),
        Door(
            "DHT record", lambda b: dht.check_record(b, key, ME.peer_id, NOW_S), (dht.encode_record(ME, key, b"body", NOW_S + 60),),
            lambda b: dht.encode_record(ME, key, b[:2000], NOW_S + 60),
        ),
        Door("ledger", _read_ledger, (_ledger(),)),
        Door("tokenizer", lambda b: FileTokenizer(b).encode(b"some text"), (_tokenizer(),)),
        *_checkpoint_doors(scratch),
    ]  # fmt: skip


# ---------------------------------------------------------------- good bytes


def _packets() -> list[bytes]:
    values_N = torch.randn(FRAGMENT.num_elements, generator=torch.Generator().manual_seed(1))
    return [encode_packet(FRAGMENT, values_N, c.name) for c in CODECS]


def _views() -> list[Any]:
    settled = _settled()
    offer = Offer(FRAGMENT.id, 4, ME.peer_id, DIGEST, DIGEST, 100, 10, 5, 0x3F800000, proof=b"proof")
    outcome = Outcome(4, Phase.SETTLED, "all are in", settled)
    member = MemberView(ME.peer_id, "me", Role.TRAINER, True, ("/ip4/10.0.0.1/tcp/7410",), (0, 1), Counters(loss=2.5))
    view = FragmentView(
        FRAGMENT.id, 1, 3, DIGEST, 4, Phase.SETTLED, "why", holders=(ME.peer_id,), offers=(offer,), receipts=((ME.peer_id, ME.peer_id),),
        settlement=settled, attesters=(ME.peer_id,), ready=(ME.peer_id,), recent=(outcome,), told=_told(),
    )  # fmt: skip
    return [view, SwarmView(1, (member,), revoked=(ME.peer_id,))]


def _told() -> Told:
    return Told(FRAGMENT.id, 1, 5, DIGEST, 3, DIGEST, bytes(64))


def _settled() -> Settlement:
    entry = Entry(ME.peer_id, DIGEST, 100, 10, 0x3F800000, 0x3F800000, 0x3F800000)
    merged = Merged(DIGEST, 100, DIGEST)
    return Settlement(FRAGMENT.id, 4, 4, DIGEST, (entry,), 0x3F800000, 0, "all are in", (ME.peer_id,), DIGEST, merged)


def _ledger() -> bytes:
    book = ledger.Ledger()
    records: list[ledger.Record] = [
        ledger.Started(RUN, ((FRAGMENT.id, DIGEST),)), ledger.Admitted(ME.peer_id, Role.TRAINER, "me"), ledger.Placed(ME.peer_id, (0, 1)),
        ledger.Opened(FRAGMENT.id, 1, 0, DIGEST, (ME.peer_id,), ()), ledger.Revoked("12" * 8, "why"), ledger.Certified(1, b"certificate"),
        ledger.Settled(_settled(), (b"proof",)), ledger.Confirmed(FRAGMENT.id, 4, 4, DIGEST, (ME.peer_id,), False, "2 attested", (b"proof",)),
        ledger.GaveUp(FRAGMENT.id, 5, Phase.VOID, "why"), ledger.RolledBack(FRAGMENT.id, 0, DIGEST, "why"), ledger.Quarantined(ME.peer_id, 9, "why"),
        ledger.Stopping("why", True), ledger.Succeeded(RUN),
    ]  # fmt: skip
    return b"\n".join(book.append(r) for r in records)


def _tokenizer() -> bytes:
    vocabulary = {chr(c): n for n, c in enumerate(range(33, 127))}
    return json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": []},
        }
    ).encode()  # fmt: skip


def _checkpoint_doors(scratch: Path) -> list[Door]:
    """Each file of a model's folder, the others left as they are: one that decentra made, and one of Hugging Face, without our card."""
    spec = ModelSpec(hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, expert_hidden_size=8, num_experts=2)
    found = []
    for kind in ("ours", "theirs"):
        folder = scratch / kind
        save_checkpoint(folder, Manifest(name="m", model=spec, data=DataSpec(seq_len=24)), build_model(spec, 1).state_dict().items(), {})
        if kind == "theirs":
            (folder / "decentra.json").unlink()
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
            if (kind, path.name) != ("ours", "config.json"):  # which is not looked at beside our card
                found.append(Door(f"checkpoint {kind} {path.name}", _reader(folder, path), (path.read_bytes(),)))
    return found


def _reader(folder: Path, path: Path) -> Callable[[bytes], Any]:
    good = path.read_bytes()

    def read(data: bytes) -> Any:
        path.write_bytes(data)
        try:
            return open_checkpoint(folder).state()
        finally:
            path.write_bytes(good)

    return read


# ---------------------------------------------------------------- reading and repairing


def _read_ledger(data: bytes) -> Any:
    return ledger.replay(data.split(b"\n"))


def _read_request(data: bytes) -> Any:
    return _from_stream(blob_frames.read_request, data)


def _read_reply(data: bytes) -> Any:
    return _from_stream(blob_frames.read_reply, data)


def _from_stream(read: Callable[[asyncio.StreamReader], Any], data: bytes) -> Any:
    async def main() -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        try:
            return await read(reader)
        except asyncio.IncompleteReadError:
            return None  # a stream that ends is part of the contract

    return asyncio.run(main())


def _with_crc(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def _hello_of_mine(body: bytes) -> bytes:
    return dump(pb.MemberFrame(hello=seal(ME, "hello", RUN, body, not_after_s=NOW_S + 60)))


def _offer_of_mine(body: bytes) -> bytes:
    return dump(pb.MemberFrame(offer=seal(ME, "offer", RUN, body)))


# ---------------------------------------------------------------- spoiling

_BINARY = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\xff\x0f")
_INTERESTING = (*_BINARY, b"1e999", b"-1", b"NaN", b'"', b"{", b"[" * 900, b"null", b"[]", b"{}")


def spoilt(rng: Random, good: Sequence[bytes]) -> bytes:
    """One of ``good`` with one to four changes: bits, bytes, pieces taken out, doubled or exchanged, nasty numbers, an early end; or noise."""
    data = bytearray(rng.choice(good))
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(2000))
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randrange(1, 40))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                word = rng.choice(_INTERESTING)
                data[at : at + len(word)] = word
            case 5:
                data[at:at] = rng.choice(_INTERESTING)
            case 6:
                other = rng.choice(good)
                cut = rng.randrange(len(other) + 1)
                data[at:end] = other[cut : cut + rng.randrange(60)]
            case 7 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def attempt(door: Door, rng: Random) -> tuple[bytes, bool, BaseException | None]:
    """One spoilt input at one door: the input, whether it was taken, and what came up that is no DecentraError."""
    from decentra.errors import DecentraError

    data = spoilt(rng, door.good)
    if door.repair is not None and rng.random() < 0.5:
        data = door.repair(data)
    try:
        door.read(data)
    except DecentraError:
        return data, False, None
    except BaseException as error:  # also what is no Exception: a panic of a library
        if isinstance(error, KeyboardInterrupt):
            raise
        return data, False, error
    return data, True, None


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="decentra-doors-")
