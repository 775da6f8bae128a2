"""DN-DETR in one file: "Accelerate DETR Training by Introducing Query DeNoising" (Li et al., CVPR 2022).
Section and equation numbers are those of arXiv 2203.01305.

The problem. A DETR turns N learned queries into N predictions, and bipartite (Hungarian) matching decides
anew at every training step which query is responsible for which object. Early in training the assignment
keeps changing: a query is trained towards one object now and towards another one soon after.

The idea. During training, feed the decoder a second kind of query: ground-truth boxes and labels with noise
added. The object that each of them came from is known, so they need no matching, and the same decoder learns
to remove the noise while it learns to detect. At inference they are left out.

A query of this decoder (DAB-DETR's) has two parts: an *anchor*, the box where it looks, and a *content*
vector, what it has found there. A noised box becomes an anchor, a noised label becomes content. Every decoder
layer corrects the anchors a little.

One training step:

    objects       = ground-truth labels and boxes                    K in the batch
    noised        = P copies of every object: boxes jittered, some labels redrawn     section 2
    queries       = noised copies, then N learned queries            Q = P*M + N      section 3
    mask          = learned queries may not attend to the copies, which hold the      section 4
                    answer, and no group of copies may attend to another group
    logits, boxes = decoder(queries, image, mask)                                     sections 5-9
    pairs         = Hungarian(predictions of the N learned queries, objects)          section 10
    dn_pairs      = (copy of object k, object k)                     known from       section 3
    loss          = set_loss(pairs) + set_loss(dn_pairs)             the same loss    section 11

Shapes, the same letters everywhere:

    B images         K objects in the batch        M objects in its fullest image
    P groups         N matching (learned) queries  Q = P*M + N decoder queries
    D hidden width   S image tokens                C classes            L decoder layers
    boxes are (cx, cy, w, h) in [0, 1], relative to their image; in masks, True means blocked

The authors' weights load (section 14), and outputs, losses and gradients agree with their code
(github.com/IDEA-Research/DN-DETR, dn_dab_detr; compared in test_dn_detr.py), except for these points:

    D1 A slot without an object (in an image with fewer than M objects) is masked out for every query.
       In the authors' code it can be attended to, so an image's predictions depend on its batch.
    D2 Centre and size noise have separate scales, as in the paper. The authors' code has one for both.
    D3 dn_max_queries (off by default) lowers the number of groups in crowded batches.
    D4 The normaliser of the denoising loss is averaged over processes, like the matching loss's.
    D5 backbone="small" and frozen_norm=False (not the defaults) can be trained from random weights.
    D6 position_frequency and cell_centers (off by default) suit small images.
    D7 Left out: segmentation, deformable attention, Swin backbones.

Sections 2 to 4 are the paper. Elsewhere, lines that denoising adds to DAB-DETR end in [DN]. Without those
sections and lines, and without the tour in section 15, the file is DAB-DETR.
"""
import argparse
import dataclasses
import math
from collections import OrderedDict
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, box_convert, sigmoid_focal_loss

# ---- 1. Configuration ----------------------------------------------------------------------------

