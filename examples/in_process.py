"""The whole algorithm in one process: the step between sgd.py and three terminals.

    python examples/in_process.py x.npy y.npy                     # gradients arrive 6 updates late
    python examples/in_process.py x.npy y.npy --delay 50 --gradients delayed
    python examples/in_process.py x.npy y.npy --cuts 1 2          # every layer is a part of its own

The train functions, the arrivals, the replay, the staleness bound and the oracle are those of the
three processes. Here plain function calls connect them. A true gradient reaches the oracle --delay
updates after its minibatch. The same options give the same numbers.
"""
import collections
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing import data, options  # first, see there
import numpy as np
from tqdm import tqdm

import oracle
import train_input
import train_middle
import train_output
from exchange import Arrivals, BoundedStaleness, Delayed, Part, Replay, gradient_source
from plumbing.errors import NoAnswer, UserError
from sgd import make_layers, minibatches, schedule, test_score


class Link:
    """One cut: the part above it, the oracle, and what the part below calls, throw and gradient."""

    def __init__(self, args, layers, k, kind, highest):
        width, self.kind = len(layers[0].w), kind
        self.args, self.part, self.labels = args, Part(layers), k if args.condition_on_labels else 0
        rng = np.random.default_rng([args.seed, 2, width])
        replay = args.replay if highest else 0  # a middle part does not replay
        self.arrivals = Arrivals(Replay(args.keep, replay), args.batch_size, rng)
        self.late = collections.deque()     # true gradients on their way to the oracle
        self.examples = Replay(oracle.DEFAULTS["keep"], args.oracle_replay)
        least = oracle.STEPS * args.batch_size / self.examples.keep
        if kind not in ("true", "delayed") and args.oracle_replay < least:
            raise UserError("with this --batch-size the oracle would never train: --oracle-replay "
                             f"must be at least {least:g}")
        self.rng = np.random.default_rng([args.seed, 3, width])
        self.oracle = oracle.Oracle([width + self.labels, *args.oracle_layers, width],
                                    args.oracle_rate, args.batch_size, args.seed)
        self.delayed = Delayed([], args.staleness)
        answer = self.delayed.answer if kind == "delayed" else self.ask
        self.bounded = BoundedStaleness(answer, args.staleness, self.wait, lambda after: None)
        self.gradient = gradient_source(
            kind, self.bounded, self.truth, np.random.default_rng([args.seed, 5]))

    def throw(self, i, h, y, clock):
        if self.kind != "true":
            self.arrivals.add(i, h, y, np.full(len(i), clock), tell=self.tell, again=None)

    def tell(self, *columns):
        self.late.append(columns)

    def ask(self, i, h, y, clock):
        return self.oracle.guess(oracle.model_input(h, y, self.labels))

    def truth(self, i, h, y, clock):
        answer = []
        self.arrivals.add_question(h, y, answer.append)
        self.train_above()
        return answer[0]

    def wait(self, ask):
        """Where a process would wait for news, all that is late arrives."""
        try:
            return ask()
        except NoAnswer:
            self.deliver(math.inf)
            return ask()

    def train_above(self):
        """Train on all that has arrived, and on replay as far as it is allowed."""
        for _ in self.train(iter(self.arrivals.next, None)):
            pass

    def deliver(self, now):
        """What was told --delay updates ago arrives, and the oracle trains on all that it may."""
        while self.late and self.late[0][3].max() <= now - self.args.delay:
            i, h, y, clock, g = self.late.popleft()
            if self.kind == "delayed":
                self.delayed.add(i, h, y, clock, g)
            else:
                self.examples.add(oracle.model_input(h, y, self.labels), g, clock)
        while drawn := self.examples.draw(oracle.STEPS * self.args.batch_size, self.rng):
            self.oracle.train(*drawn)


