from decentra.pb import messages_pb2 as _messages_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol_version", "run", "certificate", "manifest", "server_time_s")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_S_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run: bytes
    certificate: bytes
    manifest: bytes
    server_time_s: float
    def __init__(self, protocol_version: _Optional[int] = ..., run: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., manifest: _Optional[bytes] = ..., server_time_s: _Optional[float] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("protocol_version", "manifest", "role", "nonce", "name", "token")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    manifest: bytes
    role: _messages_pb2.Role
    nonce: str
    name: str
    token: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., manifest: _Optional[bytes] = ..., role: _Optional[_Union[_messages_pb2.Role, str]] = ..., nonce: _Optional[str] = ..., name: _Optional[str] = ..., token: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("admission",)
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    admission: bytes
    def __init__(self, admission: _Optional[bytes] = ...) -> None: ...

class OutcomeRequest(_message.Message):
    __slots__ = ("fragment", "round")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    fragment: str
    round: int
    def __init__(self, fragment: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class OutcomeReply(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: _messages_pb2.Outcome
    def __init__(self, outcome: _Optional[_Union[_messages_pb2.Outcome, _Mapping]] = ...) -> None: ...

class LedgerRequest(_message.Message):
    __slots__ = ("after_seq", "limit", "copy", "wait_s")
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    after_seq: int
    limit: int
    copy: bytes
    wait_s: float
    def __init__(self, after_seq: _Optional[int] = ..., limit: _Optional[int] = ..., copy: _Optional[bytes] = ..., wait_s: _Optional[float] = ...) -> None: ...

class LedgerRecord(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    def __init__(self, record: _Optional[bytes] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("port", "nonce", "filler")
    PORT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    FILLER_FIELD_NUMBER: _ClassVar[int]
    port: int
    nonce: bytes
    filler: bytes
    def __init__(self, port: _Optional[int] = ..., nonce: _Optional[bytes] = ..., filler: _Optional[bytes] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("address", "is_reachable", "why")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    IS_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    address: str
    is_reachable: bool
    why: str
    def __init__(self, address: _Optional[str] = ..., is_reachable: bool = ..., why: _Optional[str] = ...) -> None: ...

class CommandReply(_message.Message):
    __slots__ = ("answer",)
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    answer: str
    def __init__(self, answer: _Optional[str] = ...) -> None: ...

class ServiceCertificate(_message.Message):
    __slots__ = ("service_public", "tls_fingerprint", "not_after_s", "term")
    SERVICE_PUBLIC_FIELD_NUMBER: _ClassVar[int]
    TLS_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    service_public: bytes
    tls_fingerprint: bytes
    not_after_s: int
    term: int
    def __init__(self, service_public: _Optional[bytes] = ..., tls_fingerprint: _Optional[bytes] = ..., not_after_s: _Optional[int] = ..., term: _Optional[int] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("run", "peer", "role", "expires_at_s")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_S_FIELD_NUMBER: _ClassVar[int]
    run: bytes
    peer: str
    role: _messages_pb2.Role
    expires_at_s: int
    def __init__(self, run: _Optional[bytes] = ..., peer: _Optional[str] = ..., role: _Optional[_Union[_messages_pb2.Role, str]] = ..., expires_at_s: _Optional[int] = ...) -> None: ...

class Credentials(_message.Message):
    __slots__ = ("certificate", "admission")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    admission: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., admission: _Optional[bytes] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("kind", "argument", "nonce")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ARGUMENT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    argument: str
    nonce: bytes
    def __init__(self, kind: _Optional[str] = ..., argument: _Optional[str] = ..., nonce: _Optional[bytes] = ...) -> None: ...
