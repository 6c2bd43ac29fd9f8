"""The wire protocol: what train_input.py, train_output.py and oracle.py say to each other, as JSON over HTTP.

An array is {"shape": [100, 24], "dtype": "float32", "base64": "..."}, little-endian, C order; for people with curl
also {"shape": [2, 2], "values": [1, 2, 3, 4]}. A message is an object of such arrays with the same number of rows:
i (batch,) int64, the examples' indices; h and gradients (batch, width) and y (batch,), float32.

    oracle, 5001    POST /estimate_gradients   h, y                 -> gradients
                    POST /provide_gradients    i, h, y, gradients   -> accepted
    output, 5002    POST /training_examples    i, h, y              -> accepted
                    POST /true_gradients       h, y                 -> gradients, after one update-locked step
                    GET /weights               and PUT, by which a restarted trainer gets its half back
    input, 5003     GET / and GET /weights     the live page; layer 1
    all three       GET /status                dimensions, counters, losses

A request that is wrong is answered 4xx with {"error": "what was wrong and what was expected"} and changes nothing.
/status names the running process by a random `instance`. A request whose If-Match header names another one is
answered 412: so nobody mistakes a restarted process, which has forgotten everything, for the one that it knew.
"""
import argparse
import base64
import binascii
import collections
import concurrent.futures
import hmac
import http.client
import json
import logging
import math
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import flask
import numpy as np
import waitress
from werkzeug.exceptions import HTTPException

MAX_BODY = 2**27        # bytes in a request or an answer: the weights of a deep half must fit
MAX_EXAMPLES = 2**24    # bytes in a message of examples, as senders make them; twice as many are taken
MAX_INDEX = 2**31       # an example's index is below this
POST_INTERVAL = 0.004   # seconds
DTYPE_NAMES = {np.dtype(name): name for name in ("float32", "float64", "int32", "int64")}
MAX_MAGNITUDE = 1e6     # activations and gradients are small numbers; larger ones would only overflow later


class Refused(ValueError):
    """The server raises it to answer `status`; the client, when it was answered 4xx."""

    def __init__(self, message, status=400):
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """Ctrl-C or SIGTERM came while this was waiting."""


class NoAnswer(ConnectionError):
    """The server cannot be reached, or broke off, or was too slow, or answered rubbish. Asking again may help."""


# ---- arrays and messages ----

def ndarray_to_json(array):
    """An array of any shape -> a dict that json.dumps takes."""
    array = np.asarray(array)
    little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"shape": list(array.shape), "dtype": DTYPE_NAMES[array.dtype.newbyteorder("=")],
            "base64": base64.b64encode(little_endian).decode("ascii")}


def json_to_ndarray(message, dtype=None, shape=None, name="array"):
    """The inverse, for both encodings. In `shape`, None stands for any length. Raises Refused, naming `name`."""
    try:
        dims, given = message["shape"], message.get("dtype", dtype or "float32")
        if any(type(n) is not int or not 0 <= n < 2**31 for n in dims) or len(dims) > 8:
            raise ValueError(f"bad shape {dims}")
        if shape is not None and (len(dims) != len(shape) or any(n not in (None, m) for n, m in zip(shape, dims))):
            raise ValueError(f"shape {dims} does not fit")
        if given not in DTYPE_NAMES.values() or dtype and given != dtype:
            raise ValueError(f"bad dtype {given}")
        if message.keys() == {"shape", "dtype", "base64"}:
            data = bytearray(binascii.a2b_base64(message["base64"], strict_mode=True))
            flat = np.frombuffer(data, np.dtype(given).newbyteorder("<")).astype(given, copy=False)
        elif message.keys() - {"dtype"} == {"shape", "values"}:
            values, kinds = message["values"], {int} if given[0] == "i" else {int, float}
            if type(values) is not list or not kinds.issuperset(map(type, values)):
                raise ValueError("values is not a flat list of such numbers")
            with np.errstate(over="ignore"):
                flat = np.array(values, given)
        else:
            raise ValueError(f"fields {sorted(message)}")
        return flat.reshape(dims)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        wanted = f"of shape {[n if n is not None else 'any' for n in shape]}" if shape is not None else ""
        raise Refused(f"{name}: {str(error)[:120]}; expected {dtype or 'numbers'} {wanted} "
                      'as {"shape", "dtype", "base64"} or {"shape", "values"}') from None


