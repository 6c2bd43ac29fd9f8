"""The whole algorithm in one process: the step between sgd.py and three terminals.

    python examples/in_process.py x.npy y.npy                     # gradients arrive 6 updates late
    python examples/in_process.py x.npy y.npy --delay 50 --gradients delayed
    python examples/in_process.py x.npy y.npy --cuts 1 2          # every layer is a part of its own

The train functions, the two ends of each link and the oracles are those of the processes. Here
plain calls carry the messages: what is thrown is trained on above at once, and a true gradient
comes back --delay updates later. The same options give the same numbers.
"""
import collections
import math
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing import data, options  # first, see there
import numpy as np
from tqdm import tqdm

import oracle
import train_input
import train_middle
import train_output
from exchange import SOURCES
from replay import Replay
from links import LowerEnd, UpperEnd, check_oracle
from plumbing.bar import progress_bar
from plumbing.errors import NoAnswer, UserError
from plumbing.part import Part
from sgd import make_layers, minibatches, schedule, task_of, test_score


class Late(collections.deque):
    """Gradients on their way down to a part, (when they arrive, columns). None is lost."""

    def __init__(self, part, delay):
        super().__init__()
        self.part, self.delay = part, delay

    def throw(self, *columns):
        self.append((self.part.clock + self.delay, columns))

    def throw_again(self, after):
        pass


class Cut:
    """One cut, seen from below: what links.LowerEnd needs to be carried, by plain calls.

    part is the one below. train(minibatches) is a generator that trains the part above; `higher` is
    the cut above that one, or None.
    """
    news_seconds, window = 0, None  # only --delay says how late gradients are

    def __init__(self, args, part, train, higher, k, num_examples):
        def rng(stream):
            return np.random.default_rng([args.seed, stream, width])
        self.part, self.train, self.higher, width = part, train, higher, len(part.layers[-1].b)
        self.late, self.oracle, source = Late(part, args.delay), None, SOURCES[args.gradients]
        back = self.late if source.takes_back or source.asks_oracle else None
        self.above = UpperEnd(Replay(args.keep, 0 if higher else args.replay), args.batch_size,
                              rng(2), back)  # a middle part does not replay
        self.link = LowerEnd(part, self, 0, k, args, rng(5))
        self.take = self.link.take_back
        if source.asks_oracle:
            self.oracle = oracle.Oracle(
                [width, *args.oracle_layers, width], k * args.condition_on_labels,
                oracle.DEFAULTS["keep"], args.oracle_replay, args.oracle_rate, args.batch_size,
                args.seed, stream=[width]).start()
            check_oracle(self.oracle.needs, args.staleness, args.batch_size, num_examples)
            self.guess, self.take = self.oracle.guess, self.oracle.add

    def throw(self, *columns):
        """The part above trains on it at once, and on replay as far as that is allowed."""
        self.above.add(*columns, every=self.link.source.every)
        self.train_above()
        self.deliver(self.part.clock)

    def throw_again(self, after):
        pass

    def true_gradients(self, *columns):
        answer = []
        self.above.ask(*columns, answer.append)
        self.train_above()
        return answer[0]

    def train_above(self):
        collections.deque(self.train(iter(self.above.next, None)), maxlen=0)

    def trained(self, enough):
        return self.above.trained

    def deliver(self, now):
        """What is due arrives; an oracle trains on all that it may."""
        while self.late and self.late[0][0] <= now:
            _, columns = self.late.popleft()
            self.take(0, int(columns[3][0]), 0, *columns)
        while self.oracle and self.oracle.train():
            pass

    def wait(self, attempt):
        """Where a process would wait for news, all that is on its way arrives."""
        try:
            return attempt()
        except NoAnswer:
            self.flush()
            return attempt()

    def flush(self):
        if self.higher:
            self.higher.flush()
            collections.deque(self.train([None]), maxlen=0)
        self.deliver(math.inf)


def run(args, loaded):
    """Train; yields (updates, held-out score, layers, the lowest cut) after each epoch."""
    k, n, cut = loaded.y.shape[1], len(loaded.x), None
    ends = [0, *args.cuts, len(args.layers) - 1]
    layers = make_layers(args.layers, np.random.default_rng([args.seed, 1]))
    *lower, highest = (Part(layers[a:b]) for a, b in pairwise(ends))
    rate = schedule(args.learning_rate, args.decay, args.warm_up)
    train = partial(train_output.train, highest, task=task_of(k), momentum=args.output_momentum,
                    learning_rate=schedule(args.output_rate, train_output.DEFAULTS["decay"]))
    for part in reversed(lower):
        cut = Cut(args, part, train, cut, k, n)
        train = partial(train_middle.train, part, learning_rate=rate, momentum=args.momentum,
                        throw=cut.link.throw, gradients=cut.link.gradients)
    order = minibatches(n, args.batch_size, args.num_epochs, args.seed)
    per_epoch = -(-n // args.batch_size)
    for _ in train_input.train(lower[0], loaded.x, loaded.y, order, rate, args.momentum,
                               cut.link.throw, cut.link.gradients):
        if lower[0].clock % per_epoch == 0:
            yield lower[0].clock, test_score(layers, loaded.x_test, loaded.y_test), layers, cut


def make_parser():
    mine, theirs, add_to = train_input.DEFAULTS, train_output.DEFAULTS, oracle.DEFAULTS
    same = "learning_rate", "momentum", "decay", "warm_up", "batch_size", "seed"
    parser = options.make_parser(
        __doc__, layers=[2, 24, 12, 1], cuts=[1], num_epochs=8, delay=6, staleness=200,
        keep=theirs["keep"], replay=theirs["replay"], output_rate=theirs["learning_rate"],
        output_momentum=theirs["momentum"], oracle_layers=add_to["layers"][1:-1],
        oracle_rate=add_to["learning_rate"], oracle_replay=add_to["replay"],
        **{name: mine[name] for name in same})
    parser.add_argument("--condition-on-labels", action="store_true", help="oracles see y")
    data.add_options(parser)
    train_input.add_gradients(parser)
    return parser


def main():
    parser = make_parser()
    args = train_input.with_rates(options.parse(parser))
    with options.one_line_errors(parser):
        loaded = data.load(args.x, args.y, args.held_out)
        data.check_columns(loaded, args.layers)
        data.check_targets(loaded, args.layers[-1], "--layers", task_of)
        if sorted({0, *args.cuts, len(args.layers) - 1}) != [0, *args.cuts, len(args.layers) - 1]:
            raise UserError(f"--cuts must rise from 1 to {len(args.layers) - 2} at most")
        print(data.describe(loaded, task_of))
        epochs = progress_bar(run(args, loaded), total=args.num_epochs, unit="epoch")
        for updates, score, *_ in epochs:
            tqdm.write(f"{updates:6} updates, {task_of(loaded.y.shape[1]).label} {score:.4f}")


if __name__ == "__main__":
    main()
