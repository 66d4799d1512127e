"""The slow, obvious truth: every statistic from full float64 logits."""

from .token_stats import token_logprobs

__all__ = ["token_logprobs"]
