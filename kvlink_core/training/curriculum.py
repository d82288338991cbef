"""The order in which training meets harder worlds, and when it moves on.

Binding a fact to the right one of several names appears suddenly, after a plateau whose length grows with everything
else that is new. So records of a name and a value come first, then sentences, more names, more facts, pronouns across
passages and two hops; a stage ends when the model answers its questions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvlink_core.training.worlds import FULL, Level


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: a level and the range of passages."""

    level: Level
    passages: tuple[int, int]


_ONE_FACT = Level(facts=1, article_passages=1, hops=False)

STAGES: tuple[Stage, ...] = (
    Stage(Level(bare=True, pool=40, made_up=0.0, facts=1, article_passages=1, relations=1, kinds=("person",)), (2, 4)),
    Stage(Level(bare=True, pool=200, made_up=0.1, facts=1, article_passages=1, relations=1, kinds=("person",)), (2, 8)),
    Stage(Level(pool=40, made_up=0.0, facts=1, article_passages=1, relations=3, kinds=("person",), hops=False), (2, 4)),
    Stage(_ONE_FACT, (2, 8)),
    Stage(Level(facts=3, article_passages=1, hops=False), (2, 8)),
    Stage(Level(facts=3, article_passages=3), (2, 8)),
    Stage(FULL, (1, 14)),
)
LAST = len(STAGES) - 1
#: in the last stage, this share of worlds is larger than what is tested
LARGE_SHARE, LARGE = 0.12, (15, 30)


def draw_stage(rng: random.Random, current: int) -> int:
    """The stage of the next world: mostly the current one, some earlier ones, some of the whole task at any time."""
    chance = rng.random()
    if chance < (0.9 if current == LAST else 0.6):
        return current
    return LAST if chance < 0.75 else rng.randint(0, current)


def draw_passages(rng: random.Random, stage: int) -> tuple[int, int]:
    """The range of passages for a world of that stage."""
    return LARGE if stage == LAST and rng.random() < LARGE_SHARE else STAGES[stage].passages


@dataclass
class Progress:
    """Decides when to move on. Mutated by ``update``; owned by the training loop."""

    stage: int = 0
    needed: float = 0.92
    accuracy: float = 0.0
    updates: int = 0
    started: float = 0.0

    def update(self, correct: int, total: int, elapsed: float, patience: float) -> bool:
        """Take in the answers of the current stage; true if this ended it (or ``patience`` seconds ran out)."""
        if self.stage == LAST or total == 0:
            return False
        share = correct / total
        self.accuracy = share if self.updates == 0 else 0.7 * self.accuracy + 0.3 * share
        self.updates += 1
        done = self.updates >= 4 and self.accuracy >= self.needed
        if done or elapsed - self.started > patience:
            self.stage += 1
            self.accuracy, self.updates, self.started = 0.0, 0, elapsed
            return True
        return False
