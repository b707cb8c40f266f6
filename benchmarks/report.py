"""From stored JSON to one self-contained HTML page, PNG plots, and the README's table."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no window system is needed
import matplotlib.pyplot as plt
import numpy as np

from model_opt.show import draw_pareto
from protocol.errors import InputError
from protocol.timeline import KINDS

COLOURS = dict(zip(KINDS, ("#a0785a", "#2e86ab", "#8fb996", "#f2b134", "#d1495b", "#7d5ba6", "#d9d9d9")))
LINK_COLOURS = {"loopback": "#2e86ab", "lan": "#8fb996", "wan": "#d1495b", "mobile": "#f2b134"}
README_START, README_END = "<!-- figures: made by `relucent-bench report` -->", "<!-- end of figures -->"
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
    """Online latency and preprocessing traffic against ReLUs, a line for each link."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    base = rows[0]
    for link in dict.fromkeys(r["link"] for r in rows):
        chosen = sorted((r for r in rows if r["link"] == link and (r["width"], r["batch"]) == (base["width"], base["batch"])),
                        key=lambda r: r["relus"])
        x = [max(r["relus"], 100) for r in chosen]
        low = [r["online_ms"] - r["online_ms_spread"][0] for r in chosen]
        high = [r["online_ms_spread"][1] - r["online_ms"] for r in chosen]
        left.errorbar(x, [r["online_ms"] for r in chosen], [low, high], fmt="o-", capsize=2, label=link, color=LINK_COLOURS.get(link))
        if link == base["link"]:
            right.plot(x, [sum(r["preprocessing_bytes"].values()) / 1e6 for r in chosen], "o-", color="#d1495b", label="preprocessing")
            right.plot(x, [(r["online_bytes_up"] + r["online_bytes_down"]) / 1e6 for r in chosen], "s-", color="#2e86ab", label="online")
    left.axhline(base["plaintext_ms"], color="grey", ls="--", lw=1, label="plaintext PyTorch")
    left.set(xscale="log", yscale="log", xlabel="ReLUs per image (0 drawn at 100)", ylabel="online latency, ms",
             title=f"{base['network']} width {base['width']}, batch {base['batch']}")
    right.set(xscale="log", yscale="log", xlabel="ReLUs per image (0 drawn at 100)", ylabel="traffic, MB", title="traffic of one inference")
    for axis in (left, right):
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_time(rows: Sequence[Row], path: Path) -> None:
    """Stacked bars: where the online time goes, by party and kind; below, the server's time by layer of the first network."""
    chosen = [r for r in rows if r.get("timeline")][:8]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 8), layout="constrained")
    places = np.arange(len(chosen))
    base = np.zeros(len(chosen))
    parts = {f"server: {kind}": ([r["timeline"]["server"][kind] for r in chosen], COLOURS[kind]) for kind in KINDS if kind != "wait"}
    parts["client"] = ([sum(v for k, v in r["timeline"]["client"].items() if k != "wait") for r in chosen], "#444444")
    for name, (values, colour) in parts.items():
        heights = 100 * np.array(values) / np.array([r["online_ms"] for r in chosen])
        top.bar(places, heights, bottom=base, label=name, color=colour, width=0.7)
        base += heights
    rest = np.maximum(100 - base, 0)
    top.bar(places, rest, bottom=base, label="on the way, and gRPC", color=COLOURS["wait"], width=0.7)
    labels = [f"{r['relus']:,}\nw{r['width']} b{r['batch']}\n{r['link']}\n{r['online_ms']:.0f} ms" for r in chosen]
    top.set_xticks(places, labels, fontsize=8)
    top.set(ylabel="share of the online time, %", title="where the online time goes (client and server overlap: bars may pass 100%)")
    top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    layers = chosen[0]["timeline"]["layers"]
    at = np.arange(len(layers))
    base = np.zeros(len(layers))
    for kind in KINDS:
        heights = np.array([layer[kind] for layer in layers])
        bottom.bar(at, heights, bottom=base, label=kind, color=COLOURS[kind], width=0.8)
        base += heights
    bottom.set_xticks(at, [layer["layer"].replace("blocks_", "") for layer in layers], rotation=60, fontsize=7)
    bottom.set(ylabel="ms", title=f"the server, layer by layer: {chosen[0]['relus']:,} ReLUs, {chosen[0]['link']}")
    bottom.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_peers(peers: dict[str, Any], path: Path) -> None:
    """Online latency and traffic of ours beside each peer that ran, log scale, with ratios."""
    rows = [r for r in peers["rows"] if "online_ms" in r]
    names = [r["label"] for r in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.55 * len(rows) + 1.6), layout="constrained", sharey=True)
    ours = next(r for r in rows if r["name"] == "relucent")
    for axis, key, scale, text in ((axes[0], "online_ms", 1.0, "online latency, ms"), (axes[1], "bytes", 1e6, "online traffic, MB")):
        for i, row in enumerate(rows):
            if not row.get(key):
                continue
            mine = row["name"] == "relucent"
            axis.barh(i, row[key] / scale, color="#2e86ab" if mine else "#8fb996" if row["hides_image"] else "#d1495b")
            axis.text(row[key] / scale, i, f" {row[key] / scale:,.0f}" + ("" if mine else f" ({row[key] / ours[key]:.1f}x)"), va="center",
                      fontsize=8)
        axis.set(xscale="log", xlabel=text)
        axis.margins(x=0.45)
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle("red: does not hide the image from the server", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_load(load: dict[str, Any], path: Path) -> None:
    """Throughput and latency against the number of clients."""
    rows = load["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    x = [r["clients"] for r in rows]
    left.plot(x, [r["images_per_s"] for r in rows], "o-", color="#2e86ab")
    left.set(xscale="log", xlabel="clients", ylabel="images per second, preprocessing included", ylim=(0, None))
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
    """Accuracy against online latency where both are known."""
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for row in rows:
        axis.plot(row["online_ms"], 100 * row["test_accuracy"], "o", color="#2e86ab")
        axis.annotate(f"{row['label']}\n{row['relus']:,}", (row["online_ms"], 100 * row["test_accuracy"]), fontsize=7,
                      xytext=(5, -8), textcoords="offset points")
    axis.set(xlabel="private online latency, ms", ylabel="test accuracy, %")
    axis.grid(True, alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]


def sweep_table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines: one row for each measured network, batch and link."""
    lines = []
    for r in rows:
        ideal = max(r["limits"]["linear_ms"], 1e-9) if r.get("limits") else 0
        lines.append([f"{r['relus']:,}", f"w{r['width']}", str(r["batch"]), r["link"],
                      f"{r['online_ms']:.0f} ({r['online_ms_spread'][0]:.0f}-{r['online_ms_spread'][1]:.0f})",
                      f"{r['online_ms'] / r['plaintext_ms']:.1f}x", f"{r['online_ms'] / ideal:.1f}x" if ideal else "",
                      f"{(r['online_bytes_up'] + r['online_bytes_down']) / 1e6:.2f}", f"{r['preprocessing_ms']:.0f}",
                      f"{sum(r['preprocessing_bytes'].values()) / 1e6:.1f}", str(r["runs"])])
    return _table(("ReLUs", "width", "batch", "link", "online ms (min-max)", "of plaintext", "of int64 convolutions", "online MB",
                   "preprocessing ms", "preprocessing MB", "n"), lines)


def peers_table(peers: dict[str, Any]) -> list[str]:
    """Markdown lines: ours and each peer."""
    ours = next(r for r in peers["rows"] if r["name"] == "relucent")
    lines = []
    for r in peers["rows"]:
        if "online_ms" not in r:
            lines.append([r["label"], "-", "-", "-", "-", "", f"skipped: {r['skipped']}"])
            continue
        total = r["online_ms"] + (r.get("preprocessing_ms") or 0)
        lines.append([r["label"], f"{r['online_ms']:,.0f}", f"{r['online_ms'] / ours['online_ms']:.1f}x", f"{total:,.0f}",
                      f"{r['bytes'] / 1e6:,.1f}" if r.get("bytes") else "-", "yes" if r["hides_image"] else "**no**",
                      r.get("notes", "").split(";")[0]])
    return _table(("engine", "online ms", "of ours", "with preprocessing ms", "online MB", "hides the image", "notes"), lines)


def load_table(load: dict[str, Any]) -> list[str]:
    """Markdown lines: one row for each number of clients."""
    return _table(("clients", "images/s", "online p50 / p99 ms", "with preprocessing p50 / p99 ms", "refused", "errors", "server MB"),
                  [[str(r["clients"]), f"{r['images_per_s']:.2f}", f"{r['online_ms']['p50']:.0f} / {r['online_ms']['p99']:.0f}",
                    f"{r['with_preprocessing_ms']['p50']:.0f} / {r['with_preprocessing_ms']['p99']:.0f}", str(r["refused"]),
                    str(sum(r["errors"].values())), f"{r['peak_rss_mb']['server']:.0f}"] for r in load["rows"]])


def methods_table(methods: dict[str, Any]) -> list[str]:
    """Markdown lines: one row for each method, budget and seed."""
    lines = []
    for r in sorted(methods["rows"], key=lambda r: (r["budget"], -r["test_accuracy"])):
        lines.append([r["label"], f"{r['network']} w{r['width']}", f"{r['relus']:,}", str(r["degree"]),
                      f"{100 * r['validation_accuracy']:.2f}", f"{100 * r['test_accuracy']:.2f}", f"{100 * r['fixed_point_accuracy']:.2f}",
                      f"{100 * r['private_accuracy']:.1f} ({100 * r['fixed_point_accuracy_same_images']:.1f})", f"{r['online_ms']:.0f}",
                      f"{r['online_bytes'] / 1e6:.2f}", str(r["rounds"]), str(r["seed"]), str(r["epochs"]), f"{r['minutes']:.0f}"])
    return _table(("method", "network", "ReLUs", "degree", "validation", "test, float", "test, fixed point",
                   f"private on {methods['rows'][0]['private_images']:,} (fixed point on these)", "online ms", "online MB",
                   "rounds", "seed", "epochs", "minutes"), lines)


def _machine(result: dict[str, Any]) -> str:
    facts = result if "cpu" in result else result["rows"][0]
    return f"{facts['cpu']}, load average {facts['load_average'][0]}, PyTorch {facts['versions']['torch']}, {result.get('date', 'undated')}"


def make_report(results: Path, out: Path, readme: Path | None) -> list[Path]:
    """Write plots, report.html and, between its marks, the README's tables; the files written. Raises InputError without results."""
    sections: list[tuple[str, list[str], str | None]] = []
    written = []
    known: list[tuple[str, str, Callable[[dict[str, Any]], list[str]], list[tuple[str, Callable[[dict[str, Any], Path], None]]]]] = [
        ("sweep", "Latency and traffic against ReLUs", lambda r: sweep_table(r["rows"]),
         [("growth", lambda r, p: plot_growth(r["rows"], p)), ("time", lambda r, p: plot_time(r["rows"], p))]),
        ("peers", "Other engines, same network, weights and image", peers_table, [("peers", plot_peers)]),
        ("load", "Many clients", load_table, [("load", plot_load)]),
        ("methods", "ReLU-reduction methods side by side", methods_table,
         [("methods", lambda r, p: draw_pareto(r["rows"], p, "Ours, and published results of larger networks", True)),
          ("accuracy", lambda r, p: plot_accuracy(r["rows"], p))]),
    ]
    out.mkdir(parents=True, exist_ok=True)
    for name, title, table, plots in known:
        result = load_results(results, name)
        if result is None:
            continue
        lines = table(result)
        command = result.get("command", f"relucent-bench {name}")
        sections.append((title, [*lines, "", f"Machine: {_machine(result)}. Command: `{command}`."], None))
        for stem, draw in plots:
            path = out / f"{stem}.png"
            draw(result, path)
            written.append(path)
            sections.append(("", [], base64.b64encode(path.read_bytes()).decode()))
    if not sections:
        raise InputError(f"{results} holds no results", "run `relucent-bench sweep`, `peers` or `load` first")
    page = out / "report.html"
    page.write_text(_page(sections))
    written.append(page)
    if readme is not None:
        _into_readme(readme, sections)
        written.append(readme)
    return written


def _into_readme(readme: Path, sections: Sequence[tuple[str, list[str], str | None]]) -> None:
    text = readme.read_text()
    if README_START not in text or README_END not in text:
        raise InputError(f"{readme} lacks the marks between which the tables go", f"add {README_START} and {README_END}")
    body = "\n\n".join(f"### {title}\n\n" + "\n".join(lines) for title, lines, picture in sections if picture is None)
    before, rest = text.split(README_START)
    readme.write_text(f"{before}{README_START}\n\n{body}\n\n{README_END}{rest.split(README_END)[1]}")


def _page(sections: Sequence[tuple[str, list[str], str | None]]) -> str:
    style = ("body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
             "table{border-collapse:collapse;font-size:13px}td,th{border-bottom:1px solid #ddd;padding:4px 9px;text-align:right}"
             "th{background:#f5f5f5}td:first-child,th:first-child{text-align:left}img{max-width:100%}")
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Relucent benchmarks</title><style>{style}</style>",
             "<h1>Relucent benchmarks</h1>"]
    for title, lines, picture in sections:
        if picture is not None:
            parts.append(f'<img alt="plot" src="data:image/png;base64,{picture}">')
            continue
        parts.append(f"<h2>{html.escape(title)}</h2>")
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|") and "---" not in line]
        if rows:
            cells = "".join(f"<th>{html.escape(c)}</th>" for c in rows[0])
            body = "".join("<tr>" + "".join(f"<td>{html.escape(c).replace('**', '')}</td>" for c in row) + "</tr>" for row in rows[1:])
            parts.append(f"<table><tr>{cells}</tr>{body}</table>")
        parts += [f"<p>{html.escape(line)}</p>" for line in lines if line and not line.startswith("|")]
    return "\n".join(parts) + "</html>\n"
