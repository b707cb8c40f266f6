"""Command lines of the server and the dealer. PyTorch is imported by the commands that serve only: the others answer at once."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from protocol.terminal import Program, exit_on_error
from protocol.tls import Identity, check_name
from server.certificates import DAYS, Authority, holder
from server.config import DatabaseSettings, DealerSettings, ServerSettings, Settings, read_settings
from server.logs import set_up
from server.state import State, open_state, without_password

server_app = Program("relucent-server", "Serve compiled models for private inference.")
dealer_app = Program("relucent-dealer", "Deal correlated randomness to servers and their clients.")
token_app = typer.Typer(no_args_is_help=True, help="API tokens of clients; changes count at once, without a restart.")
server_app.add_typer(token_app, name="token")

Config = Annotated[Path | None, typer.Option("--config", help="TOML file of settings; environment and flags override it.")]
Certificate = Annotated[Path | None, typer.Option(help="This party's certificate (PEM).")]
Key = Annotated[Path | None, typer.Option(help="Its private key (PEM).")]
Ca = Annotated[Path | None, typer.Option(help="Authorities that certify its peers (PEM).")]
Insecure = Annotated[bool | None, typer.Option("--insecure", help="Plaintext transport, on trusted networks only.")]
MetricsAt = Annotated[str | None, typer.Option("--metrics", help="HOST:PORT to serve Prometheus metrics on.")]
LogJson = Annotated[bool | None, typer.Option("--log-json", help="Logs as JSON lines.")]
Grace = Annotated[float | None, typer.Option(help="Seconds that running calls get to finish on SIGTERM.")]
Hosts = Annotated[list[str] | None, typer.Option("--host", help="Name or address that peers use; repeatable. Default: those of the renewed"
                                                                " certificate, or localhost.")]
Days = Annotated[int, typer.Option(help="Days that the certificate is valid.", min=1)]
Renew = Annotated[bool, typer.Option("--renew", help="Replace an existing certificate.")]
StateFolder = Annotated[Path | None, typer.Option("--state", help="The server's state folder.")]
Database = Annotated[str | None, typer.Option(help="SQLAlchemy address, if the database is not in the state folder; with a password in it"
                                              " give it in the file or in RELUCENT_SERVER_DATABASE.")]
MasterKey = Annotated[Path | None, typer.Option(help="Master key file, if it is not in the state folder.")]


def _init(folder: Path, role: str, name: str | None, hosts: list[str] | None, days: int, renew: bool) -> None:
    """Issue a certificate; a renewed one keeps the name and hosts that are not given."""
    old = folder / f"{role}.pem"
    if renew and old.exists() and not (name and hosts):
        identity, known = holder(old)
        name, hosts = name or identity.name, hosts or known
    _issue(folder, Identity(role, check_name(name or role)), hosts or ["localhost", "127.0.0.1"], days, renew)


def _issue(folder: Path, identity: Identity, hosts: list[str], days: int, renew: bool) -> None:
    certificate, key = Authority(folder).issue(identity, hosts, days, renew)
    print(f"wrote {certificate} and {key}, valid for {days} days; peers trust them with --ca {folder / 'ca.pem'}")


@server_app.command("init")
@exit_on_error("relucent-server")
def init_server(folder: Annotated[Path, typer.Argument(help="Folder for ca.pem and the certificates.")],
                name: Annotated[str | None, typer.Option(help="Name of this server. Default: the renewed one's, or server.")] = None,
                host: Hosts = None, days: Days = DAYS, renew: Renew = False) -> None:
    """Make a certificate for a server, and an authority if FOLDER has none."""
    _init(folder, "server", name, host, days, renew)


@dealer_app.command("init")
@exit_on_error("relucent-dealer")
def init_dealer(folder: Annotated[Path, typer.Argument(help="Folder for ca.pem and the certificates.")], host: Hosts = None,
                days: Days = DAYS, renew: Renew = False) -> None:
    """Make a certificate for the dealer, and an authority if FOLDER has none."""
    _init(folder, "dealer", "dealer", host, days, renew)


@server_app.command("certify")
@exit_on_error("relucent-server")
def certify(folder: Annotated[Path, typer.Argument(help="Folder of the authority, made by `init`.")],
            name: Annotated[str, typer.Argument(help="Name of the client.")], days: Days = DAYS, renew: Renew = False) -> None:
    """Make a certificate for a client that connects to --listen-certified."""
    _issue(folder, Identity("client", check_name(name)), [], days, renew)


def _server_settings(config: Path | None, flags: dict[str, Any]) -> ServerSettings:
    flags["models"] = flags["models"] or None
    return read_settings(ServerSettings, config, flags)


@server_app.command("serve")
@exit_on_error("relucent-server")
def serve_models(
    models: Annotated[list[Path] | None, typer.Argument(help="Compiled model files, or folders of them; the first is the default.")] = None,
    config: Config = None,
    dealer: Annotated[str | None, typer.Option(help="HOST:PORT of the dealer, the one for servers.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT for clients with an API token; port 0 picks a free one.")] = None,
    listen_certified: Annotated[str | None, typer.Option(help="HOST:PORT for clients with a certificate.")] = None,
    client_ca: Annotated[Path | None, typer.Option(help="Authorities that certify clients (PEM).")] = None,
    certificate: Certificate = None, key: Key = None, ca: Ca = None, insecure: Insecure = None,
    state: Annotated[Path | None, typer.Option(help="Folder for tokens and prepared material; without it both live in memory.")] = None,
    database: Database = None, master_key: MasterKey = None,
    stock_mb: Annotated[int | None, typer.Option(help="Room for all prepared material, in MB.")] = None,
    client_stock_mb: Annotated[int | None, typer.Option(help="Room for one client's, in MB.")] = None,
    lifetime_s: Annotated[float | None, typer.Option(help="Seconds that prepared material is kept.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Largest batch of images.")] = None,
    sessions: Annotated[int | None, typer.Option(help="Calls that compute at once.")] = None,
    client_sessions: Annotated[int | None, typer.Option(help="Of those, for one client.")] = None,
    processes: Annotated[int | None, typer.Option(help="Worker processes on one port.")] = None,
    timelines: Annotated[bool | None, typer.Option("--timelines", help="Tell clients that ask how long the server took for what.")] = None,
    metrics: MetricsAt = None, log_json: LogJson = None, grace_s: Grace = None,
) -> None:
    """Serve MODELS until SIGTERM; SIGHUP reads them again. Prints one line with the address once it is ready."""
    _no_hangup()
    settings = _server_settings(config, {k: v for k, v in locals().items() if k != "config"})
    from server.catalogue import load_models
    from server.host import run_server, run_workers

    set_up(settings.log_json, settings.log_level)
    if settings.processes == 1:
        run_server(settings, load_models(settings.models))
        return
    load_models(settings.models)  # mistakes are found once, here
    open_state(settings).close()
    with tempfile.TemporaryDirectory(prefix="relucent-") as folder:
        def command(changes: dict[str, Any]) -> list[str]:
            path = Path(folder) / f"{changes['metrics'] or 'worker'}.json".replace(":", "-")
            values = settings.model_dump(mode="json") | changes
            path.parent.mkdir(mode=0o700, exist_ok=True)  # cleaners of old temporary files may have removed it
            path.write_text(json.dumps(values))
            return [sys.executable, "-c", "import sys; from server.cli import run_worker; run_worker(sys.argv[1])", str(path)]

        run_workers(settings, command)


def _no_hangup() -> None:
    """Until the service runs and reads its models again on SIGHUP, that ends nothing."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def run_worker(path: str) -> None:
    """One of several processes, with the settings in a JSON file."""
    _no_hangup()
    from server.catalogue import load_models
    from server.host import run_server

    settings = ServerSettings(**json.loads(Path(path).read_text()))
    set_up(settings.log_json, settings.log_level)

    @exit_on_error("relucent-server")
    def run() -> None:
        run_server(settings, load_models(settings.models), True)

    run()