ACTIVATIONS = {"prelu": nn.PReLU, "relu": nn.ReLU, "gelu": nn.GELU}
BACKBONES = ("small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclasses.dataclass(frozen=True)
class DNDETRConfig:
    """All settings. Defaults: the paper's R50 on COCO. Raises ValueError that names an impossible field."""
    # What is detected. There is no class for "no object": each class has a sigmoid of its own.
    num_classes: int = 91           # C; labels run from 0 to C-1 (COCO's category ids end at 90)
    num_queries: int = 300          # N; times num_patterns, if there are patterns

    # The transformer.
    hidden_dim: int = 256           # D
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6     # L
    dim_feedforward: int = 2048
    dropout: float = 0.0
    activation: str = "prelu"       # "prelu" (one learned slope per layer), "relu" or "gelu"
    num_patterns: int = 0           # if > 0, every anchor is used once with each learned pattern

    # The backbone.
    backbone: str = "resnet50"      # a torchvision ResNet, or "small", which learns from scratch
    dilation: bool = False          # DC5: the last stage keeps its resolution (stride 16, not 32)
    frozen_norm: bool = True        # ResNets: fixed batch norm, for pretrained weights
    small_widths: tuple = (32, 64, 128)  # "small": a stage per width, each halves the resolution

    # Denoising.                                                                                 [DN]
    dn_groups: int = 5              # P, Sec. 4.4; 0: DAB-DETR, with "unknown" as content         [DN]
    label_noise: float = 0.2        # gamma, Sec. 4.3: probability that a label is redrawn       [DN]
    center_noise: float = 0.4       # lambda_1: largest shift of a centre, in half sides         [DN]
    size_noise: float = 0.4         # lambda_2: largest change of a side, in sides               [DN]
    dn_max_queries: int = 0         # if > 0, lowers P until P*M fits, but not below 1           [DN]

    # Sine encodings of positions. DAB-DETR's paper has a temperature of 20 for both; the authors' code has
    # 10000 for anchors, and their weights expect it.
    image_temperature: float = 20.0
    anchor_temperature: float = 10000.0
    position_frequency: float = 1.0      # periods per image of the fastest wave; more for small maps
    cell_centers: bool = False           # True: a feature cell stands at its centre, not far corner

    # Matching costs, and weights of the loss.
    cost_class: float = 2.0
    cost_box: float = 5.0
    cost_giou: float = 2.0
    loss_class: float = 1.0
    loss_box: float = 5.0
    loss_giou: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self):
        for names, is_met, rule in (
                ("num_classes num_queries num_heads num_decoder_layers dim_feedforward",
                 lambda x: x >= 1, "at least 1"),
                ("num_encoder_layers num_patterns", lambda x: x >= 0, "at least 0"),
                ("dn_groups dn_max_queries", lambda x: x >= 0, "at least 0"),                     # [DN]
                ("label_noise center_noise size_noise", lambda x: 0 <= x <= 1, "in [0, 1]"),      # [DN]
                ("dropout", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("hidden_dim", lambda x: x > 0 and x % self.num_heads == 0 and x % 4 == 0,
                 f"divisible by num_heads ({self.num_heads}), and by 4 (sine and cosine of x and y)"),
                ("image_temperature anchor_temperature position_frequency", lambda x: x > 0, "positive"),
                ("activation", lambda x: x in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
                ("backbone", lambda x: x in BACKBONES, f"one of {', '.join(BACKBONES)}"),
                ("dilation", lambda x: not x or self.backbone in BACKBONES[3:], "False below resnet50"),
                ("small_widths", lambda x: len(x) > 0, "a width for each stage")):
            for name in names.split():
                if not is_met(getattr(self, name)):
                    raise ValueError(f"{name} is {getattr(self, name)!r}, it must be {rule}")


# ---- 2. Noise (Sec. 4.3) -------------------------------------------------------------------------
# Sections 2 to 4 are the paper's contribution.

def noise_labels(labels, num_classes, label_noise, generator=None):
    """Redraw each of the labels [K] (long, in 0..C-1) with probability gamma = `label_noise`.

    A redrawn label is uniform over all C classes, so it may be the same one again: labels change at the
    rate gamma * (1 - 1/C). Returns a new tensor. Raises ValueError if gamma is not in [0, 1].
    Sec. 4.3; in the authors' prepare_for_dn.
    """
    if not 0 <= label_noise <= 1:
        raise ValueError(f"label_noise is {label_noise}, it must be in [0, 1]")
    is_redrawn = torch.rand(labels.shape, generator=generator, device=labels.device) < label_noise
    random_labels = torch.randint(num_classes, labels.shape, generator=generator, device=labels.device)
    return torch.where(is_redrawn, random_labels, labels)


def noise_boxes(boxes, center_noise, size_noise, generator=None):
    """Shift and scale each of the boxes [K, 4] (cxcywh in [0, 1]) at random.

    With lambda_1 = `center_noise` < 1 the noised centre stays inside the true box, so the decoder can tell
    which object is meant. Each of the four numbers is clamped to [0, 1]; a corner may still leave the image.
    Returns a new tensor. Raises ValueError if a scale is not in [0, 1]: above 1, a centre may leave its box
    and a side may turn negative. Sec. 4.3; in the authors' prepare_for_dn.
    """
    if not (0 <= center_noise <= 1 and 0 <= size_noise <= 1):
        raise ValueError(f"center_noise is {center_noise} and size_noise is {size_noise}, not both in [0, 1]")
    uniform = torch.rand(boxes.shape, generator=generator, device=boxes.device, dtype=boxes.dtype) * 2 - 1
    centers, sizes = boxes.split(2, dim=-1)                                          # [K, 2] each
    # |dx| < lambda_1 w / 2  and  |dy| < lambda_1 h / 2
    noised_centers = centers + uniform[:, :2] * center_noise * sizes / 2
    # noised w in [(1 - lambda_2) w, (1 + lambda_2) w], and the same for h
    noised_sizes = sizes + uniform[:, 2:] * size_noise * sizes
    return torch.cat([noised_centers, noised_sizes], dim=-1).clamp(0, 1)


# ---- 3. Groups, slots, and the noised queries (Sec. 4.4, 4.5) ------------------------------------

class DenoisingSlots(NamedTuple):
    """Which query is a copy of which object: decoder query `slot[i]` of image `image[i]` is a noised copy
    of object `source[i]`. Objects are counted through the whole batch, image after image.

    Every image has P groups of M slots, M being the object count of the fullest image. Two images with 1
    and 3 objects, a | b c d, in P = 2 groups of M = 3 slots (- is an empty slot):

        image 0    a - -  a - -        image  0 1 1 1  0 1 1 1
        image 1    b c d  b c d        slot   0 0 1 2  3 3 4 5
                   group0 group1       source 0 1 2 3  0 1 2 3
    """
    num_groups: int   # P
    group_size: int   # M
    image: Tensor     # [P*K] long
    slot: Tensor      # [P*K] long, in 0 .. P*M-1
    source: Tensor    # [P*K] long, in 0 .. K-1
    is_real: Tensor   # [B, P*M] bool, False for an empty slot


def assign_slots(counts, num_groups, max_queries=0, device=None):
    """DenoisingSlots on `device` for images that hold `counts` objects (list of int, one per image).

    `max_queries` > 0 lowers the number of groups until P*M fits, but not below 1 (D3). Raises ValueError
    for a negative number or an empty batch. Sec. 4.4; in the authors' prepare_for_dn.
    """
    if not counts or min(num_groups, max_queries, *counts) < 0:
        raise ValueError(f"num_groups {num_groups}, max_queries {max_queries} and counts {list(counts)} "
                         "must not be negative, and there must be at least one image")
    group_size = max(counts)                                                         # M
    if max_queries and group_size:
        num_groups = min(num_groups, max(1, max_queries // group_size))              # P
    # Within a group, an image's objects fill its first slots. On the right: the example above. This is
    # computed on the CPU: on a GPU, nonzero would have to send the size of its output to the host.
    is_filled = torch.arange(group_size) < torch.tensor(counts)[:, None]             # [B, M]
    image, rank = is_filled.nonzero(as_tuple=True)                                   # [K]  0 1 1 1, 0 0 1 2
    # The copy in group g stands g * M slots further on.
    slot = (torch.arange(num_groups)[:, None] * group_size + rank).flatten()         # [P*K] 0 0 1 2 3 3 4 5
    source = torch.arange(len(image)).repeat(num_groups)                             # [P*K] 0 1 2 3 0 1 2 3
    tensors = image.repeat(num_groups), slot, source, is_filled.repeat(1, num_groups)
    return DenoisingSlots(num_groups, group_size, *(to_device(tensor, device) for tensor in tensors))


def denoising_queries(targets, label_embedding, config):
    """The noised queries of a batch: slots, content [B, P*M, D], anchor logits [B, P*M, 4].

    `targets` as in DNDETR (section 9). `label_embedding` [C + 1, D - 1] has a row for each class, and a last
    row for queries of unknown class, the learned ones. Sec. 4.3-4.5; authors: prepare_for_dn.
    """
    # 1. All objects of the batch in a row, and slots for their copies.
    device = label_embedding.weight.device
    labels, boxes = flatten_targets(targets, device)                                 # [K], [K, 4]
    counts = [len(target["labels"]) for target in targets]
    slots = assign_slots(counts, config.dn_groups, config.dn_max_queries, device)
    # 2. Noise, drawn for every copy separately.
    labels = noise_labels(labels[slots.source], config.num_classes, config.label_noise)    # [P*K]
    boxes = noise_boxes(boxes[slots.source], config.center_noise, config.size_noise)       # [P*K, 4]
    # 3. The label becomes the content, the box becomes the anchor (as logits, see section 5). The last
    #    number of a content is the indicator: 1 in a denoising query, 0 in a matching query (Sec. 4.5).
    content = F.pad(label_embedding(labels), (0, 1), value=1.0)                      # [P*K, D]
    anchor_logits = inverse_sigmoid(boxes)                                           # [P*K, 4]
    # 4. Copy i moves to slot[i] of image[i]: [B, P*M, D] and [B, P*M, 4]. Empty slots stay zero; section 4
    #    blocks them.
    where = slots.image, slots.slot
    content = content.new_zeros(*slots.is_real.shape, config.hidden_dim).index_put(where, content)
    anchor_logits = boxes.new_zeros(*slots.is_real.shape, 4).index_put(where, anchor_logits)
    return slots, content, anchor_logits


# ---- 4. Attention mask (Sec. 4.4, Eq. 7) ---------------------------------------------------------

def dn_attention_mask(num_groups, group_size, num_queries, device=None):
    """bool [Q, Q], Q = P*M + N, denoising queries first. True: this row may not attend to that column.

    P = 2 groups (0 and 1) of M = 2 slots, then N = 3 matching queries (m):

              0 0 1 1 m m m
            0 . . x x . . .       A copy may attend to its own group, and to the matching queries,
            0 . . x x . . .       which hold no ground truth.
            1 x x . . . . .       It may not attend to another group: averaging several noised copies
            1 x x . . . . .       of an object would reveal the object.
            m x x x x . . .       Matching queries may attend to no copy. They would copy the answer
            m x x x x . . .       instead of finding it, and fail at inference, where there are no
            m x x x x . . .       copies.

    The mask is needed in self-attention only, because queries meet nowhere else. It is Eq. 7, where
    a_ij = 1 means blocked, as in torch.nn.MultiheadAttention (scaled_dot_product_attention has it the
    other way round). Raises ValueError for negative sizes. In the authors' prepare_for_dn.
    """
    if min(num_groups, group_size, num_queries) < 0:
        raise ValueError(f"num_groups {num_groups}, group_size {group_size} and num_queries {num_queries} "
                         "must not be negative")
    num_denoising = num_groups * group_size
    query = torch.arange(num_denoising + num_queries, device=device)
    is_denoising = query < num_denoising
    # Denoising query q is in group q // M. Matching queries get P, which no group has.
    group = torch.where(is_denoising, query // max(group_size, 1), num_groups)
    # a_ij = 1 if j is a denoising query and i is not in the same group               (Eq. 7)
    return is_denoising[None, :] & (group[:, None] != group[None, :])                # [Q, Q]


def query_mask(slots, num_queries):
    """bool [B, 1, Q, Q] (1: for all heads): Eq. 7, and empty slots are blocked for every query (D1)."""
    mask = dn_attention_mask(slots.num_groups, slots.group_size, num_queries, slots.is_real.device)
    is_empty = F.pad(~slots.is_real, (0, num_queries))                               # [B, Q]
    return (mask | is_empty[:, None])[:, None]


# ---- 5. Anchors and positions --------------------------------------------------------------------
# The paper's contribution ends here. The rest is DAB-DETR.                                        [DN]

def inverse_sigmoid(x, eps=1e-3):
    """The logit of x in [0, 1], within +-6.91.

    Anchors are stored and refined as logits, box <- sigmoid(inverse_sigmoid(box) + delta), so that every box
    stays in [0, 1]. eps is part of the trained model: the authors' weights expect 1e-3.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sine_encoding(coordinates, width, temperature, frequency=1.0):
    """Encode each coordinate in [0, 1] by `width` sines and cosines: [..., n] -> [..., n * width].

    For i = 0, 2, 4, ..., width - 2 the numbers i and i + 1 of the encoding of x are
        sin and cos of  2 pi f x / T^(i / width),   f = `frequency`, T = `temperature`.
    The dot product of two encodings is largest where the coordinates are equal, which is how attention
    finds a place. Authors: gen_sineembed_for_position, PositionEmbeddingSineHW.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=coordinates.device) / width
    angle = coordinates[..., None] * (2 * math.pi * frequency) / temperature ** exponent  # [..., n, width/2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)                    # [..., n * width]


def pixel_coordinates(cell_padding, cell_centers=False):
    """(y, x) in (0, 1] of every valid feature cell: padding [B, h, w] (True = padding) -> [B, h, w, 2].

    Only valid cells are counted, so that 1 is the border of the image and not of the padding. The authors
    place a cell at its far corner; `cell_centers` places it at its centre.
    """
    valid = (~cell_padding).float()
    y, x = valid.cumsum(1), valid.cumsum(2)                                          # 1, 2, 3, ...
    shift = 0.5 if cell_centers else 0.0
    return torch.stack([(y - shift) / (y[:, -1:, :] + 1e-6), (x - shift) / (x[:, :, -1:] + 1e-6)], dim=-1)


# ---- 6. From image to tokens: backbone and encoder -----------------------------------------------

def build_backbone(config):
    """(module, channels): images [B, 3, H, W] -> features [B, channels, H / stride, W / stride].

    Weights are random; pretrained ones are loaded by the caller.
    """
    if config.backbone == "small":
        return small_backbone(config.small_widths), config.small_widths[-1]
    network = get_model(config.backbone, replace_stride_with_dilation=[False, False, config.dilation],
                        norm_layer=FrozenBatchNorm2d if config.frozen_norm else nn.BatchNorm2d)
    if config.frozen_norm:
        # Frozen statistics need pretrained weights. As in DETR, the first two stages are not trained further.
        network.conv1.requires_grad_(False)
        network.layer1.requires_grad_(False)
    *stages, _, _ = network.named_children()                  # all but the average pooling and the classifier
    return nn.Sequential(OrderedDict(stages)), network.fc.in_features


def small_backbone(widths):
    """[B, 3, H, W] -> [B, widths[-1], h, w]: for every width two 3 x 3 convolutions with batch norm and ReLU,
    the first of which halves the resolution. Three widths are a stride of 8."""
    layers = []
    for inputs, outputs in pairwise((3, *widths)):
        # Kernel size 3; stride 2, then 1.
        layers += [Conv2dNormActivation(inputs, outputs, 3, 2), Conv2dNormActivation(outputs, outputs, 3, 1)]
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """Linear layers with ReLU between them. MLP(D, D, 4) has two: [..., D] -> [..., 4]."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*ends) for ends in pairwise(widths))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class EncoderLayer(nn.TransformerEncoderLayer):
    """torch's layer, with positions that are added to queries and keys, and not to values: tokens and
    positions [B, S, D], token_padding bool [B, S] or None -> [B, S, D]."""

    def forward(self, tokens, positions, token_padding):
        query = key = tokens + positions
        attended, _ = self.self_attn(query, key, tokens, key_padding_mask=token_padding, need_weights=False)
        tokens = self.norm1(tokens + self.dropout1(attended))
        hidden = self.linear2(self.dropout(self.activation(self.linear1(tokens))))
        return self.norm2(tokens + self.dropout2(hidden))


class Encoder(nn.Module):
    """All encoder layers: [B, S, D] -> [B, S, D]. Before each of them, the position encoding is multiplied by
    a function of the token's current features."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config.hidden_dim, config.num_heads, config.dim_feedforward, config.dropout,
                         ACTIVATIONS[config.activation](), batch_first=True)
            for _ in range(config.num_encoder_layers))
        if self.layers:
            self.position_scale = MLP(config.hidden_dim, config.hidden_dim, config.hidden_dim)

    def forward(self, tokens, positions, token_padding):
        for layer in self.layers:
            tokens = layer(tokens, positions * self.position_scale(tokens), token_padding)
        return tokens


# ---- 7. Decoder layer ----------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention over inputs that are already projected."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, query, key, value, blocked=None):
        """query [B, Q, D] and key [B, S, D] (2 D wide in cross-attention), value [B, S, D], blocked bool,
        broadcastable to [B, heads, Q, S] -> [B, Q, D]."""
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)   # [B, heads, *, *]
                             for x in (query, key, value))
        allowed = None if blocked is None else ~blocked
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, allowed, dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Queries exchange information (self-attention), read the image (cross-attention), and each processes
    what it has got (feed-forward). This is Conditional DETR's layer, as in DAB-DETR."""

    def __init__(self, config, is_first):
        super().__init__()
        width, self.num_heads = config.hidden_dim, config.num_heads
        # Content ("what") and position ("where") have projections of their own.
        self.self_query_content, self.self_query_position = nn.Linear(width, width), nn.Linear(width, width)
        self.self_key_content, self.self_key_position = nn.Linear(width, width), nn.Linear(width, width)
        self.self_value = nn.Linear(width, width)
        self.self_attn = Attention(config)

        self.cross_query_content, self.cross_query_sine = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_key_content, self.cross_key_position = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_value = nn.Linear(width, width)
        self.cross_attn = Attention(config)
        # In the first layer, where the content has seen nothing yet, positions are added to query and key.
        self.cross_query_position = nn.Linear(width, width) if is_first else None

        self.linear1 = nn.Linear(width, config.dim_feedforward)
        self.activation = ACTIVATIONS[config.activation]()
        self.linear2 = nn.Linear(config.dim_feedforward, width)
        self.dropout = nn.Dropout(config.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, content, query_position, query_sine, memory, memory_position, blocked, token_padding):
        """content, query_position and query_sine (encodings of the whole anchor and of its centre, section 8)
        [B, Q, D]; memory (the image tokens) and memory_position [B, S, D]; blocked bool [B, 1, Q, Q] or None
        (section 4); token_padding bool [B, S] or None -> content [B, Q, D]."""
        # Self-attention: query and key are content + position. `blocked` acts here and nowhere else.
        query = self.self_query_content(content) + self.self_query_position(query_position)
        key = self.self_key_content(content) + self.self_key_position(query_position)
        attended = self.self_attn(query, key, self.self_value(content), blocked)
        content = self.norm1(content + self.dropout(attended))

        # Cross-attention: content and position are concatenated, not added, so that in every head
        #     score = content . content + position . position = "looks right" + "is in the right place"
        query, key = self.cross_query_content(content), self.cross_key_content(memory)
        key_position = self.cross_key_position(memory_position)
        if self.cross_query_position is not None:
            query, key = query + self.cross_query_position(query_position), key + key_position
        query = self.concatenate_heads(query, self.cross_query_sine(query_sine))     # [B, Q, 2D]
        key = self.concatenate_heads(key, key_position)                              # [B, S, 2D]
        blocked_tokens = None if token_padding is None else token_padding[:, None, None]     # [B, 1, 1, S]
        attended = self.cross_attn(query, key, self.cross_value(memory), blocked_tokens)
        content = self.norm2(content + self.dropout(attended))

        hidden = self.linear2(self.dropout(self.activation(self.linear1(content))))
        return self.norm3(content + self.dropout(hidden))

    def concatenate_heads(self, content, position):
        """Two [B, *, D] -> [B, *, 2D], in which each head has its content, then its position."""
        heads = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, position)]
        return torch.cat(heads, dim=-1).flatten(-2)


