"""The client's Python API."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import torch
from torch import Tensor

from client.delta_cache import DeltaCache, default_folder
from client.offer import Offer, fetch_offer
from client.stock import DiskStock, MemoryStock, Prepared, Stock
from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol import ring
from protocol.channel import Duplex
from protocol.dealing import DealtToClient
from protocol.errors import (
    InputError,
    MaterialElsewhere,
    MaterialError,
    ModelMismatch,
    PeerError,
    ProtocolViolation,
    RelucentError,
    one_line,
)
from protocol.inference import encode_images
from protocol.material import Material
from protocol.model import PublicModel
from protocol.online import online_client
from protocol.preprocessing import preprocess_client
from protocol.prg import Seed
from protocol.timeline import Timeline
from protocol.transport import ACCEPTED_KEY, RequestQueue, Security, ask, connect, next_message, timeline_of
from protocol.wire import (
    FRAME_BYTES,
    ID_BYTES,
    MAX_DISCARDS,
    PROTOCOL_VERSION,
    SECRET_BYTES,
    ChunkReceiver,
    ChunkSender,
    check_bytes,
)

REFILL_PAUSES_S = (1.0, 60.0)
"""How long the refilling waits after a failure: at first, and at most."""
MAX_LIFETIME_S = 30 * 86_400.0
AWAY_S = 600.0
"""How long material of a server is left alone after another one behind the same address has said that it does not hold it."""
SPLIT_FROM = 8
"""Images from which a batch runs in several streams at once."""
AnyPath = str | os.PathLike[str]
log = logging.getLogger("relucent.client")


@dataclass(frozen=True)
class Prediction:
    """One image's result: class index and name, and the real logits, which only the client learns.

    plausible: False if a logit is far beyond all that the model's calibration saw: the image is unlike what the model was
    trained on, or a truncation failed; the label then means nothing.
    """

    index: int
    label: str
    logits: tuple[float, ...]
    plausible: bool = True


@dataclass(frozen=True)
class ModelSummary:
    """A model that a server offers. relus: per image. classes: how many. input_shape: of one image."""

    name: str
    model_id: str
    relus: int
    classes: int
    input_shape: tuple[int, ...]


@dataclass(frozen=True)
class PhaseCost:
    """Time and traffic of one phase, protobuf and gRPC framing included. Bytes as this client saw them.

    dealer_to_server_bytes: as the server reported them; preprocessing only. timeline, server_timeline, dealer_timeline: milliseconds by
    layer and kind (`protocol.timeline`), if the client was made with `timeline`, and server and dealer allow it. streams: parts of the
    batch that ran at once; bytes and timelines are sums over them.
    """

    seconds: float
    bytes_up: int
    bytes_down: int
    rounds: int = 0
    dealer_bytes: int = 0
    dealer_to_server_bytes: int = 0
    timeline: tuple[dict[str, Any], ...] = ()
    server_timeline: tuple[dict[str, Any], ...] = ()
    dealer_timeline: tuple[dict[str, Any], ...] = ()
    streams: int = 1


def _path(given: AnyPath | None) -> Path | None:
    return None if given is None else Path(given)


def list_models(server: str, *, ca: AnyPath | None = None, token: str | None = None, certificate: AnyPath | None = None,
                key: AnyPath | None = None, insecure: bool = False, timeout_s: float = 20.0) -> list[ModelSummary]:
    """What a server offers, its default first. Arguments as for `Client`. Raises RelucentError's kin."""
    with connect(server, Security(_path(ca), _path(certificate), _path(key), token, insecure)) as channel:
        listed = ask(rpc.InferenceStub(channel).List, pb.ListRequest(protocol_version=PROTOCOL_VERSION), "the server", timeout_s)
    return [ModelSummary(one_line(m.name), one_line(m.model_id), m.relus, m.classes, tuple(m.input_shape)) for m in listed.models]


def default_stock() -> Path:
    """$XDG_STATE_HOME/relucent/stock, or ~/.local/state/relucent/stock."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "relucent" / "stock"


def default_stock_key() -> Path:
    """$XDG_CONFIG_HOME/relucent/stock.key, or ~/.config/relucent/stock.key: apart from what it encrypts."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "relucent" / "stock.key"


