"""Random numbers without state: every draw is a function of the seed, its purpose and its place."""

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a random number is for. Each purpose has its own stream, so that none can disturb
    another.
    """

    PROBLEMS = 0
    ORDER = 1
    SAMPLE = 2
    SHUFFLE = 3
    EVALUATE = 4
    DEMONSTRATE = 5
    WEIGHTS = 6
    LUCK = 7
    CONTINUE = 8
    V_STAR = 9


def rng_for(seed: int, purpose: Draw, *index: int) -> np.random.Generator:
    """The generator of one purpose and place: the same arguments give the same numbers on any
    machine and rank.
    """
    return np.random.default_rng([seed, purpose, *index])
