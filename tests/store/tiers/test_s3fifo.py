"""S3-FIFO against a model written from the paper, on any sequence of requests; and what it is for, scans."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_core.store.tiers.s3fifo import S3Fifo


@dataclass
class Model:
    """Lists, newest first, searched from end to end: slow, and without any of the counters kept along the way."""

    capacity: int
    sizes: dict[str, int] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    small: list[str] = field(default_factory=list)
    main: list[str] = field(default_factory=list)
    ghosts: list[tuple[str, int]] = field(default_factory=list)

    def held(self, names: list[str]) -> int:
        return sum(self.sizes[n] for n in names)

    def used(self) -> int:
        return self.held(self.small) + self.held(self.main)

    def add(self, name: str, size: int) -> None:
        self.sizes[name], self.hits[name] = size, 0
        remembered = [g for g in self.ghosts if g[0] == name]
        (self.main if remembered else self.small).insert(0, name)
        self.ghosts = [g for g in self.ghosts if g[0] != name]

    def hit(self, name: str) -> None:
        self.hits[name] = min(3, self.hits[name] + 1)

    def evict(self, pinned: set[str]) -> str | None:
        if not set(self.small + self.main) - pinned:
            return None
        while True:
            from_small = self.held(self.small) > int(self.capacity * 0.1) or not self.main
            for queue in ("small", "main") if from_small else ("main", "small"):
                gone = self.leave_small(pinned) if queue == "small" else self.leave_main(pinned)
                if gone is not None:
                    return gone

    def leave_small(self, pinned: set[str]) -> str | None:
        for name in self.small[::-1]:
            self.small.remove(name)
            if name in pinned:
                self.small.insert(0, name)
            elif self.hits[name] > 0:
                self.hits[name] = 0
                self.main.insert(0, name)
            else:
                self.ghosts.insert(0, (name, self.sizes[name]))
                while sum(s for _, s in self.ghosts) > self.capacity - int(self.capacity * 0.1):
                    self.ghosts.pop()
                return name
        return None

    def leave_main(self, pinned: set[str]) -> str | None:
        for _ in range(4):
            for name in self.main[::-1]:
                self.main.remove(name)
                if name not in pinned and self.hits[name] == 0:
                    return name
                self.hits[name] = max(0, self.hits[name] - 1)
                self.main.insert(0, name)
        return None


REQUESTS = st.lists(
    st.tuples(st.sampled_from("abcdefghijklmno"), st.integers(1, 30), st.sets(st.sampled_from("abcdefghijklmno"))),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(capacity=st.integers(1, 120), requests=REQUESTS)
def test_it_does_what_the_paper_says(capacity: int, requests: list[tuple[str, int, set[str]]]) -> None:
    model, policy = Model(capacity), S3Fifo[str](capacity)
    for name, size, pinned in requests:
        if name in model.small + model.main:
            model.hit(name)
            policy.hit(name)
        elif size <= capacity:
            while model.used() + size > capacity:
                expected = model.evict(pinned)
                assert policy.evict(lambda key, pinned=pinned: key not in pinned) == expected
                if expected is None:
                    break
            else:
                model.add(name, size)
                policy.add(name, size)
        assert sorted(policy) == sorted(model.small + model.main)
        assert policy.nbytes == model.used() <= capacity


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans())))
def test_what_is_taken_out_leaves_no_trace(steps: list[tuple[str, bool]]) -> None:
    policy, held = S3Fifo[str](60), set()
    for name, hit in steps:
        if name in held:
            (policy.hit if hit else policy.remove)(name)
            held -= set() if hit else {name}
        else:
            policy.add(name, 10)
            held.add(name)
        assert (set(policy), policy.nbytes, len(policy)) == (held, 10 * len(held), len(held))


def test_a_scan_does_not_displace_what_is_asked_for_again() -> None:
    policy: S3Fifo[int] = S3Fifo(1000)

    def ask(key: int) -> bool:
        if key in policy:
            policy.hit(key)
            return True
        while policy.nbytes + 10 > policy.capacity:
            policy.evict()
        policy.add(key, 10)
        return False

    for _ in range(3):
        for key in range(80):
            ask(key)
    for key in range(1000, 5000):
        ask(key)
    assert sum(ask(key) for key in range(80)) >= 75


def test_no_more_keys_are_remembered_than_allowed() -> None:
    policy: S3Fifo[int] = S3Fifo(10**9, ghosts=3)
    for key in range(10):
        policy.add(key, 10**8)
        policy.evict()
    for key, queue in ((9, "_main"), (8, "_main"), (7, "_main"), (6, "_small")):
        policy.add(key, 1)
        assert key in getattr(policy, queue)
