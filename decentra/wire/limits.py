"""How large anything on the wire may be, and which protocol version this code speaks. Constants only."""

from __future__ import annotations

PROTOCOL_VERSION = 5

MAX_MESSAGE_BYTES = 4 << 20
MAX_METADATA_BYTES = 8 << 10
MAX_FRAME_BYTES = 256 << 10  # of a member's stream after the hello; a heartbeat with 8192 experts has about 100 KiB
MAX_STATEMENT_BYTES = MAX_MESSAGE_BYTES
MAX_PROOF_BYTES = 4096  # a sealed offer is about 500 bytes

MAX_INT = (1 << 63) - 1
MAX_FLOAT_BITS = (1 << 32) - 1

MAX_PEER_CHARS = 64
MAX_FRAGMENT_CHARS = 64
MAX_NAME_CHARS = 64
MAX_WHY_CHARS = 1000
MAX_ADDRESS_CHARS = 256
MAX_SUCCESSOR_CHARS = 4400  # an invite and a signature

MAX_ADDRESSES = 16
MAX_RECENT = 64
MAX_LIST_ITEMS = 8192  # peers of a run, experts, fragments
MAX_LEDGER_RECORDS = 100_000  # in one call
MAX_RECEIPT_PAIRS = 1 << 18

# Statements that prove presence (hello, join, command) live this long: enough for a slow link, short enough to remember.
FRESH_S = 120.0
MAX_FRESH_S = 900.0
