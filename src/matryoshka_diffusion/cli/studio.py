"""The command studio: a web page that draws with models, on this machine or behind a token."""

from __future__ import annotations

import argparse
import ipaddress
import re
import secrets
from typing import Any

from matryoshka_diffusion.cli.options import (
    DTYPES,
    MODEL,
    PRECISION,
    add_command,
    add_shared,
    find_device,
    positive,
)
from matryoshka_diffusion.cli.terminal import show

TOKEN = re.compile(r"[\w-]{16,200}", re.ASCII)
PORT = 8000


def studio(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.files import require

    for package in ("starlette", "uvicorn"):
        require(package, "studio", "mdm studio")
    token = options.token
    if token is not None and not TOKEN.fullmatch(token):
        raise UsageError("--token: give at least 16 letters, digits, - or _")
    if token is None and not is_loopback(options.host):
        token = secrets.token_urlsafe(24)
    from matryoshka_diffusion.studio import app
    from matryoshka_diffusion.studio.requests import Limits
    from matryoshka_diffusion.studio.served import Served

    device = find_device(options.device)
    served = [
        Served(run, number, device=device, precision=options.precision)
        for number, run in enumerate(options.runs)
    ]
    with app.listen(options.host, options.port) as listening:
        name = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{name}:{listening.getsockname()[1]}/"
        address += "" if token is None else f"#token={token}"
        show(f"{address} shows {', '.join(one.config.name for one in served)}; Ctrl-C ends it")
        if options.open:
            import webbrowser

            webbrowser.open(address)
        app.serve(served, listening, token, Limits())


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def add_commands(commands: Any) -> None:
    """Add the command of this module to the parser."""
    text = "open a web page that draws with models and shows runs in training"
    command = add_command(commands, "studio", studio, text)
    add = command.add_argument
    add("runs", metavar="RUN", nargs="*", default=["openmoji"], help=f"{MODEL} (openmoji)")
    text = "address to listen at (127.0.0.1); another one needs a token"
    add("--host", default="127.0.0.1", help=text)
    add("--port", type=positive, default=PORT, help=f"or the next that is free ({PORT})")
    text = "word that every request must carry (made anew for another host than this machine)"
    add("--token", help=text)
    add("--open", action="store_true", help="open the page in the browser")
    add_shared(command, "--device")
    text = "of the network (auto: bf16 where the hardware multiplies it, else fp32)"
    add("--precision", choices=(PRECISION, *DTYPES), default=PRECISION, help=text)
