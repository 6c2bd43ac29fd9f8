"""What makes a trainer a process that others can ask: who is answered, what bounds it, waiting,
stopping. In one process."""
import argparse
import base64
import errno
import getpass
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest

from plumbing import live, options, process, say, serving
from plumbing.errors import Diverged, FileError, NoAnswer, Refused, UserError
from plumbing.wire import MAX_BODY, encode, rows_per_message
from synthgrad import Question

JSON = {"Content-Type": "application/json"}


def args(**changed):
    return argparse.Namespace(**{"host": "127.0.0.1", "port": 0, "token": None, "trace": None,
                                 "allow_host": [], **changed})


def make_app(**changed):
    app = serving.make_app("test", lambda: {"layers": [3], "updates": 0, "loss": float("nan")},
                           args(**changed))

    @app.post("/ask")
    def ask():
        h, _ = serving.message(Question, h=3)
        if h[0, 0] == 1:
            raise Diverged("diverged")
        if h[0, 0] == 2:
            raise NoAnswer("the part above is gone")
        if h[0, 0] == 3:
            raise RuntimeError("a bug")
        return serving.as_json(encode(serving.wants_values(), h=h))
    return app


@pytest.fixture
def serve(monkeypatch):
    """serve(app, **args) -> the port on which it is answered."""
    create_server = serving.waitress.create_server

    def start(app, **changed):
        # a map of its own: by default all servers of a process share one
        monkeypatch.setattr(serving.waitress, "create_server", partial(create_server, map={}))
        listener = serving.listen(args(**changed))
        serving.serve(app, listener, args(**changed))
        return listener.getsockname()[1]
    return start


# ---- who is answered ----


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1", 200), ("localhost:5001", 200), ("[::1]:5001", 200), ("192.0.2.7", 200),
    (socket.gethostname(), 200), ("[fe80::1]", 200), ("evil.example", 403),
    ("evil.example:5001", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("a b", 403),
    ("@", 403), ("cafe", 403)])
def test_only_its_own_names_reach_a_process(host, status):
    """A page in a browser that has its own name resolved to 127.0.0.1 (DNS rebinding) sends that
    name as Host."""
    answer = make_app().test_client().get("/status", headers={"Host": host})
    assert answer.status_code == status and (status == 200) == ("error" not in answer.json)


@pytest.mark.parametrize("host", ["[1:2]", "[1:2]:5001", "evil.example", "["])
def test_a_bad_host_is_refused_by_the_real_server_too(host, serve):
    port = serve(make_app(token="s3cret"), token="s3cret")
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/status", headers={"Host": host})
    answer = connection.getresponse()
    assert answer.status in (400, 403) and b"Traceback" not in answer.read()
    connection.close()


def test_a_process_may_be_given_further_names_and_looks_none_up(monkeypatch):
    """socket.getfqdn() takes half a minute on some Macs."""
    monkeypatch.setattr(socket, "getfqdn", lambda: pytest.fail("looked up"))
    headers = {"Host": "gpu1.lab.example:5001"}
    for changed, status in (({"allow_host": ["hub.example", "Gpu1.Lab.example"]}, 200),
                            ({"host": "gpu1.lab.example"}, 200), ({"host": "0.0.0.0"}, 403)):
        answer = make_app(**changed).test_client().get("/status", headers=headers)
        assert answer.status_code == status
    assert "start it with --allow-host and that name" in answer.json["error"]


def test_every_process_has_the_option_allow_host():
    parser = options.make_parser("doc", 5002)
    assert parser.parse_args(["--allow-host", "a", "--allow-host", "b"]).allow_host == ["a", "b"]
    assert parser.parse_args([]).allow_host == []


def basic(password):
    return "Basic " + base64.b64encode(f":{password}".encode()).decode()


@pytest.mark.parametrize("header, status", [
    (None, 401), ("Bearer wrong", 401), ("Bearer ", 401), ("s3cret", 401), (basic("wrong"), 401),
    ("Basic é", 401), ("Bearer é", 401), ("Basic /w==", 401),
    ("Bearer s3cret", 200), (basic("s3cret"), 200)])