def decode(message, **widths):
    """A message -> its arrays in the order of `widths`, e.g. i=(), h=(24,), y=(). Raises Refused.

    Refuses missing and extra fields, unequal numbers of rows, no rows, NaN, infinity, and numbers out of all bounds.
    """
    if not isinstance(message, dict) or message.keys() != widths.keys():
        got = sorted(message)[:8] if isinstance(message, dict) else type(message).__name__
        raise Refused(f"expected an object with exactly the fields {', '.join(widths)}; got {str(got)[:200]}")
    arrays, rows = [], None
    for name, width in widths.items():
        array = json_to_ndarray(message[name], "int64" if name == "i" else "float32", (rows, *width), name)
        rows = len(array)
        low, high = (0, MAX_INDEX - 1) if name == "i" else (-MAX_MAGNITUDE, MAX_MAGNITUDE)
        if not rows or not (array.min() >= low and array.max() <= high):  # NaN fails both comparisons
            raise Refused(f"{name}: expected at least one row of finite numbers from {low:g} to {high:g}")
        arrays.append(array)
    return arrays


def encode(**arrays):
    """A message, as json.dumps takes it. NaN is never sent: raises FloatingPointError."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"{name} is no longer finite: diverged; try a lower --learning-rate")
    return {name: ndarray_to_json(array) for name, array in arrays.items()}


def encode_weights(weights, updates):
    """[(w, b), ...] of some layers, and how many updates made them, -> a message."""
    return {"layers": [encode(w=w, b=b) for w, b in weights], "updates": int(updates)}


def decode_weights(message, dims):
    """The inverse; raises Refused unless these are finite weights of layers of the widths `dims`."""
    if not isinstance(message, dict) or message.keys() != {"layers", "updates"}:
        raise Refused("expected an object with exactly the fields layers and updates")
    layers, updates = message["layers"], message["updates"]
    if type(updates) is not int or not 0 <= updates < 2**53:
        raise Refused("updates: expected a whole number from 0")
    if not isinstance(layers, list) or len(layers) != len(dims) - 1:
        raise Refused(f"layers: expected a list of {len(dims) - 1}")
    weights = []
    for n, (layer, shape) in enumerate(zip(layers, zip(dims, dims[1:]))):
        if not isinstance(layer, dict) or layer.keys() != {"w", "b"}:
            raise Refused(f"layers[{n}]: expected an object of w and b")
        weights.append((json_to_ndarray(layer["w"], "float32", shape, f"layers[{n}].w"),
                        json_to_ndarray(layer["b"], "float32", shape[1:], f"layers[{n}].b")))
        if not all(np.isfinite(array).all() for array in weights[-1]):
            raise Refused(f"layers[{n}]: expected finite numbers")
    return weights, updates


# ---- clients ----

class OnePacketConnection(http.client.HTTPConnection):
    """Sends a request's head and body together: a server that selects between sockets then wakes up once, not twice."""

    def request(self, method, path, body, headers):
        self.packet = []
        super().request(method, path, body, headers)
        super().send(b"".join(self.packet))

    def send(self, data):
        self.packet.append(data)


