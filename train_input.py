"""The input trainer: trains layer 1 along synthetic gradients, and drives the run.

    python train_input.py x.npy y.npy                        # gradients guessed by the oracle
    python train_input.py x.npy y.npy --gradients true       # waits for the output trainer's: update-locked
    python train_input.py x.npy y.npy --gradients zero       # layer 1 never learns: the control
    python train_input.py x.npy y.npy --gradients shuffled   # each example gets another one's guess: a second control

After its forward pass it throws the activations at train_output.py, fire and forget, and does not wait for the true
gradient: it asks oracle.py for a guess, and descends along that. It runs at most --staleness updates ahead of what the
oracle has learned from. Now and then it fetches the output half's weights, tests the whole network on held-out
examples, and writes a row and a snapshot into progress/. `python plot.py --live` shows the run while it lasts. It ends
here, after --num-epochs; the other two then wait for news until they are stopped.
"""
import collections
import contextlib
import sys
import time

import plumbing  # first, see there
import numpy as np
from tqdm import tqdm

from plumbing import exchange, runs, serving
from sgd import (Sigmoid, backprop, descend, feed_forward, layers_from_weights, loss_gradient, make_layers, minibatches,
                 test_score)
from synthgrad import LayerClient, NoAnswer, OracleClient, Refused, encode_weights


def train(layers, x, y, order, learning_rate, momentum, throw, guess, clock=0):
    """The algorithm. `order` yields minibatches of indices; yields after each update, which `clock` counts."""
    for clock, i in enumerate(order, clock):
        h = feed_forward(layers, x[i])
        throw(i, h, y[i], clock)                   # to the output trainer, fire and forget
        g = guess(h, y[i], clock)                  # ĝ, the oracle's, now; rather than the true g, some time later
        backprop(layers, g)
        descend(layers, learning_rate(clock), momentum)
        yield len(i)


class BoundedStaleness:
    """The oracle's guesses, at most `bound` updates old: beyond that, layer 1 waits here (Ho et al. 2013, eq. 1).

    A guess's staleness is clock − learned. An oracle that has learned nothing yet answers zeros, and that counts from
    the first of them. A slow process, a killed one and a lost message are all the same wait. What ends it is news: wait()
    calls ask() until it succeeds, and ask() has the last minibatch thrown again, for that may have been lost.
    """

    def __init__(self, oracle, bound, wait, throw_again):
        self.oracle, self.bound, self.wait, self.throw_again = oracle, bound, wait, throw_again
        self.first_zeros, self.waits, self.waited = None, 0, 0.0    # a clock; a count; seconds
        self.recent = collections.deque(maxlen=1000)                # of the last guesses: staleness, seconds to answer

    def __call__(self, h, y, clock):
        """h (batch, width), y (batch, k) -> ĝ (batch, width)."""
        began = time.perf_counter()
        g = self.wait(lambda: self.ask(h, y, clock))
        waited = time.perf_counter() - began - self.recent[-1][1]
        if waited > 0.001:
            self.waits, self.waited = self.waits + 1, self.waited + waited
        return g

    def ask(self, h, y, clock):
        """Raises NoAnswer if the guess is too old."""
        asked = time.perf_counter()
        g, learned = self.oracle.estimate_gradients(h, y)
        if learned is not None:
            self.first_zeros = None
        elif self.first_zeros is None:
            self.first_zeros = clock
        staleness = clock - (self.first_zeros if learned is None else learned)
        if staleness > self.bound:
            self.throw_again()
            learned_from = "nothing" if learned is None else f"true gradients up to update {learned}"
            raise NoAnswer(f"it has learned from {learned_from}, layer 1 has made {clock}, and --staleness is {self.bound}: "
                           "is train_output.py there?")
        self.recent.append((max(0, staleness), time.perf_counter() - asked))  # below 0: resumed from an older checkpoint
        return g

    def status(self):
        staleness, seconds = np.array(list(self.recent) or [(np.nan, np.nan)]).T
        return {"staleness": float(np.median(staleness)), "staleness_p95": float(np.percentile(staleness, 95)),
                "latency_ms": 1e3 * float(np.median(seconds)), "latency_ms_p95": 1e3 * float(np.percentile(seconds, 95)),
                "waits": self.waits, "waited": self.waited}


