"""Carries a link's messages between processes: what links.py calls, and what servers answer.

    Above             below   the part and the oracle above: throws, asks, waits, checks
    post_gradients    above   throws gradients at the oracle, or at the part below
    serve_part        above   answers the part below
    serve_gradients   below,  takes gradients
                      oracle

The messages are those of synthgrad.py. examples/in_process.py carries them by plain calls instead.
"""
import concurrent.futures
import threading
import time

from exchange import SOURCES
from links import check_oracle, minibatches_of
from plumbing import process, serving
from plumbing.errors import NoAnswer, Refused, UserError
from plumbing.part import UNDO
from plumbing.posting import THROWN, Outbox, Poster
from plumbing.wire import encode
from synthgrad import Examples, Gradients, OracleClient, PartClient, encode_weights

LINGER = 1.0  # seconds until a part of a cycle ends, so that the others notice it, too


def serve_gradients(app, width, k, add):
    """POST /provide_gradients. add(start, clock, waiting, i, h, y, clock, start, g) gets each
    minibatch. k() is the width of y, None where any will do."""
    @app.post("/provide_gradients")
    def provide_gradients():
        i, h, y, clock, start, g, waiting = serving.message(
            Gradients, h=width, gradients=width, y=k())
        for its_start, its_clock, rows in minibatches_of(clock, start, i, h, y, clock, start, g):
            add(its_start, its_clock, waiting, *rows)
        return {"accepted": len(g)}


def serve_part(app, arrivals, network, weights):
    """What a part answers the part below it. network(): the widths of this part and of all above
    it, or None while they are not known. weights(): the arguments of encode_weights()."""
    def widths():
        if network() is None:
            raise Refused("still waiting for the part above", 503)
        return {"h": network()[0], "y": network()[-1]}

    @app.post("/training_examples")
    def training_examples():
        columns = serving.message(Examples, **widths())
        arrivals.add(*columns)
        return {"accepted": len(columns[0]), "trained": arrivals.trained}

    answers, asking = {}, threading.Lock()  # (start, clock) -> a Future, of the last THREADS

    @app.post("/true_gradients")
    def true_gradients():
        *columns, _ = serving.message(Examples, **widths())
        key = int(columns[4][0]), int(columns[3][0])
        if len(list(minibatches_of(columns[3], columns[4]))) > 1:
            raise Refused("expected one minibatch: one clock and one start", 400)
        with asking:  # a question that is asked again gets the same answer
            if key not in answers:
                answer = concurrent.futures.Future()
                arrivals.ask(*columns, answer.set_result)  # may refuse; then it is asked again
                answers[key] = answer
            answer = answers[key]
            if len(answers) > serving.THREADS:
                del answers[next(iter(answers))]
        try:
            g = answer.result(timeout=8)
        except concurrent.futures.TimeoutError:
            raise Refused("busy: the training loop took over 8 s", 503) from None
        return serving.as_json(encode(serving.wants_values(), gradients=g))

    @app.get("/weights")
    def get_weights():
        widths()
        return serving.as_json(encode_weights(*weights()))


def post_gradients(server, token, below):
    """A Poster of gradients at an oracle, or at the part below; None for "none". below(): the
    UpperEnd that they come from."""
    if server == "none":
        return None
    client = OracleClient(server, token)

    def post(*columns):
        client.provide_gradients(*columns, waiting=len(below().due))
    return Poster(Outbox(), post, f"the process at {client.url}")


