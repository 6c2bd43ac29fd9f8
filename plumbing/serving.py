"""The HTTP server of a trainer or oracle: requests, token, errors as JSON."""
import errno
import hmac
import logging
import os
import re
import socket
import threading
from urllib.parse import urlsplit

import flask
import msgspec
import waitress
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask
from werkzeug.datastructures import Authorization
from werkzeug.exceptions import HTTPException

from plumbing import options, process, say, trace
from plumbing.errors import Diverged, NoAnswer, Refused, UserError
from plumbing.wire import MAX_BODY, Malformed, decode, holder, rows_per_message

LOOPBACK = "127.0.0.1", "localhost", "::1"
CONNECTIONS = 64         # at a time; each may send MAX_BODY bytes, which waitress keeps in a file
THREADS = 4              # requests that are worked on at a time; the others wait in waitress


def check_batch(batch_size, width, k):
    """UserError unless a minibatch with its gradients fits into a message."""
    if batch_size > (most := rows_per_message(2 * width + k)):
        raise UserError(f"--batch-size must be at most {most}, so that it fits into a message")


def refusal(host, authorization, names, token):
    """Why a request is not answered, a Refused, or None. Looked at before its body is read.

    The Host header must be an IP address or a name of this machine. A web page that reaches this
    port by DNS rebinding sends its own name. (Flask's TRUSTED_HOSTS cannot say "any number".)
    """
    try:
        host = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return Refused("expected a Host like 127.0.0.1:5001", 400)
    if host not in names and not re.fullmatch(r"[\d.]+|[\da-f:.]*:[\da-f:.]*", host):
        return Refused(f"{host[:80]!r} is not a name of this process, only "
                       f"{', '.join(sorted(names))}: start it with --allow-host and that name, or "
                       "use its number", 403)
    try:
        given = Authorization.from_header(authorization)  # Basic is what a browser sends
    except ValueError:  # it is not in ASCII
        given = None
    given = given and (given.token or given.password) or ""
    if token and not hmac.compare_digest(token.encode(), given.encode()):
        return Refused("expected the header Authorization: Bearer TOKEN, as in --token-file", 401)
    return None


def names_of(args):
    """The names by which a process may be asked. Any number may be used, too."""
    names = "localhost", args.host, socket.gethostname(), *args.allow_host
    return {name.lower() for name in names}


def make_app(kind, status, args):
    """A Flask app that answers every error as JSON, and GET /status with the dict status()."""
    app = flask.Flask(kind, static_folder=None)
    if args.trace:
        trace.start(args.trace, kind)
    app.config["MAX_CONTENT_LENGTH"], app.json.sort_keys = MAX_BODY, False
    names = names_of(args)

    @app.before_request
    def check():
        headers = flask.request.headers
        if refused := refusal(flask.request.host, headers.get("Authorization"), names, args.token):
            raise refused
        if flask.request.method == "POST" and flask.request.mimetype != "application/json":
            raise Refused("expected Content-Type: application/json (curl -H 'Content-Type: "
                          "application/json')", 415)

    @app.errorhandler(Exception)
    def answer_error(error):
        if isinstance(error, Refused):
            login = {"WWW-Authenticate": "Basic"} if error.status == 401 else {}
            return {"error": str(error)}, error.status, login
        for wrong, code in ((Malformed, 400), (Diverged, 409), (NoAnswer, 503)):
            if isinstance(error, wrong):  # NoAnswer is of a process that this one asked
                return {"error": str(error)}, code
        if isinstance(error, HTTPException):
            return {"error": f"{error.name}: {error.description}"}, error.code
        app.logger.error("internal error", exc_info=error)
        return {"error": "internal error; the server's terminal says more"}, 500

    @app.get("/status")
    def get_status():
        numbers = {"process": kind, "pid": os.getpid(), "user": process.user(),
                   "starts": [process.START], **status()}
        return {name: value if value == value else None for name, value in numbers.items()}  # NaN

    return app


def message(kind, **widths):
    """The fields of the request that is being answered, which must be a `kind`."""
    body = flask.request.get_data(cache=False)
    flask.g.values = b'"values"' in body
    return decode(body, kind, **widths)


def wants_values():
    """Whether the message that is being answered spelled its arrays out: then the answer does."""
    return flask.g.values


def as_json(body):
    return flask.Response(body, mimetype="application/json")


def listen(args):
    """The socket on which serve() will answer: with --host ::, over IPv4, too. UserError when the
    port is taken."""
    where = options.address(args.host, args.port)
    try:
        found = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)
        family, *_, address = min(found)  # IPv4 first
        both = args.host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:  # the latter if it can be no host's name
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        cure = (f"{holder(where)} Stop it, or choose another --port" if taken else
                "--host takes an address of this machine, --port one that you may use")
        why = getattr(error, "strerror", error)
        raise UserError(f"cannot listen on {where}: {why}. {cure}") from None


class JsonErrorTask(ErrorTask):
    """Answers what waitress refuses as JSON, such as a request that is not HTTP."""

    def execute(self):
        error = self.request.error
        body = msgspec.json.encode({"error": f"{error.reason}: {error.body}"})
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


def serve(app, listener, args):
    """Answer requests in threads of their own until the process ends.

    THREADS requests are worked on at a time, of at most MAX_BODY bytes. CONNECTIONS are open at a
    time; one over which nothing comes for 30 s is closed. The body of a request that will be
    refused for its host or token is not read.
    """
    names = names_of(args)

    class Parser(HTTPRequestParser):
        def parse_header(self, header):
            super().parse_header(header)
            given = self.headers.get("HOST", ""), self.headers.get("AUTHORIZATION")
            if refusal(*given, names, args.token):
                self.body_rcv, self.content_length, self.expect_continue = None, 0, False
                self.headers.pop("CONTENT_LENGTH", None)
                self.headers["CONNECTION"] = "close"  # what follows is the body

    class Channel(HTTPChannel):
        parser_class, error_task_class = Parser, JsonErrorTask

    server = waitress.create_server(
        app, sockets=[listener], threads=THREADS, ident=None, channel_timeout=30,
        asyncore_use_poll=True, connection_limit=CONNECTIONS,
        max_request_body_size=MAX_BODY + 2**20)  # a little more, so that Flask answers 413
    server.channel_class = Channel
    if not args.token and args.host not in LOOPBACK:
        say(f"warning: anyone who reaches {options.address(args.host, args.port)} can read and "
            "change this training; see --token-file")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    threading.Thread(target=server.run, daemon=True).start()