class Run:
    """One run: the other two processes as seen from here, the counters, and what is written down.

    The training loop owns all of it. Servers' threads read numbers, and `published`, which is replaced whole.
    """

    def __init__(self, args, stop, data):
        self.args, self.stop, (self.x, self.y, self.x_test, self.y_test) = args, stop, data
        self.half = make_layers(args.layers, np.random.default_rng([args.seed, 1]), last=Sigmoid)
        self.oracle = OracleClient(args.oracle_server, args.token)
        self.output, thrower = (LayerClient(args.output_server, args.token) for _ in range(2))
        self.sender = exchange.Sender(thrower.training_examples, f"the output trainer at {self.output.url}",
                                      max_rows=4 * args.staleness * args.batch_size, width=args.layers[-1] + self.y.shape[1])
        self.guesses = BoundedStaleness(self.oracle, args.staleness, self.from_oracle, self.throw_again)
        self.checkpoint = runs.Checkpoint(args.progress_dir)
        self.counts = {"examples": 0, "updates": 0, "seconds": 0.0, "output_updates": 0} | (
            self.checkpoint.start(self.half, resume=True) if args.resume else {})  # a new run's Progress moves it aside
        self.row, self.state = {}, "waiting for the other two processes"
        self.score = runs.score_name(self.y)
        self.publish()

    def from_oracle(self, call):
        return serving.until_answered(call, f"the oracle at {self.oracle.url}", self.stop, self.args.patience)

    def from_output(self, call):
        return serving.until_answered(call, f"the output trainer at {self.output.url}", self.stop, self.args.patience)

    def throw(self, i, h, y, clock):
        """To the output trainer, which gets them with the question where the truth is asked for."""
        if self.args.gradients != "true":
            self.thrown, self.thrown_at = (i, h, y, np.full(len(i), clock)), time.monotonic()
            self.sender.throw(*self.thrown)

    def throw_again(self):
        """The last minibatch, twice a second at most: each time it is one more that the output half is trained on."""
        if time.monotonic() - self.thrown_at > 0.5:
            self.thrown_at = time.monotonic()
            self.sender.throw(*self.thrown)

    def gradients(self):
        """guess(h, y, clock): from where layer 1's gradient comes. "true" asks and throws in one, and needs no oracle;
        nothing else differs."""
        rng = np.random.default_rng([self.args.seed, 5])
        return {"synthetic": self.guesses,
                "true": lambda h, y, clock: self.from_output(lambda: self.output.true_gradients(h, y)),
                "zero": lambda h, y, clock: 0 * self.guesses(h, y, clock),
                "shuffled": lambda h, y, clock: rng.permutation(self.guesses(h, y, clock))}[self.args.gradients]

    def connect(self):
        """Wait for both processes; check that they fit, and that a new run begins with new partners."""
        partners = {"train_output.py": self.from_output(self.output.status)}
        if self.args.gradients != "true":
            partners["oracle.py"] = self.from_oracle(self.oracle.status)
        self.output_dims = partners["train_output.py"].layers
        runs.check_widths(self.x, self.y, self.args.layers[0], self.output_dims[-1], "the network of both halves' --layers")
        serving.check_partners(partners, self.args.layers[-1], self.y.shape[1],
                               self.args.staleness * self.args.batch_size, self.args.resume)

    def publish(self):
        """What GET /weights answers."""
        self.published = [(layer.w.copy(), layer.b.copy()) for layer in self.half], self.counts["updates"]

    def take_snapshot(self, progress):
        """Compose the whole network, test it, write a row, a snapshot and a checkpoint."""
        self.publish()
        if not all(np.isfinite(array).all() for pair in self.published[0] for array in pair):
            raise FloatingPointError("layer 1 diverged; try a lower --learning-rate")
        output_half, updates = self.from_output(lambda: self.output.weights(self.output_dims))
        if updates < self.counts["output_updates"]:
            print(f"the output half went back from {self.counts['output_updates']} updates to {updates}: its trainer was started "
                  "again, from an older checkpoint or from none", file=sys.stderr)
        self.counts["output_updates"], weights = updates, self.published[0] + output_half
        network = layers_from_weights(weights)
        self.row = {**self.counts, "epoch": self.counts["examples"] / len(self.x),
                    self.score: test_score(network, self.x_test, self.y_test),
                    "gradient_cosine": self.gradient_cosine(network), **self.guesses.status()}
        progress.write(weights, **self.row)
        self.checkpoint.save(self.half, **self.counts)

    def gradient_cosine(self, network):
        """The mean over 500 held-out examples of the cosine of ĝ and g; NaN where the oracle is not asked."""
        if self.args.gradients == "true":
            return float("nan")
        input_half, output_half = network[:len(self.half)], network[len(self.half):]
        h, y = feed_forward(input_half, self.x_test[:500]), self.y_test[:500]
        g = backprop(output_half, loss_gradient(feed_forward(output_half, h), y))
        guess, _ = self.from_oracle(lambda: self.oracle.estimate_gradients(h, y))
        norms = np.linalg.norm(g, axis=1) * np.linalg.norm(guess, axis=1)
        return float(np.mean(np.sum(g * guess, axis=1) / np.maximum(norms, 1e-20)))

    def status(self):
        numbers = {**self.row, **self.counts, **self.guesses.status()}
        return {"layers": self.args.layers, "gradients": self.args.gradients, "state": self.state, "score": self.score,
                "bound": self.args.staleness, "total": self.args.num_epochs * len(self.x),
                "examples_sent": self.sender.counters(),
                **{name: value if np.isfinite(value) else None for name, value in numbers.items()}}  # JSON has no NaN


