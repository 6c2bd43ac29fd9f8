"""The input trainer: trains layer 1 along synthetic gradients, and drives the run.

    python train_input.py x.npy y.npy                        # gradients guessed by the oracle
    python train_input.py x.npy y.npy --gradients true       # waits for the output trainer's: ordinary backprop
    python train_input.py x.npy y.npy --gradients zero       # layer 1 never learns: the control

After its forward pass it throws the activations at train_output.py, fire and forget, and does not wait for the true
gradient: it asks oracle.py for a guess, and descends along that. Now and then it fetches the output half's weights,
tests the whole network on held-out examples, and writes a row and a snapshot into progress/.
http://127.0.0.1:5003/ shows the run while it lasts.
"""
import collections
import contextlib
import copy
import sys
import threading
import time
from pathlib import Path

import flask
import numpy as np
from tqdm import tqdm

import plot
import synthgrad
from sgd import (Progress, Sigmoid, backprop, feed_forward, layers_from_weights, load_data, make_layers,
                 mean_squared_error, read_snapshot, snapshots)


def train(layers, x, y, gradients, throw, learning_rate, momentum, order):
    """The algorithm. Yields after each update; `order` yields the indices i of each minibatch."""
    for i in order:
        h = feed_forward(layers, x[i])
        throw(i, h, y[i])                      # to the output trainer, fire and forget
        g = gradients(h, y[i])                 # ĝ, the oracle's guess, now; rather than the true g, some time later
        backprop(layers, g)
        for layer in layers:
            layer.descend(learning_rate(), momentum)
        yield len(i)


def learning_rate(updates, args):
    """Rises for the first updates, while the oracle and the output half know little, and then falls as 1 / updates."""
    return args.learning_rate * min(1, (updates + 1) / (args.warm_up + 1)) / (1 + updates / args.decay)


def minibatches(num_examples, batch_size, skip, seed):
    """Indices without end, each epoch in a new order; the first `skip` examples are passed over."""
    epoch, start = divmod(skip, num_examples)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(num_examples)
        for k in range(start, num_examples, batch_size):
            yield order[k:k + batch_size]
        epoch, start = epoch + 1, 0


