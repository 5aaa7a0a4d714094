"""Every exception decentra raises on purpose, sorted by whose fault it is; each knows the exit code of the command it ends."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every decentra command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    INTEGRITY = 5
    VERSION = 6


class DecentraError(Exception):
    """Base class. The message says what was expected, what came, from whom, and what to do."""

    exit_code: ExitCode = ExitCode.FAILED


class ConfigError(DecentraError):
    """The local user's mistake: a file, flag or key that cannot be used as given."""

    exit_code = ExitCode.USAGE


class NoRoomNow(DecentraError):
    """The machine would do, but other programs have its memory now: worth trying again later."""


class InviteError(ConfigError):
    """An invite line that is malformed, incomplete or of a newer format."""


class DataError(ConfigError):
    """Training text that is missing, empty, binary or too short."""


class Unreachable(DecentraError):
    """Nobody answered in time: a bootstrap node, the averaging service or a peer."""

    exit_code = ExitCode.UNREACHABLE


class PortTaken(ConfigError):
    """A listening port is in use by another process."""


class InUse(ConfigError):
    """A file of ours that another process works with."""


class Refused(DecentraError):
    """The other side answered and said no: not admitted, expired, used up, revoked."""

    exit_code = ExitCode.REFUSED


class RunOver(Refused):
    """The run has ended; its result can be pulled."""


class NotAMember(Refused):
    """The service does not know this peer: it never joined, or another machine took over from a copy that lacks its admission."""


class AlreadyHere(Refused):
    """A process of the same identity is in the run; if it was killed, that is forgotten within seconds."""


class Expired(Refused):
    """Papers or an order that held until some time ago."""


class IntegrityError(DecentraError):
    """Bytes are not what their digest or signature says, or this machine computes different bits."""

    exit_code = ExitCode.INTEGRITY


class RejectedPayload(IntegrityError):
    """A foreign packet, record or message that was judged and refused.

    ``reason`` is one short code: ``digest``, ``signature``, ``signer``, ``purpose``, ``run``, ``expired``, ``expiry``, ``relabelled``,
    ``replayed``, ``size``, ``shape``, ``codec``, ``not-finite``, ``norm``, ``rate`` or ``malformed``.
    """

    def __init__(self, reason: str, detail: str, *, peer: str = "?", round: int | None = None) -> None:
        self.reason, self.detail, self.peer, self.round = reason, detail, peer, round
        at = "" if round is None else f" in round {round}"
        super().__init__(f"payload from {peer}{at} refused ({reason}): {detail}")


class VersionMismatch(DecentraError):
    """The two sides speak different protocol versions."""

    exit_code = ExitCode.VERSION


class ManifestMismatch(DecentraError):
    """Two sides hold different contracts; ``keys`` names the entries that differ where both are known."""

    exit_code = ExitCode.VERSION

    def __init__(self, ours: str, theirs: str, keys: tuple[str, ...] = (), what: str = "manifest") -> None:
        self.ours, self.theirs, self.keys = ours, theirs, keys
        differ = f"; these keys differ: {', '.join(keys)}" if keys else ""
        super().__init__(f"{what} differs: ours is {ours}, theirs is {theirs}{differ}")


class TrainingError(DecentraError):
    """The local trainer cannot go on (loss not finite for many steps, out of memory)."""
