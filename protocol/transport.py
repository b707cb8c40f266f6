"""gRPC glue that client, server and dealer share; the only module of `protocol` that knows sockets.

One catalogue maps every error to a gRPC status and back, so that the peer sees the named error and one public sentence,
never a traceback.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import grpc

from protocol import errors
from protocol.errors import (
    AccessDenied,
    InputError,
    PeerError,
    PeerTimeout,
    ProtocolViolation,
    RelucentError,
    StorageError,
    VersionMismatch,
    one_line,
)
from protocol.timeline import Timeline
from protocol.tls import Identity, check_valid, load_ca, load_key_pair, parse_identity

log = logging.getLogger("relucent")
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the call that is served here: random, it says nothing about the caller. The log has it, and the error that the caller sees."""

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
    errors.MaterialElsewhere: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.VersionMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AccessDenied: grpc.StatusCode.UNAUTHENTICATED,
    errors.ResourceLimit: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StorageError: grpc.StatusCode.INTERNAL,
    errors.PeerError: grpc.StatusCode.UNAVAILABLE,
    errors.PeerTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_BY_NAME = {kind.__name__: kind for kind in STATUS}
_NAME_KEY, _HINT_KEY, _REQUEST_KEY = "relucent-error", "relucent-hint", "relucent-request"
OPENING_S = 10.0
"""How long a call's first message may take."""
TIMELINE_KEY = "relucent-timeline-bin"
ACCEPTED_KEY = "relucent-accepted"

Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing")


@dataclass(frozen=True, repr=False)
class Security:
    """How a party protects its links.

    ca: file of the authorities that it trusts; None for the system's. certificate, key: files of its own identity, if any.
    token: a client's API token. insecure: plaintext, on purpose.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = None
    insecure: bool = False

    def __repr__(self) -> str:
        return f"Security(insecure={self.insecure}, <secret>)"

    def pair(self) -> tuple[bytes, bytes] | None:
        """PEM key and certificate chain, or None. Raises InputError if only one of the two files is given, or they are bad."""
        if (self.certificate is None) != (self.key is None):
            raise InputError("a certificate and its key are given together", "pass both or neither")
        return None if self.certificate is None or self.key is None else load_key_pair(self.certificate, self.key)


class _Files:
    """A party's own certificate and key as in its files, and the authorities that it trusts; read again once they change."""

    def __init__(self, security: Security, with_ca: bool = True) -> None:
        self._security = security if with_ca else replace(security, ca=None)
        self._seen = self._times()
        self._read()

    def _times(self) -> list[int]:
        files = (self._security.certificate, self._security.key, self._security.ca)
        return [path.stat().st_mtime_ns for path in files if path is not None and path.exists()]

    def _read(self) -> None:
        pair, ca = self._security.pair(), load_ca(self._security.ca) if self._security.ca is not None else None
        self.pair, self.ca = pair, ca

    def renewed(self) -> bool:
        """Whether they have changed since the last call; what cannot be used changes nothing."""
        try:
            now = self._times()
            if now == self._seen:
                return False
            self._read()
        except (OSError, InputError) as error:
            log.error("the renewed certificate cannot be used, the old one stays: %s", error)
            return False
        self._seen = now
        return True