class Client:
    """Speaks to one server over one kept connection. Belongs to one thread. Waits `timeout` seconds for the next bytes."""

    def __init__(self, url, token=None, timeout=10):
        parts = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
        if parts.scheme not in ("", "http") or not parts.hostname:
            raise ValueError(f"{url}: expected a server's address like http://127.0.0.1:5001")
        self.url = f"http://{f'[{parts.hostname}]' if ':' in parts.hostname else parts.hostname}:{parts.port or 80}"
        self.connection = OnePacketConnection(parts.hostname, parts.port or 80, timeout=timeout)
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def call(self, method, path, message=None):
        """Returns the JSON object that is answered. Raises Refused (4xx) or NoAnswer (all else that goes wrong).

        http.client rather than requests: the same call takes 0.5 ms less, which is half of it (make bench).
        """
        body = None if message is None else json.dumps(message).encode()
        try:
            try:
                self.connection.request(method, path, body, self.headers)
                response = self.connection.getresponse()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self.connection.close()  # the kept connection had gone stale: the server was restarted, say
                self.connection.request(method, path, body, self.headers)
                response = self.connection.getresponse()
            answer = response.read(MAX_BODY + 1)
            answer = json.loads(answer) if len(answer) <= MAX_BODY else None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            self.connection.close()
            raise NoAnswer(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        if not isinstance(answer, dict) or response.status != 200 and not 400 <= response.status < 500:
            self.connection.close()
            said = isinstance(answer, dict) and answer.get("error")
            raise NoAnswer(f"{self.url}{path}: {said or f'status {response.status}, and not the JSON that was expected'}")
        if response.status != 200:
            raise Refused(f"{self.url}{path}: {answer.get('error', response.status)}", response.status)
        return answer

    def status(self):
        """The server's /status, which must name the process's layers and its instance."""
        status = self.call("GET", "/status")
        if not isinstance(status.get("layers"), list) or not isinstance(status.get("instance"), str):
            raise NoAnswer(f"{self.url} is not one of the three processes: its /status lacks layers or instance")
        return status

    def _gradients(self, path, h, y):
        answer = self.call("POST", path, encode(h=h, y=y))
        try:
            gradients = json_to_ndarray(answer.get("gradients"), "float32", h.shape, "gradients")
        except Refused as error:
            raise NoAnswer(f"{self.url}{path}: {error}") from None
        if not np.isfinite(gradients).all():
            raise NoAnswer(f"{self.url}{path}: gradients that are not finite")
        return gradients


class OracleClient(Client):
    """The oracle, as the two trainers see it. h: (batch, width), y: (batch,), gradients like h."""

    def estimate_gradients(self, h, y):
        """ĝ(h), or ĝ(h, y): the synthetic gradients (paper, section 2.1)."""
        return self._gradients("/estimate_gradients", h, y)

    def provide_gradients(self, i, h, y, gradients):
        """Examples for the oracle to learn from: the true gradients g at h."""
        self.call("POST", "/provide_gradients", encode(i=i, h=h, y=y, gradients=gradients))


class LayerClient(Client):
    """The output trainer, as the input trainer sees it."""

    def status(self):
        """As above; and from here on this very process is meant: one that was started anew since answers 412."""
        self.headers.pop("If-Match", None)
        status = super().status()
        self.headers["If-Match"] = status["instance"]
        return status

    def training_examples(self, i, h, y):
        self.call("POST", "/training_examples", encode(i=i, h=h, y=y))

    def true_gradients(self, h, y):
        """g = dL/dh, per example, after which the output half has taken one step: ordinary backprop over a wire."""
        return self._gradients("/true_gradients", h, y)

    def weights(self, layers):
        """The output half's [(w, b), ...], which must fit `layers`, the widths, and the number of its updates."""
        answer = self.call("GET", "/weights")
        try:
            return decode_weights(answer, layers)
        except Refused as error:
            raise NoAnswer(f"{self.url}/weights: {error}") from None

    def restore(self, weights, updates):
        self.call("PUT", "/weights", encode_weights(weights, updates))


# ---- fire and forget ----

def examples_per_message(width):
    """How many examples of `width` floats fit: base64 takes 16/3 bytes for a float, i and y as much as 3 floats."""
    return MAX_EXAMPLES // (6 * (width + 4))


def newest_rows(i):
    """The positions in i (batch,) of the last occurrence of each value."""
    return len(i) - 1 - np.unique(i[::-1], return_index=True)[1]


class Sender:
    """Throws examples at a server without ever making the thrower wait; a thread of its own posts them.

    What waits is bounded to `max_examples`: the oldest are dropped. Of two examples with the same index that wait
    together only the newest is sent. What could not be delivered is dropped too. Everything is counted:
    thrown = sent + replaced + dropped + waiting. POST_INTERVAL lies between posts, so
    that what arrives meanwhile shares one: a request costs either side about as much as two updates.
    """

    def __init__(self, post, who, max_examples):
        self.post, self.who, self.max_examples = post, who, max_examples
        self.queue, self.wake, self.closing = collections.deque(), threading.Condition(), False
        self.thrown = self.sent = self.replaced = self.dropped = self.waiting = 0
        self.reachable = True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def throw(self, *arrays):
        """arrays: i first, then the others, one row per example; from now on they must not be written to."""
        with self.wake:
            self.queue.append(arrays)
            self.thrown += len(arrays[0])
            self.waiting += len(arrays[0])
            while self.waiting > self.max_examples and len(self.queue) > 1:
                oldest = len(self.queue.popleft()[0])
                self.waiting -= oldest
                self.dropped += oldest
            self.wake.notify()

    def close(self, timeout):
        """Send what still waits, for at most `timeout` seconds."""
        with self.wake:
            self.closing = True
            self.wake.notify()
        self.thread.join(timeout)

    def counters(self):
        with self.wake:
            return {name: getattr(self, name) for name in ("thrown", "sent", "replaced", "dropped", "waiting")}

    def _run(self):
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.queue or self.closing)
                if not self.queue:
                    return
                batches = list(self.queue)
                self.queue.clear()
            arrays = [np.concatenate(column) for column in zip(*batches)]
            newest = newest_rows(arrays[0])
            try:
                self.post(*(array[newest] for array in arrays))
                outcome = "sent"
            except Exception as error:  # whatever it is, it is said, and the thread lives on
                outcome = "dropped"
                if self.reachable:
                    print(f"{self.who} does not take what is thrown at it; dropping until it does: {error}",
                          file=sys.stderr, flush=True)
            with self.wake:
                setattr(self, outcome, getattr(self, outcome) + len(newest))
                self.replaced += len(arrays[0]) - len(newest)
                self.waiting -= len(arrays[0])
                self.reachable = outcome == "sent"
                if self.closing and not self.reachable:
                    return
                self.wake.wait_for(lambda: self.closing, POST_INTERVAL if self.reachable else 0.5)


