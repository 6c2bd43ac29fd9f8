"""What makes a trainer a process that others can ask: Flask and waitress, options, the token, waiting, stopping."""
import argparse
import hmac
import logging
import math
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import flask
import waitress
from werkzeug.exceptions import HTTPException

from synthgrad import MAX_BODY, Malformed, NoAnswer, Refused, decode, rows_per_message


class Stopped(Exception):
    """Ctrl-C or SIGTERM came while this was waiting."""


class Stop:
    """Turns true on SIGTERM (exit code 0) and on Ctrl-C (130); a second Ctrl-C does not wait for anything.

    A plain flag: a signal may come while the main thread holds the lock of a threading.Event.
    """

    def __init__(self):
        self.requested, self.exit_code = False, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number, _):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.exit_code = True, 130 if number == signal.SIGINT else 0

    def __bool__(self):
        return self.requested


def until_answered(call, who, stop, patience):
    """call(), again and again while it raises NoAnswer: ever less often, and after a second saying for whom one waits.

    Ends with the answer, with NoAnswer after `patience` seconds, or with Stopped: once a stop is requested, only what is
    answered at once is waited for.
    """
    began, pause, said = time.monotonic(), 0.001, False
    while True:
        try:
            answer = call()
            if said:
                print(f"{who} answers", file=sys.stderr, flush=True)
            return answer
        except NoAnswer as error:
            waited = time.monotonic() - began
            if stop:
                raise Stopped(error) from None
            if waited > patience:
                raise
            if waited > 1 and not said:
                said = True
                print(f"waiting for {who} ({error})", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, 0.2)


def check_partners(partners, width, k, ahead, resume):
    """ValueError unless the statuses {program: Status} fit activations of `width` and y of `k`, `ahead`, the examples that
    layer 1 may throw before it waits, are enough for each to train on, and (without `resume`) nobody has made an update
    yet: a new run never starts in silence on what an earlier one has left."""
    for name, status in partners.items():
        if status.needs > ahead:
            raise ValueError(f"--staleness times --batch-size is {ahead} examples, but {name} waits for {status.needs} "
                             "before it trains again; a larger --replay of its own makes that fewer")
        if status.layers[0] != width:
            raise ValueError(f"the --layers of {name} begin with {status.layers[0]}, ours end with {width}")
        if status.condition_on_labels not in (0, k):
            raise ValueError(f"{name} was started with --condition-on-labels {status.condition_on_labels}; y has a width of {k}")
    used = [f"{name} (at {status.updates} updates)" for name, status in partners.items() if status.updates]
    if used and not resume:
        raise ValueError(f"{' and '.join(used)} took part in an earlier run: restart what is named for a new run, "
                         "or go on with that one by --resume")


def make_app(process, status, args):
    """A Flask app that answers every error as JSON, and GET /status with what status() returns: a dict.

    It answers only requests whose Host is a number or one of this machine's names, which a page that reaches it by DNS
    rebinding cannot have. (Flask's TRUSTED_HOSTS knows no "any number", which --host 0.0.0.0 needs.)
    """
    app = flask.Flask(process, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"], app.json.sort_keys = MAX_BODY, False
    token, names = args.token, {name.lower() for name in ("localhost", args.host, socket.gethostname())}

    @app.before_request
    def check():
        host = urlsplit(f"//{flask.request.host}").hostname or ""
        if host not in names and not re.fullmatch(r"[\d.]+|[\da-f:.]*:[\da-f:.]*", host):
            raise Refused(f"Host {host[:80]!r} is not one of this process's: {', '.join(sorted(names))} or a number", 403)
        if token:
            given = flask.request.authorization  # a browser asks for a password, and sends Basic
            given = given and (given.token or given.password) or ""
            if not hmac.compare_digest(token.encode(), given.encode()):
                raise Refused("expected the header Authorization: Bearer TOKEN, with the token of --token-file", 401)
        if flask.request.method == "POST" and flask.request.mimetype != "application/json":
            raise Refused("expected Content-Type: application/json", 415)

    @app.errorhandler(Exception)
    def answer_error(error):
        if isinstance(error, (Malformed, FloatingPointError)):
            return {"error": str(error)}, 400 if isinstance(error, Malformed) else 409
        if isinstance(error, Refused):
            return {"error": str(error)}, error.status, {"WWW-Authenticate": "Basic"} if error.status == 401 else {}
        if isinstance(error, HTTPException):
            return {"error": f"{error.name}: {error.description}"}, error.code
        app.logger.error("internal error", exc_info=error)
        return {"error": "internal error; the server's terminal says more"}, 500

    @app.get("/status")
    def get_status():
        return {"process": process, **status()}

    return app


def message(kind, **widths):
    """The fields of the request that is being answered, which must be a `kind`."""
    return decode(flask.request.get_data(cache=False), kind, **widths)


def as_json(body):
    return flask.Response(body, mimetype="application/json")


def serve(app, args):
    """Answer requests in threads of their own until the process ends. OSError when the port is taken.

    Of requests, four are worked on at a time, each of at most MAX_BODY bytes; others wait in waitress, at most a
    thousand. A connection over which nothing comes for 30 s is closed.
    """
    try:
        server = waitress.create_server(app, host=args.host, port=args.port, threads=4, ident=None, channel_timeout=30,
                                        connection_limit=1000, asyncore_use_poll=True,
                                        max_request_body_size=MAX_BODY + 2**20)  # a little more, for Flask to say so
    except OSError as error:
        raise OSError(f"cannot listen on {args.host}:{args.port}: {error.strerror}; --port chooses another port") from None
    if not args.token and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: anyone who reaches {args.host}:{args.port} can read and change this training; see --token-file",
              file=sys.stderr)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    threading.Thread(target=server.run, daemon=True).start()