@server_app.command("check-config")
@exit_on_error("relucent-server")
def check_config(
    config: Annotated[Path, typer.Option("--config", help="TOML file of settings.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the effective settings.")] = False,
) -> None:
    """Check settings, certificates, models and database without serving."""
    from server.catalogue import load_models

    settings = read_settings(ServerSettings, config, {})
    settings.security.pair()
    loaded = load_models(settings.models)
    open_state(settings).close()
    if as_json:
        shown = {"database": without_password(settings.database)} if settings.database is not None else {}
        print(json.dumps(settings.model_dump(mode="json") | shown, indent=1))
    else:
        print(f"{config} is good: {', '.join(m.public.name for m in loaded)}; dealer {settings.dealer}; listens on {settings.listen}")


@dealer_app.command("serve")
@exit_on_error("relucent-dealer")
def serve_dealer(
    config: Config = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT for clients (and in plaintext for servers).")] = None,
    listen_servers: Annotated[str | None, typer.Option(help="HOST:PORT for servers, which show their certificate.")] = None,
    certificate: Certificate = None, key: Key = None, ca: Ca = None, insecure: Insecure = None, master_key: MasterKey = None,
    deals: Annotated[int | None, typer.Option(help="Dealings at once.")] = None,
    timelines: Annotated[bool | None, typer.Option("--timelines", help="Tell clients that ask how long the dealer took for what.")] = None,
    metrics: MetricsAt = None, log_json: LogJson = None, grace_s: Grace = None,
) -> None:
    """Deal until SIGTERM. Prints one line with the address once it is ready."""
    _no_hangup()
    settings: Settings = read_settings(DealerSettings, config, {k: v for k, v in locals().items() if k != "config"})
    assert isinstance(settings, DealerSettings)
    from server.host import run_dealer

    set_up(settings.log_json, settings.log_level)
    run_dealer(settings)