# ---- serving ----

def read_json():
    """The JSON of the request that is being answered, of at most MAX_BODY bytes or what was set before."""
    try:
        return json.loads(flask.request.get_data(cache=False))
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None


def read(**widths):
    """The arrays of the request that is being answered, in the order of `widths`."""
    flask.request.max_content_length = 2 * MAX_EXAMPLES
    return decode(read_json(), **widths)


def make_app(process, status, token=None):
    """A Flask app that answers every error as JSON, and GET /status with what status() returns: a dict."""
    app, instance = flask.Flask(process, static_folder=None), secrets.token_hex(8)
    app.config["MAX_CONTENT_LENGTH"], app.json.sort_keys = MAX_BODY, False  # the page shows rows in our order

    @app.before_request
    def check():
        request = flask.request
        if token:
            given = request.authorization and (request.authorization.token or request.authorization.password)
            if not hmac.compare_digest(token.encode(), (given or "").encode()):
                raise Refused("expected the header Authorization: Bearer TOKEN, with the token of --token-file", 401)
        if request.headers.get("If-Match", instance) != instance:
            raise Refused(f"this {process} was started anew; its instance is {instance}", 412)
        if request.method in ("POST", "PUT") and request.mimetype != "application/json":
            raise Refused("expected Content-Type: application/json", 415)

    @app.errorhandler(Exception)
    def answer_error(error):
        if isinstance(error, Refused):
            return {"error": str(error)}, error.status, {"WWW-Authenticate": "Basic"} if error.status == 401 else {}
        if isinstance(error, FloatingPointError):
            return {"error": str(error)}, 409
        if isinstance(error, HTTPException):
            return {"error": f"{error.name}: {error.description}"}, error.code
        app.logger.error("internal error", exc_info=error)
        return {"error": "internal error; the server's terminal says more"}, 500

    @app.get("/status")
    def get_status():
        return {"process": process, "instance": instance, **status()}

    return app


def serve(app, host, port, token=None):
    """Answer requests in threads of their own until the process ends. OSError when the port is taken."""
    try:
        server = waitress.create_server(app, host=host, port=port, threads=4, ident=None,
                                        max_request_body_size=2 * MAX_BODY)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; --port chooses another port") from None
    if not token and host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: anyone who reaches {host}:{port} can read and change this training; see --token-file",
              file=sys.stderr)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    threading.Thread(target=server.run, daemon=True).start()


class Inbox:
    """How the server's threads reach what only the training loop may touch: as jobs, which the loop does.

    Holds at most as many jobs as the server has threads, for each waits until its own is done, or withdraws it after
    `timeout` seconds. That is less than a client waits: a job is not done after the client has gone.
    """

    def __init__(self, timeout=8):
        self.jobs, self.timeout = queue.SimpleQueue(), timeout

    def ask(self, job, *args):
        """In a server's thread: have job(*args) done, between two minibatches, and return what it returns."""
        future = concurrent.futures.Future()
        self.jobs.put((future, job, args))
        try:
            return future.result(self.timeout)
        except concurrent.futures.TimeoutError:
            if future.cancel():
                raise Refused(f"busy: the training loop did not get round to it in {self.timeout} s", 503) from None
            return future.result()  # it has just begun

    def work(self, wait=False):
        """In the training loop: do what has been asked for; with `wait`, give it 0.2 s to come."""
        try:
            while True:
                future, job, args = self.jobs.get(wait, 0.2)
                wait = False
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(job(*args))
                except Exception as error:
                    future.set_exception(error)
                    if isinstance(error, FloatingPointError):
                        raise  # diverged: the process must stop, not only this request
        except queue.Empty:
            return