# ---- 8. Decoder: anchors, refined layer by layer (DAB-DETR) --------------------------------------

class Decoder(nn.Module):
    """All decoder layers. Each reads the image at its anchors, then corrects them for the next one."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(config, is_first=index == 0)
                                    for index in range(config.num_decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.anchor_mlp = MLP(2 * width, width, width)      # encoding of an anchor -> query_position
        self.position_scale = MLP(width, width, width)      # content -> weight of each sine and cosine
        self.reference_size = MLP(width, width, 2)          # content -> (w_ref, h_ref)

    def forward(self, content, anchor_logits, memory, memory_position, blocked, token_padding, box_head):
        """content [B, Q, D], anchor_logits [B, Q, 4], box_head (section 9), the rest as in DecoderLayer
        -> normalised outputs [L, B, Q, D], and the anchors that each layer started from, [L, B, Q, 4]."""
        anchors = anchor_logits.float().sigmoid()
        outputs, anchors_per_layer = [], [anchors]
        for index, layer in enumerate(self.layers):
            query_position, query_sine = self.encode_anchors(anchors, content, is_first=index == 0)
            content = layer(content, query_position, query_sine, memory, memory_position,
                            blocked, token_padding)
            outputs.append(self.norm(content))
            if index < len(self.layers) - 1:
                # box <- sigmoid(inverse_sigmoid(box) + delta). Here delta is computed from `content`, and in
                # DNDETR.forward from norm(content), as in the authors' code.
                refined = (box_head(content).float() + inverse_sigmoid(anchors)).sigmoid()
                # Without detach, this layer would also be trained to choose where later layers look.
                # `refined` keeps its gradient for the next layer's prediction, which is a correction of it.
                anchors = refined.detach()
                anchors_per_layer.append(refined)
        return torch.stack(outputs), torch.stack(anchors_per_layer)

    def encode_anchors(self, anchors, content, is_first):
        """anchors [B, Q, 4] and content [B, Q, D] -> query_position for self-attention and query_sine for
        cross-attention, both [B, Q, D]. DAB-DETR, Sec. 4.2 to 4.4."""
        width = self.config.hidden_dim
        # query_position = MLP(PE(cy, cx, w, h)): where the anchor is, and how large
        sine = sine_encoding(anchors[..., [1, 0, 2, 3]], width // 2, self.config.anchor_temperature,
                             self.config.position_frequency)                         # [B, Q, 2D]
        query_position = self.anchor_mlp(sine)                                       # [B, Q, D]
        # query_sine = PE(cy, cx), to be compared with PE(y, x) of every image token. After the first layer,
        # the content decides which frequencies count.
        query_sine = sine[..., :width]                                               # [B, Q, D]
        if not is_first:
            query_sine = query_sine * self.position_scale(content)
        # Modulated attention: score = PE(x) . PE(cx) * w_ref / w + PE(y) . PE(cy) * h_ref / h
        # The larger w, the flatter the score along x: a wide anchor looks over a wide area.
        reference_size = self.reference_size(content).float().sigmoid()              # [B, Q, 2]: w_ref, h_ref
        height_then_width = (reference_size / anchors[..., 2:]).flip(-1)             # as y comes before x
        return query_position, query_sine * height_then_width.repeat_interleave(width // 2, dim=-1)


# ---- 9. The model --------------------------------------------------------------------------------

class DNDETR(nn.Module):
    """images [B, 3, H, W] (float, normalised), padding_mask bool [B, H, W] (True = padding) and, in training,
    targets -> dict of predictions.

    targets: a dict for each image, {"labels": long [n] in 0..C-1, "boxes": float [n, 4], cxcywh in [0, 1]}
    for its n objects. n may be 0, and the tensors may stay on the CPU.
    Denoising runs if targets are given, the model is in training mode, and dn_groups > 0.       [DN]

    Returns pred_logits [B, N, C] and pred_boxes [B, N, 4] (cxcywh in [0, 1]) of the last layer, all_logits
    and all_boxes [L, B, N, *] of every layer. With num_patterns > 0, N is num_queries * num_patterns.
    With denoising, also dn_logits [L, B, P*M, C], dn_boxes [L, B, P*M, 4] and dn_slots.         [DN]

    Raises ValueError for images, masks or targets of a wrong shape or type, and for wrong values if they are
    on the CPU. Sec. 4; authors: DABDETR.
    """

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_dim
        self.backbone, channels = build_backbone(config)
        self.input_projection = nn.Conv2d(channels, width, kernel_size=1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.class_head = nn.Linear(width, config.num_classes)
        self.box_head = MLP(width, width, width, 4)
        self.anchor_logits = nn.Embedding(config.num_queries, 4)
        self.label_embedding = nn.Embedding(config.num_classes + 1, width - 1)                    # [DN]
        if config.num_patterns:
            self.patterns = nn.Embedding(config.num_patterns, width)

        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_head.bias, -math.log(99))   # every class starts at probability 0.01
        nn.init.zeros_(self.box_head.layers[-1].weight)          # every prediction starts at its anchor
        nn.init.zeros_(self.box_head.layers[-1].bias)

    def forward(self, images, padding_mask=None, targets=None):
        check_images(images, padding_mask)
        # 1. The image becomes S tokens with positions, both [B, S, D].
        memory, memory_position, token_padding = self.encode_image(images, padding_mask)
        # 2. The learned queries, the same for every image: content [B, N, D] and anchor logits [B, N, 4].
        content, anchor_logits = self.matching_queries(len(images))
        blocked = None                                           # every query may attend to every other
        # 3. In training, the noised copies come first: Q = P*M + N.                              [DN]
        slots = None                                                                              # [DN]
        if self.training and targets is not None and self.config.dn_groups:                       # [DN]
            check_targets(targets, len(images), self.config.num_classes)                          # [DN]
            slots, dn_content, dn_anchor_logits = denoising_queries(                              # [DN]
                targets, self.label_embedding, self.config)                  # [B, P*M, *]        # [DN]
            blocked = self.query_mask(slots, num_queries=content.shape[1])   # [B, 1, Q, Q]       # [DN]
            content = torch.cat([dn_content, content], dim=1)                # [B, Q, D]          # [DN]
            anchor_logits = torch.cat([dn_anchor_logits, anchor_logits], dim=1)  # [B, Q, 4]      # [DN]
        # 4. Every decoder layer reads the image and refines the anchors: [L, B, Q, D] and [L, B, Q, 4].
        hidden, anchors = self.decoder(content, anchor_logits, memory, memory_position, blocked,
                                       token_padding, self.box_head)
        # 5. All layers share the heads: class logits, and box = sigmoid(inverse_sigmoid(anchor) + delta).
        logits = self.class_head(hidden).float()                                     # [L, B, Q, C]
        boxes = (self.box_head(hidden).float() + inverse_sigmoid(anchors)).sigmoid()     # [L, B, Q, 4]
        outputs = {}
        if slots is not None:                                                                     # [DN]
            num_denoising = slots.is_real.shape[1]                           # P*M                # [DN]
            outputs["dn_slots"] = slots                                                           # [DN]
            outputs["dn_logits"], logits = logits.tensor_split([num_denoising], dim=2)            # [DN]
            outputs["dn_boxes"], boxes = boxes.tensor_split([num_denoising], dim=2)               # [DN]
        return outputs | {"pred_logits": logits[-1], "pred_boxes": boxes[-1],
                          "all_logits": logits, "all_boxes": boxes}

    query_mask = staticmethod(query_mask)    # an attribute, so that an experiment can replace it # [DN]

    def encode_image(self, images, padding_mask):
        """-> tokens [B, S, D], their positions [B, S, D], and token_padding bool [B, S] or None."""
        features = self.input_projection(self.backbone(images))                      # [B, D, h, w]
        # Nearest neighbour, the default: a cell is padding if the pixel at its top left is. interpolate wants
        # [batch, channels, h, w]; [None] makes our batch the channels.
        padding = torch.zeros_like(images[:, 0]) if padding_mask is None else padding_mask    # [B, H, W]
        cell_padding = F.interpolate(padding[None].float(), features.shape[-2:])[0].bool()    # [B, h, w]
        coordinates = pixel_coordinates(cell_padding, self.config.cell_centers)      # [B, h, w, 2]
        positions = sine_encoding(coordinates, self.config.hidden_dim // 2, self.config.image_temperature,
                                  self.config.position_frequency).flatten(1, 2)      # [B, S, D]
        tokens = features.flatten(2).transpose(1, 2)                                 # [B, S, D]
        # No mask without padding: attention is faster then.
        token_padding = None if padding_mask is None else cell_padding.flatten(1)    # [B, S]
        return self.encoder(tokens, positions, token_padding), positions, token_padding

    def matching_queries(self, batch_size):
        """The learned queries: content [B, N, D] and anchor logits [B, N, 4]."""
        anchor_logits = self.anchor_logits.weight
        content = anchor_logits.new_zeros(self.config.hidden_dim)                    # [D], DAB-DETR's
        # Replaced by the last row of the label embedding, "unknown", and the indicator 0.       [DN]
        content = F.pad(self.label_embedding.weight[-1], (0, 1), value=0.0)                       # [DN]
        content = content.expand(self.config.num_queries, -1)
        if self.config.num_patterns:
            # All anchors with the first pattern, then all with the second one, ...
            content = (content + self.patterns.weight[:, None]).flatten(0, 1)
            anchor_logits = anchor_logits.repeat(self.config.num_patterns, 1)
        # [N, D] and [N, 4], for every image
        return content.expand(batch_size, -1, -1), anchor_logits.expand(batch_size, -1, -1)

    @classmethod
    def from_official(cls, checkpoint, **overrides):
        """A model with the authors' released weights: see load_official (section 14)."""
        return load_official(cls, checkpoint, overrides)


