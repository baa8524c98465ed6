"""Verdicts: a response's text and the reference -> a score with its reason. The graders stand in graders.py."""

from rewards.graders import (
    ATTEMPTS,
    GRADERS,
    Grader,
    RewardConfig,
    Verdict,
    grade_boxed,
    grade_chain,
)

__all__ = [
    "ATTEMPTS",
    "GRADERS",
    "Grader",
    "RewardConfig",
    "Verdict",
    "grade_boxed",
    "grade_chain",
]