class Rest:
    """Tells a training loop when to rest: before anything has arrived, and when nothing new did for 0.1 s.

    Whoever trains on while another one is away fits what stands still, and layer 1 swings once it moves again. Ten
    kills made the final MSE 2.45 times as large when this was 10 s, 1.27 times at 0.5 s (make bench-crashes). On a
    network that brings news less often than every 0.1 s, the loops rest for the remaining time.
    """

    def __init__(self):
        self.received, self.since = 0, -math.inf

    def due(self, received):
        if received != self.received:
            self.received, self.since = received, time.monotonic()
        return time.monotonic() - self.since > 0.1


def yield_to_servers():
    """Let the calling thread, a training loop, give way: whoever answers a request runs first."""
    if hasattr(os, "SCHED_IDLE") and os.cpu_count() > 1:  # Linux; elsewhere a priority is the whole process's
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Stop:
    """Turns true on SIGTERM (exit code 0) or Ctrl-C (130); a second Ctrl-C does not wait for anything."""

    def __init__(self):
        self.requested, self.exit_code = False, 0
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def _request(self, signum, _):
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.exit_code = True, 130 if signum == signal.SIGINT else 0

    def __bool__(self):
        return self.requested


def until_answered(call, who, stop, patience=math.inf, pause=lambda: time.sleep(0.2)):
    """call(), again and again while it raises NoAnswer, saying once for whom one waits.

    Ends with the answer, with Stopped, or with NoAnswer after `patience` seconds. `pause` passes the time.
    """
    give_up = None
    while not stop:
        try:
            answer = call()
            if give_up:
                print(f"{who} answers", file=sys.stderr, flush=True)
            return answer
        except NoAnswer as error:
            if not give_up:
                print(f"waiting for {who} ({error})", file=sys.stderr, flush=True)
            give_up = give_up or time.monotonic() + patience
            if time.monotonic() > give_up:
                raise
            pause()
    raise Stopped


def argument_parser(doc, port, layers, learning_rate):
    """The options that all three processes have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=port, help="port to listen on (%(default)s)")
    add("--layers", type=int, nargs="+", default=layers, help=f"this part's widths ({' '.join(map(str, layers))})")
    add("--learning-rate", type=float, default=learning_rate, help="at the start (%(default)s)")
    add("--batch-size", type=int, default=100, help="examples per minibatch (%(default)s)")
    add("--seed", type=int, default=0, help="of the random numbers (%(default)s)")
    add("--token-file", type=Path, help="file with a secret that all three processes share and insist on")
    return parser


LEAST = {"batch_size": 1, "seed": 0, "keep": 1, "decay": 1, "warm_up": 0, "momentum": 0, "num_epochs": 1,
         "snapshot_seconds": 0, "patience": 0}  # of these options, where a process has them


def read_token(path):
    """The shared secret in a file; ValueError unless a bearer header can carry it (RFC 6750)."""
    token = path.read_text().strip()
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise ValueError(f"{path}: expected a secret of letters, digits and . _ ~ + / -, and nothing else")
    return token


def run(main, parser):
    """Parse, run main(args, stop), and exit: 0, 130 after Ctrl-C, 1 or 2 with one line about what diverged or was wrong."""
    args = parser.parse_args()
    for name, least in LEAST.items():
        if not getattr(args, name, least) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if min(args.layers) < 1 or len(args.layers) < 2:
        parser.error("--layers takes two or more widths, which must be positive")
    if not 0 < args.learning_rate < 1e6 or not 0 < args.port < 65536:
        parser.error("--learning-rate must be positive, --port from 1 to 65535")
    most = examples_per_message(2 * max(args.layers[0], args.layers[-1]))
    if args.batch_size > most:
        parser.error(f"--batch-size must be at most {most}: a minibatch must fit into {MAX_EXAMPLES >> 20} MiB")
    if 6 * sum(n * m for n, m in zip(args.layers, args.layers[1:])) > MAX_BODY:
        parser.error(f"--layers {args.layers}: the weights must fit into a message of {MAX_BODY >> 20} MiB")
    stop = Stop()
    sys.setswitchinterval(0.0005)  # threads hand Python's lock on after 0.5 ms, not after 5: others wait for an answer
    try:
        args.token = read_token(args.token_file) if args.token_file else None
        main(args, stop)
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except Stopped:
        pass
    except KeyboardInterrupt:
        stop.exit_code = 130
    sys.exit(stop.exit_code)