class Run:
    """One run: the two other processes as seen from here, the counters, and what is written down.

    The training loop owns everything here but `thrower`, the sender's thread's client, what `reconnecting` guards, and
    `looked`, which the page writes.
    """

    def __init__(self, args, stop, half, x_test, y_test):
        self.args, self.stop, self.half, self.x_test, self.y_test = args, stop, half, x_test, y_test
        self.oracle = synthgrad.OracleClient(args.oracle_server, args.token)
        self.output = synthgrad.LayerClient(args.output_server, args.token)
        self.thrower = synthgrad.LayerClient(args.output_server, args.token)
        self.reconnecting, self.output_instance, self.output_weights = threading.Lock(), None, None
        self.examples = self.updates = 0
        self.seconds, self.row, self.version, self.sender = 0.0, {}, 0, None
        self.state, self.looked = "waiting for the other two processes", float("-inf")  # when a page last asked
        self.latencies = collections.deque(maxlen=1000)  # seconds that the oracle took to answer
        self.published = weights_of(half, 0)  # what GET /weights answers: the newest snapshot's

    # -- gradients, from one of three sources --

    def synthetic(self, h, y):
        asked = time.perf_counter()
        g = self.patiently(lambda: self.oracle.estimate_gradients(h, y), f"the oracle at {self.oracle.url}")
        self.latencies.append(time.perf_counter() - asked)
        return g

    def true(self, h, y):
        return self.from_output(lambda: self.output.true_gradients(h, y))

    def zero(self, h, y):
        return 0 * self.synthetic(h, y)  # asks all the same, so that this control differs in nothing else

    # -- the output trainer, which may have been started anew since --

    def throw(self, i, h, y):
        self.reconnected(self.thrower, lambda: self.thrower.training_examples(i, h, y))

    def from_output(self, call):
        return self.patiently(lambda: self.reconnected(self.output, call), f"the output trainer at {self.output.url}")

    def patiently(self, call, who):
        return synthgrad.until_answered(call, who, self.stop, self.args.patience)

    def reconnected(self, client, call):
        """call(); a restarted output trainer is first given its half back, as of the newest snapshot."""
        try:
            return call()
        except synthgrad.Refused as error:
            if error.status != 412:
                raise
        with self.reconnecting:
            instance = client.status()["instance"]
            if instance != self.output_instance and self.output_weights:
                try:
                    client.restore(*self.output_weights)
                except synthgrad.NoAnswer:
                    client.headers["If-Match"] = self.output_instance  # the next call will be answered 412 again
                    raise
                print("the output trainer was started anew: gave it the newest snapshot's weights", file=sys.stderr)
            self.output_instance = instance
        return call()

    def connect(self, output_half=None):
        """Wait for both processes, and check that they fit; `output_half` goes to an output trainer that is new."""
        width = self.args.layers[-1]
        status = self.patiently(self.output.status, f"the output trainer at {self.output.url}")
        self.output_layers, self.output_instance = status["layers"], status["instance"]
        if status["layers"][0] != width:
            raise ValueError(f"the output trainer's --layers begin with {status['layers'][0]}, ours end with {width}")
        self.thrower.headers["If-Match"] = status["instance"]
        if output_half and not status.get("updates"):
            self.from_output(lambda: self.output.restore(*output_half))
        if self.args.gradients != "true":
            status = self.patiently(self.oracle.status, f"the oracle at {self.oracle.url}")
            if status["layers"][0] != width:
                raise ValueError(f"the oracle's --layers begin with {status['layers'][0]}, ours end with {width}")

    # -- what is written down --

    def take_snapshot(self, progress):
        """Compose the whole network, test it, write it. The snapshot's layers are never written to again."""
        weights, updates = self.from_output(lambda: self.output.weights(self.output_layers))
        with self.reconnecting:
            self.output_weights = weights, updates
        whole = copy.deepcopy(self.half) + layers_from_weights(weights)
        self.row = {"seconds": self.seconds, "examples": self.examples, "epoch": self.examples / self.args.num_examples,
                    "test_mse": mean_squared_error(whole, self.x_test, self.y_test),
                    "gradient_cosine": self.gradient_cosine(whole)}
        if not np.isfinite(self.row["test_mse"]):
            raise FloatingPointError("the network diverged; try a lower --learning-rate")
        progress.write(whole, **self.row, updates=self.updates, output_updates=updates)
        self.published, self.version = weights_of(whole[:len(self.half)], self.updates), progress.count

    def gradient_cosine(self, whole):
        """The mean cosine between ĝ and g over 500 held-out examples; NaN when the oracle is not asked."""
        if self.args.gradients == "true":
            return float("nan")
        half, output, y = whole[:len(self.half)], whole[len(self.half):], self.y_test[:500]
        h = feed_forward(half, self.x_test[:500])
        g = backprop(output, feed_forward(output, h) - y[:, None])
        guess = self.synthetic(h, y)
        norms = np.linalg.norm(g, axis=1) * np.linalg.norm(guess, axis=1)
        return float(np.mean(np.sum(g * guess, axis=1) / np.maximum(norms, 1e-20)))

    def status(self):
        return {**{name: value if np.isfinite(value) else None for name, value in self.row.items()},  # the snapshot's,
                "layers": self.args.layers, "gradients": self.args.gradients, "updates": self.updates,  # then today's
                "examples": self.examples, "seconds": self.seconds, "state": self.state,
                "examples_sent": self.sender.counters() if self.sender else {},
                "latency_ms": {f"p{p}": float(np.percentile(list(self.latencies) or [0], p)) * 1e3 for p in (50, 95)}}


def weights_of(layers, updates):
    """[(w, b), ...] of layers, which nobody may write to from now on, and how many updates made them."""
    return [(layer.w, layer.b) for layer in layers], updates


