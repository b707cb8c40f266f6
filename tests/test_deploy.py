"""The files of deploy/ fit the programs, each other, and the trust model: no party is given the keys of another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.report import SECTIONS, TRAINING
from protocol import errors
from protocol.model import Model, save
from protocol.tls import Identity
from server.certificates import Authority
from server.config import ServerSettings, read_settings
from server.host import metrics_of_worker
from server.metrics import Metrics
from tests.test_programs import program

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
OPERATING = (ROOT / "docs" / "operating.md").read_text()
OWN = {party: {"ca.pem", f"{party}.pem", f"{party}-key.pem"} for party in ("dealer", "server")}


def objects(party: str) -> tuple[str, list[dict[str, Any]]]:
    """Of a party's Kubernetes manifest: the commands in its header, without the line ends that a backslash hides, and the objects."""
    text = (DEPLOY / "kubernetes" / f"{party}.yaml").read_text()
    header = "\n".join(line.removeprefix("#").removeprefix("   ") for line in text.splitlines() if line.startswith("#"))
    return header.replace("\\\n", ""), list(yaml.safe_load_all(text))


# --- who holds which keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("party", ["dealer", "server"])
def test_pods_hold_their_own_partys_keys_only(party: str) -> None:
    header, (workload, _) = objects(party)
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = re.search(rf"kubectl create secret generic {party} -n (\S+) (.*)", header)
    assert given, header
    files = set(re.findall(r"--from-file=(\S+)", given[2]))
    assert files == OWN[party] | {f"{party}.key"}
    assert header.index(f"kubectl create namespace {given[1]}") < given.start() < header.index(f"kubectl apply -f {party}.yaml")
    # all secrets come from that one, and every file that the settings name is in it
    assert [v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v] == [party]
    references = [e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e]
    assert all(r["name"] == party and f"--from-literal={r['key']}=" in given[2] for r in references)
    assert {Path(e["value"]).name for e in container["env"] if e.get("value", "").startswith("/secrets/")} == files
    assert not [v for v in pod["volumes"] if not {"secret", "emptyDir"} & v.keys()], "a volume that nobody has filled"


@pytest.mark.parametrize(("party", "host", "ports"), [("dealer", "dealer.example.org", {7002, 7003}),
                                                      ("server", "inference.example.org", {7001})])
def test_services_are_reached_by_the_names_of_their_certificates(party: str, host: str, ports: set[int]) -> None:
    header, (workload, service) = objects(party)
    assert f"relucent-{party} init certificates --host {host}" in header
    assert {o["metadata"]["namespace"] for o in (workload, service)} == set(re.findall(r"create namespace (\S+)", header))
    assert (service["spec"]["type"], {p["port"] for p in service["spec"]["ports"]}) == ("LoadBalancer", ports)
    assert service["spec"]["selector"] == workload["spec"]["template"]["metadata"]["labels"]
    if party == "server":
        assert service["spec"]["sessionAffinity"] == "ClientIP"  # material lies where it was prepared
        assert workload["spec"]["serviceName"] == service["metadata"]["name"]
        env = {e["name"]: e.get("value") for e in workload["spec"]["template"]["spec"]["containers"][0]["env"]}
        assert env["RELUCENT_SERVER_DEALER"] == "dealer.example.org:7003"


