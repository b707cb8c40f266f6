"""The files of deploy/ fit the programs, each other, and the trust model: no party is given the keys of another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
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
