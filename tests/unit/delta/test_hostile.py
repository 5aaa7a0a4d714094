"""Hostile packets under a memory limit, in a process of its own: refused or decoded, never a crash, never more memory than the fragment deserves."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import random, resource, struct, zlib
import torch
torch.set_num_threads(1)
from decentra.delta.codec import CODECS
from decentra.delta.packet import decode_packet, encode_packet
from decentra.errors import RejectedPayload
from decentra.ids import FragmentId
from decentra.modules import build_layout

fragment = build_layout([("a.norm", (64,)), ("b.weight", (300, 301)), ("c.rows", (8, 64))])[FragmentId("trunk/0")]
values_N = torch.randn(fragment.num_elements, generator=torch.Generator().manual_seed(1))
good = {c.name: encode_packet(fragment, values_N, c.name) for c in CODECS}
for packet in good.values():
    decode_packet(packet, fragment)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20),) * 2)  # a fragment is 0.4 MB; tables of models and allocators get the rest
rng = random.Random(7)
counts = {"refused": 0, "decoded": 0}
for turn in range(1500):
    body = bytearray(good[rng.choice(list(good))][:-4])
    kind = turn % 5
    if kind == 0:  # any lengths the header can say
        struct.pack_into("<QQ", body, 16, rng.getrandbits(rng.randrange(1, 65)), rng.getrandbits(rng.randrange(1, 65)))
    elif kind == 1:
        for _ in range(rng.randrange(1, 20)):
            body[rng.randrange(32, len(body))] = rng.randrange(256)
    elif kind == 2:
        body[32:] = rng.randbytes(len(body) - 32)
    elif kind == 3:
        body = body[: rng.randrange(len(body))]
    else:
        struct.pack_into("<H", body, 6, rng.randrange(24))
    try:
        decoded = decode_packet(bytes(body) + struct.pack("<I", zlib.crc32(body)), fragment)
        assert bool(torch.isfinite(decoded.dense()).all())
        counts["decoded"] += 1
    except RejectedPayload as error:
        assert error.reason in ("size", "malformed", "shape", "codec", "not-finite"), error.reason
        counts["refused"] += 1
print(counts["refused"], counts["decoded"])
"""


def test_hostile_packets_are_refused_or_decoded_within_bounded_memory() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, decoded = map(int, done.stdout.split())
    assert refused > 500
    assert decoded > 100, "random bits in a sparse section often mean something: what cannot be seen has to be harmless"
