"""The input trainer: trains layer 1 along synthetic gradients, and drives the run.

    python train_input.py x.npy y.npy                        # gradients guessed by the oracle
    python train_input.py x.npy y.npy --gradients true       # waits for the true ones
    python train_input.py x.npy y.npy --gradients delayed    # true ones of earlier minibatches
    python train_input.py x.npy y.npy --gradients local      # those of a small head of its own
    python train_input.py x.npy y.npy --gradients zero       # layer 1 does not learn: the control
    python train_input.py x.npy y.npy --gradients shuffled   # each example gets another one's guess

After its forward pass it throws the activations at train_output.py, fire-and-forget, and does not
wait for the true gradient. It asks oracle.py for a guess and descends along that. Now and then it
fetches the weights above the cut, tests the whole network on held-out examples, and writes a row
and a snapshot into progress/. The run ends here, after --num-epochs; the other processes stay idle
until they are stopped.
"""
import argparse
import time
from pathlib import Path

from plumbing import data, options, runs, say  # first, see there
import numpy as np

from exchange import SOURCES
from links import LowerEnd
from plumbing import process
from plumbing.bar import progress_bar
from plumbing.errors import FileError, NoAnswer, Refused
from plumbing.part import UNDO, Part
from plumbing.report import machine
from sgd import (HIDDEN, backprop, feed_forward, layers_from_weights, make_layers, minibatches,
                 schedule, task_of, test_score)

LOWER = dict(  # of every part that has another one above it; None: exchange.py says, by --gradients
    learning_rate=None, momentum=None, warm_up=None, decay=5000, batch_size=100, staleness=20,
    patience=600, resume=False)
DEFAULTS = LOWER | dict(
    layers=[2, 24], num_epochs=16, seed=0, oracle_server="127.0.0.1:5001",
    output_server="127.0.0.1:5002", progress_dir="progress", snapshot_seconds=5)
HEAD = dict(head=[12], head_rate=0.1, head_momentum=0.9)  # of --gradients local


def train(part, x, y, order, learning_rate, momentum, throw, gradients):
    """The algorithm. `order` yields minibatches of indices. Yields after each of them.

    gradients() is that of a source in exchange.py, and gives one gradient a minibatch, or with
    delayed gradients those that have come back. Synthetic asks oracle.Oracle.guess, over HTTP.
    """
    for i in order:
        h = feed_forward(part.layers, x[i])
        throw(i, h, y[i], part.clock)                     # to the part above, fire-and-forget
        for g, _ in gradients(h, y[i], part.clock):       # by default the oracle's guess ĝ
            backprop(part.layers, g)
            part.descend(learning_rate(part.clock), momentum)
        part.clock += 1
        yield len(i)


def add_gradients(parser):
    """The options of every part that has another one above it."""
    add = parser.add_argument
    add("--gradients", choices=[*SOURCES], default="synthetic",
        help="where this part's come from (%(default)s)")
    add("--head", type=options.number(int, 1), nargs="*", default=HEAD["head"], metavar="WIDTH",
        help="hidden layers of the network that predicts y, with --gradients local (%(default)s)")
    add("--head-rate", type=options.number(float, 1e-12, 1e6), default=HEAD["head_rate"],
        help="its learning rate (%(default)s)")
    add("--head-momentum", type=options.number(float, 0, 1), default=HEAD["head_momentum"],
        help="its momentum (%(default)s)")


