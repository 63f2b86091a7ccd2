"""What the anchors are made from in place of MGVQ's codes: a few vectors of the vision tower's features, by three rules.

    random           patches at positions drawn once from a seed, the same in every image, in raster order
    topk_attention   the patches that CLS attends to most in the tower's last layer, mean over heads, in raster order
    kmeans           the centres of Lloyd's k-means over the image's patches, in the order of their first points

Each vector is a weighted sum of features whose weights no gradient passes. All of it is computed in fp32 on whole features, which
tensor-parallel ranks hold alike to the last bit, so they choose alike; of equals the first patch is taken.
"""

import random

import torch
from torch import Tensor, nn

ITERATIONS = 10  # of Lloyd's algorithm


def random_positions(patches: int, count: int, seed: int) -> list[int]:
    """`count` of `patches` positions, in order: those with the least of Python's random.Random(seed).random(), drawn for each in turn.

    Python promises that this generator's numbers stay what they are; torch promises nothing of the kind.
    """
    draw = random.Random(seed)
    ranks = [draw.random() for _ in range(patches)]
    return sorted(sorted(range(patches), key=ranks.__getitem__)[:count])


def attention_of_cls(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """CLS's attention summed over heads. query [images, heads, d] of CLS, key [images, heads, P + 1, d] -> [images, P] fp32."""
    scores = (key.float() @ query.float()[..., None])[..., 0] * scale
    return scores.softmax(-1).sum(1)[:, 1:]


def attention_in_clip(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The same, of a layer of transformers' CLIP, from what goes into it, [images, P + 1, h]."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query, key = (x.unflatten(-1, (-1, attention.head_dim)) for x in (attention.q_proj(normed[:, 0]), attention.k_proj(normed)))
    return attention_of_cls(query, key.transpose(1, 2), attention.scale)


def _one_hot(positions: Tensor, patches: int) -> Tensor:
    return nn.functional.one_hot(positions, patches).float()


def _kmeans(features: Tensor, count: int) -> Tensor:
    """Weights of the centres' members, [images, P, h] -> [images, count, P]; a centre without members stays where it was."""
    images, patches, _ = features.shape
    image, centre = torch.arange(images, device=features.device), features.mean(1, keepdim=True)
    distance, chosen = (features - centre).square().sum(-1), []
    for number in range(count):  # first the patch farthest from the mean, then the one farthest from all that are chosen
        chosen.append(distance.argmax(1))
        to_chosen = (features - features[image, chosen[-1]][:, None]).square().sum(-1)
        distance = torch.minimum(distance, to_chosen) if number else to_chosen
    weights = _one_hot(torch.stack(chosen, 1), patches)
    for _ in range(ITERATIONS):
        centres = weights @ features
        nearest = (centres.square().sum(-1)[:, None] - 2 * features @ centres.transpose(1, 2)).argmin(-1)
        members = _one_hot(nearest, count).transpose(1, 2)
        sizes = members.sum(-1, keepdim=True)
        weights = torch.where(sizes > 0, members / sizes.clamp_min(1), weights)
    return weights


@torch.no_grad()
def anchor_weights(source: str, features: Tensor, count: int, seed: int, attention: Tensor | None) -> Tensor:
    """Of each patch in each of the `count` vectors: [images, count, P] fp32. attention: [images, P], of topk_attention."""
    images, patches, _ = features.shape
    if source == "random":
        positions = torch.tensor(random_positions(patches, count, seed), device=features.device).expand(images, -1)
    elif source == "topk_attention":
        positions = attention.sort(descending=True, stable=True).indices[:, :count].sort().values
    else:
        return _kmeans(features.float(), count)
    return _one_hot(positions, patches)


def anchor_features(source: str, features: Tensor, count: int, seed: int = 0, attention: Tensor | None = None) -> Tensor:
    """The chosen vectors, one behind the other: features [images, P, h] -> [images, count * h]."""
    weights = anchor_weights(source, features, count, seed, attention)
    return (weights @ features.float()).flatten(1).to(features.dtype)