def test_compose_gives_each_party_its_own_keys_only(tmp_path: Path) -> None:
    """The script of `init`, run with folders in place of the volumes."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounts = {name: dict(v.split(":")[:2] for v in s["volumes"]) for name, s in services.items()}
    for name in ("dealer-certificates", "server-certificates", "dealer", "state", "authority"):
        assert len([m for s, m in mounts.items() if name in m and s != "init"]) == (name != "authority"), name
    shell, options, script, *name = services["init"]["entrypoint"]
    for folder in mounts["init"].values():
        (tmp_path / folder[1:]).mkdir()
        script = script.replace(f" {folder}", f" {tmp_path}{folder}")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("chown", "relucent-server", "relucent-dealer"):
        run = "pass" if tool == "chown" else f"from server.cli import {tool.removeprefix('relucent-')}_app as app; app()"
        (tools / tool).write_text(f"#!{sys.executable}\n{run}\n")
        (tools / tool).chmod(0o755)
    for arguments in ([], ["--renew", "--host", "example.org"]):
        command = [shell, options, script.replace("$$", "$"), *name, *arguments]
        done = subprocess.run(command, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for party, files in OWN.items():
            folder = tmp_path / mounts["init"][f"{party}-certificates"][1:]
            assert {p.name for p in folder.iterdir()} == files
            assert (folder / f"{party}.pem").read_bytes() == (tmp_path / "authority" / f"{party}.pem").read_bytes()
            assert mounts[party][f"{party}-certificates"] == "/certificates"


# --- settings and units -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("party", ["dealer", "server"])
@pytest.mark.parametrize("folder", [".", "systemd"])
def test_example_settings_pass_check_config(folder: str, party: str, tmp_path: Path, mixed_model: Model) -> None:
    """With the same paths below another root, where everything that they name lies ready."""
    text = (DEPLOY / folder / f"{party}.toml").read_text()
    settings = tomllib.loads(text)
    identity = Identity(party, party)  # type: ignore[arg-type]
    certificate, key = Authority(tmp_path / "authority").issue(identity, ["localhost"])
    for name, source in (("certificate", certificate), ("key", key), ("ca", tmp_path / "authority" / "ca.pem")):
        target = tmp_path / settings[name][1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    for models in settings.get("models", []):
        file = tmp_path / models[1:] if models.endswith(".safetensors") else tmp_path / models[1:] / "m.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save(Model(replace(mixed_model.public, name=file.stem), mixed_model.private), file)
    path = tmp_path / "settings.toml"
    path.write_text(text.replace('"/', f'"{tmp_path}/'))
    done = program(party, "check-config", "--config", path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("party", ["dealer", "server"])
def test_units_let_programs_write_where_the_settings_say(party: str) -> None:
    settings, unit = tomllib.loads((DEPLOY / "systemd" / f"{party}.toml").read_text()), ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    path = DEPLOY / "systemd" / f"relucent-{party}.service"
    unit.read(path)
    service = unit["Service"]
    state, user = Path("/var/lib") / service["StateDirectory"], service["User"]
    assert service["ProtectSystem"] == "strict"
    for name in ("state", "master_key"):
        assert Path(settings.get(name, state)).is_relative_to(state), name
    # the guide makes the user and the folders, and puts there what unit and settings name
    guide = OPERATING.partition("### As services of systemd")[2].partition("\n## ")[0]
    assert re.search(rf"^useradd --system .* {user}$", guide, re.MULTILINE)
    assert f"install -d -o {user} -g {user} -m {service['StateDirectoryMode'][1:]} {state}\n" in guide
    binary, _, _, config = service["ExecStart"].split()
    assert f"runuser -u {user} -- {binary} check-config --config {config}\n" in guide
    installed = {f"{target}/{Path(source).name}" for group, sources, target in
                 re.findall(r"^install -g (\S+) -m 640 (.+) (/\S+)$", guide, re.MULTILINE) if group == user for source in sources.split()}
    assert {config, settings["certificate"], settings["key"], settings["ca"]} <= installed
    assert {Path(file).name for file in installed} <= OWN[party] | {f"{party}.toml", "*.safetensors"}
    for models in map(Path, settings.get("models", [])):
        assert str((models.parent if models.suffix else models) / "*.safetensors") in installed
        assert not models.suffix or (ROOT / "models" / models.name).is_file()
    assert f"install -m 644 {path.relative_to(ROOT)} /etc/systemd/system\n" in guide
    assert f"{binary.rpartition('/bin/')[0]}\n" in OPERATING.partition("python3 -m venv ")[2]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze comes with systemd")
@pytest.mark.parametrize("party", ["dealer", "server"])
def test_units_are_valid(party: str, tmp_path: Path) -> None:
    path = tmp_path / f"relucent-{party}.service"
    path.write_text(re.sub(r"/opt/relucent/bin/\S+", sys.executable, (DEPLOY / "systemd" / path.name).read_text()))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert done.returncode == 0 and path.name not in done.stderr, done.stderr


def test_prometheus_asks_every_process() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    wanted = []
    for party in ("server", "dealer"):
        assert any(v.startswith(f"./{party}.toml:") for v in services[party]["volumes"])
        settings = tomllib.loads((DEPLOY / f"{party}.toml").read_text())
        ports = [metrics_of_worker(settings["metrics"], i) for i in range(settings.get("processes", 1))]
        wanted += [str(port).replace("0.0.0.0", party) for port in ports]
    assert job["static_configs"] == [{"targets": wanted}]


def test_the_guide_installs_what_the_makefile_installs() -> None:
    pinned = re.findall(r'"(?:torch|crypten)==[^"]+"', (ROOT / "Makefile").read_text())
    assert len(pinned) == 2
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    for text in (OPERATING, dockerfile):
        assert re.search(rf"pip install .*{pinned[0]}", text)
        after = text.partition(pinned[1])[2]
        assert "--no-deps" in text.partition(pinned[1])[0].splitlines()[-1]
        # Relucent comes after the removal of CrypTen's package of the same name as one of its own
        assert re.search(r"rm -r.*/site-packages/benchmarks(?s:.*)pip install .*\.", after)


# --- what is watched --------------------------------------------------------------------------------------------------

RULES = [r for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for r in group["rules"]]
FIVE_IN_A_HUNDRED, HALF = "0+5x40", "0+50x40"  # a minute, of:
ALL = "0+100x40"
FIRES: dict[str, dict[str, str]] = {  # alert: series that make it fire; every minute a value
    "RelucentDown": {"up": "0x40"},
    "RelucentErrors": {'relucent_server_errors_total{kind="StorageError"}': "0+30x40"},
    "RelucentPeers": {'relucent_server_errors_total{kind="PeerError"}': HALF, 'relucent_server_sessions_total{outcome="failed"}': HALF,
                      'relucent_server_sessions_total{outcome="done"}': HALF},
    "RelucentDealerErrors": {'relucent_dealer_errors_total{kind="PeerTimeout"}': HALF, "relucent_dealer_sessions_total": ALL},
    "RelucentInternalErrors": {'relucent_dealer_errors_total{kind="Internal"}': "0x15 1x25"},
    "RelucentRefusals": {'relucent_server_refusals_total{reason="ResourceLimit"}': ALL},
    "RelucentAccessDenied": {'relucent_server_refusals_total{reason="AccessDenied"}': ALL},
    "RelucentStock": {"relucent_server_stock_bytes": f"{8 << 30}x40"},
    "RelucentWaiting": {"relucent_server_sessions_waiting": "200x40"},
    "RelucentSlow": {'relucent_server_phase_seconds_bucket{phase="online",le="6.4"}': "0x40",
                     'relucent_server_phase_seconds_bucket{phase="online",le="12.8"}': ALL,
                     'relucent_server_phase_seconds_bucket{phase="online",le="+Inf"}': ALL},
    "RelucentCertificateExpires": {"relucent_certificate_seconds": "86400x40"},
}
QUIET = {
    "up": "1x40", 'relucent_server_errors_total{kind="Internal"}': "0x40", 'relucent_dealer_errors_total{kind="Internal"}': "0x40",
    'relucent_server_errors_total{kind="PeerError"}': FIVE_IN_A_HUNDRED, "relucent_server_sessions_total": ALL,
    'relucent_dealer_errors_total{kind="PeerTimeout"}': FIVE_IN_A_HUNDRED, "relucent_dealer_sessions_total": ALL,
    'relucent_server_refusals_total{reason="AccessDenied"}': "0+1x40", "relucent_server_stock_bytes": f"{4 << 30}x40",
    "relucent_server_sessions_waiting": "20x40", "relucent_certificate_seconds": "8640000x40",
    'relucent_server_phase_seconds_bucket{phase="online",le="0.1"}': ALL,
    'relucent_server_phase_seconds_bucket{phase="online",le="+Inf"}': ALL,
}


def known_metrics() -> set[str]:
    """The names that the programs give their metrics, as Prometheus stores them."""
    names = {"up"}
    for party in ("server", "dealer"):
        for family in Metrics(party).registry.collect():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            names |= {family.name + suffix for suffix in suffixes}
    for path in (ROOT / "server").glob("*.py"):
        names |= set(re.findall(r'\.watch\("(\w+)"', path.read_text()))
    return names


def test_every_metric_that_is_named_exists() -> None:
    known = known_metrics()
    assert {"relucent_server_errors_total", "relucent_server_phase_seconds_bucket", "relucent_server_stock_bytes"} <= known
    for rule in RULES:
        named = set(re.findall(r"\b(?:relucent_\w+|up)\b", rule["expr"].replace('"relucent"', "")))
        assert named and named <= known, rule["alert"]
        for label, values in re.findall(r'(kind|reason)(?:=|!=|=~|!~)"([^"]+)"', rule["expr"]):
            for value in values.split("|"):
                assert hasattr(errors, value) or (label, value) == ("kind", "Internal"), rule["alert"]
    for name in ("prometheus.yml", "alerts.yml"):
        assert set(re.findall(r"relucent_\w+", (DEPLOY / name).read_text())) <= known
    stems = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in known} | known
    assert set(re.findall(r"relucent_(?:server|dealer|certificate)_\w+", OPERATING)) <= stems


def test_thresholds_are_those_of_the_settings() -> None:
    settings = read_settings(ServerSettings, DEPLOY / "server.toml", {})
    expressions = {r["alert"]: r["expr"] for r in RULES}
    assert expressions["RelucentStock"].endswith(f"> 0.9 * {settings.stock_mb} * 1048576")
    assert expressions["RelucentWaiting"].endswith(f"> 0.5 * {settings.waiting}")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool comes with Prometheus")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    assert FIRES.keys() == {r["alert"] for r in RULES}

    def series(values: dict[str, str]) -> list[dict[str, str]]:
        labels = ('job="relucent"', 'instance="one"')
        return [{"series": f"{name.partition('{')[0]}{{{','.join([*labels, *filter(None, [name.partition('{')[2][:-1]])])}}}", "values": v}
                for name, v in values.items()]

    tests: list[dict[str, Any]] = []
    for alert, values in {**FIRES, "": QUIET}.items():
        fired = [{"expr": f'count by (alertname) (ALERTS{{alertstate="firing",alertname="{r["alert"]}"}})', "eval_time": "20m",
                  "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if r["alert"] == alert else []} for r in RULES]
        tests.append({"interval": "1m", "input_series": series(values), "promql_expr_test": fired})
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yml")], "evaluation_interval": "1m", "tests": tests}))
    for command in (["test", "rules", path], ["check", "config", DEPLOY / "prometheus.yml"]):
        done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# --- documents --------------------------------------------------------------------------------------------------------

def test_settings_that_are_documented_exist() -> None:
    settings = ServerSettings.model_fields
    table = OPERATING.partition("| setting | default | meaning |\n|---|---|---|\n")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in row.split("|")[1].strip().split(", ")}
    assert len(named) > 20 and named <= settings.keys()
    by_themselves = re.search(r"^- \*\*For each process by itself\*\*: (.*?), and downloads", OPERATING, re.MULTILINE)
    assert by_themselves and set(re.findall(r"`(\w+)`", by_themselves[1])) <= settings.keys()


@pytest.mark.parametrize("document", ["README.md", "docs/benchmarks.md", "docs/operating.md"])
def test_the_tables_have_their_place(document: str) -> None:
    """Each between its marks, filled with a table that there is."""
    parts = re.split(r"^<!-- (table: \w+|end of table) -->$", (ROOT / document).read_text(), flags=re.MULTILINE)
    marks, between = parts[1::2], parts[2::2]
    assert marks and marks[1::2] == ["end of table"] * (len(marks) // 2) and len(marks) % 2 == 0
    for mark, table in zip(marks[::2], between[::2]):
        assert mark.removeprefix("table: ") in {*SECTIONS, TRAINING} and table.count("\n|---|") == 1, mark