class Client:
    """A connection to a server and its dealer.

    Security contract: the server learns neither images nor results, the client nothing of the weights but the
    logits; semi-honest parties, and the dealer colludes with nobody. Every preprocessed material serves one batch.

    Args:
        server, dealer: "host:port".
        ca: file of the authorities that certify server and dealer; None for the system's. token: API token, or certificate and
            key: files; one of them says who this client is. insecure: plaintext transport, on trusted networks only.
        model: name of the model; "" for the server's default.
        cache: folder for Delta; None for the user's cache folder.
        stock: folder in which prepared material outlives this client; None keeps it in memory. stock_key: file of the key that encrypts
            it; None for `default_stock_key`.
        timeout_s: deadline of every call. timeline: record where the time of both phases goes.
        streams: parts of a batch of 8 images or more that run at once: while one waits for its peer or the link, another computes.

    Not for several threads at once; make one client for each. Raises RelucentError's kin (`protocol.errors`).
    """

    def __init__(self, server: str, dealer: str, *, ca: AnyPath | None = None, token: str | None = None,
                 certificate: AnyPath | None = None, key: AnyPath | None = None, insecure: bool = False, model: str = "",
                 cache: AnyPath | None = None, stock: AnyPath | None = None, stock_key: AnyPath | None = None,
                 timeout_s: float = 300.0, timeline: bool = False, streams: int = 2) -> None:
        if streams < 1:
            raise InputError(f"streams must be at least 1, got {streams}")
        self._timeout_s, self._model_name, self._timed, self._streams = timeout_s, model, timeline, streams
        # the dealer is shown neither token nor certificate: it needs no more than the proof for each material
        self._channels = [connect(server, Security(_path(ca), _path(certificate), _path(key), token, insecure)),
                          connect(dealer, Security(_path(ca), insecure=insecure))]
        self._server, self._dealer = rpc.InferenceStub(self._channels[0]), rpc.DealingStub(self._channels[1])
        self._cache = DeltaCache(_path(cache) or default_folder())
        self._stock_folder, self._stock_key = _path(stock), _path(stock_key) or default_stock_key()
        self._stock: Stock = MemoryStock()
        self._refused: dict[bytes, float] = {}
        self._online, self._preparing = threading.Lock(), threading.Lock()
        self._closed, self._consumed = threading.Event(), threading.Event()
        self._refilling: threading.Thread | None = None
        self._offer: Offer = None  # type: ignore[assignment]  # set by _load
        self.last_online: PhaseCost | None = None
        self.last_preprocessing: PhaseCost | None = None
        try:
            self._load_again_once()
        except BaseException:
            self._close_channels()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the server is told to forget material that was prepared in memory and is unused."""
        self._closed.set()
        self._consumed.set()
        self._discard(self._stock.close())
        self._close_channels()
        if self._refilling is not None:
            self._refilling.join()

    def _discard(self, materials: list[tuple[bytes, bytes]]) -> None:
        with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: closed by now; the server forgets them by itself in time
            for start in range(0, len(materials), MAX_DISCARDS):
                part = materials[start : start + MAX_DISCARDS]
                request = pb.DiscardRequest(material_ids=[m for m, _ in part], client_secrets=[s for _, s in part])
                self._server.Discard(request, timeout=5)

    def _close_channels(self) -> None:
        for channel in self._channels:
            channel.close()

    # --- the model --------------------------------------------------------------------------------------------------

    def _load_again_once(self) -> None:
        """Load; once more if the server registers anew in between."""
        try:
            self._load()
        except ModelMismatch:
            self._load()

    def _load(self) -> None:
        """Fetch the offer. Raises ModelMismatch if the model is not the one from before."""
        offer = fetch_offer(self._server, self._model_name, self._cache, self._timeout_s)
        if self._offer is not None and self._offer.model.model_id != offer.model.model_id:
            raise ModelMismatch("the server has changed its model", "make a new client")
        self._offer = offer
        if self._stock_folder is not None:
            self._stock = DiskStock(self._stock_folder, self._stock_key, offer.label)

    @property
    def model(self) -> PublicModel:
        """The public part of the server's model."""
        return self._offer.model

    @property
    def max_batch(self) -> int:
        """Images that the server takes at once."""
        return self._offer.max_batch

    # --- preprocessing ------------------------------------------------------------------------------------------------

    def prepared(self, batch: int = 1) -> int:
        """Inferences of this batch size that are ready to run."""
        return min(self._stock.count(size, self._away()) // count for size, count in Counter(self._parts(batch)).items())

    def _away(self) -> list[bytes]:
        """Holders of material that the server at the other end does not have."""
        return [holder for holder, since in [*self._refused.items()] if time.monotonic() - since < AWAY_S]

    def _parts(self, batch: int) -> list[int]:
        """Images of each stream of a batch."""
        streams = min(self._streams, batch) if batch >= SPLIT_FROM else 1
        return [batch // streams + (i < batch % streams) for i in range(streams)]

    def preprocess(self, n: int = 1, batch: int = 1, progress: Callable[[int], None] = lambda _: None) -> None:
        """Prepare `n` inferences of `batch` images ahead. `progress(done)` is called after each."""
        for done in range(n):
            costs = []
            for size in self._parts(self._checked(batch)):
                with self._preparing:
                    self._put(self._prepare(size))
                costs.append(self.last_preprocessing)
            self.last_preprocessing = _together([c for c in costs if c is not None])
            progress(done + 1)

    def _checked(self, batch: int) -> int:
        """Raises InputError unless the server takes that many images at once."""
        return self._offer.plan(batch).batch

    def keep_ahead(self, n: int, batch: int = 1) -> None:
        """From now on prepare in the background, between predictions, so that `n` inferences of `batch` images are ready.

        A failure is logged and tried again, after a pause that grows. Call it once.
        """
        if self._refilling is not None:
            raise InputError("this client prepares in the background already", "call keep_ahead once")
        self._checked(batch)
        self._refilling = threading.Thread(target=self._refill, args=(n, batch), daemon=True, name="refill")
        self._refilling.start()

    def _refill(self, n: int, batch: int) -> None:
        pause, longest = REFILL_PAUSES_S
        while not self._closed.is_set():
            self._consumed.clear()
            try:
                while not self._closed.is_set() and self.prepared(batch) < n:
                    for size in self._parts(batch):
                        with self._online:  # not while an image waits for its answer
                            pass
                        with self._preparing:
                            self._put(self._prepare(size))
                    pause = REFILL_PAUSES_S[0]
                self._consumed.wait(longest)  # material also expires
            except (RelucentError, ValueError) as error:  # ValueError: the channel was closed
                if not self._closed.is_set():
                    log.warning("cannot prepare ahead: %s; next try in %.0f s", error, pause)
                    self._closed.wait(pause)
                    pause = min(2 * pause, longest)

    def _put(self, prepared: Prepared) -> None:
        material_id = prepared.material.material_id
        try:
            self._stock.add(prepared)
        except BaseException:
            self._discard([(material_id, prepared.secret)])
            raise
        if self._closed.is_set():  # meanwhile
            self._discard(self._stock.close())

    def _prepare(self, batch: int) -> Prepared:
        try:
            return self._preprocess_once(self._offer, batch)
        except ModelMismatch:  # the server has registered anew; its Delta has changed
            self._load_again_once()
            return self._preprocess_once(self._offer, batch)

    def _preprocess_once(self, offer: Offer, batch: int) -> Prepared:
        plan = offer.plan(batch)
        started = time.perf_counter()
        timeline = Timeline(time.perf_counter if self._timed else None, started)
        secret = secrets.token_bytes(SECRET_BYTES)
        client_id = hashlib.sha256(secret).digest()
        up: RequestQueue[pb.PreprocessUp] = RequestQueue()
        up.put(pb.PreprocessUp(open=pb.PreprocessOpen(
            protocol_version=PROTOCOL_VERSION, model_id=offer.model.model_id, delta_id=offer.delta_id, batch=plan.batch,
            client_id=client_id, timeline=self._timed)))
        sender = ChunkSender(up.put, pb.PreprocessUp)
        replies = self._server.Preprocess(iter(up), timeout=self._timeout_s)
        dealt: Any = None
        material_id = b""
        try:
            material_id = check_bytes(next_message(replies, "the server").material_id, ID_BYTES, "the material id")
            dealt = self._dealer.FetchMaterial(pb.MaterialRequest(
                protocol_version=PROTOCOL_VERSION, model_id=offer.model.model_id, registration_id=offer.registration_id,
                material_id=material_id, client_id=client_id, batch=plan.batch, client_secret=secret, mask_id=offer.mask_id,
                timeline=self._timed), timeout=self._timeout_s)
            try:
                seed = Seed(check_bytes(next_message(dealt, "the dealer").seed, SECRET_BYTES, "the seed"))
                source = ChunkReceiver(lambda: next_message(dealt, "the dealer").chunk)
                timeline.lap("setup")
                contents = preprocess_client(plan, offer.delta, DealtToClient(plan, seed, source, timeline), sender, timeline)
            except RelucentError as error:
                raise self._first_cause(replies, error) from None
            up.close()
            reply = next_message(replies, "the server")
            timeline.lap("wait")
            timeline.close("ready")
            seconds = time.perf_counter() - started
            if reply.WhichOneof("kind") != "ready":
                raise ProtocolViolation("the server did not confirm the material")
            if not 0 <= reply.ready.lifetime_s < float("inf"):
                raise ProtocolViolation("the server announces an impossible lifetime of the material")
            holder = check_bytes(reply.ready.holder, ID_BYTES, "the holder's id")
            lifetime = min(reply.ready.lifetime_s, MAX_LIFETIME_S)
            timelines = [timeline_of(call) if self._timed else () for call in (replies, dealt)]
        except BaseException:
            replies.cancel()
            if material_id:
                self._discard([(material_id, secret)])
            raise
        finally:
            up.close()
            if dealt is not None:
                dealt.cancel()
        self.last_preprocessing = PhaseCost(
            seconds, sender.bytes, ID_BYTES + 2 * FRAME_BYTES, 1, source.bytes, int(reply.ready.dealer_bytes),
            timeline=tuple(timeline.describe()), server_timeline=timelines[0], dealer_timeline=timelines[1])
        return Prepared(Material(material_id, plan, contents), secret, time.time() + lifetime, holder=holder)

    def _first_cause(self, replies: Any, error: RelucentError) -> RelucentError:
        """If the server has failed the call, its reason explains more than the dealer's."""
        if isinstance(error, ModelMismatch):  # the server is told the same and registers anew; wait until it has
            with contextlib.suppress(RelucentError):
                next_message(replies, "the server")
            return error
        for _ in range(20):
            if replies.done():
                try:
                    next_message(replies, "the server")
                except RelucentError as cause:
                    return error if type(cause) is PeerError else cause
            time.sleep(0.05)
        return error

    # --- online -------------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | np.ndarray[Any, Any], progress: Callable[[str], None] = lambda _: None) -> list[Prediction]:
        """Classify images privately, uint8 (N, *model.input_shape). Uses prepared material, or preprocesses first.

        One batch of N if N is at most the server's maximum, else several; `progress` is told what is being done. Material that
        the server no longer has is replaced. Raises InputError for another shape or type.
        """
        tensor = torch.as_tensor(images)
        encode_images(tensor[:1], self.model)  # refuse before anything is spent
        results: list[Prediction] = []
        for batch in tensor.split(self.max_batch):
            results += [self._prediction(row) for row in self._infer(batch, progress)]
        return results

    def _prediction(self, row: Tensor) -> Prediction:
        index = int(row.argmax())
        largest = self.model.largest_logit
        plausible = largest is None or float(row.abs().max()) <= largest
        return Prediction(index, self.model.classes[index] if self.model.classes else str(index), tuple(row.tolist()), plausible)

    def _infer(self, images: Tensor, progress: Callable[[str], None]) -> Tensor:
        self._checked(len(images))
        parts = images.split(self._parts(len(images)))
        what = f"{len(images)} image{'s' * (len(images) > 1)}"
        ready: list[tuple[Prepared, bool]] = []
        costs: list[PhaseCost] = []
        try:
            for part in parts:
                ready.append(self._take(len(part), lambda: progress(f"preprocessing {what}")))
                if not ready[-1][1] and self.last_preprocessing is not None:
                    costs.append(self.last_preprocessing)
        except BaseException:
            for prepared, _ in ready:
                prepared.material.destroy()
            self._discard([(prepared.material.material_id, prepared.secret) for prepared, _ in ready])
            raise
        if costs:
            self.last_preprocessing = _together(costs)
        progress(f"classifying {what}")
        started = time.perf_counter()
        try:
            with self._online:
                if len(parts) == 1:
                    done = [self._run(parts[0], *ready[0])]
                else:
                    with ThreadPoolExecutor(len(parts), "stream") as pool:
                        done = [*pool.map(lambda part, one: self._run(part, *one), parts, ready)]
        finally:
            self._consumed.set()
        self.last_online = replace(_together([cost for _, cost in done]), seconds=time.perf_counter() - started)
        return torch.cat([logits for logits, _ in done])

    def _take(self, batch: int, tell: Callable[[], None] = lambda: None) -> tuple[Prepared, bool]:
        """Material for a batch, and whether it was in stock."""
        prepared = self._stock.take(self._offer.plan(batch), self._away())
        if prepared is not None:
            return prepared, True
        tell()
        with self._preparing:  # what the refilling makes just now may serve
            prepared = self._stock.take(self._offer.plan(batch), self._away())
            return (prepared, True) if prepared is not None else (self._prepare(batch), False)

    def _run(self, images: Tensor, prepared: Prepared, stocked: bool) -> tuple[Tensor, PhaseCost]:
        """The online phase; again with other material while the server has lost what was in stock."""
        while True:
            try:
                return self._run_online(images, prepared)
            except MaterialError as error:
                if not stocked:
                    raise
                if isinstance(error, MaterialElsewhere):  # the connection leads to another server now; what else it lacks is kept
                    self._refused[prepared.holder] = time.monotonic()
                prepared, stocked = self._take(len(images))

    def _run_online(self, images: Tensor, prepared: Prepared) -> tuple[Tensor, PhaseCost]:
        started = time.perf_counter()
        timeline = Timeline(time.perf_counter if self._timed else None)
        x_ring = encode_images(images, self.model)
        plan = prepared.material.plan
        up: RequestQueue[pb.InferUp] = RequestQueue()
        up.put(pb.InferUp(open=pb.InferOpen(protocol_version=PROTOCOL_VERSION, model_id=self.model.model_id,
                                            material_id=prepared.material.material_id, client_secret=prepared.secret,
                                            timeline=self._timed)))
        replies = self._server.Infer(iter(up), timeout=self._timeout_s)
        sender = ChunkSender(up.put, pb.InferUp)
        receiver = ChunkReceiver(lambda: next_message(replies, "the server"))
        try:
            if prepared.stored and ACCEPTED_KEY not in dict(replies.initial_metadata() or ()):
                next_message(replies, "the server")  # raises what the server means
                raise ProtocolViolation("the server neither accepts the material nor refuses it")
            timeline.lap("setup")
            result = online_client(prepared.material, x_ring, Duplex(sender, receiver), timeline)
            seconds = time.perf_counter() - started
        except BaseException:
            replies.cancel()
            self._discard([(prepared.material.material_id, prepared.secret)])  # if the server did not get as far as taking it
            raise
        finally:
            up.close()
            prepared.material.destroy()
        cost = PhaseCost(seconds, sender.bytes, receiver.bytes, plan.rounds, timeline=tuple(timeline.describe()),
                         server_timeline=timeline_of(replies) if self._timed else ())
        return ring.decode(result, plan.output_scale), cost


def _together(costs: list[PhaseCost]) -> PhaseCost:
    """The cost of several streams: sums, but for the rounds, which they go through at once."""

    def layers(timelines: list[tuple[dict[str, Any], ...]]) -> tuple[dict[str, Any], ...]:
        return tuple({"layer": same[0]["layer"], **{kind: sum(layer.get(kind, 0.0) for layer in same) for layer in same for kind in layer
                                                    if kind != "layer"}} for same in zip(*timelines))

    names = ("seconds", "bytes_up", "bytes_down", "dealer_bytes", "dealer_to_server_bytes", "streams")
    return PhaseCost(**{name: sum(getattr(c, name) for c in costs) for name in names}, rounds=max(c.rounds for c in costs),
                     timeline=layers([c.timeline for c in costs]), server_timeline=layers([c.server_timeline for c in costs]),
                     dealer_timeline=layers([c.dealer_timeline for c in costs]))