class _Renewable(grpc.Channel):  # type: ignore[misc]
    """A channel with a certificate: once its files change, further calls go over a new connection; those that run keep theirs."""

    def __init__(self, files: _Files, make: Callable[[_Files], grpc.Channel]) -> None:
        self._files, self._make, self._lock = files, make, threading.Lock()
        self._channel = make(files)

    def _present(self) -> grpc.Channel:
        with self._lock:
            if self._files.renewed():
                self._channel = self._make(self._files)
            return self._channel

    def _method(self, kind: str) -> Callable[..., Any]:
        return lambda *of, **how: lambda *request, **terms: getattr(self._present(), kind)(*of, **how)(*request, **terms)

    unary_unary = property(lambda self: self._method("unary_unary"))
    unary_stream = property(lambda self: self._method("unary_stream"))
    stream_unary = property(lambda self: self._method("stream_unary"))
    stream_stream = property(lambda self: self._method("stream_stream"))

    def subscribe(self, callback: Callable[[Any], None], try_to_connect: bool = False) -> None:
        self._present().subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[Any], None]) -> None:
        self._present().unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> _Renewable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: str, security: Security) -> grpc.Channel:
    """A channel to a peer; it follows its certificate's files. Raises InputError for no address, and for unusable certificates."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{address!r} is no address", "write HOST:PORT, such as 127.0.0.1:7001")
    if security.insecure:
        if security.token is not None or security.certificate is not None:
            raise InputError("a token or certificate is not sent over plaintext", "leave --insecure out")
        return grpc.insecure_channel(address, OPTIONS)
    if security.token is not None and not (security.token.isascii() and security.token.isprintable() and security.token):
        raise InputError("the API token has characters that no token has", "check the token file")

    def make(files: _Files) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(files.ca, *(files.pair or (None, None)))
        if security.token is not None:
            credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(security.token))
        return grpc.secure_channel(address, credentials, OPTIONS)

    files = _Files(security)
    return make(files) if security.certificate is None else _Renewable(files, make)


def listen(server: grpc.Server, address: str, security: Security, verify_peers: bool = False) -> str:
    """Let `server` listen; returns the address with the port that was chosen.

    verify_peers: callers must show a certificate of the trusted authorities. Raises InputError, PeerError.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"{address!r} is no address to listen on", "write HOST:PORT, such as 127.0.0.1:7001")
    if security.insecure:
        add = server.add_insecure_port
    else:
        if security.certificate is None:
            raise InputError("no certificate", "make one with `init` and pass --certificate and --key, or --insecure on trusted networks")
        if verify_peers and security.ca is None:
            raise InputError("no CA certificate to verify peers with", "pass --ca")
        files = _Files(security, verify_peers)

        def configuration() -> Any:
            assert files.pair is not None  # a certificate is given
            return grpc.ssl_server_certificate_configuration([files.pair], files.ca)

        credentials = grpc.dynamic_ssl_server_credentials(
            configuration(), lambda: configuration() if files.renewed() else None, verify_peers)

        def add(where: str) -> int:
            return int(server.add_secure_port(where, credentials))

    try:
        bound = add(address)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise PeerError(f"cannot listen on {address}", "is the port in use by another program?")
    return f"{host}:{bound}"


def certified(context: grpc.ServicerContext) -> Identity | None:
    """The caller's identity by its verified certificate; None without one. Raises AccessDenied if it has expired since the handshake."""
    shown = context.auth_context()
    for pem in shown.get("x509_pem_cert", ()):
        check_valid(pem)
    for uri in shown.get("peer_uri", ()):
        identity = parse_identity(uri.decode(errors="replace"))
        if identity is not None:
            return identity
    return None


def is_plaintext(context: grpc.ServicerContext) -> bool:
    """Whether a call came over plaintext transport."""
    return list(context.auth_context().get("transport_security_type", ())) != [b"ssl"]


def bearer_token(context: grpc.ServicerContext) -> str | None:
    """The API token of a call, or None."""
    for key, value in context.invocation_metadata():
        if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
            return value.removeprefix("Bearer ")
    return None


@contextmanager
def answering(what: str, context: grpc.ServicerContext) -> Iterator[None]:
    """Serve one call under an id of its own; an error is logged as one of `what`, and becomes the call's status."""
    request_id.set(secrets.token_hex(6))
    try:
        yield
    except Exception as error:
        _log_failure(what, error)
        _end(context, error)


def _log_failure(what: str, error: BaseException) -> None:
    if isinstance(error, RelucentError):
        log.warning("%s failed: %s: %s", what, type(error).__name__, one_line(str(error)))
    else:
        log.error("%s failed inside", what, exc_info=error)


