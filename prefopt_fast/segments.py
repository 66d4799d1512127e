"""Two tokenizations of one text, compared at the characters where both have a boundary: WSPO's ``level="segment"``.

Let A and B be the character offsets in a response at which the strong and the weak model's tokens end. At the shared
boundaries A ∩ B both models have read exactly the same text, so the text between two consecutive ones, a segment, has a
log-probability given what precedes it under either model: by the chain rule the sum of its own tokens' log-probs. With
n_k strong tokens in segment k, N in all, s_t and r_t the strong and the weak pair's log-ratios, S_k = Σ s_t over the
segment's strong tokens and R_k = Σ r_t over its weak ones, the loss is

    L = 1/N Σ_k (γ S_k − R_k)² / n_k.

Of the token level, 1/N Σ_t (γ s_t − r_t)², this is what can be known. Its targets r_t on strong tokens do not exist;
only their sums R_k over segments do. By Cauchy-Schwarz Σ_t (γ s_t − r_t)² ≥ (γ S_k − R_k)² / n_k within a segment for
all r_t of sum R_k, with equality where all residuals of the segment are equal: L is the token level under the targets
that fit best, of all that the weak pair allows. It penalizes nothing that the weak pair does not say. Hence:

- With equal tokens every n_k is 1, and L is the token level, to the bit.
- With one segment L = (γ S/N − R/N)². That is the sequence level where the numbers of tokens agree. The sequence level
  across tokenizers divides R by the weak model's own M tokens; here both sums are of the same text, and stay so.
- L rises as segments are split: sequence level ≤ L ≤ token level for equal tokens in segments of any kind.
- A segment's weight, ∂²L/∂S_k² ∝ 1/n_k, falls with its length as the variance of a sum of n_k terms rises; unweighted
  squares (γ S_k − R_k)² would let the few places where tokenizers disagree for long govern the gradient.
- The gradient at token t, 2γ (γ S_k − R_k) / (n_k N), depends on the segment that t is in, and on nothing else.

Boundaries are positions in the response's own text, so that each model can have its own chat template around it:
see :func:`token_boundaries`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

NO_BOUNDARY = -1  # between tokens that share a character
NO_SEGMENT = -1  # of tokens that no shared boundary follows or precedes


def token_boundaries(
    text: str,
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
) -> list[int]:
    """Where in a response's own text each of its n tokens begins and the last one ends: n + 1 rising positions.

    Positions count the characters of the messages' text; whatever a template puts after a message's text, and between
    it and the next, is one more position, reached when all of it is. So the end of the turn is one last segment, be it
    ``</s>`` here and ``<|im_end|>`` and a line break there; and a template's opening, before any text, stands for
    nothing: tokens before the first position belong to no segment. A token that holds both template and text counts as
    text where it opens a message, and as the end of the turn where it closes one.

    Some places between tokens are no boundary, -1: inside a character whose bytes are spread over tokens; before a
    token of no width, which goes with what precedes it (an EOS without characters after all text is the end of the
    turn). Of characters that are in no token, white space goes with what follows, as most tokenizers have it; all
    others went into what precedes, as a combining accent does under NFC.

    Args:
        text: what was tokenized: the whole rendered conversation.
        offsets: (start, end) in ``text`` of each of the response's tokens, as ``return_offsets_mapping`` gives them.
        spans: (start, end) in ``text`` of each message's text in the response, rising.

    Raises:
        ValueError: no tokens, or spans that do not rise within ``text``.
    """
    edges = [edge for span in spans for edge in span]
    if not offsets or edges != sorted(edges) or (edges and not 0 <= edges[0] <= edges[-1] <= len(text)):
        raise ValueError(
            f"expected tokens, and spans that rise within {len(text)} characters; "
            f"found {len(offsets)} tokens and spans {list(spans)}"
        )
    ends = [end for _, end in spans]
    firsts = [0, *accumulate(end - start + 1 for start, end in spans)]

    def position(character: int) -> int:
        span = bisect_left(ends, character)
        return firsts[span] + (max(0, character - spans[span][0]) if span < len(spans) else 0)

    boundaries: list[int] = []
    reached = offsets[0][0]  # the end of the text that is in tokens so far
    for start, end in offsets:
        if start == end:
            start, end = reached, reached + (reached == ends[-1] if ends else 0)
        skipped = text[reached:start].rstrip()
        boundaries.append(position(reached + len(skipped)) if start >= reached else NO_BOUNDARY)
        reached = max(reached, end)
    boundaries.append(position(reached))

    last = None  # of places at one position the last counts
    for i in reversed(range(len(boundaries))):
        if boundaries[i] == last:
            boundaries[i] = NO_BOUNDARY
        elif boundaries[i] != NO_BOUNDARY:
            last = boundaries[i]
    return boundaries


def shared_segments(
    strong_boundaries: Tensor | Sequence[int],  # (N + 1,)
    weak_boundaries: Tensor | Sequence[int],  # (M + 1,)
) -> tuple[Tensor, Tensor]:
    """The segment of each strong token (N,) and of each weak token (M,), int64.

    Segments are numbered from 0 in the order of the text and have a token of either side at least; tokens before the
    first shared boundary or after the last one have -1. Boundaries of a truncated response are a slice of the whole
    one's: what only one side has whole is then in no segment.

    Args:
        strong_boundaries, weak_boundaries: from :func:`token_boundaries`, or any positions in a common text: where the
            first token begins, then where each token ends; -1 where a token's end is no boundary.

    Raises:
        ValueError: boundaries that are not integers in one dimension, or do not rise.
    """
    strong, weak = (torch.as_tensor(boundaries) for boundaries in (strong_boundaries, weak_boundaries))
    for name, boundaries in (("strong", strong), ("weak", weak)):
        if boundaries.dim() != 1 or boundaries.is_floating_point():
            raise ValueError(
                f"{name}_boundaries must be integers (tokens + 1,), found {boundaries.dtype} {tuple(boundaries.shape)}"
            )
        if bool((boundaries[boundaries != NO_BOUNDARY].diff() <= 0).any()) or bool((boundaries < NO_BOUNDARY).any()):
            raise ValueError(f"{name}_boundaries must be positions that rise, or -1; found {boundaries.tolist()}")
    return _segments(strong, weak), _segments(weak, strong)


def _segments(own: Tensor, other: Tensor) -> Tensor:
    shared = torch.isin(own, other) & (own != NO_BOUNDARY)
    begun = shared.cumsum(0)
    segments = begun[:-1] - 1  # NO_SEGMENT before the first shared boundary
    return segments.masked_fill(begun[:-1] == begun[-1:], NO_SEGMENT)


def spread_over_segments(
    weak_values: Tensor,  # (M,)
    weak_segments: Tensor,  # (M,)
    strong_segments: Tensor,  # (N,)
) -> Tensor:
    """Weak tokens' log-probs as values of strong tokens, (N,): each segment's sum R_k as n_k equal parts.

    How the sum is divided makes no difference to ``wspo_loss(..., level="segment")``. Tokens of no segment get 0.

    Raises:
        ValueError: lengths or numbers of segments that do not agree.
    """
    if weak_values.shape != weak_segments.shape:
        raise ValueError(f"found {tuple(weak_values.shape)} weak values for {tuple(weak_segments.shape)} weak tokens")
    count, found = (int(segments.max()) + 1 for segments in (strong_segments, weak_segments))
    if count != found:
        raise ValueError(f"strong_segments has {count} segments, weak_segments {found}")
    sums = weak_values.new_zeros(count + 1).index_add(0, weak_segments + 1, weak_values)
    sums[0] = 0
    return (sums / torch.bincount(strong_segments + 1, minlength=count + 1).clamp(min=1))[strong_segments + 1]


def segment_means(
    values: Tensor,  # (B, T), zero where mask is False
    segments: Tensor,  # (B, T)
    mask: Tensor,  # (B, T), False at tokens of no segment
) -> Tensor:
    """(B, T): each token's value replaced by the mean over its segment, whose tokens stand in a row; 0 where ``mask``
    is False."""
    # Counted anew: where tokens were left out, the numbers may be larger than T.
    index = torch.nn.functional.pad(segments.diff(dim=-1) != 0, (1, 0)).cumsum(-1)
    sums = torch.zeros_like(values).scatter_add(-1, index, values)
    counts = torch.zeros_like(values).scatter_add(-1, index, mask.to(values.dtype)).clamp(min=1)
    return torch.where(mask, (sums / counts).gather(-1, index), 0.0)