def run(args, loaded):
    """Train; yields (updates, held-out score, layers, links) after each epoch."""
    dims, cuts, k = args.layers, args.cuts, loaded.y.shape[1]
    ends = [0, *cuts, len(dims) - 1]
    layers = make_layers(dims, np.random.default_rng([args.seed, 1]))
    parts = [layers[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    upper = "true" if args.gradients == "true" else "synthetic"  # only the lowest part's is chosen
    links = [Link(args, part, k, upper if n else args.gradients, part is parts[-1])
             for n, part in enumerate(parts[1:])]
    links[0].delayed.layers = parts[0]
    below = schedule(args.learning_rate, args.decay, args.warm_up)
    above = schedule(args.output_rate, train_output.DEFAULTS["decay"])
    for link, upper in zip(links, links[1:], strict=False):
        link.train = lambda arrivals, link=link, upper=upper: train_middle.train(
            link.part, arrivals, below, args.momentum, upper.throw, upper.gradient)
    links[-1].train = lambda arrivals: train_output.train(
        links[-1].part, arrivals, above, args.output_momentum)
    order = minibatches(len(loaded.x), args.batch_size, args.num_epochs, args.seed)
    per_epoch = -(-len(loaded.x) // args.batch_size)
    updates = train_input.train(parts[0], loaded.x, loaded.y, order, below, args.momentum,
                                links[0].throw, links[0].gradient)
    for n, _ in enumerate(updates, 1):
        for link, clock in zip(links, [n, *(each.part.updates for each in links)], strict=False):
            link.train_above()
            link.deliver(clock)
        if n % per_epoch == 0:
            yield n, test_score(layers, loaded.x_test, loaded.y_test), layers, links


def make_parser():
    mine, theirs = train_input.DEFAULTS, train_output.DEFAULTS
    same = "learning_rate", "momentum", "decay", "warm_up", "batch_size", "seed"
    parser = options.make_parser(
        __doc__, layers=[2, 24, 12, 1], num_epochs=8, staleness=1000, keep=theirs["keep"],
        replay=theirs["replay"], **{name: mine[name] for name in same})
    data.add_options(parser)
    add = parser.add_argument
    add("--cuts", type=int, nargs="+", default=[1], help="layers below each cut (%(default)s)")
    add("--gradients", choices=train_input.GRADIENTS, default="synthetic", help="(%(default)s)")
    add("--delay", type=options.number(int, 0), default=6,
        help="updates until a true gradient arrives (%(default)s)")
    add("--output-rate", type=float, default=theirs["learning_rate"],
        help="learning rate of the highest part (%(default)s)")
    add("--output-momentum", type=float, default=theirs["momentum"], help="(%(default)s)")
    add("--oracle-layers", type=int, nargs="*", default=oracle.DEFAULTS["layers"][1:-1],
        help="hidden layers of the oracles; none makes them linear (%(default)s)")
    add("--oracle-replay", type=float, default=oracle.DEFAULTS["replay"], help="(%(default)s)")
    add("--oracle-rate", type=float, default=oracle.DEFAULTS["learning_rate"], help="(%(default)s)")
    add("--condition-on-labels", action="store_true", help="let the oracles see y")
    return parser


def main():
    parser = make_parser()
    args = options.parse(parser)
    with options.one_line_errors(parser):
        loaded = data.load(args.x, args.y, args.held_out)
        data.check_columns(loaded, args.layers)
        data.check_targets(loaded, args.layers[-1], "--layers")
        if not 0 < args.cuts[0] <= args.cuts[-1] < len(args.layers) - 1 or args.cuts != sorted(
                set(args.cuts)):
            raise UserError(f"--cuts must rise from 1 to {len(args.layers) - 2} at most")
        print(data.describe(loaded))
        for updates, score, *_ in tqdm(run(args, loaded), total=args.num_epochs, unit="epoch"):
            tqdm.write(f"{updates:6} updates, held-out {loaded.score[5:]} {score:.4f}")


if __name__ == "__main__":
    main()