def _end(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """End a call with the status of `error`; what is unexpected, or names files of this machine, becomes one neutral sentence."""
    metadata = [(_REQUEST_KEY, request_id.get())]
    if isinstance(error, RelucentError):
        told = error
        if isinstance(error, StorageError):
            told = StorageError("it cannot store anything now", "try again later; its log says more")
        hint = one_line(told.hint).encode("ascii", "replace").decode()  # as HTTP/2 wants it
        context.set_trailing_metadata((*metadata, (_NAME_KEY, type(error).__name__), (_HINT_KEY, hint)))
        context.abort(STATUS[type(error)], str(told))
    context.set_trailing_metadata(metadata)
    context.abort(grpc.StatusCode.INTERNAL, "the peer failed inside; its log says more")
    raise AssertionError("abort returns never")


def translate(error: grpc.RpcError, peer: str) -> RelucentError:
    """The error that the peer meant, from the failed call; its text ends with the id under which the peer's log has it."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    detail = one_line((error.details() if isinstance(error, grpc.Call) else "") or "")
    metadata = dict(error.trailing_metadata() or ()) if isinstance(error, grpc.Call) else {}
    kind = _BY_NAME.get(str(metadata.get(_NAME_KEY, "")))
    request = str(metadata.get(_REQUEST_KEY, ""))
    where = f" (request {request})" if re.fullmatch("[0-9a-f]{12}", request) else ""
    if kind is not None:
        return kind(f"{peer}: {detail}{where}", one_line(str(metadata.get(_HINT_KEY, ""))))
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerTimeout(f"{peer} did not answer within the deadline", "try again, or raise --timeout")
    if code == grpc.StatusCode.CANCELLED:
        return PeerTimeout(f"{peer} ended the call: it stood still, or took too long", "try again; is the link too slow for this batch?")
    if code == grpc.StatusCode.UNAVAILABLE and any(word in detail.lower() for word in ("handshake", "certificate", "ssl", "tls")):
        reason = "its certificate is not trusted, expired, or for another name" if "CERTIFICATE_VERIFY_FAILED" in detail else "TLS failed"
        return PeerError(f"no secure connection to {peer}: {reason}", "check --ca, both certificates, the address and the clock")
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return AccessDenied(f"{peer} does not accept this identity", "check the token or certificate")
    if code == grpc.StatusCode.UNAVAILABLE:
        return PeerError(f"{peer} is unreachable or went away", "check the address and that it runs")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return VersionMismatch(f"{peer} is no Relucent service of this version", "check the address and the versions")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.ResourceLimit(f"{peer} is out of capacity, or a message was too large", "try again later")
    return PeerError(f"{peer} failed ({code.name.lower()}){where}", "its log says more")


def pack_timeline(timeline: Timeline) -> bytes:
    """A timeline as the value of a call's metadata."""
    return zlib.compress(json.dumps(timeline.describe()).encode())


def timeline_of(call: Any) -> tuple[dict[str, Any], ...]:
    """What the peer of a call that ends tells of its time, nothing if it does not. Waits for the end. Raises ProtocolViolation."""
    told = [v for k, v in call.trailing_metadata() or () if k == TIMELINE_KEY and isinstance(v, bytes)]
    return tuple(unpack_timeline(told[0])) if told else ()


def unpack_timeline(data: bytes) -> list[dict[str, Any]]:
    """Inverse of `pack_timeline`. Raises ProtocolViolation."""
    try:
        text = zlib.decompressobj().decompress(data, 1 << 20)
        layers = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ProtocolViolation("the peer sent an unreadable timeline") from error
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and _is_layer(layer) for layer in layers):
        raise ProtocolViolation("the peer sent an unreadable timeline")
    return layers


def _is_layer(layer: dict[str, Any]) -> bool:
    return isinstance(layer.get("layer"), str) and all(type(value) in (int, float) for key, value in layer.items() if key != "layer")


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


def ask(method: Callable[..., Any], request: Any, peer: str, timeout_s: float, **terms: Any) -> Any:
    """The answer of a call that has one. Raises the translated error, or PeerError if the peer ended the call without it."""
    try:
        answer = method(request, timeout=timeout_s, **terms)
    except grpc.RpcError as error:
        raise translate(error, peer) from None
    if answer is None:
        raise PeerError(f"{peer} ended the call early")
    return answer


def next_message(messages: Iterator[Incoming], peer: str) -> Incoming:
    """The next message of a call. Raises the translated error, or PeerError if the peer ended the stream."""
    try:
        return next(messages)
    except StopIteration:
        raise PeerError(f"{peer} ended the call early") from None
    except grpc.RpcError as error:
        raise translate(error, peer) from None


def next_from_caller(messages: Iterator[Incoming]) -> Incoming:
    """The next message of a caller's stream. Raises PeerError."""
    try:
        return next(messages)
    except (StopIteration, grpc.RpcError):
        raise PeerError("the caller ended the call early") from None
    except Exception as error:  # grpc raises a bare Exception when the call is cancelled while waiting
        raise PeerError("the caller went away") from error


