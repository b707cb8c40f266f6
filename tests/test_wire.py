"""Chunks and messages: round trips, and every deviation is refused."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolViolation, VersionMismatch
from protocol.relucent_pb2 import Chunk
from protocol.wire import CHUNK_BYTES, FRAME_BYTES, ChunkReceiver, ChunkSender, check_bytes, check_version, to_chunks
from server import pacing
from server.pacing import Paced


def receiver(chunks: list[Chunk]) -> ChunkReceiver:
    feed: Iterator[Chunk] = iter(chunks)
    return ChunkReceiver(lambda: next(feed))


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(-2, 2))
def test_round_trip_at_chunk_borders(halves: list[int], extra: int) -> None:
    parts = [bytes([i]) * max(0, h * CHUNK_BYTES // 2 + extra) for i, h in enumerate(halves)]
    chunks = list(to_chunks(7, tuple(parts)))
    whole = b"".join(parts)
    assert all(0 < len(c.data) <= CHUNK_BYTES for c in chunks[:-1])
    assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) == max(1, -(-len(whole) // CHUNK_BYTES))
    assert b"".join(c.data for c in chunks) == whole


def test_sender_and_receiver_agree_and_count() -> None:
    sent: list[Chunk] = []
    sender = ChunkSender(sent.append)
    for data in (b"abc", b"", bytes(CHUNK_BYTES + 5)):
        sender.send(data)
    back = receiver(sent)
    assert [bytes(back.receive(n)) for n in (3, 0, CHUNK_BYTES + 5)] == [b"abc", b"", bytes(CHUNK_BYTES + 5)]
    assert sender.bytes == back.bytes == sum(chunk.ByteSize() + FRAME_BYTES for chunk in sent)


def test_a_message_is_sent_and_read_in_pieces() -> None:
    sent: list[Chunk] = []
    sender = ChunkSender(sent.append)
    for piece, last in ((b"ab", False), (bytes(CHUNK_BYTES + 1), False), (b"c", True), (b"d", True)):
        sender.send(piece, last=last)
    assert [(c.sequence, len(c.data), c.last) for c in sent] == [
        (0, 2, False), (0, CHUNK_BYTES, False), (0, 1, False), (0, 1, True), (1, 1, True)]
    back = receiver(sent)
    assert [len(piece) for piece in back.pieces(CHUNK_BYTES + 4)] == [2, CHUNK_BYTES, 1, 1]
    assert back.receive(1) == b"d" and back.bytes == sender.bytes


@pytest.mark.parametrize(("name", "good"), [("too long", 0), ("too short", 0), ("too long over chunks", 1), ("out of order", 0),
                                            ("next message inside this one", 1), ("empty chunk", 0)])
def test_no_piece_of_a_bad_message_is_handed_out_from_where_it_is_bad(name: str, good: int) -> None:
    pieces = receiver(BAD[name]).pieces(4)
    assert len([next(pieces) for _ in range(good)]) == good
    with pytest.raises(ProtocolViolation):
        next(pieces)


GOOD = [Chunk(sequence=0, data=b"ab"), Chunk(sequence=0, data=b"cd", last=True)]
BAD = {
    "too long": [Chunk(sequence=0, data=b"abcde", last=True)],
    "too short": [Chunk(sequence=0, data=b"abc", last=True)],
    "too long over chunks": [GOOD[0], Chunk(sequence=0, data=b"cde", last=True)],
    "out of order": [Chunk(sequence=1, data=b"abcd", last=True)],
    "next message inside this one": [GOOD[0], Chunk(sequence=1, data=b"cd", last=True)],
    "empty chunk": [Chunk(sequence=0), *GOOD],
    "huge chunk": [Chunk(sequence=0, data=bytes(CHUNK_BYTES + 1), last=True)],
}


def test_good_message_passes() -> None:
    assert receiver(GOOD).receive(4) == b"abcd"


@pytest.mark.parametrize("name", BAD)
def test_bad_message_is_refused(name: str) -> None:
    with pytest.raises(ProtocolViolation):
        receiver(BAD[name]).receive(CHUNK_BYTES + 1 if name == "huge chunk" else 4)


def test_repeated_message_is_refused() -> None:
    channel = receiver([*GOOD, *GOOD])
    channel.receive(4)
    with pytest.raises(ProtocolViolation, match="where 1 is due"):
        channel.receive(4)


@pytest.mark.parametrize(("bytes_per_s", "piece"), [(1e8, CHUNK_BYTES), (1e7, 60_000), (1e5, pacing.MIN_PIECE_BYTES)])
def test_the_server_cuts_as_finely_as_the_link_is_slow(bytes_per_s: float, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece takes PIECE_S there and back, unless that were less than the least size; beyond MAX_PIECE_BYTES nothing is cut."""
    now, held_up_s, sizes = 0.0, 0.0, (3 << 20, 100_000, 3 << 20)
    sent: list[Chunk] = []

    def take_time(chunk: Chunk) -> Chunk:
        nonlocal now
        now += len(chunk.data) / 2 / bytes_per_s + held_up_s  # half of an exchange's time is sending
        return chunk

    arriving = list(to_chunks(0, (bytes(24_000),)))
    monkeypatch.setattr("server.pacing.PIECES", 1 << 20)
    monkeypatch.setattr("server.pacing.time.perf_counter", lambda: now)
    channel = Paced(ChunkSender(lambda chunk: sent.append(take_time(chunk))), ChunkReceiver(lambda: take_time(arriving.pop(0))))
    now = 60.0  # until the input comes: no sign of a slow link
    channel.receive(24_000)
    for sequence, size in enumerate(sizes):
        held_up_s = 1.0 if sequence == 1 else 0.0  # one exchange is slower than the link
        channel.send(bytes(size))
        arriving += to_chunks(sequence + 1, (bytes(size),))
        channel.receive(size)
    for sequence, (size, expected) in enumerate(zip(sizes, (pacing.FIRST_PIECE_BYTES, piece, piece))):
        cut = [len(chunk.data) for chunk in sent if chunk.sequence == sequence]
        assert sum(cut) == size and all(one == pytest.approx(expected, abs=8) for one in cut[:-1]) and cut[-1] <= expected


def test_a_message_is_cut_into_a_bounded_number_of_pieces() -> None:
    sent: list[Chunk] = []
    channel = Paced(ChunkSender(sent.append), ChunkReceiver(sent.pop))
    for size in (8_000_000, 100 << 20):
        sent.clear()
        channel.send(bytes(size))
        assert {len(chunk.data) for chunk in sent[:-1]} == {min(size // pacing.PIECES, CHUNK_BYTES)}


def test_versions_and_lengths() -> None:
    check_version(1)
    with pytest.raises(VersionMismatch, match="version 2"):
        check_version(2)
    assert check_bytes(bytes(16), 16, "id") == bytes(16)
    with pytest.raises(ProtocolViolation, match="15 bytes"):
        check_bytes(bytes(15), 16, "id")
