"""From stored JSON to one self-contained HTML page, PNG plots, and the tables in the documents."""

from __future__ import annotations

import base64
import csv
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no window system is needed
import matplotlib.pyplot as plt
import numpy as np

from model_opt.published import PUBLISHED
from model_opt.show import METHOD_COLOURS, draw_pareto
from model_opt.training import write_atomically
from protocol.errors import InputError

PARTS = {"setup": ("set-up of the call", "#a0785a"), "linear": ("private linear maps", "#2e86ab"),
         "elementwise": ("truncation, masks, copies", "#8fb996"), "squares": ("squares", "#f2b134"),
         "comparison": ("comparison (DCF)", "#d1495b"), "send": ("handing over", "#7d5ba6"), "client": ("the client's work", "#444444"),
         "serialisation": ("serialisation, both ways", "#c9a0dc"), "link": ("gRPC and the link", "#d9d9d9"),
         "outside": ("before and after the server's call", "#f5f5f5")}
"""Of the server's timeline: what a reader calls them, and their colours."""
PREPROCESSING_PARTS = {"setup": PARTS["setup"], "linear": PARTS["linear"], "randomness": ("expanding seeds", "#f2b134"),
                       "keys": ("DCF keys", "#d1495b"), "elementwise": ("elementwise", "#8fb996"), "send": PARTS["send"],
                       "store": ("into the stock", "#444444"), "wait": ("waiting for the others", "#d9d9d9"),
                       "outside": ("before and after its own call", "#f5f5f5")}
LINK_COLOURS = {"loopback": "#2e86ab", "lan": "#8fb996", "wan": "#d1495b", "mobile": "#f2b134"}
MARKS = "<!-- table: {} -->", "<!-- end of table -->"
"""Between them `report --fill` puts the table of that name."""
REACHED = (0.8, 0.85, 0.9, 0.92, 0.93)
COVERED = 0.95
"""Rows whose timelines sum to less of the wall time are named."""
FORETOLD = 0.1
"""Latencies on a link that lie farther from the foretold one, as a share of it, are named."""
CAPTIONS = {"growth": "Medians of the runs that the table names; bars from the smallest to the largest run.",
            "time": "The server's online timeline, its waiting split into the client's work and the ways there and back; and, where it "
                    "was recorded, all three parties' preprocessing.",
            "peers": "Logarithmic. Ours: the dark part is online. The peers make their correlated randomness while they infer.",
            "load": "Every client prepares one inference and uses it, again and again.",
            "methods": "Ours are networks trained here; the marks are results that others published on larger networks.",
            "accuracy": "Accuracy on all test images against private online latency on loopback, as measured in the sessions and at the "
                        "load that the table's rows record: networks of the same bytes and ReLUs differ by the machine only."}
Row = dict[str, Any]


