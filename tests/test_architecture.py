"""The layout keeps its promises: imports go one way, randomness and CrypTen have their places, documents name files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "client", "server", "model_opt", "benchmarks")
ALLOWED = {
    "protocol": {"protocol"},
    "client": {"client", "protocol"},
    "server": {"server", "protocol"},
    "model_opt": {"model_opt", "protocol"},
    "benchmarks": {"benchmarks", "client", "protocol", "model_opt"},
}
SOURCES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")) if "_pb2" not in p.name]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    reached = {name.split(".")[0] for name in imports(path)} & set(PACKAGES)
    assert reached <= ALLOWED[package]


def test_protocol_knows_no_sockets_but_in_transport_and_no_command_lines_but_in_terminal() -> None:
    outside = {"grpc", "socket", "asyncio", "argparse", "subprocess", "time"}
    for path in (ROOT / "protocol").glob("*.py"):
        if path.name not in ("transport.py", "relucent_pb2_grpc.py"):
            assert not {n.split(".")[0] for n in imports(path)} & outside, path.name
        if path.name != "terminal.py":
            assert not imports(path) & {"typer", "protocol.terminal"}, path.name


def test_crypten_is_touched_in_one_module() -> None:
    users = {p.name for p in SOURCES if "crypten" in {n.split(".")[0] for n in imports(p)} or '"crypten"' in p.read_text()}
    assert users <= {"crypten_adapter.py", "processes.py"}  # the latter names it to report its version


def test_secrets_come_from_the_operating_system_only() -> None:
    weak = re.compile(
        r"torch\.(rand|randn|randint|randperm|manual_seed)"
        r"|np\.random|numpy\.random|^import random|import pickle|pickle\.|(?<!safetensors\.)torch\.load\("
    )
    for package in ("protocol", "client", "server"):
        for path in (ROOT / package).glob("*.py"):
            assert not [line for line in path.read_text().splitlines() if weak.search(line)], path


def test_architecture_document_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [str(p.relative_to(ROOT)) for p in SOURCES if p.name != "__init__.py" and f"`{p.name}`" not in text]
    assert not missing


def test_public_things_have_docstrings() -> None:
    bare = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            bare.append(path.name)
        bare += [f"{path.name}:{n.name}" for n in tree.body
                 if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and ast.get_docstring(n) is None]
    assert not bare


def test_wire_format_is_generated_from_the_proto(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", ".", f"--python_out={tmp_path}", "protocol/relucent.proto"],
                   cwd=ROOT, check=True)
    assert (tmp_path / "protocol" / "relucent_pb2.py").read_text() == (ROOT / "protocol" / "relucent_pb2.py").read_text()
