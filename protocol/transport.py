"""gRPC glue that client, server and dealer share; the only module of `protocol` that knows sockets.

One catalogue maps every error to a gRPC status and back, so that the peer sees the named error and one public sentence,
never a traceback.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NoReturn, TypeVar

import grpc

from protocol import errors
from protocol.errors import InputError, PeerError, PeerTimeout, ProtocolViolation, RelucentError, VersionMismatch

log = logging.getLogger("relucent")

OPTIONS = [
    ("grpc.max_receive_message_length", 2 << 20),
    ("grpc.max_send_message_length", 2 << 20),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.lookahead_bytes", 4 << 20),
]

STATUS: dict[type[RelucentError], grpc.StatusCode] = {
    errors.InputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelFileError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ProtocolViolation: grpc.StatusCode.INVALID_ARGUMENT,
    errors.MaterialError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.VersionMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceLimit: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StorageError: grpc.StatusCode.INTERNAL,
    errors.PeerError: grpc.StatusCode.UNAVAILABLE,
    errors.PeerTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_BY_NAME = {kind.__name__: kind for kind in STATUS}
_NAME_KEY = "relucent-error"

Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing")


def connect(address: str, insecure: bool) -> grpc.Channel:
    """A channel to a peer. Raises InputError for an address that cannot be one, or without `insecure`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{address!r} is no address", "write HOST:PORT, such as 127.0.0.1:7001")
    if not insecure:
        raise InputError("this version has plaintext transport only", "pass --insecure to accept that, on trusted networks")
    return grpc.insecure_channel(address, OPTIONS)


def abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """End a call with the status of `error`; anything unexpected becomes one neutral sentence and a log entry."""
    if isinstance(error, RelucentError):
        context.set_trailing_metadata(((_NAME_KEY, type(error).__name__),))
        context.abort(STATUS[type(error)], str(error))
    log.error("a call failed inside", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, "the peer failed inside; its log says more")
    raise AssertionError("abort returns never")


def translate(error: grpc.RpcError, peer: str) -> RelucentError:
    """The error that the peer meant, from the failed call."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    detail = (error.details() if isinstance(error, grpc.Call) else "") or ""
    metadata = dict(error.trailing_metadata() or ()) if isinstance(error, grpc.Call) else {}
    kind = _BY_NAME.get(str(metadata.get(_NAME_KEY, "")))
    if kind is not None:
        return kind(f"{peer}: {detail}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerTimeout(f"{peer} did not answer within the deadline", "try again, or raise --timeout")
    if code == grpc.StatusCode.UNAVAILABLE:
        return PeerError(f"{peer} is unreachable or went away", "check the address and that it runs")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return VersionMismatch(f"{peer} is no Relucent service of this version", "check the address and the versions")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.ResourceLimit(f"{peer} is out of capacity, or a message was too large", "try again later")
    return PeerError(f"{peer} failed ({code.name.lower()})", "its log says more")


class RequestQueue(Generic[Outgoing]):
    """The request stream of a call: an iterator for gRPC that other threads feed."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()

    def put(self, message: Outgoing) -> None:
        self._queue.put(message)

    def close(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[Outgoing]:
        while (message := self._queue.get()) is not None:
            yield message


def next_message(messages: Iterator[Incoming], peer: str) -> Incoming:
    """The next message of a call. Raises the translated error, or PeerError if the peer ended the stream."""
    try:
        return next(messages)
    except StopIteration:
        raise PeerError(f"{peer} ended the call early") from None
    except grpc.RpcError as error:
        raise translate(error, peer) from None


def next_kind(messages: Iterator[Any], kind: str) -> Any:
    """The next message of a caller's stream, which must be of `kind`."""
    try:
        message = next(messages, None)
    except grpc.RpcError:
        message = None
    except Exception as error:  # grpc raises a bare Exception when the call is cancelled while waiting
        raise PeerError("the caller went away") from error
    if message is None:
        raise PeerError("the caller ended the call early")
    if message.WhichOneof("kind") != kind:
        raise ProtocolViolation(f"a message of another kind arrived where {kind!r} is due")
    return getattr(message, kind)


def when_over(context: grpc.ServicerContext, action: Callable[[], Any]) -> None:
    """Run `action` once the call is over, now if it is already."""
    if not context.add_callback(action):
        action()


@contextmanager
def time_limit(context: grpc.ServicerContext, limit_s: float) -> Iterator[None]:
    """Cancel the call after `limit_s` seconds, whatever the peer's own deadline."""
    timer = threading.Timer(limit_s, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run_session(work: Callable[[Callable[[Any], None]], None], context: grpc.ServicerContext, limit_s: float) -> Iterator[Any]:
    """Serve one streaming call: `work(transmit)` runs in a thread of its own, what it transmits is yielded.

    The call is cancelled after `limit_s` seconds whatever the peer's own deadline, and its error becomes the status.
    """
    outgoing: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=16)
    gone = threading.Event()
    when_over(context, gone.set)

    def transmit(message: Any, error: BaseException | None = None) -> None:
        while True:
            if gone.is_set():
                raise PeerError("the peer ended the call")
            try:
                outgoing.put((message, error), timeout=0.2)
                return
            except queue.Full:
                continue

    def run() -> None:
        failure: BaseException | None = None
        try:
            work(transmit)
        except BaseException as error:
            failure = error
        try:
            transmit(None, failure)
        except PeerError:
            if failure is not None and not isinstance(failure, RelucentError):
                log.error("a call failed inside after its peer had gone", exc_info=failure)

    thread = threading.Thread(target=run, daemon=True, name="session")
    thread.start()
    try:
        with time_limit(context, limit_s):
            while True:
                try:
                    message, failure = outgoing.get(timeout=0.5)
                except queue.Empty:
                    if gone.is_set():  # the session could not hand over its end any more
                        return
                    continue
                if failure is not None:
                    abort(context, failure)
                if message is None:
                    return
                yield message
    finally:
        gone.set()
