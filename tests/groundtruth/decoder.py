"""The decoder of the traces 03 and 04, as their allocations show it: a model and a batch for `module:function`.

Whoever recorded the traces wrote their decoder by hand, for an assignment of Stanford's course CS336. That code is not
here. The operators below were worked out from the assignment's description and from the traces: sizes of allocations,
their order, and when each is given back. They matter, where a usual implementation would take others:

- products by einsum, which runs as bmm even for a weight, whose gradient then comes transposed and is copied;
- RMSNorm as weight * (x * rsqrt), which keeps both factors of both products;
- rotary positions on pairs of neighbours, put together by stack;
- a causal mask from comparing positions, -inf put in by where, and softmax from exp and sum;
- the embedding as weight[ids], whose gradient is put into zeros, row by row.

Shape suffixes: B samples, L positions, H heads, Q and K positions of queries and keys, E size of a head, P its pairs,
D width, F width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x @ weight.T without a bias, by einsum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.weight * (x_BLD * torch.rsqrt(x_BLD.pow(2).mean(-1, keepdim=True) + 1e-5))


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021). Angles are made once, for the longest sequence."""

    def __init__(self, size: int, longest: int) -> None:
        super().__init__()
        frequencies_P = 10_000.0 ** (-torch.arange(0, size, 2) / size)
        angles_LP = torch.arange(longest)[:, None] * frequencies_P
        self.register_buffer("cosines_LP", angles_LP.cos(), persistent=False)
        self.register_buffer("sines_LP", angles_LP.sin(), persistent=False)

    def forward(self, x_BHLE: Tensor) -> Tensor:
        length = x_BHLE.shape[-2]
        cosines_LP, sines_LP = self.cosines_LP[:length], self.sines_LP[:length]
        even_BHLP, odd_BHLP = x_BHLE.unflatten(-1, (-1, 2)).movedim(-1, 0)
        turned_even = cosines_LP * even_BHLP - sines_LP * odd_BHLP
        turned_odd = sines_LP * even_BHLP + cosines_LP * odd_BHLP
        return torch.stack([turned_even, turned_odd], -1).flatten(-2)


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    shifted = x - x.max(-1, keepdim=True).values
    exponentials = shifted.exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def attend(query_BHQE: Tensor, key_BHKE: Tensor, value_BHKE: Tensor, mask_QK: Tensor) -> Tensor:
    scores_BHQK = torch.einsum("...qe,...ke->...qk", query_BHQE, key_BHKE) / math.sqrt(query_BHQE.shape[-1])
    scores_BHQK = torch.where(mask_QK, scores_BHQK, -math.inf)
    weights_BHQK = softmax(scores_BHQK)
    return torch.einsum("...qk,...ke->...qe", weights_BHQK, value_BHKE)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int, rotary: Rotary) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))

    def forward(self, x_BLD: Tensor) -> Tensor:
        projected = [self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)]
        query_BHLE, key_BHLE, value_BHLE = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected)
        del projected
        query_BHLE = self.rotary(query_BHLE)
        key_BHLE = self.rotary(key_BHLE)  # the query as it was is given back before this
        positions_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        mask_LL = positions_L[:, None] >= positions_L
        return self.out(attend(query_BHLE, key_BHLE, value_BHLE, mask_LL).transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.down, self.up = Linear(width, inner), Linear(inner, width), Linear(width, inner)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF = self.gate(x_BLD)
        return self.down(gate_BLF * torch.sigmoid(gate_BLF) * self.up(x_BLD))


class Layer(nn.Module):
    """Both sublayers with a norm before each."""

    def __init__(self, width: int, heads: int, inner: int, rotary: Rotary) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads, rotary), FeedForward(width, inner)
        self.attention_norm, self.feed_forward_norm = Norm(width), Norm(width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        attended_BLD = self.attention(self.attention_norm(x_BLD))
        x_BLD = x_BLD + attended_BLD
        added_BLD = self.feed_forward(self.feed_forward_norm(x_BLD))
        return x_BLD + added_BLD


class Decoder(nn.Module):
    """Gives the mean cross entropy of the next tokens.

    The recorded training loop held the logits in a variable until its step ended. A model cannot know when that is, but
    gradients are given back then: that of the embedding, which comes last, holds the logits from backward on.
    """

    def __init__(self, width: int, layers: int, heads: int, inner: int, vocabulary: int, longest: int) -> None:
        super().__init__()
        rotary = Rotary(width // heads, longest)
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        self.layers = nn.ModuleList(Layer(width, heads, inner, rotary) for _ in range(layers))
        self.norm, self.head = Norm(width), Linear(width, vocabulary)
        self.logits_BLV: Tensor | None = None
        self.embedding.register_post_accumulate_grad_hook(self._hand_over)

    def forward(self, ids_BL: Tensor, next_ids_BL: Tensor) -> Tensor:
        x_BLD = self.embedding[ids_BL]
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        self.logits_BLV = self.head(self.norm(x_BLD))
        return F.cross_entropy(self.logits_BLV.flatten(0, 1), next_ids_BL.flatten())

    def _hand_over(self, embedding: Tensor) -> None:
        assert embedding.grad is not None
        embedding.grad.logits_BLV, self.logits_BLV = self.logits_BLV, None


def model(
    width: int = 2560,
    layers: int = 32,
    heads: int = 32,
    inner: int = 10_240,
    vocabulary: int = 10_000,
    longest: int = 512,
) -> nn.Module:
    """The decoder of the traces; its weights have no values."""
    return Decoder(width, layers, heads, inner, vocabulary, longest)


def batch(batch_size: int, sequence_length: int) -> dict[str, Tensor]:
    """Tokens and those that follow them, int64 (B, L) each."""
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
    return {"ids_BL": ids, "next_ids_BL": ids.clone()}