def add_page(app, run):
    """The live page: a template, two pictures, and what the three processes say of themselves."""
    pictures = plot.LivePictures(run.args.progress_dir)

    def ask(url):
        try:
            return synthgrad.Client(url, run.args.token, timeout=1).call("GET", "/status")
        except (synthgrad.NoAnswer, synthgrad.Refused):
            return None

    def number(value, form):
        return "–" if value is None else format(value, form)

    @app.get("/")
    def page():
        return flask.send_file(Path(__file__).with_name("page.html"))

    @app.get("/<kind>.png")
    def picture(kind):
        if kind not in plot.LIVE_SIZES:
            flask.abort(404)
        drawn = pictures.get(kind, run.version) if run.version else None  # before that, the folder holds an older run
        if drawn is None:
            raise synthgrad.Refused("the picture could not be drawn, or not yet", 503)
        return drawn, {"Content-Type": "image/png", "Cache-Control": "no-store"}

    @app.get("/live")
    def live():
        run.looked = time.monotonic()
        mine, output, oracle = run.status(), ask(run.output.url), ask(run.oracle.url)
        fine = output and (oracle or run.args.gradients == "true")
        return {"version": run.version, "well": bool(fine), "state": mine["state"], "processes": {
            "input trainer": {
                "examples": f"{mine['examples']:,}", "seconds": f"{mine['seconds']:.0f}",
                "held-out MSE": number(mine.get("test_mse"), ".4f"),
                "gradient cosine": number(mine.get("gradient_cosine"), ".2f"),
                "oracle's latency, median": f"{mine['latency_ms']['p50']:.1f} ms",
                "oracle's latency, 95th percentile": f"{mine['latency_ms']['p95']:.1f} ms",
                **{f"examples {name}": f"{count:,}" for name, count in mine["examples_sent"].items()}},
            "output trainer": output and {
                "updates": f"{output['updates']:,}", "loss": number(output["loss"], ".4f"),
                **{f"examples {name}": f"{count:,}" for name, count in output["examples"].items()},
                **{f"gradients {name}": f"{count:,}" for name, count in output["gradients"].items()}},
            "oracle": oracle and {
                "updates": f"{oracle['updates']:,}", "loss, as a fraction": number(oracle["loss"], ".3f"),
                **{name: f"{oracle[name]:,}" for name in ("answered", "withheld", "received", "stored", "dropped")}}}}


def main(args, stop):
    if None in (args.x, args.y):
        raise ValueError("expected x.npy and y.npy, the training data; `python generate.py` makes them")
    x, y, x_test, y_test = load_data(args.x, args.y)
    args.num_examples = len(x)
    if args.layers[0] != x.shape[1]:
        raise ValueError(f"--layers {args.layers}: must begin with {x.shape[1]}, the columns of {args.x}")
    half = make_layers(args.layers, np.random.default_rng(args.seed), last=Sigmoid)
    run = Run(args, stop, half, x_test, y_test)
    output_half = resume(run) if args.resume else None
    app = synthgrad.make_app("input trainer", run.status, args.token)

    @app.get("/weights")
    def weights():
        return synthgrad.encode_weights(*run.published)

    add_page(app, run)
    synthgrad.serve(app, args.host, args.port, args.token)
    columns = ["seconds", "examples", "epoch", "test_mse", "gradient_cosine"]
    try:
        run.connect(output_half)
        progress = Progress(args.progress_dir, columns, args.resume)
        learn(run, x, y, progress)
    except synthgrad.Stopped:
        pass