def load_results(folder: Path, name: str) -> dict[str, Any] | None:
    """A stored result, or None if there is none. Raises InputError for a damaged one."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is no JSON file", f"run `relucent-bench {name}` again") from error
    return result


def plot_growth(rows: Sequence[Row], path: Path) -> None:
    """Online and whole latency and traffic against ReLUs, a line for each link."""
    figure, (online, whole, traffic) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    base = rows[0]
    alike = [r for r in rows if all(r[key] == base[key] for key in ("network", "width", "batch")) and _full(r, base)]
    for link in dict.fromkeys(r["link"] for r in alike):
        chosen = sorted((r for r in alike if r["link"] == link), key=lambda r: r["relus"])
        x = [max(r["relus"], 100) for r in chosen]
        for axis, key in ((online, "online_ms"), (whole, "total_ms")):
            low = [r[key] - r[f"{key}_spread"][0] for r in chosen]
            high = [r[f"{key}_spread"][1] - r[key] for r in chosen]
            axis.errorbar(x, [r[key] for r in chosen], [low, high], fmt="o-", capsize=2, label=link, color=LINK_COLOURS.get(link))
        if link == base["link"]:
            traffic.plot(x, [sum(r["preprocessing_bytes"].values()) / 1e6 for r in chosen], "o-", color="#d1495b", label="preprocessing")
            traffic.plot(x, [(r["online_bytes_up"] + r["online_bytes_down"]) / 1e6 for r in chosen], "s-", color="#2e86ab", label="online")
    online.axhline(base["plaintext_ms"], color="grey", ls="--", lw=1, label="plaintext PyTorch")
    online.set(ylabel="ms", title="online: what a user waits for with material in stock")
    whole.set(ylabel="ms", title="preprocessing and online, one after the other")
    traffic.set(ylabel="MB", title="traffic of one inference")
    for axis in (online, whole, traffic):
        axis.set(xscale="log", yscale="log", xlabel="ReLUs per image, squares elsewhere (0 drawn at 100)")
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8)
    figure.suptitle(f"{base['network']} of width {base['width']}, batch {base['batch']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _full(row: Row, base: Row) -> bool:
    """Whether no pixel passes unchanged."""
    return bool(row["relus"] + row["squares"] == base["relus"] + base["squares"])


def plot_time(rows: Sequence[Row], path: Path) -> None:
    """Stacked bars: where the online time goes, as the server sees it; below, by layer of the base; and the parties' preprocessing."""
    base = rows[0]
    most = max((r for r in rows if r["link"] == base["link"]), key=lambda r: r["relus"])
    largest = max((r for r in rows if r["link"] == base["link"]), key=lambda r: r["batch"])
    alike = [r for r in rows if all(r[key] == base[key] for key in ("network", "width", "batch", "squares", "relus"))]
    none = [r for r in rows if r["relus"] == 0 and r["link"] == base["link"]]
    extremes = list({id(row): row for row in (base, most, largest)}.values())
    chosen = [*none[:1], *extremes, *(r for r in alike if r["link"] != base["link"])]
    timed = [r for r in extremes if "preprocessing_timeline" in r]  # results of earlier versions have none
    panels = 3 if timed else 2
    figure, (top, bottom, *before) = plt.subplots(panels, 1, figsize=(11, 4.2 * panels), layout="constrained")
    shares = [_shares(r["timeline"]["server"], r["limits"]["serialisation_ms"] / r["streams"]) for r in chosen]
    for share, row in zip(shares, chosen):
        share["outside"] = max(row["online_ms"] - sum(share.values()), 0.0)
    _stack(top, [{part: 100 * ms / sum(share.values()) for part, ms in share.items()} for share in shares])
    labels = [f"{r['relus']:,} ReLUs\nbatch {r['batch']}, {r['link']}\n{r['online_ms']:,.0f} ms" for r in chosen]
    top.set_xticks(range(len(chosen)), labels, fontsize=8)
    top.set(ylabel="share of the online time, %", title="where the online time goes", ylim=(0, 100))
    layers = base["timeline"]["layers"]
    sizes = [layer.get("bytes_up", 0) + layer.get("bytes_down", 0) for layer in layers]
    serialised = base["limits"]["serialisation_ms"] / max(sum(sizes), 1)
    _stack(bottom, [_shares(layer, serialised * size) for layer, size in zip(layers, sizes)])
    bottom.set_ylim(0, 1.05 * max(bar.get_y() + bar.get_height() for bar in bottom.patches))
    bottom.set_xticks(range(len(layers)), [layer["layer"].replace("blocks_", "") for layer in layers], rotation=60, fontsize=7)
    bottom.set(ylabel="ms", title=f"layer by layer: {base['relus']:,} ReLUs, batch {base['batch']}, {base['link']}")
    for axis in before:
        _plot_preprocessing(axis, timed)
    for axis in (top, *before):
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_preprocessing(axis: Any, rows: Sequence[Row]) -> None:
    """Stacked bars: each party's part in the preprocessing of each row."""
    bars, labels = [], []
    for row in rows:
        for party in ("dealer", "server", "client"):
            parts = row["preprocessing_timeline"][party]
            bar = {part: 100 * parts.get(part, 0.0) / row["preprocessing_ms"] for part in PREPROCESSING_PARTS}
            bars.append(bar | {"outside": max(100 - sum(bar.values()), 0.0)})
            labels.append(f"{party}\n{row['relus']:,} ReLUs\nbatch {row['batch']}\n{row['preprocessing_ms']:,.0f} ms")
    _stack(axis, bars, PREPROCESSING_PARTS)
    axis.set_xticks(range(len(bars)), labels, fontsize=8)
    axis.set(ylabel="share of the preprocessing time, %", title="where the preprocessing time goes, all parties at once", ylim=(0, 100))


def _shares(timeline: dict[str, float], serialisation_ms: float) -> dict[str, float]:
    """The parts of a server's timeline in ms. Serialisation, which gRPC does in threads of its own, is measured apart, within "link"."""
    taken = min(serialisation_ms, timeline["link"])
    return {part: timeline.get(part, 0.0) for part in PARTS} | {"serialisation": taken, "link": timeline["link"] - taken}


def _stack(axis: Any, bars: Sequence[dict[str, float]], parts: dict[str, tuple[str, str]] = PARTS) -> None:
    bottom = np.zeros(len(bars))
    for part, (label, colour) in parts.items():
        heights = np.array([bar[part] for bar in bars])
        if heights.any():
            axis.bar(range(len(bars)), heights, bottom=bottom, label=label, color=colour, width=0.75)
        bottom += heights