# ---- 10. Matching: which query is responsible for which object -----------------------------------

def to_device(tensor, device):
    """Move a tensor without waiting for the GPU. Only for CUDA: elsewhere, `non_blocking` copies may be read
    before they are complete (MPS, pytorch issue 139550)."""
    return tensor.to(device, non_blocking=device is not None and torch.device(device).type == "cuda")


def flatten_targets(targets, device):
    """-> labels [K] and boxes [K, 4] of all objects of the batch, image after image, on `device`."""
    labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
    return to_device(labels, device), to_device(boxes, device)


def generalized_iou(boxes, others, eps=1e-6):
    """Generalised IoU, in (-1, 1], of cxcywh boxes [..., 4] and [..., 4], with broadcasting -> [...].

    GIoU = I / U - (H - U) / H, with intersection I, union U, and H the area of the smallest box around both,
    the hull. The authors have an eps of 1e-6; with torchvision's 1e-7, boxes of a few pixels differ.
    """
    ax0, ay0, ax1, ay1 = box_convert(boxes, "cxcywh", "xyxy").unbind(-1)
    bx0, by0, bx1, by1 = box_convert(others, "cxcywh", "xyxy").unbind(-1)
    intersection = ((torch.min(ax1, bx1) - torch.max(ax0, bx0)).clamp(min=0)
                    * (torch.min(ay1, by1) - torch.max(ay0, by0)).clamp(min=0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    hull = (torch.max(ax1, bx1) - torch.min(ax0, bx0)) * (torch.max(ay1, by1) - torch.min(ay0, by0))
    return intersection / (union + eps) - (hull - union) / (hull + eps)


class Pairs(NamedTuple):
    """Predictions and the objects they are responsible for, R pairs in each of L layers: in layer l, query
    `query[l, r]` of image `image[l, r]` is paired with object `source[l, r]`, counted through the batch. The
    first dimension is 1 if all layers have the same pairs."""
    image: Tensor     # [L, R] long
    query: Tensor     # [L, R] long
    source: Tensor    # [L, R] long


@torch.no_grad()
def match(logits, boxes, targets, config):
    """Hungarian matching of logits [L, B, N, C] and boxes [L, B, N, 4] with the targets -> Pairs.

    An image with n objects gets min(N, n) pairs. Raises FloatingPointError if a cost is not finite.
    DETR, Sec. 3.1; authors: HungarianMatcher.
    """
    # 1. The cost of every pair, for all layers and images at once, so that the GPU waits for the CPU once in
    #    a training step. Objects are padded to the fullest image: labels [B, M], boxes [B, M, 4].
    labels, true_boxes = (
        nn.utils.rnn.pad_sequence([to_device(target[name], boxes.device) for target in targets],
                                  batch_first=True) for name in ("labels", "boxes"))
    cost = matching_cost(logits, boxes, labels, true_boxes, config).cpu().numpy()    # [L, B, N, M]
    if not np.isfinite(cost).all():
        raise FloatingPointError("the matching cost is not finite: predictions are NaN or infinite. Look for "
                                 "NaN in images or boxes, a fully padded image, or a learning rate too high")
    # 2. In each layer and image, the cheapest way to give every object a query of its own. The padding is
    #    cut off; `first_object` turns an image's object numbers into those of the batch.
    counts = [len(target["labels"]) for target in targets]
    first_object = [0, *accumulate(counts)]
    layers = []
    for layer_cost in cost:                                                          # [B, N, M]
        pairs = []
        for image, count in enumerate(counts):
            query, rank = linear_sum_assignment(layer_cost[image, :, :count])
            pairs.append([np.full_like(query, image), query, rank + first_object[image]])
        layers.append(np.concatenate(pairs, axis=1))                                 # [3, R]
    return Pairs(*to_device(torch.from_numpy(np.stack(layers, axis=1)), boxes.device))


def matching_cost(logits, boxes, labels, true_boxes, config):
    """The cost of pairing query n with object m, [L, B, N, M]; labels [B, M], true_boxes [B, M, 4]."""
    # Focal cost, p being the predicted probability of the object's class: by how much the focal loss changes
    # if the answer should be yes instead of no,
    #     -alpha (1 - p)^gamma log(p)  -  (-(1 - alpha) p^gamma log(1 - p))
    labels = labels[None, :, None].expand(*logits.shape[:3], -1)                     # [L, B, N, M]
    probability = logits.gather(-1, labels).sigmoid()
    alpha, gamma = config.focal_alpha, config.focal_gamma
    as_object = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    as_background = (1 - alpha) * probability ** gamma * -(1 - probability + 1e-8).log()
    boxes, true_boxes = boxes[:, :, :, None], true_boxes[None, :, None]     # [L, B, N, 1, 4], [1, B, 1, M, 4]
    return (config.cost_class * (as_object - as_background)
            + config.cost_box * (boxes - true_boxes).abs().sum(-1)
            - config.cost_giou * generalized_iou(boxes, true_boxes))


# ---- 11. Loss ------------------------------------------------------------------------------------

class DNDETRCriterion(nn.Module):
    """Outputs and targets of DNDETR -> dict of scalars. "loss" is the weighted total to back-propagate. The
    unweighted terms are "loss_ce", "loss_bbox" and "loss_giou" of the last layer, and "loss_ce_0" etc. of the
    layers before it.
    With "dn_" before them, the same names are the terms of denoising (authors: compute_dn_loss).  [DN]

    Raises ValueError for impossible targets, FloatingPointError for predictions that are not finite.
    Authors: SetCriterion.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weights = dict(loss_ce=config.loss_class, loss_bbox=config.loss_box, loss_giou=config.loss_giou)

    def forward(self, outputs, targets):
        logits, boxes = outputs["all_logits"], outputs["all_boxes"]
        check_targets(targets, logits.shape[1], self.config.num_classes)
        truth = flatten_targets(targets, logits.device)                              # [K], [K, 4]
        pairs = match(logits, boxes, targets, self.config)
        terms = self.set_loss(logits, boxes, pairs, truth, len(truth[0]))            # {name: [L]}
        slots = outputs.get("dn_slots")                                                           # [DN]
        if slots is not None:                                                                     # [DN]
            # The same loss, but nothing has to be matched: the slots know the object of a copy.   [DN]
            pairs = Pairs(slots.image[None], slots.slot[None], slots.source[None])                # [DN]
            # An empty slot has nothing to learn, not even to say "no object". With this logit it  [DN]
            # says so already: its loss is 0, and so is its gradient.                              [DN]
            dn_logits = outputs["dn_logits"].masked_fill(~slots.is_real[..., None], -1e4)         # [DN]
            # Divided by the number of copies, so that more groups do not mean a larger loss.      [DN]
            dn_terms = self.set_loss(dn_logits, outputs["dn_boxes"], pairs, truth, len(slots.source))  # [DN]
            terms |= {f"dn_{name}": term for name, term in dn_terms.items()}                      # [DN]

        losses = {"loss": 0}
        for name, term in terms.items():
            # loss = sum over the layers of 1 * focal loss + 5 * L1 + 2 * (1 - GIoU), with default weights
            losses["loss"] += self.weights[name.removeprefix("dn_")] * term.sum()
            for layer, value in enumerate(term):
                losses[name if layer == len(term) - 1 else f"{name}_{layer}"] = value
        return losses

    def set_loss(self, logits, boxes, pairs, truth, num_objects):
        """logits [L, B, Q, C] and boxes [L, B, Q, 4] (here Q is N or P*M), compared with truth (labels
        [K] and boxes [K, 4]) as `pairs` say -> {"loss_ce": [L], "loss_bbox": [L], "loss_giou": [L]}."""
        labels, true_boxes = truth
        # 1. Classes, of every query. A paired one should say yes to the class of its object, and all else
        #    should be no:  focal loss = -alpha (1 - p)^gamma log(p)          for yes,
        #                                -(1 - alpha) p^gamma log(1 - p)      for no.
        layer = torch.arange(len(logits), device=logits.device)[:, None]    # [L, 1], beside pairs [L, R]
        target_classes = torch.zeros_like(logits)                                    # [L, B, Q, C]
        target_classes[layer, pairs.image, pairs.query, labels[pairs.source]] = 1
        focal = sigmoid_focal_loss(logits, target_classes, self.config.focal_alpha, self.config.focal_gamma)
        # 2. Boxes, of paired queries only.
        boxes, true_boxes = boxes[layer, pairs.image, pairs.query], true_boxes[pairs.source]     # [L, R, 4]
        sums = {"loss_ce": focal.sum((1, 2, 3)),
                "loss_bbox": (boxes - true_boxes).abs().sum((1, 2)),
                "loss_giou": (1 - generalized_iou(boxes, true_boxes)).sum(1)}
        # 3. Divided by the number of objects or copies, not of queries, most of which find nothing.
        normalizer = mean_over_processes(num_objects, logits.device).clamp(min=1)
        return {name: total / normalizer for name, total in sums.items()}


def mean_over_processes(number, device):
    """The mean of `number` over all training processes. As gradients are averaged over processes too, the
    loss does not depend on how a batch is split among them (D4)."""
    number = torch.full((), float(number), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(number)
        number /= torch.distributed.get_world_size()
    return number


# ---- 12. Predictions, and the instability of matching --------------------------------------------

@torch.no_grad()
def postprocess(outputs, image_sizes, num_select=300):
    """One dict per image, best first: "scores" [k], "labels" [k], "boxes" [k, 4] as xyxy in pixels.

    `image_sizes` holds the (height, width) of each image without its padding; k is min(`num_select`, N*C).
    As classes are independent (focal loss), a query may appear with several of them. There is no non-maximum
    suppression: self-attention lets queries avoid duplicates. Raises ValueError unless there is a size for
    every image. Authors: PostProcess.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    sizes = torch.as_tensor(image_sizes, device=boxes.device)
    if sizes.shape != (len(logits), 2):
        raise ValueError(f"image_sizes must hold a (height, width) for each of the {len(logits)} images, "
                         f"its shape is {list(sizes.shape)}")
    scores, index = logits.sigmoid().flatten(1).topk(min(num_select, logits[0].numel()))     # [B, k]
    query, labels = index // logits.shape[2], index % logits.shape[2]
    boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query[..., None].expand(-1, -1, 4))
    boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]                              # times w, h, w, h
    return [dict(scores=score, labels=label, boxes=box) for score, label, box in zip(scores, labels, boxes)]


