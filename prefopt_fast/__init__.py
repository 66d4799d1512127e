"""WPO, WSPO and the DPO family from hidden states, without the tokens × vocabulary matrix.

hidden states → :func:`token_logprobs` → :func:`sequence_logprobs`, :func:`wpo_weights` → losses. Needs torch alone;
:mod:`prefopt_fast.trainer` and the ``prefopt-fast`` command need the ``train`` extra.
"""

from . import reference
from .head import LMHead
from .log_ratio import token_log_ratio
from .losses import PAIRWISE_LOSSES, kto_loss, preference_loss, wpo_loss, wspo_loss
from .modules import PreferenceLoss, WPOLoss, WSPOLoss
from .segments import shared_segments, spread_over_segments, token_boundaries
from .sequence_stats import ALIGNMENTS, SequenceLogprobs, sequence_logprobs, wpo_weights
from .token_stats import STATS, GradReport, TokenStats, check_inputs, token_logprobs

__version__ = "0.1.0"

__all__ = [
    "ALIGNMENTS",
    "PAIRWISE_LOSSES",
    "STATS",
    "GradReport",
    "LMHead",
    "PreferenceLoss",
    "SequenceLogprobs",
    "TokenStats",
    "WPOLoss",
    "WSPOLoss",
    "check_inputs",
    "kto_loss",
    "preference_loss",
    "reference",
    "sequence_logprobs",
    "shared_segments",
    "spread_over_segments",
    "token_boundaries",
    "token_log_ratio",
    "token_logprobs",
    "wpo_loss",
    "wpo_weights",
    "wspo_loss",
]
