"""The input trainer: trains layer 1 along synthetic gradients, and drives the run.

    python train_input.py x.npy y.npy                        # gradients guessed by the oracle
    python train_input.py x.npy y.npy --gradients true       # waits for the true ones
    python train_input.py x.npy y.npy --gradients delayed    # true ones of earlier minibatches
    python train_input.py x.npy y.npy --gradients zero       # layer 1 does not learn: the control
    python train_input.py x.npy y.npy --gradients shuffled   # each example gets another one's guess

After its forward pass it throws the activations at train_output.py, fire-and-forget, and does not
wait for the true gradient. It asks oracle.py for a guess and descends along that. Now and then it
fetches the weights above the cut, tests the whole network on held-out examples, and writes a row
and a snapshot into progress/. The run ends here, after --num-epochs; the other processes stay idle
until they are stopped.
"""
import time
from pathlib import Path

from plumbing import data, options, runs, say, serving  # first, see there
import numpy as np
from tqdm import tqdm

from exchange import Delayed, gradient_source
from links import LowerEnd
from plumbing.errors import NoAnswer, Refused
from sgd import (HIDDEN, backprop, descend, feed_forward, layers_from_weights, loss_gradient,
                 make_layers, minibatches, schedule, test_score)
from synthgrad import Gradients

DEFAULTS = dict(
    layers=[2, 24], learning_rate=30.0, momentum=0.0, decay=5000, warm_up=1000, batch_size=100,
    staleness=20, num_epochs=16, patience=600, seed=0, oracle_server="127.0.0.1:5001",
    output_server="127.0.0.1:5002", progress_dir="progress", snapshot_seconds=5, resume=False)
GRADIENTS = "synthetic", "true", "delayed", "zero", "shuffled"


def train(layers, x, y, order, learning_rate, momentum, throw, gradient, clock=0):
    """The algorithm. `order` yields minibatches of indices. Yields after each update.

    gradient() is exchange.gradient_source's; behind it BoundedStaleness asks, over HTTP by
    LowerEnd.ask_oracle, what oracle.Oracle.guess answers.
    """
    for clock, i in enumerate(order, clock):  # noqa: B020
        h = feed_forward(layers, x[i])
        throw(i, h, y[i], clock)                    # to the part above, fire-and-forget
        g = gradient(i, h, y[i], clock)             # the oracle's guess ĝ, centered
        backprop(layers, g)
        descend(layers, learning_rate(clock), momentum)
        yield len(i)


class Report:
    """The report of a run: tests the whole network now and then, and writes it down.

    The training loop owns it. Servers' threads call status().
    """

    def __init__(self, loaded, layers, link, counts, same):
        self.data, self.layers, self.link = loaded, layers, link
        self.counts, self.same = counts, same  # same: what --resume checks
        self.row, self.updates_above, self.state = {}, None, "waiting for the other processes"

    def take(self, progress, checkpoint):
        """Compose the network of this part's weights and those above, as they are when asked for.
        Test it; write a checkpoint, a row and a snapshot."""
        mine = [(layer.w.copy(), layer.b.copy()) for layer in self.layers]
        link, counts = self.link, self.counts
        theirs, updates = link.from_above(lambda: link.above.weights(link.network))
        for old, new in zip(self.updates_above or updates, updates, strict=True):
            if new < old:
                say(f"a part above went back from {old} updates to {new}: its trainer was "
                    "restarted. If that was without --resume, undo it: stop that trainer, rename "
                    "the newest checkpoint.N.npz in its --progress-dir to checkpoint.npz, and "
                    "start it with --resume")
        self.updates_above = updates
        counts.update(waits=link.bounded.waits, waited=link.bounded.waited)
        checkpoint.save(self.layers, **self.same, **counts)
        network = layers_from_weights(mine + theirs)
        score = test_score(network, self.data.x_test, self.data.y_test)
        cosine, probe = self.compare_gradients(network)
        self.row = {**link.bounded.status(), **counts, self.data.score: score,
                    "epoch": counts["examples"] / len(self.data.x), "gradient_cosine": cosine}
        progress.write(mine + theirs, probe, **self.row)

    def try_to_take(self, progress, checkpoint):
        """take(), but a disk that is full does not end the run."""
        try:
            self.take(progress, checkpoint)
        except NoAnswer:
            raise
        except OSError as error:
            say(f"no snapshot: {error}; training goes on")

    def compare_gradients(self, network):
        """The mean over held-out examples of the cosine of ĝ and g. For pictures, where x has two
        columns, both for four units, too. NaN and {} where no oracle is asked."""
        if not self.link.has_oracle:
            return float("nan"), {}
        below, above = network[:len(self.layers)], network[len(self.layers):]
        n = min(2000 if self.data.x.shape[1] == 2 else 500, self.link.outbox.per_message)
        x, y = self.data.x_test[:n], self.data.y_test[:n]
        h = feed_forward(below, x)
        g = backprop(above, loss_gradient(feed_forward(above, h), y))
        guess, _ = self.link.from_oracle(lambda: self.link.oracle.estimate_gradients(h, y))
        probe = {"x": x, "g": g[:, :4], "guess": guess[:, :4]} if x.shape[1] == 2 else {}
        return mean_cosine(g, guess), probe

    def status(self, args):
        return {"layers": args.layers, "state": self.state, "score": self.data.score,
                "progress_dir": str(Path(args.progress_dir).resolve()),
                "total": args.num_epochs * len(self.data.x),
                **self.row, **self.counts, **self.link.status()}