def plot_peers(peers: dict[str, Any], path: Path) -> None:
    """Latency, preprocessing included, and traffic of ours beside each peer that ran, log scale, with ratios."""
    rows = [r for r in peers["rows"] if "online_ms" in r]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.6 * len(rows) + 1.8), layout="constrained", sharey=True)
    ours = next(r for r in rows if r["name"] == "relucent")
    for axis, key, scale, text in ((axes[0], "total_ms", 1.0, "latency, preprocessing included, ms"),
                                   (axes[1], "total_bytes", 1e6, "traffic, preprocessing included, MB")):
        largest = max(row.get(key) or 0 for row in rows) / scale
        for i, row in enumerate(rows):
            if not row.get(key):
                continue
            axis.barh(i, row[key] / scale, color=_peer_colour(row))
            if row is ours:
                online = ours["online_ms" if key == "total_ms" else "bytes"] / scale
                axis.barh(i, online, color="#17465a")
                note = f" {row[key] / scale:,.0f} (online {online:,.0f})"
            else:
                note = f" {row[key] / scale:,.0f}" + (f" ({_ratio(row[key], ours[key])})" if row.get("same_network", True) else "")
            axis.text(row[key] / scale, i, note, va="center", fontsize=8)
        axis.set(xscale="log", xlabel=text, xlim=(None, 12 * largest))
    axes[0].set_yticks(range(len(rows)), [f"{r['label']}, n={r['runs']}" for r in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"{peers['network']} of width {peers['width']}; blue: ours, dark online; green: hides the image; red: does not; "
                    "grey: another network",
                    fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _peer_colour(row: Row) -> str:
    if row["name"] == "relucent":
        return "#2e86ab"
    if not row.get("same_network", True):
        return "#bbbbbb"
    return "#8fb996" if row["hides_image"] else "#d1495b"


def plot_load(load: dict[str, Any], path: Path) -> None:
    """Throughput and latency against the number of clients."""
    rows = load["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    x = [r["clients"] for r in rows]
    left.plot(x, [r["images_per_s"] for r in rows], "o-", color="#2e86ab")
    left.set(xscale="log", xlabel="clients", ylabel="images per second, preprocessing included",
             ylim=(0, 1.15 * max(r["images_per_s"] for r in rows)))
    for key, style in (("p50", "o-"), ("p99", "s--")):
        right.plot(x, [r["online_ms"][key] for r in rows], style, color="#2e86ab", label=f"online {key}")
        right.plot(x, [r["with_preprocessing_ms"][key] for r in rows], style, color="#d1495b", label=f"with preprocessing {key}")
    right.set(xscale="log", yscale="log", xlabel="clients", ylabel="ms")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xticks(x, [str(v) for v in x])
        axis.grid(True, alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_accuracy(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against online latency where both are known, a panel for each network that others were made of."""
    origins = [network_name(_origin(row, rows)) for row in rows]
    networks = list(dict.fromkeys(origins))
    figure, panels = plt.subplots(len(networks), 1, figsize=(11, 4.2 * len(networks)), layout="constrained", squeeze=False)
    for axis, network in zip(panels[:, 0], networks):
        own = sorted((row for row, origin in zip(rows, origins) if origin == network), key=lambda row: -row["test_accuracy"])
        colours: dict[str, str] = {}
        for row in own:
            name = f"{row['label']}{_course(row)}"
            first = name not in colours
            colour = colours.setdefault(name, METHOD_COLOURS[len(colours) % len(METHOD_COLOURS)])
            ends = [[abs(row["online_ms"] - end)] for end in row["online_ms_spread"]]
            axis.errorbar(row["online_ms"], 100 * row["test_accuracy"], xerr=ends, fmt="o", capsize=2, color=colour,
                          label=name if first else None)
            axis.annotate(f"{row['relus']:,}", (row["online_ms"], 100 * row["test_accuracy"]), (3, 4), textcoords="offset points",
                          fontsize=7, color=colour)
        axis.set(title=f"{network}; numbers: ReLUs", xlabel="private online latency, ms", ylabel="test accuracy, %")
        axis.grid(True, alpha=0.25)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_methods(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against ReLUs, a line for each method on each network, and published results."""
    named = [row | {"series": f"{row.get('series', row['label'])}, {network_name(_origin(row, rows))}"} for row in rows]
    datasets = {row["dataset"] for row in rows}
    published = datasets.pop() if len(datasets) == 1 else ""
    draw_pareto(named, path, "Ours, and published results" if published in PUBLISHED else "Ours", published)


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.{1 if value > base else 2}f}x"


def network_name(row: Row) -> str:
    """A row's network, with its width if that is known."""
    return str(row["network"]) + (f" w{row['width']}" if row["width"] else "")


def _origin(row: Row, rows: Sequence[Row]) -> Row:
    """The network that a row's was made of: the widest of the same teacher, from which reshaping makes narrower ones."""
    teacher = row.get("settings", {}).get("teacher")
    return max((r for r in rows if r is row or (teacher and r.get("settings", {}).get("teacher") == teacher)), key=lambda r: r["width"])


def _with_spread(row: Row, key: str) -> str:
    return f"{row[key]:,.0f} ({row[f'{key}_spread'][0]:,.0f}-{row[f'{key}_spread'][1]:,.0f})"


def sweep_table(sweep: dict[str, Any]) -> list[str]:
    """Markdown lines: one row for each measured network, batch and link."""
    lines = []
    for r in sweep["rows"]:
        foretold = f"{r['online_ms'] / r['predicted_ms']:.2f}" if "predicted_ms" in r else ""
        lines.append([f"{r['relus']:,}", f"{r['squares']:,}", network_name(r), str(r["batch"]), r["link"], _with_spread(r, "online_ms"),
                      f"{r['online_ms'] / r['plaintext_ms']:.1f}x", foretold,
                      f"{(r['online_bytes_up'] + r['online_bytes_down']) / 1e6:.2f}", f"{r['preprocessing_ms']:,.0f}",
                      f"{sum(r['preprocessing_bytes'].values()) / 1e6:.1f}", f"{r['total_ms']:,.0f}",
                      f"{1e3 * r['batch'] / r['online_ms']:.1f}", str(r["runs"])])
    table = _table(("ReLUs", "squares", "network", "batch", "link", "online ms (min-max)", "of plaintext", "of foretold", "online MB",
                    "preprocessing ms", "preprocessing MB", "total ms", "images/s online", "n"), lines)
    links = [f"{name}: {1e3 * m['rtt_s']:.2f} ms, {m['bits_per_s'] / 1e6:.0f} Mbit/s ({m.get('emulation', 'relay')})"
             for name, m in sweep.get("links", {}).items()]
    notes = ["", "Foretold: the online time on loopback + rounds x RTT + bytes / bandwidth: on WAN and mobile the bytes of the busier "
             "direction, as both are busy at once, but for 3 ms a round; on the LAN, where they take turns, all."]
    astray = [f"{r['relus']:,} ReLUs, {r['squares']:,} squares, {network_name(r)}, batch {r['batch']}, {r['link']}" for r in sweep["rows"]
              if abs(r["online_ms"] / r.get("predicted_ms", r["online_ms"]) - 1) > FORETOLD]
    if astray:
        notes.append(f"More than {FORETOLD:.0%} from it: {'; '.join(astray)}; what exceeds it is in the parts of their timelines; "
                     "in batches one stream computes while the other waits for the link.")
    timelines = [r["timeline"] for r in sweep["rows"]]
    if covered := [min(timeline["coverage"].values()) for timeline in timelines if "coverage" in timeline]:
        below = [f"{r['relus']:,} ReLUs, {network_name(r)}, batch {r['batch']}, {r['link']}: {min(r['timeline']['coverage'].values()):.1%}"
                 for r in sweep["rows"] if min(r["timeline"].get("coverage", {"": 1.0}).values()) < COVERED]
        notes.append(f"Both timelines' parts sum to {covered[0]:.1%} of the online time in the first row, {min(covered):.1%} at least."
                     + f" Below {COVERED:.0%}: {'; '.join(below)}." * bool(below))
    notes += [f"The emulated links as measured: {'; '.join(links)}."] if links else []
    notes += [f"Left out: {'; '.join(sweep['left_out'])}."] if sweep.get("left_out") else []
    return table + notes


def latency_table(sweep: dict[str, Any]) -> list[str]:
    """Markdown lines: the base network against its ReLUs, every other activation a square, on each link."""
    base = sweep["rows"][0]
    alike = [r for r in sweep["rows"] if all(r[key] == base[key] for key in ("network", "width", "batch")) and _full(r, base)]
    links = list(dict.fromkeys(row["link"] for row in alike))
    lines = []
    for relus in sorted({r["relus"] for r in alike}):
        found = {r["link"]: r for r in alike if r["relus"] == relus}
        r = found.get(base["link"]) or next(iter(found.values()))
        lines.append([f"{relus:,}", *(f"{found[k]['online_ms']:,.0f}" if k in found else "" for k in links),
                      f"{r['online_ms'] / r['plaintext_ms']:.1f}x", f"{(r['online_bytes_up'] + r['online_bytes_down']) / 1e6:.2f}",
                      f"{r['preprocessing_ms']:,.0f}", f"{sum(r['preprocessing_bytes'].values()) / 1e6:.1f}"])
    table = _table(("ReLUs", *(f"online ms, {link}" for link in links), f"of plaintext, {base['link']}", "online MB",
                    f"preprocessing ms, {base['link']}", "preprocessing MB"), lines)
    runs = [r["runs"] for r in alike]
    return [*table, "", f"{base['network']} of width {base['width']}, {base['relus'] + base['squares']:,} activations, batch "
            f"{base['batch']}; medians of {min(runs)} to {max(runs)}."]


def summary_table(sweep: dict[str, Any]) -> list[str]:
    """Markdown lines: one row for each network, batch and mask, its latency on each link side by side."""
    links = list(dict.fromkeys(row["link"] for row in sweep["rows"]))
    points: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sweep["rows"]:
        points.setdefault(tuple(row[key] for key in ("network", "width", "batch", "relus", "squares")), {})[row["link"]] = row
    lines = []
    for found in points.values():
        r = found.get(links[0]) or next(iter(found.values()))
        online = [f"{found[k]['online_ms']:,.0f}" + f" (n={found[k]['runs']})" * (found[k]["runs"] != r["runs"]) if k in found else ""
                  for k in links]
        lines.append([f"{r['relus']:,}", f"{r['squares']:,}", network_name(r), str(r["batch"]), *online,
                      f"{r['online_ms'] / r['plaintext_ms']:.1f}x", f"{(r['online_bytes_up'] + r['online_bytes_down']) / 1e6:.2f}",
                      f"{r['preprocessing_ms']:,.0f}", f"{sum(r['preprocessing_bytes'].values()) / 1e6:.1f}",
                      " / ".join(f"{found[k]['total_ms']:,.0f}" for k in links if k in found), str(r["runs"])])
    table = _table(("ReLUs", "squares", "network", "batch", *(f"online ms, {link}" for link in links), f"of plaintext, {links[0]}",
                    "online MB", f"preprocessing ms, {links[0]}", "preprocessing MB",
                    f"with preprocessing ms, {' / '.join(links)}", "n"), lines)
    return table + ([f"\nLeft out: {'; '.join(sweep['left_out'])}."] if sweep.get("left_out") else [])


def _slope(line: dict[str, Any]) -> str:
    return f"{line['slope']:.3f}" + (f" ± {line['error']:.3f}" if line.get("error") is not None else "")


def fits_table(sweep: dict[str, Any]) -> list[str]:
    """Markdown lines: what one more ReLU, or square, costs."""
    lines = []
    for name, fit in sweep["fits"].items():
        worst = max(fit[key]["residual"] for key in ("online_us", "preprocessing_us"))
        lines.append([name.replace("ReLU", "ReLU in place of a square"),
                      f"{fit['from']:,}-{fit['to']:,} ({fit['points']})", _slope(fit["online_us"]),
                      f"{fit['online_bytes']['slope']:.1f}", _slope(fit["preprocessing_us"]),
                      f"{fit['preprocessing_bytes']['slope']:.0f}", f"{worst:.0%}"])
    return _table(("one more", "range (points)", "online us ± standard error", "online bytes", "preprocessing us", "preprocessing bytes",
                   "largest distance of a time from its line"), lines)


def limits_table(sweep: dict[str, Any]) -> list[str]:
    """Markdown lines: what the work needs at least, each alone, beside what it takes."""
    lines = []
    for r in sweep["rows"]:
        limit = r["limits"]
        linear = min(limit["linear_ms"], limit["int64_ms"], r["timeline"]["server"]["linear"])  # none of them can be below the least
        floor = linear + limit["aes_ms"] + r["on_link_ms"]
        lines.append([f"{r['relus']:,}", network_name(r), str(r["batch"]), r["link"], f"{r['plaintext_ms']:.1f}",
                      f"{limit['int64_ms']:.1f}", f"{linear:.1f}", f"{limit['aes_ms']:.1f}", f"{limit['serialisation_ms']:.1f}",
                      f"{limit['bandwidth_ms']:.0f}", f"{r['on_link_ms']:.0f}", f"{r['online_ms']:,.0f}", f"{r['online_ms'] / floor:.1f}x",
                      f"{r['online_ms'] / (r['plaintext_ms'] + r['on_link_ms']):.1f}x"])
    return _table(("ReLUs", "network", "batch", "link", "plaintext ms", "int64 convolutions ms", "our convolutions ms (the least seen)",
                   "AES of one party ms", "serialisation ms", "bytes of the busier direction / bandwidth ms", "with rounds x RTT ms",
                   "online ms", "of our convolutions + AES + link", "of plaintext + link"), lines)


def targets_table(sweep: dict[str, Any]) -> list[str]:
    """Markdown lines: what we aimed at on two idle cores with ResNet-18 w64 on loopback, one image at a time, and what was measured."""
    base = sweep["rows"][0]
    if (base["network"], base["width"], base["link"], base["batch"]) != ("resnet18", 64, "loopback", 1):
        return [f"The aims are for ResNet-18 w64 on loopback with one image at a time; this sweep's base is {network_name(base)} on "
                f"{base['link']}, batch {base['batch']}."]
    alike = [r for r in sweep["rows"] if all(r[key] == base[key] for key in ("network", "width", "link"))]
    every = max((r for r in alike if r["batch"] == base["batch"]), key=lambda r: r["relus"])
    batch = max((r for r in alike if r["relus"] == base["relus"]), key=lambda r: r["batch"])
    gain = batch["batch"] / batch["online_ms"] / (base["batch"] / base["online_ms"])
    aims = [(f"online, {base['relus']:,} ReLUs", "at most 8x plaintext", base["online_ms"] / base["plaintext_ms"], "x", 8, True),
            (f"online, {every['relus']:,} ReLUs", "at most 60x plaintext", every["online_ms"] / every["plaintext_ms"], "x", 60, True),
            *([(f"online images per second, batch {batch['batch']} against 1", "at least 3x", gain, "x", 3, False)]
              if batch["batch"] > 1 else []),
            ("material that one dealer makes, sending apart", "at least 3 inferences a second", 1e3 / base["limits"]["dealing_ms"],
             " a second", 3, False),
            ("preprocessing of one inference", "under 500 ms", base["preprocessing_ms"], " ms", 500, True)]
    return _table(("what", "aim", "measured", "met"),
                  [[what, aim, f"{value:.3g}{unit}", "yes" if (value <= limit if below else value >= limit) else "**no**"]
                   for what, aim, value, unit, limit, below in aims])


def peers_table(peers: dict[str, Any]) -> list[str]:
    """Markdown lines: ours and each peer. Ratios are of totals: the peers make their correlated randomness online."""
    ours = next(r for r in peers["rows"] if r["name"] == "relucent")
    lines = []
    for r in peers["rows"]:
        if "online_ms" not in r:
            lines.append([r["label"], *[""] * 9, f"skipped: {r['skipped']}"])
            continue
        same = r.get("same_network", True)
        megabytes = f"{r['total_bytes'] / 1e6:,.1f}" if r.get("total_bytes") else ""
        lines.append([r["label"], str(r["runs"]), _with_spread(r, "online_ms"), f"{r['total_ms']:,.0f}",
                      _ratio(r["total_ms"], ours["total_ms"]) if same else "", _ratio(r["online_ms"], ours["online_ms"]) if same else "",
                      megabytes, _ratio(r["total_bytes"], ours["total_bytes"]) if megabytes and same else "",
                      f"{r['setup_ms'] / 1e3:.1f} s, {r['setup_bytes'] / 1e6:.0f} MB" if r.get("setup_ms") else "",
                      "yes" if r["hides_image"] else "**no**", (r.get("notes") or "").split(";")[0]])
    return _table(("engine", "n", "online ms (min-max)", "with preprocessing ms", "of ours", "online against our online",
                   "MB with preprocessing", "of ours", "once, before", "hides the image", "notes"), lines)


def _percentiles(row: Row, key: str) -> str:
    return f"{row[key]['p50']:.0f} / {row[key]['p99']:.0f}" if row["inferences"] else "-"


def load_table(load: dict[str, Any]) -> list[str]:
    """Markdown lines: one row for each number of clients."""
    lines = _table(("clients", "images/s", "online p50 / p99 ms", "with preprocessing p50 / p99 ms", "n", "refused", "errors", "server MB",
                    "dealer MB"),
                   [[str(r["clients"]), f"{r['images_per_s']:.2f}", _percentiles(r, "online_ms"), _percentiles(r, "with_preprocessing_ms"),
                     str(r["inferences"]),
                     str(r["refused"]), str(sum(r["errors"].values())), f"{r['peak_rss_mb']['server']:.0f}",
                     f"{r['peak_rss_mb']['dealer']:.0f}"] for r in load["rows"]])
    processes = f"{load['server_processes']} server process{'es' if load['server_processes'] > 1 else ''}"
    return [*lines, "", f"Model {load['model']}, {load['relus']:,} ReLUs, TLS and a token for each client, {processes}. Clients, server "
            "and dealer share this machine's cores, so more cores serve more; with few inferences p99 is near the slowest one."]


def _validation(row: dict[str, Any]) -> str:
    """Validation accuracy; with the number of images if a training took in the others."""
    last = row["later"][-1] if row.get("later") else row
    images = f" (of {last['validation_images']:,})" if last.get("fold_in") else ""
    return f"{100 * row['validation_accuracy']:.2f}{images}"


def _course(row: dict[str, Any]) -> str:
    """What came before a network's last reduction, and after it."""
    earlier, later = row.get("earlier", []), row.get("later", [])
    begun = next((f", from {part['relus']:,} ReLUs" for part in reversed(earlier) if part["command"] == "reduce"), "")
    averaged = ", weights averaged" if any(part["command"] == "average" for part in later) else ""
    fewest = [run["relus"] for part in later if part.get("relus_of") for run in part["besides"] if run["command"] == "reduce"]
    averaged += f", also with those of {min(fewest):,} ReLUs" if fewest else ""
    epochs = sum(run["epochs"] for part in later for run in (part, *part.get("besides", ())) if run["command"] != "reduce")
    return begun + (f", then {epochs} epochs with the ReLUs fixed" if epochs else "") + averaged


def _ordered(methods: dict[str, Any]) -> list[Row]:
    """By network, the widest first, then by budget, the best first."""
    rows: list[Row] = methods["rows"]
    origins = {id(r): _origin(r, rows) for r in rows}
    return sorted(rows, key=lambda r: (origins[id(r)]["network"], -origins[id(r)]["width"], r["budget"], -r["test_accuracy"]))


def _subject(methods: dict[str, Any]) -> Callable[[Row], str]:
    """A row's network; with its data set where there are several."""
    several = len({r["dataset"] for r in methods["rows"]}) > 1
    return lambda r: f"{r['network']} w{r['width']}" + (f", {r['dataset']}" if several else "")


def _private_images(methods: dict[str, Any]) -> str:
    """How many test images were classified privately."""
    return " or ".join(f"{count:,}" for count in sorted({r["private_images"] for r in methods["rows"]}))


def accuracy_table(methods: dict[str, Any]) -> list[str]:
    """Markdown lines: accuracies on the test images; of each method, network, budget, seed and width the one that was trained longest."""
    longest: dict[tuple[Any, ...], Row] = {}
    for r in _ordered(methods):
        key = (r["label"], r["dataset"], network_name(_origin(r, methods["rows"])), r["budget"], r["seed"], r["width"])
        longest[key] = max(longest.get(key, r), r, key=lambda row: (row["epochs"], len(row.get("later", [])), row["validation_accuracy"]))
    subject, images = _subject(methods), _private_images(methods)
    lines = [[r["label"] + _course(r), subject(r), f"{r['relus']:,}",
              *(f"{100 * r[key]:.2f}" for key in ("test_accuracy", "fixed_point_accuracy")), f"{100 * r['private_accuracy']:.1f}",
              f"{r['online_ms']:.0f}", f"{r['online_bytes'] / 1e6:.2f}", str(r["epochs"])] for r in longest.values()]
    return _table(("method", "network", "ReLUs", "float", "fixed point", f"private, first {images}",
                   "online ms", "online MB", "epochs"), lines)


def methods_table(methods: dict[str, Any]) -> list[str]:
    """Markdown lines: one row for each method, budget and seed."""
    lines, subject = [], _subject(methods)
    for r in _ordered(methods):
        accuracies = [_validation(r), *(f"{100 * r[key]:.2f}" for key in ("test_accuracy", "fixed_point_accuracy")),
                      f"{100 * r['private_accuracy']:.1f} ({100 * r['fixed_point_accuracy_same_images']:.1f})"]
        served = [_with_spread(r, "online_ms"), f"{r['online_bytes'] / 1e6:.2f}", str(r["rounds"])]
        degree = "" if r["degree"] is None else str(r["degree"])
        lines.append([r["label"] + _course(r), subject(r), f"{r['relus']:,}", degree, *accuracies, *served,
                      str(r["seed"]), str(r["epochs"]), f"{r['minutes']:.0f}", r["hardware"]])
    return _table(("method", "network", "ReLUs", "degree", "validation", "test, float", "test, fixed point",
                   f"private on {_private_images(methods)} (fixed point on these)", "online ms (min-max)", "online MB",
                   "rounds", "seed", "epochs", "minutes", "trained on"), lines)


def training_table(logs: Sequence[Path]) -> list[str]:
    """Markdown lines: how long each logged training took to reach accuracies on the validation images."""
    lines = []
    for log in logs:
        with log.open(newline="") as rows:
            epochs = [(float(row["validation_accuracy"]), float(row["seconds"]) / 60) for row in csv.DictReader(rows)]
        minutes = list(accumulate(spent for _, spent in epochs))
        reached = [next((f"{spent:.0f}" for (accuracy, _), spent in zip(epochs, minutes) if accuracy >= least), "") for least in REACHED]
        lines.append([log.stem.removeprefix("training-"), str(len(epochs)), f"{minutes[-1]:.0f}", *reached, f"{100 * epochs[-1][0]:.1f}"])
    return _table(("training", "epochs", "minutes", *(f"minutes to {least:.0%}" for least in REACHED), "validation in the end"), lines)


def _machine(result: dict[str, Any]) -> str:
    """What a result was measured on and when; of one whose rows were measured one by one, all that differs."""
    facts = [result] if "cpu" in result else result["rows"]

    def all_of(values: list[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    loads = [f["load_average"][0] for f in facts]
    load = f"{loads[0]}" if len(facts) == 1 else f"{min(loads)} to {max(loads)}"
    return (f"{all_of([f['cpu'] for f in facts])}, load average {load} at the start, "
            f"PyTorch {all_of([f['versions']['torch'] for f in facts])}, {all_of([f.get('date', 'undated') for f in facts])}, "
            f"commit {all_of([f.get('commit') or 'unknown' for f in facts])}")


@dataclass(frozen=True)
class Section:
    """A table of a stored result. paged: shown on the HTML page, with its plots; else it repeats a part of another."""

    result: str
    title: str
    table: Callable[[dict[str, Any]], list[str]]
    plots: tuple[tuple[str, Callable[[dict[str, Any], Path], None]], ...] = ()
    paged: bool = True


SECTIONS = {
    "latency": Section("sweep", "Latency and traffic against ReLUs, in short", latency_table, paged=False),
    "sweep": Section("sweep", "Latency and traffic against ReLUs", summary_table,
                     (("growth", lambda r, p: plot_growth(r["rows"], p)), ("time", lambda r, p: plot_time(r["rows"], p)))),
    "points": Section("sweep", "Every point", sweep_table),
    "slopes": Section("sweep", "What one more ReLU or square costs", fits_table),
    "limits": Section("sweep", "Physical limits", limits_table),
    "aims": Section("sweep", "Aims", targets_table),
    "peers": Section("peers", "Other engines, same network, weights and images", peers_table, (("peers", plot_peers),)),
    "load": Section("load", "Many clients", load_table, (("load", plot_load),)),
    "accuracy": Section("methods", "ReLU-reduction methods, in short", accuracy_table, paged=False),
    "methods": Section("methods", "ReLU-reduction methods side by side", methods_table,
                       (("methods", lambda r, p: plot_methods(r["rows"], p)), ("accuracy", lambda r, p: plot_accuracy(r["rows"], p)))),
}
TRAINING = "training"
"""Name of the table of the training logs."""


def make_report(results: Path, out: Path, fill: Sequence[Path] = ()) -> list[Path]:
    """Write plots and report.html, and put tables between the marks of documents; the files written.

    Raises InputError without results, and for a document without marks, or with marks of a table that there is not.
    """
    sections: list[tuple[str, list[str], str | None]] = []
    tables: dict[str, list[str]] = {}
    written = []
    out.mkdir(parents=True, exist_ok=True)
    stored = {name: load_results(results, name) for name in dict.fromkeys(section.result for section in SECTIONS.values())}
    for name, section in SECTIONS.items():
        result = stored[section.result]
        if result is None:
            continue
        command = result.get("command", f"relucent-bench {section.result}")
        tables[name] = [*section.table(result), "", f"Machine: {_machine(result)}. Command: `{command}`."]
        if section.paged:
            sections.append((section.title, tables[name], None))
        for stem, draw in section.plots:
            path = out / f"{stem}.png"
            draw(result, path)
            written.append(path)
            sections.append((stem, [], base64.b64encode(path.read_bytes()).decode()))
    if logs := sorted(results.glob("training-*.csv")):
        tables[TRAINING] = [*training_table(logs), "", "Single runs on two cores, named as their logs; some go on from another network's "
                            "weights. Between epochs the first 1,000 validation images, in the end all that no training had taken in."]
        sections.append(("Time to accuracy", tables[TRAINING], None))
    if not sections:
        raise InputError(f"{results} holds no results", "run `relucent-bench sweep`, `peers` or `load` first")
    page = out / "report.html"
    write_atomically(page, _page(sections).encode())
    for path in fill:
        _fill(path, tables)
    return [*written, page, *fill]


def _fill(path: Path, tables: dict[str, list[str]]) -> None:
    """Put tables between the marks that name them; a mark has a line of its own."""
    start, end = MARKS
    text = path.read_text()
    named = re.compile(f"^{start.format('([^ ]*)')}$", re.MULTILINE)
    whole = re.compile(f"{named.pattern}.*?^{end}$", re.MULTILINE | re.DOTALL)
    names = named.findall(text)
    known = f"names: {', '.join((*SECTIONS, TRAINING))}"
    if not names or len(whole.findall(text)) != len(names):
        raise InputError(f"{path} lacks the marks between which tables go", f"add {start.format('NAME')} and {end}; {known}")
    if missing := [name for name in names if name not in tables]:
        raise InputError(f"{path} asks for a table {missing[0]!r} of which there are no results", f"measure it first; {known}")

    def filled(found: re.Match[str]) -> str:
        return "\n\n".join((start.format(found[1]), "\n".join(tables[found[1]]), end))

    write_atomically(path, whole.sub(filled, text).encode())


def _page(sections: Sequence[tuple[str, list[str], str | None]]) -> str:
    style = ("body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
             "table{border-collapse:collapse;font-size:13px}td,th{border-bottom:1px solid #ddd;padding:4px 9px;text-align:right}"
             "th{background:#f5f5f5}td:first-child,th:first-child{text-align:left}img{max-width:100%}")
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Relucent benchmarks</title><style>{style}</style>",
             "<h1>Relucent benchmarks</h1>"]
    for title, lines, picture in sections:
        if picture is not None:
            caption = html.escape(CAPTIONS[title])
            parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{picture}"><figcaption>{caption}</figcaption></figure>')
            continue
        parts.append(f"<h2>{html.escape(title)}</h2>")
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|") and "---" not in line]
        if rows:
            cells = "".join(f"<th>{html.escape(c)}</th>" for c in rows[0])
            body = "".join("<tr>" + "".join(f"<td>{html.escape(c).replace('**', '')}</td>" for c in row) + "</tr>" for row in rows[1:])
            parts.append(f"<table><tr>{cells}</tr>{body}</table>")
        parts += [f"<p>{html.escape(line)}</p>" for line in lines if line and not line.startswith("|")]
    return "\n".join(parts) + "</html>\n"
