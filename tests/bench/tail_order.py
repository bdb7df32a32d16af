#!/usr/bin/env python3
"""How much longer than the work itself a job takes, by the rule that says when its longest request goes first (docs/decisions/0035). A
simulation of places that take requests as they become free, behind a leader's queue; no machine is measured.

    tests/bench/tail_order.py"""
import collections
import heapq
import random
import statistics

WINDOW, REPEATS = 2, 30  # requests that a leader holds, in places; draws of each case
RULES = (0, 0.5, 1, 1.5, 2, 3, float("inf"))  # times the longest; 0: the order of lines; inf: longest first from the start


def steps(lengths, expected, places, rounds):
    """Steps of a job whose requests take `lengths` and are expected to take `expected`."""
    n = len(lengths)
    waits, by_length = set(range(n)), sorted(range(n), key=lambda i: (-expected[i], i))
    left, oldest, longest = sum(expected), 0, 0

    def give():
        nonlocal left, oldest, longest
        if not waits:
            return None
        while oldest not in waits:
            oldest += 1
        while by_length[longest] not in waits:
            longest += 1
        i = by_length[longest] if rounds * expected[by_length[longest]] >= left / places else oldest
        waits.remove(i)
        left -= expected[i]
        return i

    queue = collections.deque(i for i in (give() for _ in range(WINDOW * places)) if i is not None)
    running = [lengths[queue.popleft()] for _ in range(min(places, len(queue)))]
    heapq.heapify(running)
    now = 0
    while running:
        now = heapq.heappop(running)
        i = give()
        if i is not None:
            queue.append(i)
        if queue:
            heapq.heappush(running, now + lengths[queue.popleft()])
    return now


def known(draw):
    return lambda r, n: (lambda x: (x, x))([draw(r) for _ in range(n)])


def lognormal(r):
    return max(1, min(8000, int(r.lognormvariate(5, 1.2))))


def bounds(r, n):
    most = [lognormal(r) for _ in range(n)]
    return [max(1, int(m * r.random())) for m in most], most


def one_long(r, n):
    x = [r.randint(20, 80) for _ in range(n - 1)] + [1500]
    return x, x


def hundred_long(r, n):
    x = [10] * (n - 100) + [1000] * 100
    return x, x


CASES = {"20 to 80, one of 1,500 in the last line": one_long,
         "10, the last hundred 1,000": hundred_long,
         "exponential, mean 200": known(lambda r: max(1, int(r.expovariate(1 / 200)))),
         "log-normal, mean about 300": known(lognormal),
         "the same as bounds, of which each takes a share": bounds,
         "exponential, all with the same bound": lambda r, n: ([max(1, min(512, int(r.expovariate(1 / 200)))) for _ in range(n)], [512] * n)}


def main():
    print("| lengths | places | " + " | ".join({0: "order of lines", float("inf"): "always longest"}.get(f, f"{f:g}") for f in RULES) + " |")
    print("|---|---|" + "---|" * len(RULES))
    for name, draw in CASES.items():
        for places in (8, 64, 256):
            over = {f: [] for f in RULES}
            for seed in range(REPEATS):
                lengths, expected = draw(random.Random(seed), max(20 * places, 1000))
                least = max(sum(lengths) / places, max(lengths))
                for f in RULES:
                    over[f].append(steps(lengths, expected, places, f) / least)
            print(f"| {name} | {places} | " + " | ".join(f"{100 * (statistics.mean(v) - 1):.1f} %" for v in over.values()) + " |")


main()