def main(args, stop):
    run = Run(args, stop, runs.load_data(args.x, args.y, args.held_out))
    app = serving.make_app("input trainer", run.status, args)
    app.get("/weights", endpoint="weights")(lambda: serving.as_json(encode_weights(*run.published)))
    serving.serve(app, args)
    run.connect()
    progress = runs.Progress(args.progress_dir, [
        "seconds", "examples", "epoch", run.score, "gradient_cosine", "staleness", "staleness_p95", "waits", "waited",
        "updates"], vars(args) | {"token": None}, args.resume)
    try:
        learn(run, progress)
    except (NoAnswer, Refused, serving.Stopped) as error:  # nothing is lost: --resume goes on from here
        run.checkpoint.save(run.half, **run.counts)
        progress.end("stopped")
        print(f"stopped without a last snapshot, but with a checkpoint: {error}", file=sys.stderr)
        if not stop:
            raise
    except FloatingPointError:
        progress.end("stopped: it diverged")
        raise


def learn(run, progress):
    """Train for args.num_epochs, with a progress bar, a snapshot now and then and one at the end."""
    args, counts, total = run.args, run.counts, run.args.num_epochs * len(run.x)
    run.take_snapshot(progress)
    run.state = f"training along {args.gradients} gradients"
    order = minibatches(len(run.x), args.batch_size, args.num_epochs, args.seed, skip=counts["examples"])
    updates = train(run.half, run.x, run.y, order, lambda clock: warm_up_and_decay(clock, args), args.momentum,
                    run.throw, run.gradients(), counts["updates"])
    start, due = time.perf_counter() - counts["seconds"], counts["seconds"] + args.snapshot_seconds
    with (contextlib.suppress(serving.Stopped),
          tqdm(total=total, initial=counts["examples"], unit=" examples", unit_scale=True, mininterval=0.5) as bar):
        for count in updates:
            counts["examples"] += count
            counts["updates"] += 1
            counts["seconds"] = time.perf_counter() - start
            bar.update(count)
            if counts["seconds"] > due:
                run.take_snapshot(progress)
                due = time.perf_counter() - start + args.snapshot_seconds
                bar.set_postfix_str(f"epoch {run.row['epoch']:.1f}, held-out {run.score[5:]} {run.row[run.score]:.4f}")
            if run.stop:
                break
    run.sender.close(timeout=5)
    run.take_snapshot(progress)
    how = "stopped" if run.stop else "finished"
    run.state = f"training is {how}"
    progress.end(how)
    print(f"{counts['examples']} examples in {counts['seconds']:.1f} s, held-out {run.score[5:]} "
          f"{run.row[run.score]:.4f}: {args.progress_dir}/metrics.csv", flush=True)


def warm_up_and_decay(clock, args):
    """The learning rate: it rises while the oracle and the output half know little, and falls as 1 / (1 + clock / decay)."""
    return args.learning_rate * min(1, (clock + 1) / (args.warm_up + 1)) / (1 + clock / args.decay)


if __name__ == "__main__":
    parser = serving.argument_parser(
        __doc__, 5003, layers=[2, 24], learning_rate=3.0, momentum=0.0, decay=20_000, batch_size=100, seed=0,
        oracle_server="127.0.0.1:5001", output_server="127.0.0.1:5002", progress_dir="progress", resume=False)
    runs.add_data_options(parser)
    add = parser.add_argument
    add("--gradients", choices=["synthetic", "true", "zero", "shuffled"], default="synthetic", help="(%(default)s)")
    add("--staleness", type=serving.number(int, 1), default=20,
        help="updates that layer 1 may be ahead of what the oracle has learned from (%(default)s)")
    add("--warm-up", type=serving.number(float, 0), default=1000, help="updates until the full rate (%(default)s)")
    add("--num-epochs", type=serving.number(int, 1), default=16, help="%(default)s")
    add("--snapshot-seconds", type=serving.number(float, 0), default=5, help="between rows (%(default)s)")
    add("--patience", type=serving.number(float, 0), default=600, help="seconds to wait for another process (%(default)s)")
    serving.run(main, parser)
