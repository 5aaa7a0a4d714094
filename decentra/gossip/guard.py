"""Keeps hostile DHT bytes from killing the process: bounds on size and nesting, set before hivemind unpacks anything. Judges no signatures.

hivemind unpacks a tuple (msgpack extension type 0x40) by calling the unpacker again from inside the unpacker, with no limit; every level
costs a large piece of C stack, so about 200 levels (less than 1 kB on the wire) end the process with SIGSEGV.
"""

from __future__ import annotations

import threading
from typing import Any

from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.serializer import MSGPackSerializer

from decentra.errors import RejectedPayload

MAX_VALUE_BYTES = 10_000
MAX_DICTIONARY_BYTES = 256 << 10  # a whole key with all its subkeys, as one peer sends it to another
MAX_EXT_DEPTH = 8
MAX_SUBKEYS = 128  # per DHT key; with the byte limit below a stored key always fits MAX_DICTIONARY_BYTES
MAX_STORED_BYTES = 128 << 10

_DICTIONARY_CODE = 0x50
# msgpack: first byte of an extension -> position of its type code (ext 8, 16, 32 and the five fixed lengths)
_EXT_CODE_AT = {0xC7: 2, 0xC8: 3, 0xC9: 5, 0xD4: 1, 0xD5: 1, 0xD6: 1, 0xD7: 1, 0xD8: 1}

_state = threading.local()
_install_lock = threading.Lock()


def install_guard() -> None:
    """Bound what hivemind unpacks and stores in this process. Safe to call again; call it before the first DHT node starts.

    After it, hivemind's unpacker raises RejectedPayload for values over ``MAX_VALUE_BYTES`` (whole keys: ``MAX_DICTIONARY_BYTES``) and for
    extensions nested deeper than ``MAX_EXT_DEPTH``; a key that is full takes no new subkeys.
    """
    with _install_lock:
        if getattr(MSGPackSerializer, "_decentra_guard", False):
            return
        _guard_unpacker()
        _guard_storage()
        # hivemind prints to the terminal by itself; its messages go to the root logger instead, where the program decides
        use_hivemind_log_handler("nowhere")
        MSGPackSerializer._decentra_guard = True


def _guard_unpacker() -> None:
    decode = MSGPackSerializer._decode_ext_types.__func__
    loads = MSGPackSerializer.loads.__func__

    def bounded_decode(cls: Any, type_code: int, data: bytes) -> Any:
        depth = getattr(_state, "depth", 0)
        if depth >= MAX_EXT_DEPTH:
            raise RejectedPayload("malformed", f"a DHT value nests extensions deeper than {MAX_EXT_DEPTH}; it is ignored")
        _state.depth = depth + 1
        try:
            return decode(cls, type_code, data)
        finally:
            _state.depth = depth

    def bounded_loads(cls: Any, buf: bytes) -> Any:
        # inside a dictionary the unpacker is called again for its list of items
        is_whole_key = getattr(_state, "depth", 0) > 0 or _is_dictionary(buf)
        limit = MAX_DICTIONARY_BYTES if is_whole_key else MAX_VALUE_BYTES
        if len(buf) > limit:
            raise RejectedPayload("size", f"a DHT value has at most {limit} bytes, got {len(buf)}; it is ignored")
        return loads(cls, buf)

    MSGPackSerializer._decode_ext_types = classmethod(bounded_decode)
    MSGPackSerializer.loads = classmethod(bounded_loads)


def _is_dictionary(buf: bytes) -> bool:
    at = _EXT_CODE_AT.get(buf[0]) if buf else None
    return at is not None and len(buf) > at and buf[at] == _DICTIONARY_CODE


def _guard_storage() -> None:
    store_subkey = DHTLocalStorage.store_subkey

    def bounded_store_subkey(self: Any, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        present = self.get(key)
        if present is not None and isinstance(present.value, DictionaryDHTValue) and _is_full(present.value, subkey, value):
            return False  # those who are in stay in: a flood of strangers must not push members out
        return bool(store_subkey(self, key, subkey, value, expiration_time))

    DHTLocalStorage.store_subkey = bounded_store_subkey


def _is_full(dictionary: Any, subkey: Any, value: bytes) -> bool:
    others = [len(item.value) for name, item in dictionary.items() if name != subkey]
    return len(others) >= MAX_SUBKEYS or sum(others) + len(value) > MAX_STORED_BYTES