def mean_cosine(g, guess):
    """The mean over examples of the cosine between two gradients, both (batch, width)."""
    norms = np.linalg.norm(g, axis=1) * np.linalg.norm(guess, axis=1)
    return float(np.mean(np.sum(g * guess, axis=1) / np.maximum(norms, 1e-20)))


def main(args, stop):
    loaded = data.load(args.x, args.y, args.held_out)
    k = loaded.y.shape[1]
    data.check_columns(loaded, args.layers)
    listener = serving.listen(args)
    layers = make_layers(args.layers, np.random.default_rng([args.seed, 1]), last=HIDDEN)
    checkpoint = runs.Checkpoint(args.progress_dir)
    same = {"seed": args.seed, "held_out": len(loaded.x_test), "data": loaded.digest}
    resumed = checkpoint.resume(layers, **same) if args.resume else {}
    counts = {"examples": 0, "updates": 0, "seconds": 0.0, "waits": 0, "waited": 0.0, **resumed}
    delayed = Delayed(layers, args.staleness) if args.gradients == "delayed" else None
    link = LowerEnd(args, stop, delayed and delayed.answer)
    link.bounded.waits, link.bounded.waited = counts["waits"], counts["waited"]
    report = Report(loaded, layers, link, counts, same)

    app = serving.make_app("input trainer", lambda: report.status(args), args)
    if delayed:
        @app.post("/provide_gradients")
        def provide_gradients():
            columns = serving.message(Gradients, h=link.width, gradients=link.width, y=k)
            delayed.add(*columns)
            return {"accepted": len(columns[0])}
    serving.serve(app, listener, args)
    link.connect(new=not resumed, k=k)
    data.check_targets(loaded, link.network[-1], "the network of all --layers")

    columns = ["seconds", "examples", "epoch", loaded.score, "gradient_cosine", "staleness",
               "staleness_p95", "waits", "waited", "updates"]
    progress = runs.Progress(args.progress_dir, columns, {
        **vars(args), "token": None, "constant_guess": loaded.constant_guess}, args.resume)
    say(data.describe(loaded))
    with progress.ending():
        run(args, stop, report, progress, checkpoint)


def run(args, stop, report, progress, checkpoint):
    """Train for args.num_epochs, with a progress bar, snapshots now and then and one at the end."""
    x, y, counts, link = report.data.x, report.data.y, report.counts, report.link
    score = report.data.score
    report.take(progress, checkpoint)
    report.state = f"training along {args.gradients} gradients"
    order = minibatches(len(x), args.batch_size, args.num_epochs, args.seed, counts["examples"])
    gradient = gradient_source(args.gradients, link.bounded, link.ask_above,
                               np.random.default_rng([args.seed, 5]))
    updates = train(report.layers, x, y, order,
                    schedule(args.learning_rate, args.decay, args.warm_up), args.momentum,
                    link.throw, gradient, counts["updates"])
    start = time.perf_counter() - counts["seconds"]
    due = counts["seconds"] + args.snapshot_seconds
    try:
        with tqdm(total=args.num_epochs * len(x), initial=counts["examples"], unit=" examples",
                  unit_scale=True, mininterval=0.5) as bar:
            for count in updates:
                counts["examples"] += count
                counts["updates"] += 1
                counts["seconds"] = time.perf_counter() - start
                bar.update(count)
                if counts["seconds"] > due:
                    report.try_to_take(progress, checkpoint)
                    due = time.perf_counter() - start + args.snapshot_seconds
                    bar.set_postfix_str(f"epoch {report.row['epoch']:.1f}, held-out {score[5:]} "
                                        f"{report.row[score]:.4f}")
                if stop:
                    break
        link.poster.close(timeout=5)
        report.take(progress, checkpoint)
    except (NoAnswer, Refused, serving.Stopped) as error:
        checkpoint.save(report.layers, **report.same, **counts)
        say(f"stopped without a last snapshot, but with a checkpoint; --resume continues: {error}")
        raise
    last = [float(row[score]) for row in progress.rows[-3:]]
    report.state = f"training is {'stopped' if stop else 'finished'}"
    say(f"{counts['examples']:,} examples in {counts['seconds']:.1f} s, held-out "
        f"{score[5:]} {last[-1]:.4f} (median of the last {len(last)} rows "
        f"{np.median(last):.4f}): {progress.metrics}")
    if stop:
        say("interrupted; --resume continues from here")
        raise serving.Stopped
    for line in progress.verdict():
        say(line)


if __name__ == "__main__":
    parser = options.make_parser(__doc__, 5003, **DEFAULTS)
    data.add_options(parser)
    parser.add_argument("--gradients", choices=GRADIENTS, default="synthetic", help="(%(default)s)")
    serving.run(main, parser)
