"""What can go wrong. A miss is no error: it is ``None``, or an outcome."""

from typing import Self


class TerraceError(Exception):
    """Any error of this package."""


class ConnectError(TerraceError, ConnectionError):
    """No daemon was named, or none answers there."""


class SessionEnded(TerraceError, ConnectionError):
    """The daemon went away, or the session was closed: connect again, open the spaces, lease again."""


class NoAnswer(TerraceError, TimeoutError):
    """The daemon is there and does not answer. What was asked may still be done."""


class Throttled(TerraceError):
    """The daemon is over a limit: wait a little and ask again."""


class Refused(TerraceError):
    """The daemon refused; nothing was changed. ``code`` is the gRPC code, for example ``PermissionDenied``."""

    def __init__(self, message: str, code: str = "Unknown") -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[Self], tuple[object, str]]:
        return type(self), (self.args[0], self.code)


class InvalidArgument(TerraceError, ValueError):
    """An argument that cannot be meant: a key too long, a payload that is not one block, a foreign space."""


class Unsupported(TerraceError):
    """The session's transport cannot do this: mapped blocks need the socket, streams need gRPC."""


class ProtocolError(TerraceError):
    """The daemon answered something that the protocol does not allow, or a chunk could not be mapped."""


class StaleBlock(TerraceError):
    """The bytes were not, or are no longer, those that were granted: throw away what was derived from them."""


class CorruptBlock(TerraceError):
    """The bytes do not match the checksum that was sealed: count it as a miss."""


class DeviceFailed(TerraceError):
    """The device is not there, is full, or failed. What was on a lost device is gone: count it as misses."""


class ClosedError(TerraceError, ValueError):
    """The object was closed before."""


class BufferInUse(TerraceError, BufferError):
    """Views of the block are alive, or it may not be written any more."""


class ForkedError(TerraceError):
    """The object belongs to the parent process: connect again in the child."""