def matched_objects(outputs, targets, config):
    """The object that each query of the last layer is matched with, counted within its image, or -1: long
    [B, N], on the CPU. This is V of Eq. 1."""
    pairs = match(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets, config)
    image, query, source = (index[0].cpu() for index in pairs)
    rank = torch.cat([torch.arange(len(target["labels"])) for target in targets])    # [K], within the image
    matched = torch.full(outputs["pred_logits"].shape[:2], -1)
    matched[image, query] = rank[source]
    return matched


def matching_instability(previous, current):
    """IS of one image (Sec. 3.1): the number of queries whose match changed between two epochs.

    IS = sum over n of 1(V_n of this epoch != V_n of the epoch before)          (Eq. 2)
    `previous` and `current` [N] are rows of matched_objects. An object that moves to an unmatched query
    counts twice, so for n objects IS is between 0 and 2 n. Raises ValueError if the lengths differ.
    """
    previous, current = torch.as_tensor(previous), torch.as_tensor(current)
    if previous.shape != current.shape:
        raise ValueError(f"IS compares the same queries, not {len(previous)} and {len(current)} of them")
    return int((previous != current).sum())


# ---- 13. Checks of what people most often get wrong ----------------------------------------------
# The method ends here. What follows is housekeeping.

def check_images(images, padding_mask):
    """Raise ValueError unless images [B, 3, H, W] and padding_mask [B, H, W] are as DNDETR wants them."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError("images must be float [B, 3, H, W], normalised as the backbone expects, "
                         f"not {images.dtype} {list(images.shape)}")
    if padding_mask is None:
        return
    if padding_mask.shape != images[:, 0].shape or padding_mask.dtype != torch.bool:
        raise ValueError(f"padding_mask must be bool {list(images[:, 0].shape)} for these images, "
                         f"not {padding_mask.dtype} {list(padding_mask.shape)}")
    if padding_mask.device.type == "cpu" and padding_mask.flatten(1).all(1).any():
        raise ValueError("padding_mask covers a whole image. True means padding: is the mask inverted?")


def check_targets(targets, num_images, num_classes):
    """Raise ValueError for ground truth that would train nonsense: see DNDETR for the format.

    Values are read only where they are on the CPU, because reading them from a GPU would stall it.
    """
    if len(targets) != num_images:
        raise ValueError(f"{len(targets)} targets for a batch of {num_images} images")
    for index, (labels, boxes) in enumerate((target["labels"], target["boxes"]) for target in targets):
        is_float = boxes.is_floating_point()
        if labels.dtype != torch.long or labels.ndim != 1 or not is_float or boxes.shape != (len(labels), 4):
            raise ValueError(f"targets[{index}] must have labels, long [n], and boxes, float [n, 4], not "
                             f"{labels.dtype} {list(labels.shape)} and {boxes.dtype} {list(boxes.shape)}")
    if any(target[name].device.type != "cpu" for target in targets for name in ("labels", "boxes")):
        return
    labels, boxes = flatten_targets(targets, "cpu")
    corners, slack = box_convert(boxes, "cxcywh", "xyxy"), 1e-3                      # annotations are rounded
    sticks_out = ((corners < -slack) | (corners > 1 + slack)).any(1)
    # In (x0, y0, x1, y1) the last two numbers are the larger ones. A box that sticks out of its image is
    # harmless, unless all boxes of the batch look like this.
    looks_xyxy = (boxes[:, 2:] > boxes[:, :2]).all()
    for is_wrong, rule in (
            ((labels < 0) | (labels >= num_classes), f"labels are 0 .. {num_classes - 1}, num_classes - 1"),
            (~boxes.isfinite().all(1), "boxes must be finite"),
            (((boxes < -slack) | (boxes > 1 + slack)).any(1), "boxes are in [0, 1]: are these pixels?"),
            ((boxes[:, 2:] <= 0).any(1), "boxes must have an area: drop such objects"),
            (sticks_out & looks_xyxy, "boxes are (cx, cy, w, h): is this (x0, y0, x1, y1)?")):
        if is_wrong.any():
            first = int(is_wrong.nonzero()[0])
            image = [index for index, target in enumerate(targets) for _ in target["labels"]][first]
            raise ValueError(f"targets[{image}] has an object with label {labels[first]} and box "
                             f"{[round(number, 4) for number in boxes[first].tolist()]}, but {rule}")


# ---- 14. The authors' released weights -----------------------------------------------------------

OFFICIAL_NAMES = {  # replaced in this order: a part of their names, and what we call it
    "module.": "", "transformer.": "", "backbone.0.body.": "backbone.", "input_proj.": "input_projection.",
    "label_enc.": "label_embedding.",                                                             # [DN]
    "class_embed": "class_head", "decoder.bbox_embed": "box_head", "bbox_embed": "box_head",
    "refpoint_embed": "anchor_logits", "ref_point_head": "anchor_mlp", "ref_anchor_head": "reference_size",
    "query_scale": "position_scale", ".sa_": ".self_", ".ca_": ".cross_", "v_proj": "value",
    "qcontent_proj": "query_content", "qpos_proj": "query_position", "qpos_sine_proj": "query_sine",
    "kcontent_proj": "key_content", "kpos_proj": "key_position"}
OFFICIAL_ARGS = (  # one of their options, and the field that holds it here
    ("scalar", "dn_groups"), ("label_noise_scale", "label_noise"),                                # [DN]
    ("box_noise_scale", "center_noise"), ("box_noise_scale", "size_noise"),                       # [DN]
    ("nheads", "num_heads"), ("dropout", "dropout"), ("dilation", "dilation"))
RESNETS = {20: "resnet18", 36: "resnet34", 53: "resnet50", 104: "resnet101", 155: "resnet152"}  # convolutions


def read_checkpoint(path):
    """The dict in a checkpoint file, read without running code from it. Raises ValueError if it can't be."""
    torch.serialization.add_safe_globals([argparse.Namespace])     # the authors' files hold their options
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{path} can't be read as a checkpoint; absent or truncated? {error}") from error