class Above:
    """The part and the oracle above a cut, over HTTP. It is created before they answer.

    What links.LowerEnd calls stands there.
    """
    window = 1          # delayed gradients that may be on their way at first
    news_seconds = 0.2  # that one try waits for a gradient, so that a stop request is noticed

    def __init__(self, args, stop):
        self.args, self.stop, self.source = args, stop, SOURCES[args.gradients]
        self.part, thrower = (PartClient(args.output_server, args.token) for _ in range(2))
        self.oracle = OracleClient(args.oracle_server, args.token)
        self.name = f"the part above at {self.part.url}"
        self.oracle_name = f"the oracle at {self.oracle.url}"
        self.network, self.starts = None, []  # widths and marks of what is above, once known
        self.outbox, self.newest = Outbox(), None  # newest: what the part above was trained on

        def post(*columns):
            self.newest = thrower.training_examples(*columns, every=self.source.every)
        self.poster = Poster(self.outbox, post, self.name)
        self.throw, self.throw_again = self.outbox.throw, self.outbox.throw_again
        self.guess, self.true_gradients = self.oracle.estimate_gradients, self.part.true_gradients

    def until_answered(self, call, who):
        return process.until_answered(call, who, self.stop, self.args.patience)

    def wait(self, attempt):
        return self.until_answered(
            attempt, self.oracle_name if self.source.asks_oracle else self.name)

    def trained(self, enough):
        """The newest minibatch that the part above was trained on, (start, clock), or None: what it
        said in its last answer to a post. It is asked if that is of before the clock `enough`."""
        newest = self.newest
        if not newest or newest[0] != process.START or newest[1] < enough:
            newest = self.newest = self.part.status().trained
        return newest

    def weights(self):
        """The arguments of encode_weights() for all parts above."""
        return self.until_answered(lambda: self.part.weights(self.network), self.name)

    def connect(self, k=None, num_examples=2**53):
        """Wait for the part and the oracle above, and check that they fit. k is the width of y; a
        middle part learns it here. Returns k."""
        args, width = self.args, self.args.layers[-1]

        def complete():
            status = self.part.status()
            self.starts = status.starts
            check_partner(status, ("output trainer", "middle trainer"), width, k, self.name)
            if status.network is None:
                raise NoAnswer("it is waiting for the part above it")
            return status
        above = self.until_answered(complete, self.name)
        k, batch_size = k or above.network[-1], min(args.batch_size, num_examples)
        serving.check_batch(batch_size, width, k)
        self.partners = {self.name: above}
        if self.source.asks_oracle:
            oracle = self.until_answered(self.oracle.status, self.oracle_name)
            check_partner(oracle, ("oracle",), width, k, self.oracle_name)
            check_oracle(oracle.needs, args.staleness, batch_size, num_examples)
            self.partners[self.oracle_name] = oracle
        if self.source.every and (args.staleness + 1) * batch_size > THROWN:
            raise UserError(f"--staleness + 1 times --batch-size must be at most {THROWN} with "
                            f"--gradients {args.gradients}: so many examples can be on their way")
        self.network = above.network
        return k

    def check_use(self, resumed, part):
        """UserError if this is a new run and the others are not, or the other way round. part
        remembers in its checkpoint how far the part above was."""
        used = [f"{name} (at {each.updates} updates)" for name, each in self.partners.items()
                if each.updates]
        if used and not resumed:
            raise UserError(f"{' and '.join(used)} took part in an earlier run, or in one that goes"
                            " on: restart what is named, or continue that run with --resume")
        before, now = part.numbers.get("above", 0), self.partners[self.name].updates
        if before and not now:
            raise UserError(f"{self.name} is as drawn, but had made {before} updates when this "
                            f"part's checkpoint was written: {UNDO}")
        part.numbers["above"] = now


def check_partner(status, kinds, width, k, name):
    """UserError unless the status is that of one of these kinds of processes, and fits a cut of
    `width` and y of `k`. UserError, too, if this process is above that one."""
    ours = process.user() if "127.0.0.1" in name else status.user
    if status.process not in kinds:
        raise UserError(f"{name} is not one: the process there is an {status.process}. "
                        "--output-server names the part above, --oracle-server its oracle")
    if status.user != ours:
        raise UserError(f"{name} was started by {status.user}, not by you: choose other ports, with"
                        " --port, --oracle-server and --output-server, or --first-port of make run")
    if process.START in status.starts:
        time.sleep(LINGER)  # answering meanwhile
        raise UserError(f"{name} has this process above it: the parts form a cycle. "
                        "--output-server is the address of the next part towards the output")
    if status.layers[0] != width:
        raise UserError(f"the --layers of {name} begin with {status.layers[0]}, ours end "
                        f"with {width}")
    if status.condition_on_labels not in (0, k or status.condition_on_labels):
        raise UserError(f"{name} was started with --condition-on-labels "
                        f"{status.condition_on_labels}; y has a width of {k}")
