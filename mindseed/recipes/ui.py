"""The studio: chat with models, compare them, watch runs, take tokens apart, look inside a model, in the browser.

  mindseed ui                                         the models and runs under runs/
  mindseed ui runs/demo/fine-tune/model               this one
  mindseed ui --server http://127.0.0.1:8998          the models of a server that is running already

Without --server one is started (`mindseed serve`) and ends with the studio. Conversations are kept on this computer;
nothing is sent anywhere. A server that wants a key gets that of MINDSEED_API_KEY.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.files import atomic
from mindseed.base.log import say, warn
from mindseed.ui.studio import (
    AGAIN, ENDED, ERRORS, VARIABLE, Ended, Studio, converses, data_folder, find_models, served_names)

MOST_FOUND = 4                                    # models that are served though nobody named them
HERE = ("127.0.0.1", "localhost", "::1")
STREAMLIT = {
    "server.headless": "true", "server.fileWatcherType": "none", "server.runOnSave": "false",
    "browser.gatherUsageStats": "false", "client.toolbarMode": "minimal", "client.showErrorDetails": "type",
    "client.showErrorLinks": "false", "logger.hideWelcomeMessage": "true", "logger.level": "warning"}


@dataclass(frozen=True, kw_only=True)
class Options:
    models: tuple[str, ...] = option((), help="model directories [those under runs/, the newest]", positional=True,
                                     elsewhere=("load_from", "model_path", "model_name_or_path"))
    server: str | None = option(None, help="the address of a server that is running already", elsewhere=("base_url",))
    runs: tuple[str, ...] = option(("runs",), help="folders in which runs lie", elsewhere=("logdir",))
    data: str | None = option(None, help="the folder of conversations and settings [where the system keeps such]")
    host: str = option("127.0.0.1", help="the address of the page; another one than this machine's own lets others in")
    port: int = option(8501, help="of the page; 0: any that is free")
    open: bool | None = option(None, help="open a browser [if there is a screen]")


def main(options: Options) -> int:
    require_extra()
    places = options.models or tuple(found_below(options.runs))
    check(options, places)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)
    try:
        return run(options, places)
    except KeyboardInterrupt:
        say("stopped")
        return 0


def run(options: Options, places: tuple[str, ...]) -> int:
    """Start what belongs to the studio, watch over it, and end it."""
    port = options.port or free_port(options.host)
    with contextlib.ExitStack() as stack:
        here = Studio(models=tuple(map(str, places)), runs=options.runs, data=options.data or str(data_folder()),
                      server=(options.server or "").rstrip("/").removesuffix("/v1"))
        server = None
        if options.server is None and places:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mindseed-ui-"))
            address, log = f"http://127.0.0.1:{free_port('127.0.0.1')}", Path(folder) / "server.log"
            here = Studio(**vars(here) | {"server": address, "log": str(log)})
            server = Server(here, serve_command(places, address))
            stack.callback(server.stop)
            server.start()
        elif here.server:
            probe(here.server)
        page = start(page_command(options.host, port), told={VARIABLE: here.spell()}, out=subprocess.DEVNULL)
        stack.callback(end, page)
        return watch(options, here, page, server, port)


def require_extra() -> None:
    for name in ("streamlit", "openai", "altair"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the studio needs the package {name}, which is not installed; pip install 'mindseed[ui]'")


def probe(server: str) -> None:
    """Say so if nobody is there: the address may be misspelt."""
    if not answers(f"{server}/v1/models", proxies=urlsplit(server).hostname not in HERE):
        warn(f"nothing answers at {server}; the pages look for it again until it does")


def found_below(runs: tuple[str, ...]) -> list[str]:
    """The newest models under the folders of runs; those that have learnt to converse come first."""
    models = sorted({p for place in runs for p in find_models(Path(place)) if p.name == "model"},
                    key=lambda p: (converses(p), (p / "config.json").stat().st_mtime), reverse=True)
    if len(models) > MOST_FOUND:
        say(f"taking the newest {MOST_FOUND} of {len(models)} models; name those you want: mindseed ui DIR DIR")
    return [str(p) for p in models[:MOST_FOUND]]


def check(options: Options, places: tuple[str, ...]) -> None:
    """UserError for what cannot be meant, before anything is started."""
    from mindseed.interop.directory import require_folder
    for place in places:
        require_folder(Path(place))
    if options.server is not None and not options.server.startswith(("http://", "https://")):
        raise UserError(f"server={options.server!r} must be an address such as http://127.0.0.1:8998")
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"port={options.port} must lie between 0 and 65535")
    if options.port:
        with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((options.host, options.port))
            except OSError as error:
                raise UserError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}; choose "
                                "another port (--port 0: any that is free)") from None
    if options.host not in HERE:
        warn(f"whoever reaches {options.host} may use the studio, read its conversations and load models")


def serve_command(places: tuple[str, ...], address: str) -> list[str]:
    words = [f"{name}={place}" for place, name in served_names(places).items()]
    return ["-m", "mindseed", "serve", *words, "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
            "--drain_s", "1"]


def page_command(host: str, port: int) -> list[str]:
    import mindseed.ui
    folder = Path(mindseed.ui.__file__).parent
    settings = STREAMLIT | {"server.address": host, "server.port": str(port), "theme.base": str(folder / "theme.toml")}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return ["-m", "mindseed.ui.start", "run", str(folder / "app.py"), *words]


def watch(options: Options, here: Studio, page: subprocess.Popen, server: Server | None, port: int) -> int:
    """Until the page ends, or a signal comes."""
    shown = f"[{options.host}]" if ":" in options.host else options.host.replace("0.0.0.0", "127.0.0.1")
    address, ready = f"http://{shown}:{port}", False
    while page.poll() is None:
        if not ready and answers(f"{address}/_stcore/health"):
            ready = True
            say(f"studio     {address}")
            say(f"server     {here.server or 'none: no model was found or named'}")
            say("Ctrl-C ends it")
            screen = sys.platform in ("win32", "darwin") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
            if options.open or options.open is None and screen:
                webbrowser.open(address)
        if server is not None:
            server.look()
        time.sleep(0.2)
    return page.returncode


def answers(address: str, *, proxies: bool = False) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(None if proxies else {}))
    try:
        with opener.open(address, timeout=1) as response:
            return response.status == 200
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


class Server:
    """`mindseed serve` in a process of its own. If it never comes up that ends the studio; if it dies later it does
    not, for most pages can do without: they tell of it, and may ask for another."""

    def __init__(self, here: Studio, words: list[str]) -> None:
        self.here, self.words = here, words
        self.process: subprocess.Popen | None = None
        self.up = False                           # it has answered, once

    def start(self) -> None:
        with open(self.here.log, "wb") as out, open(self.here.beside_log(ERRORS), "wb") as errors:
            self.process = start(self.words, out=out, errors=errors)
        for name in (AGAIN, ENDED):
            self.here.beside_log(name).unlink(missing_ok=True)

    def look(self) -> None:
        """Notice its coming and going, and whether a page asks for another."""
        if self.process is None:
            if self.here.beside_log(AGAIN).exists():
                say("the server is started again")
                self.start()
            return
        if not self.up and answers(f"{self.here.server}/health"):
            self.up = True
        if self.process.poll() is None:
            return
        code, self.process = self.process.returncode, None
        said = self.here.beside_log(ERRORS).read_text(encoding="utf-8", errors="replace").strip()
        if not self.up:
            raise UserError(f"the server could not be started: {said.rpartition('error: ')[2][-2000:]}")
        how = Ended(code=code_words(code), words="\n".join(said.splitlines()[-12:])[-2000:])
        warn(f"the server has ended (exit code {how.code}); "
             + (f"its last words:\n{how.words}" if how.words else "it said nothing of why"))
        self.here.beside_log(AGAIN).unlink(missing_ok=True)
        with atomic(self.here.beside_log(ENDED)) as temp:
            temp.write_text(json.dumps(asdict(how)), encoding="utf-8")

    def stop(self) -> None:
        if self.process is not None:
            end(self.process)


def code_words(code: int) -> str:
    """-9 -> '-9, SIGKILL'."""
    with contextlib.suppress(ValueError):
        return f"{code}, {signal.Signals(-code).name}" if code < 0 else str(code)
    return str(code)


def start(words: list[str], *, told: dict[str, str] | None = None, out: IO[bytes] | int | None = None,
          errors: IO[bytes] | None = None) -> subprocess.Popen:
    """A program of this Python. A Ctrl-C in the terminal does not reach it: `end` does, once."""
    return subprocess.Popen([sys.executable, *words], env=os.environ | {"PYTHONUNBUFFERED": "1"} | (told or {}),
                            stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True,
                            preexec_fn=end_with_parent if sys.platform == "linux" else None)


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with_parent() -> None:
    """Even if the parent is killed in a way that it cannot act on (Linux: PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def free_port(host: str) -> int:
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as trial:
        trial.bind((host, 0))
        return trial.getsockname()[1]