def load_official(model_class, checkpoint, overrides):
    """A model of `model_class`, on the CPU, with the authors' weights. Loading is strict.

    `checkpoint`: the path of a file as they release it, its dict, or a bare state dict. Sizes are read off
    the weights. The rest comes from `overrides` (fields of DNDETRConfig), else from the options in the file,
    else it is as in the paper. Raises ValueError for a file that can't be read, one that is not theirs, and
    tensors that do not fit, which are listed.
    """
    if not isinstance(checkpoint, dict):
        checkpoint = read_checkpoint(checkpoint)
    args = vars(checkpoint["args"]) if "args" in checkpoint else {}
    state = {}          # their box head is stored under two names, which become one
    for name, tensor in checkpoint.get("model", checkpoint).items():
        for theirs, ours in OFFICIAL_NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    try:
        model = model_class(DNDETRConfig(**(official_config(state, args) | overrides)))
        model.load_state_dict(state)
    except KeyError as error:
        raise ValueError(f"this is not a DN-DETR checkpoint of the authors: it lacks {error}") from error
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the model: {error}") from error
    return model


def official_config(state, args):
    """What the weights `state`, under our names, and their options `args` say about the configuration."""
    def count_layers(part):
        return len({name.split(".")[2] for name in state if name.startswith(f"{part}.layers.")})

    convolutions = sum("conv" in name or "downsample.0" in name for name in state if "backbone." in name)
    has_slopes = "decoder.layers.0.activation.weight" in state
    return {ours: args[theirs] for theirs, ours in OFFICIAL_ARGS if theirs in args} | {
        "num_classes": len(state["class_head.weight"]), "num_queries": len(state["anchor_logits.weight"]),
        "hidden_dim": len(state["decoder.norm.bias"]), "num_patterns": len(state.get("patterns.weight", ())),
        "dim_feedforward": len(state["decoder.layers.0.linear1.weight"]),
        "num_encoder_layers": count_layers("encoder"), "num_decoder_layers": count_layers("decoder"),
        "backbone": RESNETS.get(convolutions, f"a network of {convolutions} convolutions"),
        "activation": "prelu" if has_slopes else args.get("transformer_activation", "relu")}


