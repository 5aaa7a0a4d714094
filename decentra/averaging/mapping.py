"""gRPC status codes to decentra's errors and back: one context manager for each side. No other module looks at a code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc

from decentra.errors import (
    AlreadyHere,
    DecentraError,
    Expired,
    IntegrityError,
    ManifestMismatch,
    NotAMember,
    Refused,
    RejectedPayload,
    RunOver,
    Unreachable,
    VersionMismatch,
)

MAX_DETAIL_CHARS = 1000
ERROR_KEY, REASON_KEY, OURS_KEY, THEIRS_KEY = (f"decentra-{name}" for name in ("error", "reason", "ours", "theirs"))

# The first class that fits decides; RejectedPayload is an IntegrityError and has to stand before it.
_CODES: tuple[tuple[type[DecentraError], grpc.StatusCode], ...] = (
    (Refused, grpc.StatusCode.PERMISSION_DENIED),
    (VersionMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (ManifestMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (RejectedPayload, grpc.StatusCode.INVALID_ARGUMENT),
    (IntegrityError, grpc.StatusCode.DATA_LOSS),
    (Unreachable, grpc.StatusCode.UNAVAILABLE),
)
_REFUSALS: dict[str, type[Refused]] = {cls.__name__: cls for cls in (RunOver, NotAMember, AlreadyHere, Expired)}  # on which callers act


@asynccontextmanager
async def answering(context: Any, on_bug: Callable[[Exception], None]) -> AsyncIterator[None]:
    """Server side: what the block raises becomes the call's status. A bug is handed to ``on_bug`` and tells the caller nothing."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except DecentraError as error:
        await _abort(context, error)
    except Exception as error:
        on_bug(error)
        await context.abort(grpc.StatusCode.INTERNAL, "the averaging service failed on this call; its log says why")


async def _abort(context: Any, error: DecentraError) -> None:
    code = next((code for cls, code in _CODES if isinstance(error, cls)), grpc.StatusCode.INTERNAL)
    metadata = [(ERROR_KEY, type(error).__name__)]
    detail = str(error)
    if isinstance(error, RejectedPayload):
        metadata, detail = [*metadata, (REASON_KEY, _header(error.reason))], error.detail
    if isinstance(error, ManifestMismatch):
        metadata += [(OURS_KEY, _header(error.ours)), (THEIRS_KEY, _header(error.theirs))]
    await context.abort(code, detail[:MAX_DETAIL_CHARS], tuple(metadata))


def _header(text: str) -> str:
    """Metadata values are printable ASCII."""
    return "".join(char if " " <= char <= "~" else "?" for char in text[:100])


@contextmanager
def calling(address: str, call: Any = None) -> Iterator[None]:
    """Client side: whatever gRPC raises in the block becomes an error of ours that names ``address``."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error.code(), error.details(), error.trailing_metadata(), address) from None
    except (grpc.aio.UsageError, asyncio.InvalidStateError):
        raise Unreachable(f"the stream to the averaging service at {address} has ended; attend again") from None
    except asyncio.CancelledError:
        # A call that the other side cancelled raises the same exception as a cancelled task; only the latter may go on.
        task = asyncio.current_task()
        if call is not None and call.cancelled() and task is not None and not task.cancelling():
            raise Unreachable(f"the averaging service at {address} ended the stream; it may be restarting, attend again") from None
        raise


async def ending_of(call: Any, address: str) -> DecentraError:
    """Why a stream that is done has ended, as the error that whoever still writes to it gets."""
    if await call.code() == grpc.StatusCode.OK:
        return Unreachable(f"the averaging service at {address} has closed the stream; attend again")
    return error_of(await call.code(), await call.details(), await call.trailing_metadata(), address)


def error_of(code: Any, details: str | None, metadata: Any, address: str) -> DecentraError:
    """The error of ours that a failed call's status stands for."""
    told = {str(key): str(value) for key, value in (metadata or ())}
    detail, name = details or "no details", told.get(ERROR_KEY)
    if name == ManifestMismatch.__name__:
        return ManifestMismatch(told.get(THEIRS_KEY, "?"), told.get(OURS_KEY, "?"))
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return _REFUSALS.get(name or "", Refused)(f"the averaging service at {address} refused: {detail}")
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED):
        return VersionMismatch(f"the averaging service at {address}: {detail}; update decentra on both sides")
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return RejectedPayload(told.get(REASON_KEY, "malformed"), detail, peer=f"this machine, judged by {address}")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in detail:
        return RejectedPayload("size", f"a message between us and {address} is too large: {detail}", peer=address)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Unreachable(f"the averaging service at {address} is too busy ({detail}); try again in a while")
    if code == grpc.StatusCode.DATA_LOSS:
        return IntegrityError(f"the averaging service at {address}: {detail}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unreachable(f"the averaging service at {address} did not answer in time; it may be overloaded or cut off")
    return Unreachable(f"the averaging service at {address} does not answer ({code.name}: {detail[:300]}); it may be down or restarting")