def learn(run, x, y, progress):
    """Train for args.num_epochs, with a progress bar, a snapshot now and then and one at the end."""
    args, total = run.args, run.args.num_epochs * len(x)
    run.take_snapshot(progress)
    run.state = f"training layer 1 along {args.gradients} gradients"
    sender = run.sender = synthgrad.Sender(run.throw, f"the output trainer at {run.output.url}",
                                           min(10_000, synthgrad.examples_per_message(args.layers[-1])))
    updates = train(run.half, x, y, getattr(run, args.gradients),
                    sender.throw if args.gradients != "true" else lambda *_: None,
                    lambda: learning_rate(run.updates, args), args.momentum,
                    minibatches(len(x), args.batch_size, run.examples, args.seed))
    before, start, due = run.seconds, time.perf_counter(), args.snapshot_seconds
    with (contextlib.suppress(synthgrad.Stopped),
          tqdm(total=total, initial=run.examples, unit=" examples", unit_scale=True, mininterval=0.5) as bar):
        while run.examples < total and not run.stop:
            count = next(updates)
            run.examples += count
            run.updates += 1
            bar.update(count)
            elapsed = time.perf_counter() - start
            run.seconds = before + elapsed
            if not sender.reachable:
                run.from_output(lambda: run.output.weights(run.output_layers))
                sender.reachable = True
            if elapsed > due:
                due = elapsed + args.snapshot_seconds
                run.take_snapshot(progress)
                bar.set_postfix_str(f"epoch {run.row['epoch']:.1f}, held-out MSE {run.row['test_mse']:.4f}")
    sender.close(timeout=5)
    if stopped := bool(run.stop):
        run.stop, args.patience = False, min(args.patience, 5)  # one more snapshot, if the others are still there
    try:
        run.take_snapshot(progress)
    except synthgrad.NoAnswer as error:
        if not stopped:
            raise
        print(f"no last snapshot: {error}", file=sys.stderr)
    print(f"{run.examples} examples in {run.seconds:.1f} s, held-out MSE {run.row['test_mse']:.4f}: "
          f"{args.progress_dir}/metrics.csv", flush=True)
    run.state = "training was stopped" if stopped else "training is finished"
    if time.monotonic() - run.looked < 5:
        time.sleep(4)  # whoever looks at the live page sees the end, too


def resume(run):
    """Take the newest whole snapshot's layer 1 and counters; returns the output half's (weights, updates)."""
    for path in reversed(snapshots(run.args.progress_dir)):
        try:
            layers, row = read_snapshot(path)
        except ValueError as error:
            print(f"{error}; using the one before", file=sys.stderr)
            continue
        mine, others = layers[:len(run.half)], layers[len(run.half):]
        if "output_updates" not in row or [len(layer.w) for layer in mine] + [len(mine[-1].b)] != run.args.layers:
            raise ValueError(f"--resume: {path} is of a run with other layers than --layers {run.args.layers}")
        run.half[:] = mine
        run.examples, run.seconds, run.updates = row["examples"], row["seconds"], row["updates"]
        run.published, run.output_weights = weights_of(mine, row["updates"]), weights_of(others, row["output_updates"])
        print(f"going on from {path}, {run.examples} examples", file=sys.stderr)
        return run.output_weights
    print(f"no snapshot in {run.args.progress_dir}: starting afresh", file=sys.stderr)
    run.args.resume = False


if __name__ == "__main__":
    parser = synthgrad.argument_parser(__doc__, 5003, [2, 24], learning_rate=3.0)
    parser.add_argument("x", nargs="?", help="inputs, (n, columns)")
    parser.add_argument("y", nargs="?", help="targets, (n,)")
    parser.add_argument("--gradients", choices=["synthetic", "true", "zero"], default="synthetic", help="%(default)s")
    parser.add_argument("--momentum", type=float, default=0.0, help="%(default)s")
    parser.add_argument("--warm-up", type=float, default=1000, help="updates until the full rate (%(default)s)")
    parser.add_argument("--decay", type=float, default=30_000, help="updates until the rate has halved (%(default)s)")
    parser.add_argument("--num-epochs", type=int, default=16, help="%(default)s")
    parser.add_argument("--oracle-server", default="127.0.0.1:5001", help="%(default)s")
    parser.add_argument("--output-server", default="127.0.0.1:5002", help="%(default)s")
    parser.add_argument("--progress-dir", default="progress", help="%(default)s")
    parser.add_argument("--snapshot-seconds", type=float, default=5, help="%(default)s")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for another process (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest snapshot in --progress-dir")
    synthgrad.run(main, parser)
