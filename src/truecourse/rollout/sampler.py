"""From logits to tokens, and from tokens to the end of a completion: shared by every way of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from truecourse.recipe import Sampling

Decode = Callable[[Sequence[int]], str]


def draw(logits_BV: Tensor, uniforms_B: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens `[B]` by inverse CDF at each row's own uniform, and their log-probs `[B]` (nats).

    The log-prob is that of the distribution drawn from: after temperature, then top-k, then top-p, renormalised.
    At temperature 0 the token is the argmax (no uniforms needed) and the log-prob that of temperature 1, where the
    distribution drawn from would say 0 for every token.
    """
    if sampling.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
    assert uniforms_B is not None
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    ids_BK = None
    if 0 < sampling.top_k < logits_BV.shape[1]:
        logits_BV, ids_BK = logits_BV.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits_BV, ids_BK = logits_BV.sort(descending=True, stable=True)
    p_BK = logits_BV.softmax(-1)
    if sampling.top_p < 1:
        # the smallest set that holds top_p: a token stays while those before it hold less
        p_BK = p_BK * (p_BK.cumsum(-1) - p_BK < sampling.top_p)
        p_BK = p_BK / p_BK.sum(-1, keepdim=True)
    cdf_BK = p_BK.cumsum(-1)
    # u·total < total (streams.LARGEST), so the first place above it exists and its own probability is above 0
    at_B1 = torch.searchsorted(cdf_BK, (uniforms_B * cdf_BK[:, -1])[:, None], right=True)
    if p_BK.device.type != "cpu":  # a parallel prefix sum may still rise where the probability is 0, by a rounding
        at_B1 = torch.where(p_BK.gather(1, at_B1) > 0, at_B1, p_BK.argmax(-1, keepdim=True))
    logps_B = p_BK.gather(1, at_B1)[:, 0].log()
    return (at_B1 if ids_BK is None else ids_BK.gather(1, at_B1))[:, 0], logps_B


class StopStrings:
    """Finds stop strings in the text of growing completions by decoding only their tails."""

    def __init__(self, strings: Sequence[str], decode: Decode):
        self.strings, self.decode = strings, decode
        # a match ends inside the newest token's text; this many characters before that text are enough to hold the
        # rest of it, with room for a leading space or the pieces of a cut character that decoding a tail can lose
        self.reach = max(map(len, strings), default=0) + 4
        self._may_end: dict[int, bool] = {}

    def cut(self, tokens: Sequence[int], tail: int) -> tuple[int | None, int]:
        """(Length of the text before the first stop string, None without one; the tail to look at from now on.)

        To be called after every token, with the tail returned last time (0 at first).
        """
        newest = tokens[-1]
        if newest not in self._may_end:
            # decoded twice in a row: some tokenizers drop the leading space of a text
            piece = self.decode([newest, newest])
            self._may_end[newest] = not piece or "\ufffd" in piece or any(s[-1] in piece for s in self.strings)
        if not self._may_end[newest]:
            return None, tail
        text = self.decode(tokens[tail:])
        if any(s in text for s in self.strings):
            whole = self.decode(tokens)
            found = [at for at in map(whole.find, self.strings) if at >= 0]
            if found:
                return min(found), tail
        later = len(tokens) - 2 * self.reach
        if later > tail + self.reach and len(self.decode(tokens[later:])) > self.reach:
            tail = later
        return None, tail