def argument_parser(doc, port, **defaults):
    """The options that all processes have, and those of `defaults` that the trainers share, with these defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # plumbing.launch reads some of these, too
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=number(int, 1, 65535), default=port, help="port to listen on (%(default)s)")
    add("--token-file", type=Path, help="file with a secret that all processes share and insist on")
    shared = {
        "layers": dict(type=number(int, 1), nargs="+", help="this part's widths (%(default)s)"),
        "learning_rate": dict(type=number(float, 1e-12, 1e6), help="at the start (%(default)s)"),
        "momentum": dict(type=number(float, 0, 1), help="%(default)s"),
        "decay": dict(type=number(float, 1), help="updates until the learning rate has halved (%(default)s)"),
        "batch_size": dict(type=number(int, 1), help="examples per minibatch (%(default)s)"),
        "seed": dict(type=number(int, 0), help="of the random numbers (%(default)s)"),
        "keep": dict(type=number(int, 1), help="newest examples to train over, and bound of the queues (%(default)s)"),
        "replay": dict(type=number(float, 0), help="how often to draw each example that has arrived, to train on it again,"
                       " before waiting for news (%(default)s)"),
        "oracle_server": dict(help="where the oracle is (%(default)s)"),
        "output_server": dict(help="where the output trainer is (%(default)s)"),
        "resume": dict(action="store_true", help="go on from the checkpoint in --progress-dir, if there is one"),
        "progress_dir": dict(help="folder that is written to (%(default)s)")}
    for name, default in defaults.items():
        add(f"--{name.replace('_', '-')}", default=default, **shared[name])
    return parser


def number(kind, least, most=math.inf):
    """For argparse: a finite number within bounds."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected " + (
                f"at least {least}" if most == math.inf else f"from {least} to {most}"))
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def read_token(path):
    """The shared secret in a file; ValueError unless a bearer header can carry it (RFC 6750)."""
    token = path.read_text().strip()
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise ValueError(f"{path}: expected a secret of letters, digits and . _ ~ + / -, and nothing else")
    return token


def run(main, parser):
    """Parse, run main(args, stop), and exit: 0, 130 after Ctrl-C, 1 or 2 with one line about what diverged or was wrong."""
    args = parser.parse_args()
    layers, batch_size = getattr(args, "layers", [1, 1]), getattr(args, "batch_size", 1)
    if len(layers) < 2:
        parser.error("--layers takes two or more widths")
    if batch_size > (most := rows_per_message(2 * max(layers) + 1)):
        parser.error(f"--batch-size must be at most {most}: a minibatch must fit into a message")
    stop = Stop()
    try:
        token = read_token(args.token_file) if args.token_file else None
        main(argparse.Namespace(**vars(args), token=token), stop)
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except (ValueError, OSError, Refused) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except Stopped:
        pass
    except KeyboardInterrupt:
        stop.exit_code = 130
    sys.exit(stop.exit_code)