def test_a_token_is_insisted_on_as_a_bearer_or_a_browsers_password(header, status):
    headers = {"Authorization": header} if header else {}
    answer = make_app(token="s3cret").test_client().get("/status", headers=headers)
    assert answer.status_code == status
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    assert make_app().test_client().get("/status", headers=headers).status_code == 200


def test_a_token_is_read_from_a_file_and_one_that_no_header_can_carry_is_refused(tmp_path):
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    assert options.read_token(path) == "s3cret"
    for bad in ("", " \n", "two words", "schlüssel", "a=b"):
        path.write_text(bad)
        with pytest.raises(ValueError, match="token: expected a secret of letters, digits"):
            options.read_token(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_a_token_file_of_another_editor_is_read_or_named_with_the_cure(encoding, tmp_path):
    path = tmp_path / "token"
    path.write_text("s3cret\n", encoding)
    if encoding != "utf-16":
        assert options.read_token(path) == "s3cret"
        return
    with pytest.raises(UserError, match=f"^{path}: expected .* in UTF-8. This writes one") as said:
        options.read_token(path)
    cure = str(said.value).split("python3 -c ")[1].strip('"')
    exec(cure)
    assert len(options.read_token(path)) == 64


def answer_to(port, request):
    """The status and the JSON that the real server answers to the bytes of a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("request_, status", [
    (b"rubbish\r\n\r\n", 400), (b"GET /status HTTP/1.1\r\nX: " + b"x" * 300_000, 431),
    (b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Basic \xe9\r\n\r\n", 401),
    (b"POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer s3cret\r\n"
     b"Content-Length: 99999999999\r\n\r\n", 413),
    (b"POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer s3cret\r\n"
     b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400)])
def test_what_is_not_a_request_is_answered_as_json_too(request_, status, serve):
    code, answer = answer_to(serve(make_app(token="s3cret"), token="s3cret"), request_)
    assert code == status and list(answer) == ["error"]


@pytest.mark.parametrize("header", [
    "Content-Length: 30000000", "Transfer-Encoding: chunked",
    "Content-Length: 30000000\r\nExpect: 100-continue"])
def test_the_body_of_a_request_that_is_refused_is_not_read(header, serve):
    port = serve(make_app(token="s3cret"), token="s3cret")
    for wrong in ("Authorization: Bearer wrong", "Host: evil.example"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            host = "" if "Host" in wrong else "Host: localhost\r\n"
            connection.sendall(f"POST /ask HTTP/1.1\r\n{host}{wrong}\r\n"
                               f"Content-Type: application/json\r\n{header}\r\n\r\n".encode())
            answer = b""
            while received := connection.recv(65536):  # until the server closes the connection
                answer += received
        assert answer.split()[1] == (b"403" if "Host" in wrong else b"401"), answer


@pytest.mark.parametrize("token, answered", [("s3cret", True), ("wrong", False), (None, False)])
def test_the_live_page_sends_its_token(token, answered, serve):
    port = serve(make_app(token="s3cret"), token="s3cret")
    status = live.Process(f"127.0.0.1:{port}", token, "test").ask()
    assert (status is not None) == answered


def test_a_good_request_is_answered_by_the_real_server(serve):
    port = serve(make_app(token="s3cret"), token="s3cret")
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = encode(h=np.zeros((2, 3), "f"), y=np.zeros((2, 1), "f"))
    for _ in range(2):  # over one connection
        connection.request("POST", "/ask", body, {**JSON, "Authorization": "Bearer s3cret"})
        answer = connection.getresponse()
        assert answer.status == 200 and b"shape" in answer.read()
    connection.close()


def test_a_user_without_a_name_has_a_number(monkeypatch):
    """As in `docker run --user 1234`."""
    def nameless():
        raise KeyError("getpwuid(): uid not found: 1234")
    monkeypatch.setattr(process.getpass, "getuser", nameless)
    assert process.user() == str(os.getuid())


# ---- what bounds it ----


def test_four_requests_are_worked_on_at_a_time(serve):
    """One that waits for /true_gradients must not keep /status or the others from their answer."""
    barrier, app = threading.Barrier(4), make_app()

    @app.get("/together")
    def together():
        barrier.wait(10)
        return {}
    port, statuses = serve(app), []

    def ask():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/together")
        statuses.append(connection.getresponse().status)
        connection.close()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert statuses == [200] * 4


def test_a_message_that_is_too_large_is_refused():
    client = make_app().test_client()
    answer = client.post("/ask", data=b" " * (MAX_BODY + 1), headers=JSON)
    assert answer.status_code == 413 and "error" in answer.json
    assert client.post("/ask", data=b" " * 1000, headers=JSON).status_code == 400


def test_connections_are_bounded_too(monkeypatch):
    created = {}

    class Server:
        def run(self):
            pass

    def create_server(app, **settings):
        created.update(settings)
        return Server()
    monkeypatch.setattr(serving.waitress, "create_server", create_server)
    serving.serve(make_app(), None, args())
    assert created["connection_limit"] == serving.CONNECTIONS <= 100
    assert MAX_BODY < created["max_request_body_size"] <= MAX_BODY + 2**21
    assert created["channel_timeout"] <= 60


def test_whoever_listens_to_others_without_a_token_is_warned(monkeypatch, capsys):
    monkeypatch.setattr(serving.waitress, "create_server", lambda app, **_: argparse.Namespace(
        run=lambda: None))
    for host, token, warned in (("0.0.0.0", None, 1), ("0.0.0.0", "x", 0), ("127.0.0.1", None, 0)):
        serving.serve(make_app(), None, args(host=host, token=token))
        assert capsys.readouterr().err.count("warning: anyone who reaches") == warned


# ---- how it is answered ----


@pytest.mark.parametrize("first, status, error", [
    (0, 200, None), (1, 409, "diverged"), (2, 503, "the part above is gone"),
    (3, 500, "internal error; the server's terminal says more")])
def test_every_error_is_answered_as_json(first, status, error):
    body = encode(h=np.full((1, 3), first, "f"), y=np.zeros((1, 1), "f"))
    answer = make_app().test_client().post("/ask", data=body, headers=JSON)
    assert answer.status_code == status and answer.json.get("error") == error


@pytest.mark.parametrize("method, path, headers, status", [
    ("post", "/ask", {}, 415), ("post", "/ask", {"Content-Type": "text/plain"}, 415),
    ("get", "/ask", {}, 405), ("delete", "/status", {}, 405), ("get", "/nothing", {}, 404),
    ("get", "/../etc/passwd", {}, 404), ("post", "/ask", JSON, 400)])
def test_wrong_types_paths_and_methods(method, path, headers, status):
    answer = getattr(make_app().test_client(), method)(path, headers=headers)
    assert answer.status_code == status and list(answer.json) == ["error"]


def test_whoever_spells_out_arrays_gets_them_spelled_out():
    client = make_app().test_client()
    question = {"h": {"shape": [1, 3], "values": [0, 5, 6]}, "y": {"shape": [1, 1], "values": [1]}}
    assert client.post("/ask", json=question).json == {"h": {"shape": [1, 3], "values": [0, 5, 6]}}
    body = encode(h=np.zeros((1, 3), "f"), y=np.zeros((1, 1), "f"))
    assert "base64" in client.post("/ask", data=body, headers=JSON).json["h"]


def test_status_says_who_it_is_and_what_is_not_a_number_is_null():
    status = make_app().test_client().get("/status").json
    assert status == {"process": "test", "pid": os.getpid(), "user": getpass.getuser(),
                      "starts": [process.START], "layers": [3], "updates": 0, "loss": None}


# ---- waiting and stopping ----


class Clock:
    """time.monotonic() and sleep() without waiting."""
    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(process, "time", Clock())
    return process.time


class Partner:
    """Answers from the moment `after` on. Is not asked more often than a hundred thousand times."""

    def __init__(self, clock, after):
        self.clock, self.after, self.asked = clock, after, 0

    def __call__(self):
        self.asked += 1
        assert self.asked < 100_000, "asked for ever"
        if self.clock.now < self.after:
            raise NoAnswer("nobody there")
        return "answer"


def test_a_partner_is_waited_for_as_long_as_patience_lasts_and_no_longer(clock):
    assert process.until_answered(Partner(clock, 99), "it", False, patience=100) == "answer"
    clock.now = 0
    with pytest.raises(NoAnswer, match="nobody there"):
        process.until_answered(Partner(clock, 1e9), "it", False, patience=100)
    assert 100 < clock.now < 102


def test_for_whom_it_waits_is_said_once_and_that_it_goes_on(clock, capsys):
    process.until_answered(Partner(clock, 50), "the oracle", False, patience=100)
    said = capsys.readouterr().err.splitlines()
    assert said == ["waiting for the oracle (nobody there)",
                    "going on after 50 s: the oracle has caught up"]
    clock.now = 0
    process.until_answered(Partner(clock, 0.5), "the oracle", False, patience=100)
    assert capsys.readouterr().err == "", "short waits are not worth a line"


def test_a_partner_is_asked_often_at_first_and_then_a_few_times_a_second(clock):
    quick, slow = Partner(clock, 0.01), Partner(clock, 100)
    process.until_answered(quick, "it", False, patience=200)
    assert clock.now < 0.02
    clock.now = 0
    process.until_answered(slow, "it", False, patience=200)
    assert 300 < slow.asked < 1100


def test_once_a_stop_is_requested_nobody_is_waited_for(clock):
    with pytest.raises(process.Stopped):
        process.until_answered(Partner(clock, 50), "it", True, patience=100)
    assert clock.now == 0
    assert process.until_answered(Partner(clock, 0), "it", True, patience=100) == "answer"


def test_what_is_refused_is_not_asked_again(clock):
    def refused():
        raise Refused("bad", 400)
    with pytest.raises(Refused):
        process.until_answered(refused, "it", False, patience=100)


def test_a_stop_is_a_flag_with_an_exit_code_and_a_second_ctrl_c_ends_at_once(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    for first, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)):
        stop = process.Stop()
        assert not stop
        handlers[first](first, None)
        assert stop and stop.exit_code == code
        for again in (signal.SIGTERM, signal.SIGHUP):
            handlers[again](again, None)
        assert stop.exit_code == code
        with pytest.raises(KeyboardInterrupt):
            handlers[signal.SIGINT](signal.SIGINT, None)


def test_after_nohup_the_end_of_the_terminal_is_no_stop(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    process.Stop()
    assert signal.SIGHUP not in handlers and signal.SIGTERM in handlers


def test_a_line_for_a_terminal_that_has_gone_is_lost_and_no_error(monkeypatch):
    def gone(text):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr("sys.stderr", argparse.Namespace(write=gone, flush=lambda: None))
    say("training is stopped")


def test_a_line_now_and_then_only_if_there_were_updates(monkeypatch, capsys, clock):
    updates = 0
    reporter = process.Reporter(lambda: f"{updates} updates")
    for now, updates in ((1, 5), (31, 5), (40, 9), (62, 9), (93, 9)):
        clock.now = now
        reporter.now_and_then(updates)
    assert capsys.readouterr().err.splitlines() == ["5 updates", "9 updates"]


def test_a_port_that_is_taken_is_one_error_that_says_who_has_it(serve):
    with serving.listen(args()) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: .*Another prog"):
            serving.listen(args(port=port))
    for token, who in ((None, rf"The test \(process {os.getpid()}\) of another run answers there. "
                              "Stop it, or choose another --port"),
                       ("s3cret", "A process of another run, which asks for a token,")):
        port = serve(make_app(token=token), token=token)
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: .*{who}"):
            serving.listen(args(port=port))
    with pytest.raises(UserError, match="cannot listen on 192.168..5:5001"):
        serving.listen(args(host="192.168..5", port=5001))
    with pytest.raises(UserError, match="cannot listen on no.such.host.invalid:5001"):
        serving.listen(args(host="no.such.host.invalid", port=5001))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_all_addresses_are_those_of_ipv4_too(serve):
    port = serve(make_app(), host="::", token="s3cret")
    for host in ("127.0.0.1", "::1"):
        connection = http.client.HTTPConnection(host, port, timeout=10)
        connection.request("GET", "/status", headers={"Authorization": "Bearer s3cret"})
        assert connection.getresponse().status == 200
        connection.close()


def test_an_ipv6_address_is_printed_in_brackets():
    assert options.address("::1", 5001) == "[::1]:5001"
    assert options.address("gpu1", 5001) == "gpu1:5001"


def test_the_largest_batch_that_is_allowed_fits_into_a_message():
    for width, k in ((24, 1), (1024, 10), (20_000, 1)):
        most = rows_per_message(2 * width + k)
        serving.check_batch(most, width, k)
        with pytest.raises(ValueError, match=f"--batch-size must be at most {most},"):
            serving.check_batch(most + 1, width, k)


@pytest.mark.parametrize("error, code", [
    (Diverged("diverged"), 1), (UserError("bad"), 2), (FileError("full"), 2),
    (NoAnswer("gone"), 2), (Refused("no", 400), 2), (KeyboardInterrupt(), 130)])
def test_whatever_ends_a_program_is_one_line_and_a_code(error, code, capsys):
    parser = argparse.ArgumentParser("program.py")
    with pytest.raises(SystemExit) as ended, options.one_line_errors(parser):
        raise error
    assert ended.value.code == code
    expected = "" if code == 130 else f"program.py: {error}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("error", [ValueError("operands could not be broadcast"), OSError(9, "odd"),
                                   FloatingPointError("overflow"), KeyError("w1")])
def test_an_error_of_the_code_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised, options.one_line_errors(argparse.ArgumentParser()):
        raise error
    assert raised.value is error


@pytest.mark.processes
@pytest.mark.parametrize("ending, code", [
    ("", 0), ("; raise UserError('bad')", 2), ("; raise ValueError('bad')", 1)])
def test_a_process_ends_while_a_thread_still_works(ending, code):
    """Such a thread may be in C++ code, which aborts the process if Python shuts down (seen with
    the live page). One that is not a daemon is waited for if Python shuts down."""
    program = f"""
import argparse, threading
from plumbing import process
from plumbing.errors import UserError
def main(*_):
    threading.Thread(target=threading.Event().wait).start()
    print("said", end=""){ending}
parser = argparse.ArgumentParser("program.py")
parser.set_defaults(token_file=None)
process.run(main, parser)"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True)
    assert (ended.returncode, ended.stdout) == (code, b"said")


@pytest.mark.parametrize("bad", [
    ["--layers", "24"], ["--layers", "0", "1"], ["--batch-size", "0"], ["--learning-rate", "-1"],
    ["--learning-rate", "inf"], ["--port", "99999"], ["--port", "0"], ["--decay", "0"],
    ["--keep", "0"], ["--replay", "-1"], ["--replay", "nan"], ["--momentum", "nan"],
    ["--momentum", "1.5"], ["--seed", "-1"], ["--resum"], ["--token-file", "/no/such/file"]])
def test_a_bad_option_is_exit_code_2_and_an_abbreviation_is_one(bad, monkeypatch, capsys):
    import train_output
    parser = options.make_parser("doc", 5002, **train_output.DEFAULTS)
    monkeypatch.setattr("sys.argv", ["train_output.py", *bad])
    with pytest.raises(SystemExit) as ended:
        options.parse(parser)
    assert ended.value.code == 2 and capsys.readouterr().err.count("error") <= 1
