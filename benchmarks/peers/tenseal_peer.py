"""TenSEAL: CKKS without interaction, on a small network of its own with squares, not on the exported network.

Usage: python -m benchmarks.peers.tenseal_peer FOLDER [--runs N]. Only the images of the folder are used. The network: 4 convolutions 5x5,
stride 3, without padding; square; linear 400 to 64; square; linear 64 to the classes; random weights. The client encrypts each channel's
5x5 windows, the server evaluates on ciphertexts, the client decrypts. Nothing but serialised bytes passes between them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import tenseal

from benchmarks.peers.exported import Array, Exported, InputError, run_program

DEGREE, COEFFICIENT_BITS, SCALE_BITS = 8192, (35, 29, 29, 29, 29, 29, 35), 29
"""Five levels in 215 bits; 218 are the most that degree 8192 has at 128-bit security by the homomorphic encryption standard."""
KERNEL, STRIDE, FILTERS, HIDDEN, CLASSES = 5, 3, 4, 64, 10


@dataclass(frozen=True)
class Network:
    """Weights: kernels (FILTERS, channels, KERNEL, KERNEL), first (FILTERS windows, HIDDEN), second (HIDDEN, CLASSES); biases alike."""

    kernels: Array
    kernel_bias: Array
    first: Array
    first_bias: Array
    second: Array
    second_bias: Array


def random_network(channels: int, windows: int) -> Network:
    """Random weights that keep values near 1."""
    draw = np.random.default_rng(0)

    def weights(*shape: int, fan_in: int) -> Array:
        return draw.normal(0, fan_in**-0.5, shape)

    return Network(weights(FILTERS, channels, KERNEL, KERNEL, fan_in=channels * KERNEL**2), weights(FILTERS, fan_in=100),
                   weights(FILTERS * windows, HIDDEN, fan_in=3 * FILTERS * windows), weights(HIDDEN, fan_in=100),
                   weights(HIDDEN, CLASSES, fan_in=3 * HIDDEN), weights(CLASSES, fan_in=100))


def plaintext(network: Network, image: Array) -> Array:
    """Logits (CLASSES,) of an image (C, H, W) in float64."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (KERNEL, KERNEL), axis=(1, 2))[:, ::STRIDE, ::STRIDE]
    hidden = np.einsum("chwij,fcij->fhw", windows, network.kernels).reshape(FILTERS, -1) + network.kernel_bias[:, None]
    hidden = np.square(hidden.reshape(-1)) @ network.first + network.first_bias
    logits: Array = np.square(hidden) @ network.second + network.second_bias
    return logits


def evaluate(context: Any, network: Network, encrypted: list[bytes], windows: int) -> bytes:
    """The server's part: encrypted channels to encrypted logits, without the secret key."""
    channels = [tenseal.ckks_vector_from(context, data) for data in encrypted]
    hidden = []
    for kernels, bias, weights in zip(network.kernels, network.kernel_bias, np.split(network.first, FILTERS)):
        start: Any = float(bias)
        convolved = sum((c.conv2d_im2col(k.tolist(), windows) for c, k in zip(channels, kernels)), start)
        hidden.append(convolved.square().mm(weights.tolist()))
    summed = sum(hidden[1:], hidden[0]) + network.first_bias.tolist()
    logits: bytes = (summed.square().mm(network.second.tolist()) + network.second_bias.tolist()).serialize()
    return logits


def measure(exported: Exported, runs: int, protocol: str) -> dict[str, Any]:
    """The figures; see `docs/benchmarks.md`. `reference` holds this network's logits in float64."""
    images = exported.images.astype(np.float64)
    if images.ndim != 4 or min(images.shape[2:]) < KERNEL:
        raise InputError(f"images must be (N, C, H, W) of at least {KERNEL} x {KERNEL} pixels, not {images.shape}")
    sides = [(side - KERNEL) // STRIDE + 1 for side in images.shape[2:]]
    windows = sides[0] * sides[1]
    if windows * 32 > DEGREE // 2:  # 25 values of a window take the next power of two
        raise InputError(f"images of {images.shape[2]} x {images.shape[3]} pixels do not fit one ciphertext a channel")
    network = random_network(images.shape[1], windows)
    started = time.perf_counter()
    client = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(COEFFICIENT_BITS))
    client.global_scale = 2**SCALE_BITS
    client.generate_galois_keys()
    keys = client.serialize(save_secret_key=False)
    server = tenseal.context_from(keys)
    setup = time.perf_counter() - started
    seconds, sent, logits = [], [], []
    for run in range(-1, runs):  # the first one warms up
        started = time.perf_counter()
        query = [tenseal.im2col_encoding(client, channel.tolist(), KERNEL, KERNEL, STRIDE)[0].serialize()
                 for channel in images[max(run, 0) % len(images)]]
        answer = evaluate(server, network, query, windows)
        logits.append(tenseal.ckks_vector_from(client, answer).decrypt())
        seconds.append(time.perf_counter() - started)
        sent.append(sum(map(len, query)) + len(answer))
    return {
        "peer": "TenSEAL", "protocol": protocol, "runs": runs, "online_ms": [1e3 * s for s in seconds[1:]],
        "bytes": sent[-1], "rounds": 1, "logits": logits[1:],
        "reference": [plaintext(network, images[run % len(images)]).tolist() for run in range(runs)],
        "setup_ms": 1e3 * setup, "setup_bytes": len(keys),
        "versions": {name: version(name) for name in ("tenseal", "numpy")}, "hides_image_from_server": True, "needs_dealer": False,
        "notes": f"another, much smaller network with random weights: {FILTERS} convolutions {KERNEL}x{KERNEL} stride {STRIDE}, square, "
                 f"linear {FILTERS * windows}-{HIDDEN}, square, linear {HIDDEN}-{CLASSES}; CKKS of degree {DEGREE}, modulus of "
                 f"{'+'.join(map(str, COEFFICIENT_BITS))} bits, scale 2^{SCALE_BITS}, 128-bit security; client and server in one process; "
                 "bytes: serialised ciphertexts both ways; set-up: the client's keys, made and sent once"}


if __name__ == "__main__":
    run_program("TenSEAL on a small network of its own.", measure, ("CKKS",))