def with_rates(args):
    """The arguments, where what was not given is what is best for these --gradients."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **SOURCES[args.gradients].rates, **given})


class Run:
    """A run: the data, layer 1, its link, what is reported of them. The training loop owns it;
    servers' threads call status()."""

    def __init__(self, args, stop, loaded, above):
        self.args, self.stop, self.data, self.above = args, stop, loaded, above
        self.k = loaded.y.shape[1]
        self.score, self.constant = task_of(self.k).score, data.constant_guess(loaded, task_of)
        layers = make_layers(args.layers, np.random.default_rng([args.seed, 1]), last=HIDDEN)
        self.part = Part(layers, args.progress_dir, seed=args.seed,
                         held_out=len(loaded.x_test), data=loaded.digest,
                         gradients=args.gradients)
        self.link = LowerEnd(self.part, above, process.START, self.k, args,
                             np.random.default_rng([args.seed, 5]))
        self.examples, self.seconds, self.row, self.progress = 0, 0.0, {}, None
        self.phases = {"until_ready": 0.0, "snapshots": 0.0}  # seconds of this start
        self.updates_above, self.state = None, "waiting for the other processes"

    def connect(self):
        """Continue from the checkpoint or begin, once the others answer and fit."""
        args, part, bounded, began = self.args, self.part, self.link.bounded, time.perf_counter()
        self.above.connect(self.k, len(self.data.x))
        data.check_targets(self.data, self.above.network[-1], "the network of all --layers",
                           task_of)
        resumed = args.resume and part.resume(True)
        self.above.check_use(resumed, part)
        self.examples, self.seconds, bounded.waits, bounded.waited = (
            part.numbers.get(name, 0) for name in ("examples", "seconds", "waits", "waited"))
        self.phases["until_ready"] = time.perf_counter() - began
        self.progress = runs.Progress(args.progress_dir, [
            "seconds", "examples", "epoch", self.score, "gradient_cosine", "staleness",
            "staleness_p95", "waits", "waited", "updates"],
            {**vars(args), "token": None, "constant_guess": self.constant,
             "seconds": self.phases, "machine": machine()}, resumed)

    def save(self):
        bounded = self.link.bounded
        self.part.numbers.update(examples=self.examples, seconds=self.seconds,
                                 waits=bounded.waits, waited=bounded.waited)
        if self.updates_above:
            self.part.numbers["above"] = min(self.updates_above)
        self.part.save()

    def take(self):
        """Compose the network as it is now. Test it; write a checkpoint, a row and a snapshot."""
        began = time.perf_counter()
        (mine, _), (theirs, updates) = self.part.weights(), self.above.weights()
        if any(new < old for old, new in zip(self.updates_above or updates, updates, strict=True)):
            say(f"a part above went back from {self.updates_above} updates to {updates}: its "
                f"trainer was restarted. If that was without --resume, undo it: {UNDO}")
        self.updates_above = updates
        self.save()
        network = layers_from_weights(mine + theirs)
        cosine, probe = self.compare_gradients(network)
        self.row = {**self.link.bounded.status(), "seconds": self.seconds,
                    "examples": self.examples, "updates": self.part.clock,
                    "epoch": self.examples / len(self.data.x), "gradient_cosine": cosine,
                    self.score: test_score(network, self.data.x_test, self.data.y_test)}
        self.progress.write(mine + theirs, probe, **self.row)
        self.phases["snapshots"] += time.perf_counter() - began
        self.phases.update(training=self.seconds, waiting=self.link.bounded.waited)

    def try_to_take(self):
        """take(), but a disk that is full does not end the run."""
        try:
            self.take()
        except FileError as error:
            say(f"no snapshot: {error}; training goes on")

    def compare_gradients(self, network):
        """The mean cosine of g and ĝ, not yet centered, over as many held-out examples as fit into
        a message; NaN where no oracle is asked. Where x has two columns, also what is drawn: x, and
        g and ĝ of four units."""
        if not self.link.source.asks_oracle:
            return float("nan"), {}
        below, above = network[:len(self.part.layers)], network[len(self.part.layers):]
        n = min(2000 if self.data.x.shape[1] == 2 else 500, 2**22 // len(below[-1].b))
        x, y = self.data.x_test[:n], self.data.y_test[:n]
        h = feed_forward(below, x)
        g = backprop(above, task_of(self.k).loss_gradient(feed_forward(above, h), y))
        guess, _ = self.above.wait(lambda: self.above.guess(h, y))
        probe = {"x": x, "g": g[:, :4], "guess": guess[:, :4]} if x.shape[1] == 2 else {}
        return mean_cosine(g, self.link.source.used(guess)), probe

    def status(self):
        return {**self.row, "layers": self.args.layers, "state": self.state, "score": self.score,
                "gradients": self.args.gradients, "total": self.args.num_epochs * len(self.data.x),
                "progress_dir": str(Path(self.args.progress_dir).resolve()),
                "examples": self.examples, "updates": self.part.clock, "seconds": self.seconds,
                "examples_sent": self.above.outbox.counters(), **self.link.status()}

    def train(self):
        """For args.num_epochs, with a progress bar, snapshots now and then and one at the end."""
        args, x = self.args, self.data.x
        self.take()
        self.state = f"training along {args.gradients} gradients"
        order = minibatches(len(x), args.batch_size, args.num_epochs, args.seed, self.examples)
        start, due = time.perf_counter() - self.seconds, self.seconds + args.snapshot_seconds
        with progress_bar(total=args.num_epochs * len(x), initial=self.examples, unit=" examples",
                  unit_scale=True, mininterval=0.5) as bar:
            for count in train(self.part, x, self.data.y, order,
                               schedule(args.learning_rate, args.decay, args.warm_up),
                               args.momentum, self.link.throw, self.link.gradients):
                self.examples += count
                self.seconds = time.perf_counter() - start
                bar.update(count)
                if self.seconds > due:
                    self.try_to_take()
                    due = time.perf_counter() - start + args.snapshot_seconds
                    bar.set_postfix_str(f"epoch {self.row['epoch']:.1f}, held-out "
                                        f"{self.score[5:]} {self.row[self.score]:.4f}")
                if self.stop:
                    break
        self.above.poster.close(timeout=5)

    def end(self):
        """The last snapshot, and what there is to say. Waits for room on a disk that is full."""
        until, told = time.monotonic() + self.args.patience, False
        while True:
            try:
                self.take()
                break
            except FileError as error:
                if self.stop or time.monotonic() > until:
                    raise
                told = told or say(f"{error}; nothing is lost yet: make room") or True
                time.sleep(1)
        self.state = f"training is {'stopped' if self.stop else 'finished'}"
        say(f"{self.examples:,} examples in {self.seconds:.1f} s, held-out {self.score[5:]} "
            f"{self.row[self.score]:.4f} (median of the last three rows "
            f"{runs.reached(self.progress.rows):.4f}): {self.progress.metrics}")


def mean_cosine(g, guess):
    """The mean over examples of the cosine between two gradients, both (batch, width)."""
    norms = np.linalg.norm(g, axis=1) * np.linalg.norm(guess, axis=1)
    return float(np.mean(np.sum(g * guess, axis=1) / np.maximum(norms, 1e-20)))


def main(args, stop):
    from over_http import Above, serve_gradients
    from plumbing import serving                  # here, for in_process.py serves nothing
    loaded = data.load(args.x, args.y, args.held_out)
    data.check_columns(loaded, args.layers)
    listener = serving.listen(args)
    run = Run(args, stop, loaded, Above(args, stop))
    app = serving.make_app("input trainer", run.status, args)
    serve_gradients(app, args.layers[-1], lambda: run.k, run.link.take_back)
    serving.serve(app, listener, args)
    run.connect()
    say(data.describe(loaded, task_of))
    with run.progress.ending():
        try:
            run.train()
            run.end()
        except (NoAnswer, Refused, process.Stopped) as error:
            run.save()
            say("stopped without a last snapshot, but with a checkpoint; --resume continues: "
                f"{error}")
            raise
        if stop:
            say("interrupted; --resume continues from here")
            raise process.Stopped
    for line in run.progress.verdict():
        say(line)


if __name__ == "__main__":
    parser = options.make_parser(__doc__, 5003, **DEFAULTS)
    data.add_options(parser)
    add_gradients(parser)
    process.run(lambda args, stop: main(with_rates(args), stop), parser)
