"""Command-line options by name, and errors as one line."""
import argparse
import contextlib
import math
import re
import sys
from pathlib import Path

from plumbing.errors import Diverged, UserError, file_errors


def number(kind, least, most=math.inf):
    """For argparse: a finite number within bounds."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: expected {bounds}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


SHARED = {
    "host": dict(help="address to listen on (%(default)s)"),
    "allow_host": dict(action="append", metavar="NAME",
                       help="a name by which browsers or others reach this process; repeatable"),
    "port": dict(type=number(int, 1, 65535), help="port to listen on (%(default)s)"),
    "token_file": dict(type=Path, help="file with a secret that all processes share and ask for"),
    "layers": dict(type=number(int, 1), nargs="+", help="layer widths (%(default)s)"),
    "learning_rate": dict(type=number(float, 1e-12, 1e6), help="initial rate (%(default)s)"),
    "momentum": dict(type=number(float, 0, 1), help="(%(default)s)"),
    "decay": dict(type=number(float, 1), help="updates until the rate has halved (%(default)s)"),
    "warm_up": dict(type=number(float, 0), help="updates until the full rate (%(default)s)"),
    "batch_size": dict(type=number(int, 1), help="examples per minibatch (%(default)s)"),
    "num_epochs": dict(type=number(int, 1), help="(%(default)s)"),
    "seed": dict(type=number(int, 0), help="random seed (%(default)s)"),
    "keep": dict(type=number(int, 1), help="newest examples to train on (%(default)s)"),
    "replay": dict(type=number(float, 0), help="training draws per new example (%(default)s)"),
    "staleness": dict(type=number(int, 1), help="updates that news from above may be old; then "
                                                "this part waits (%(default)s)"),
    "patience": dict(type=number(float, 0), help="seconds to wait for a process (%(default)s)"),
    "oracle_server": dict(help="where the oracle is (%(default)s)"),
    "output_server": dict(help="where the part above is (%(default)s)"),
    "progress_dir": dict(help="folder to write to (%(default)s)"),
    "trace": dict(type=Path, help="file for a trace of the last events, see plumbing/trace.py"),
    "resume": dict(action="store_true", help="continue from a checkpoint in --progress-dir"),
    "checkpoint_seconds": dict(type=number(float, 0), help="between checkpoints (%(default)s)"),
    "cuts": dict(type=int, nargs="+", help="layers below each cut (%(default)s)"),
    "delay": dict(type=number(int, 0), help="updates until a gradient arrives (%(default)s)"),
    "output_rate": dict(type=number(float, 1e-12, 1e6), help="of the highest part (%(default)s)"),
    "output_momentum": dict(type=number(float, 0, 1), help="of the highest part (%(default)s)"),
    "oracle_layers": dict(type=number(int, 1), nargs="*",
                          help="hidden layers of the oracles; none: linear (%(default)s)"),
    "oracle_rate": dict(type=number(float, 1e-12, 1e6), help="of the oracles (%(default)s)"),
    "oracle_replay": dict(type=number(float, 0), help="draws per new gradient (%(default)s)"),
    "snapshot_seconds": dict(type=number(float, 0), help="between rows (%(default)s)"),
}


def make_parser(doc, port=None, **defaults):
    """A parser of the options in SHARED that are named; with `port`, of a process that others can
    reach. They cannot be abbreviated, because plumbing.launch reads some of them, too."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if port:
        defaults = {"host": "127.0.0.1", "port": port, "allow_host": [], "token_file": None,
                    "trace": None, **defaults}
    for name, default in defaults.items():
        words = SHARED[name]
        if default is None:
            words = words | {"help": words["help"].replace("%(default)s", "by --gradients")}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **words)
    return parser


def parse(parser):
    """The arguments, with `token`, the secret in --token-file or None."""
    args = parser.parse_args()
    if len(getattr(args, "layers", (1, 1))) < 2:
        parser.error("--layers takes two or more widths")
    with one_line_errors(parser):
        path = getattr(args, "token_file", None)
        token = read_token(path) if path else None
    return argparse.Namespace(**vars(args), token=token)


def read_token(path):
    """The secret in a file. UserError unless a bearer header can carry it (RFC 6750)."""
    with file_errors():
        token = path.read_bytes().decode("utf-8-sig", errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise UserError(f"{path}: expected a secret of letters, digits and . _ ~ + / - in UTF-8. "
                        "This writes one: python3 -c \"import pathlib, secrets; "
                        f"pathlib.Path('{path.as_posix()}').write_text(secrets.token_hex())\"")
    return token


def address(host, port):
    """host:port, with an IPv6 host in brackets, as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def one_line_errors(parser):
    """Exit with one line about a UserError: code 1 if training diverged, else 2; 130 after Ctrl-C.
    Any other error is one of the code, and keeps its traceback."""
    try:
        yield
    except UserError as error:
        parser.exit(1 if isinstance(error, Diverged) else 2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)