def next_kind(messages: Iterator[Any], kind: str) -> Any:
    """The next message of a caller's stream, which must be of `kind`."""
    message = next_from_caller(messages)
    if message.WhichOneof("kind") != kind:
        raise ProtocolViolation(f"a message of another kind arrived where {kind!r} is due")
    return getattr(message, kind)


def when_over(context: grpc.ServicerContext, action: Callable[[], Any]) -> None:
    """Run `action` once the call is over, now if it is already."""
    if not context.add_callback(action):
        action()


@contextmanager
def time_limit(context: grpc.ServicerContext, limit_s: float, idle_s: float | None = None,
               first_s: float | None = None) -> Iterator[Callable[[], None]]:
    """Cancel the call after `limit_s` seconds, or `idle_s` after the last `touch`, whatever the peer's own deadline.

    first_s: until the first `touch`, if that is another time. Yields `touch`, to be called at every message.
    """
    over = threading.Event()
    started = last = time.monotonic()
    bound_s = idle_s if first_s is None else first_s

    def touch() -> None:
        nonlocal last, bound_s
        last, bound_s = time.monotonic(), idle_s

    def watch() -> None:
        while True:
            left = started + limit_s - time.monotonic()
            if bound_s is not None:
                left = min(left, last + bound_s - time.monotonic())
            if left <= 0:
                log.warning("a call is cancelled: it stood still, or took too long")
                context.cancel()
                return
            if over.wait(left):
                return

    threading.Thread(target=copy_context().run, args=(watch,), daemon=True, name="time-limit").start()
    try:
        yield touch
    finally:
        over.set()


class PromptCallers(grpc.ServerInterceptor):  # type: ignore[misc]
    """Ends calls whose only request does not come within `opening_s`: gRPC itself would keep a thread for each as long as it lasts."""

    def __init__(self, opening_s: float) -> None:
        self._opening_s = opening_s

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """The handler, reading a stream of one request, which is the same on the wire."""
        handler = continuation(details)
        if handler is None or handler.request_streaming:
            return handler

        def request(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with answering("opening", context), time_limit(context, self._opening_s):
                return next_from_caller(messages)

        def answer(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
            return handler.unary_unary(request(messages, context), context)

        def answers(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            yield from handler.unary_stream(request(messages, context), context)

        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        return make(answers if handler.response_streaming else answer, handler.request_deserializer, handler.response_serializer)


@dataclass(frozen=True)
class Session:
    """What serves one streaming call: `send` to the caller, `incoming` from it, and `touch`, a sign of life from anywhere else."""

    send: Callable[[Any], None]
    incoming: Iterator[Any]
    touch: Callable[[], None]


def run_session(what: str, work: Callable[[Session], None], requests: Iterator[Any], context: grpc.ServicerContext, limit_s: float,
                idle_s: float | None = None, first_s: float | None = None) -> Iterator[Any]:
    """Serve one streaming call under an id of its own: `work(session)` runs in a thread of its own, what it sends is yielded.

    The call is cancelled after `limit_s` seconds, or when there was no message either way and no `touch` for `idle_s` (`first_s`
    before the first), whatever the peer's own deadline; an error is logged as one of `what`, and becomes the call's status.
    """
    request_id.set(secrets.token_hex(6))
    outgoing: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=16)
    gone = threading.Event()
    when_over(context, gone.set)

    def put(message: Any, error: BaseException | None = None) -> None:
        while True:
            if gone.is_set():
                raise PeerError("the peer ended the call")
            try:
                outgoing.put((message, error), timeout=0.2)
                return
            except queue.Full:
                continue

    def run(session: Session) -> None:
        failure: BaseException | None = None
        try:
            work(session)
        except BaseException as error:
            failure = error
            _log_failure(what, error)
        try:
            put(None, failure)
        except PeerError:
            pass
        finally:
            failure = None  # its traceback holds this frame, and with it all that the session held

    try:
        with time_limit(context, limit_s, idle_s, first_s) as touch:

            def heard() -> Iterator[Any]:
                for request in requests:
                    touch()
                    yield request

            threading.Thread(target=copy_context().run, args=(run, Session(put, heard(), touch)), daemon=True, name="session").start()
            while True:
                try:
                    message, failure = outgoing.get(timeout=0.5)
                    touch()
                except queue.Empty:
                    if gone.is_set():  # the session could not hand over its end any more
                        return
                    continue
                if failure is not None:
                    _end(context, failure)
                if message is None:
                    return
                yield message
    finally:
        gone.set()
