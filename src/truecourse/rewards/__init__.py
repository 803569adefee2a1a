"""Reward functions, verifiers and shaping, mixed and scored; a failure is marked, never a silent zero."""

from truecourse.rewards.builtins import BUILTINS
from truecourse.rewards.reward import Failure, Reward, RewardError, Scores, build, check_failures

__all__ = ["BUILTINS", "Failure", "Reward", "RewardError", "Scores", "build", "check_failures"]