# ---- 15. python dn_detr.py: a tour in a few seconds ----------------------------------------------

def tour():
    """Print noised boxes, the mask, the shapes of the outputs, and the terms of the loss."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.7, 0.6, 0.4, 0.5]])
    print("1. An object (cx cy w h) and three noised copies of it:")
    for name in ("truth", "copy", "copy", "copy"):
        box = boxes[0] if name == "truth" else noise_boxes(boxes, 0.4, 0.4)[0]
        print(f"    {name:5} " + " ".join(f"{number:.3f}" for number in box))
    print("2. The attention mask, 2 groups of 2 copies, then 6 matching queries (x = blocked):")
    for row in dn_attention_mask(2, 2, 6):
        print("    " + " ".join("x" if is_blocked else "." for is_blocked in row))
    config = DNDETRConfig(num_classes=3, num_queries=6, hidden_dim=32, num_heads=4, num_encoder_layers=1,
                          num_decoder_layers=2, dim_feedforward=64, backbone="small", dn_groups=2)
    targets = [{"labels": torch.tensor([0]), "boxes": boxes[:1]},
               {"labels": torch.tensor([1, 2]), "boxes": boxes}]
    outputs = DNDETR(config)(torch.randn(2, 3, 64, 64), targets=targets)
    print("3. The outputs in training (at inference, there are none that begin with dn):")
    for name, output in outputs.items():
        print(f"    {name:11} {list(output.shape) if isinstance(output, Tensor) else type(output).__name__}")
    losses = DNDETRCriterion(config)(outputs, targets)
    print(f"4. The loss is {losses['loss']:.2f}; its terms in the last layer, matching and denoising:")
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        print(f"    {name:9} {losses[name]:6.2f} {losses[f'dn_{name}']:6.2f}")


if __name__ == "__main__":
    tour()