@dealer_app.command("check-config")
@exit_on_error("relucent-dealer")
def check_dealer_config(config: Annotated[Path, typer.Option("--config", help="TOML file of settings.")]) -> None:
    """Check settings and certificates without serving."""
    settings = read_settings(DealerSettings, config, {})
    settings.security.pair()
    print(f"{config} is good: listens on {settings.listen}")


# --- API tokens -----------------------------------------------------------------------------------------------------


def _database(config: Path | None, state: Path | None, database: str | None, master_key: Path | None, existing: bool = True) -> State:
    """The server's database, found as the server itself finds it. existing: refuse to make one."""
    settings = read_settings(DatabaseSettings, config, {"state": state, "database": database, "master_key": master_key})
    return open_state(settings, existing or (settings.state is None and settings.database is None))


@token_app.command("create")
@exit_on_error("relucent-server")
def create_token(
    names: Annotated[list[str], typer.Argument(help="Name of the client; several for a token each.")],
    days: Annotated[float | None, typer.Option(help="Days that it is valid; default for ever.", min=0.001)] = None,
    config: Config = None, state: StateFolder = None, database: Database = None, master_key: MasterKey = None,
) -> None:
    """Make tokens and print them, one a line, once; the server stores a hash only."""
    for name in names:
        check_name(name)
    opened = _database(config, state, database, master_key, existing=False)
    for name in names:
        print(opened.create_token(name, days))


@server_app.command("deny")
@exit_on_error("relucent-server")
def deny(name: Annotated[str, typer.Argument(help="Name of the client, as in its certificate or token.")],
         config: Config = None, state: StateFolder = None, database: Database = None, master_key: MasterKey = None,
         undo: Annotated[bool, typer.Option("--undo", help="Let the client in again.")] = False) -> None:
    """Refuse a client from now on, certificates included, and destroy its prepared material."""
    opened = _database(config, state, database, master_key)
    if undo:
        opened.allow(name)
        print(f"{name} is let in again")
        return
    opened.deny(name)
    destroyed = len(opened.drop_materials_of(Identity("client", name).uri))
    print(f"{name} is denied; destroyed {destroyed} prepared material(s)")


@token_app.command("list")
@exit_on_error("relucent-server")
def list_tokens(config: Config = None, state: StateFolder = None, database: Database = None, master_key: MasterKey = None,
                as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """All tokens, without the tokens themselves."""
    opened = _database(config, state, database, master_key)
    now, rows = opened.clock(), opened.list_tokens()
    if as_json:
        print(json.dumps([{**vars(t), "valid": t.valid(now)} for t in rows]))
        return

    def date(seconds: float | None) -> str:
        return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"

    table = Table("id", "name", "created (UTC)", "expires", "state")
    for t in rows:
        table.add_row(t.id, t.name, date(t.created), date(t.expires), "valid" if t.valid(now) else "revoked" if t.revoked else "expired")
    Console().print(table)


@token_app.command("revoke")
@exit_on_error("relucent-server")
def revoke_token(which: Annotated[str, typer.Argument(help="Id of a token, or name of a client: all of its tokens.")],
                 config: Config = None, state: StateFolder = None, database: Database = None, master_key: MasterKey = None) -> None:
    """Refuse a token from now on, and destroy its client's prepared material."""
    opened = _database(config, state, database, master_key)
    revoked = opened.revoke_token(which)
    destroyed = sum(len(opened.drop_materials_of(Identity("client", name).uri)) for name in {t.name for t in revoked})
    print(f"revoked {len(revoked)} token(s) and destroyed {destroyed} prepared material(s)")
