"""DN-DETR in one file: "Accelerate DETR Training by Introducing Query DeNoising" (Li et al., CVPR 2022).
"Sec.", "Eq." and "Table" are those of the CVPR paper. The extended version, which came later to arXiv
(2203.01305), numbers some of them differently. "Section" is one of this file.

The problem. DETR turns N learned queries into N predictions. At every training step, bipartite (Hungarian)
matching decides anew which query is responsible for which object. Early in training the assignment keeps
changing: a query is trained towards one object now, and towards another one soon after (Sec. 3.1).

The idea. In training, the decoder gets a second kind of query: ground-truth boxes and labels with noise
added. They are called denoising queries, the learned ones matching queries. A denoising query has to restore
the box and the label of the object that it was made from. As this object is known, there is no matching.

Why it helps. First, no matching can change which object a denoising query must restore, so the decoder always
has something consistent to learn. Second, a noised box starts near its object, so the decoder learns early to
refine a box from what it sees nearby (Sec. 3.2). The matching queries, alone at inference, pass through the
same decoder, and so profit from what it has learned.

A query of this decoder (DAB-DETR's) has two parts: an *anchor*, the box where it looks, and a *content*
vector, what it has found there. A noised box becomes an anchor, a noised label becomes content. Every decoder
layer corrects the anchors a little. One training step:

    objects       = ground-truth labels and boxes                    K in the batch
    copies        = P noised copies of each object, one per group                     section 3
    queries       = slots with the copies, then matching queries     Q = P*M + N      section 4
    mask          = matching queries may not attend to the copies, which hold         section 5
                    the answer, and no group may attend to another group
    logits, boxes = decoder(queries, image, mask)                                     sections 6-10
    pairs         = Hungarian(predictions of the matching queries, objects)           section 11
    dn_pairs      = (copy of object k, object k), known without matching              section 4
    loss          = set_loss(pairs) + set_loss(dn_pairs)             the same loss    section 12

Shapes:

    B images         K objects in the batch        M the most objects in one image of the batch
    P groups         N matching queries            Q = P*M + N decoder queries
    D hidden width   S = h*w image tokens          R matched pairs (query, object) in a layer
    C classes        L decoder layers              n objects of one image
    boxes are (cx, cy, w, h) in [0, 1], relative to their image; in masks, True means blocked

Apart from D1 to D4, outputs, losses and the norm of the gradient agree with the authors' code
(github.com/IDEA-Research/DN-DETR, dn_dab_detr). Checkpoints in their format load, which was tested with the
names and shapes of their R50 model.

    D1 A slot without an object (in an image with fewer than M objects) is masked out. In the authors' code
       its group can attend to it, so denoising outputs, not matching ones, depend on the rest of the batch.
    D2 Center shifting and box scaling have a scale each, as in the paper. The authors' code has one for both.
    D3 Added for small models and images, off by default: dn_max_queries, position_frequency, cell_centers,
       backbone="small", frozen_norm=False.
    D4 The normalizer of the denoising loss is averaged over processes, like that of the matching loss.
    D5 Left out: segmentation, deformable attention, Swin backbones.

Sections 3 to 5 are the paper's contribution. Elsewhere, [DN] marks what it adds to DAB-DETR. With 0 groups,
this file is DAB-DETR with one learned vector as the content of all its queries.
"""
import argparse
import dataclasses
import math
from collections import OrderedDict
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, box_convert, sigmoid_focal_loss

# ---- 1. Helpers ----------------------------------------------------------------------------------

def require(is_met, message):
    """Raise ValueError with this message, unless the condition is met."""
    if not is_met:
        raise ValueError(message)


def to_device(tensor, device):
    """Move a tensor without waiting for the GPU. Only for CUDA: elsewhere, `non_blocking` copies may be read
    before they are complete (MPS, pytorch issue 139550)."""
    return tensor.to(device, non_blocking=device is not None and torch.device(device).type == "cuda")


def flatten_targets(targets, device):
    """The objects of all images in a row: labels [K], and boxes [K, 4] in float32.

    `targets` has a dict for each image, with labels (long [n]) and boxes (float [n, 4]) of its n objects.
    """
    labels = torch.cat([target["labels"] for target in targets])
    boxes = torch.cat([target["boxes"] for target in targets]).float()
    return to_device(labels, device), to_device(boxes, device)


def inverse_sigmoid(x, eps=1e-3):
    """The logit of x in [0, 1], within +-6.91.

    Anchors are stored and refined as logits, box <- sigmoid(inverse_sigmoid(box) + delta), so that every box
    stays in [0, 1]. eps is part of the trained model: the authors' weights expect 1e-3.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


# ---- 2. Configuration ----------------------------------------------------------------------------

ACTIVATIONS = {"prelu": nn.PReLU, "relu": nn.ReLU, "gelu": nn.GELU}
BACKBONES = ("small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclasses.dataclass(frozen=True)
class DNDETRConfig:
    """All settings. Defaults: the paper's R50 on COCO. A value out of range raises a ValueError."""
    # Denoising [DN]
    dn_groups: int = 5              # P, Sec. 4.4, Table 5; 0 turns denoising off
    label_noise: float = 0.2        # gamma, Sec. 4.3: probability that a label is flipped
    center_noise: float = 0.4       # lambda_1: maximum center shift, a fraction of half the width and height
    size_noise: float = 0.4         # lambda_2: maximum change of width and height, a fraction of each
    dn_max_queries: int = 0         # if > 0, lowers P until the P*M slots fit, but not below 1
    dn_mask: bool = True            # ablation only, Table 4: False blocks only empty slots
    # What is detected. There is no class for "no object": each class has a sigmoid of its own.
    num_classes: int = 91           # C; labels run from 0 to C-1 (COCO's category ids end at 90)
    num_queries: int = 300          # N; with patterns, N = num_queries * num_patterns
    # Transformer
    hidden_dim: int = 256           # D
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6     # L
    dim_feedforward: int = 2048
    dropout: float = 0.0
    activation: str = "prelu"       # "prelu" (one learned slope per layer), "relu" or "gelu"
    num_patterns: int = 0           # learned vectors added to contents; an anchor is used once with each
    # Backbone
    backbone: str = "resnet50"      # a torchvision ResNet, or "small", which learns from scratch
    dilation: bool = False          # DC5: the last stage keeps its resolution (stride 16, not 32)
    frozen_norm: bool = True        # ResNets: fixed batch norm, for pretrained weights
    small_widths: tuple = (32, 64, 128)  # "small": output channels of each stage, which halves the resolution
    # Sine encodings of positions. DAB-DETR's paper has a temperature of 20 for both; the authors' code has
    # 10000 for anchors, and their weights expect it.
    image_temperature: float = 20.0
    anchor_temperature: float = 10000.0
    position_frequency: float = 1.0      # cycles of the fastest sine across the image (paper: 1)
    cell_centers: bool = False           # a feature cell's coordinate is its center, not its far corner
    # Matching costs, and weights of the loss
    cost_class: float = 2.0
    cost_box: float = 5.0
    cost_giou: float = 2.0
    loss_class: float = 1.0
    loss_box: float = 5.0
    loss_giou: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self):
        def check(name, is_met, rule):
            require(is_met, f"{name} is {getattr(self, name)!r}; it must be {rule}")

        for name in ("num_classes", "num_queries", "hidden_dim", "num_heads", "num_decoder_layers"):
            check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_encoder_layers", "num_patterns", "dn_groups", "dn_max_queries"):
            check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("label_noise", "center_noise", "size_noise"):
            check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        check("hidden_dim", self.hidden_dim % math.lcm(4, self.num_heads) == 0,
              f"divisible by num_heads ({self.num_heads}), and by 4 (sine and cosine of x and y)")
        check("activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        check("backbone", self.backbone in BACKBONES, f"one of {', '.join(BACKBONES)}")


# ---- 3. Noise (Sec. 4.3) -------------------------------------------------------------------------

def noise_labels(labels, num_classes, label_noise, generator=None):
    """Label flipping: with probability gamma = `label_noise`, replace a label by a random class.

    labels [n] long, from 0 to C-1 -> [n]. The random class is uniform over all C classes, so it may be the
    same one again: labels change at the rate gamma * (1 - 1/C). Raises ValueError if gamma is not in [0, 1].
    """
    require(0 <= label_noise <= 1, f"label_noise is {label_noise}; it must be in [0, 1]")
    is_flipped = torch.rand(labels.shape, generator=generator, device=labels.device) < label_noise
    random_labels = torch.randint(num_classes, labels.shape, generator=generator, device=labels.device)
    return torch.where(is_flipped, random_labels, labels)


def noise_boxes(boxes, center_noise, size_noise, generator=None):
    """Center shifting and box scaling: boxes [n, 4] (float, cxcywh in [0, 1]) -> [n, 4].

    With lambda_1 = `center_noise` < 1 the noised center stays inside the true box, so the decoder can tell
    which object is meant. Each of the four numbers is clamped to [0, 1]; a corner may still leave the image.
    Raises ValueError for integers, and for a scale that is not in [0, 1].
    """
    for name, scale in (("center_noise", center_noise), ("size_noise", size_noise)):
        require(0 <= scale <= 1, f"{name} is {scale}; it must be in [0, 1]")
    require(boxes.is_floating_point(), f"boxes must be float, (cx, cy, w, h) in [0, 1], not {boxes.dtype}")
    uniform = torch.rand(boxes.shape, generator=generator, device=boxes.device, dtype=boxes.dtype) * 2 - 1
    centers, sizes = boxes.split(2, dim=-1)                                          # [n, 2] each
    # Center shifting:  |dx| <= lambda_1 w / 2  and  |dy| <= lambda_1 h / 2
    noised_centers = centers + uniform[:, :2] * center_noise * sizes / 2
    # Box scaling:  noised w in [(1 - lambda_2) w, (1 + lambda_2) w], and the same for h
    noised_sizes = sizes + uniform[:, 2:] * size_noise * sizes
    return torch.cat([noised_centers, noised_sizes], dim=-1).clamp(0, 1)


# ---- 4. Denoising queries, in groups (Sec. 4.4, 4.5) ---------------------------------------------

class DenoisingSlots(NamedTuple):
    """Copy i is query slot[i] of image image[i], made from object source[i]. Objects are numbered through the
    batch, image after image.

    Every image has P groups of M slots, as many as the most objects in one image. Two images that hold the
    objects 0 and 1, 2, 3, in P = 2 groups of M = 3 slots (- is an empty slot):

                        group 0    group 1
        first image     0  -  -    0  -  -
        second image    1  2  3    1  2  3
        slot            0  1  2    3  4  5
    """
    num_groups: int   # P
    group_size: int   # M
    image: Tensor     # [P*K] long, in the example   0 1 1 1  0 1 1 1
    slot: Tensor      # [P*K] long                   0 0 1 2  3 3 4 5
    source: Tensor    # [P*K] long                   0 1 2 3  0 1 2 3
    is_real: Tensor   # [B, P*M] bool, False for an empty slot


def assign_slots(counts, num_groups, max_queries=0, device=None):
    """DenoisingSlots on `device` for images that hold `counts` objects (list of int, one per image).
    `max_queries` > 0 lowers the number of groups until P*M fits, but not below 1."""
    group_size = max(counts)                                                         # M
    if max_queries and group_size:
        num_groups = min(num_groups, max(1, max_queries // group_size))              # P
    # On the CPU: nonzero on a GPU would force a synchronization.
    rank = torch.arange(group_size, device="cpu")                                    # [M]
    is_filled = rank < torch.tensor(counts, device="cpu")[:, None]                   # [B, M]
    group, image, rank = is_filled.expand(num_groups, -1, -1).nonzero(as_tuple=True)     # [P*K] each
    slot = group * group_size + rank
    source = torch.arange(sum(counts), device="cpu").repeat(num_groups)              # [P*K]
    tensors = image, slot, source, is_filled.repeat(1, num_groups)
    return DenoisingSlots(num_groups, group_size, *(to_device(tensor, device) for tensor in tensors))


def denoising_queries(targets, label_embedding, config):
    """The denoising queries of a batch: slots, content [B, P*M, D], anchor logits [B, P*M, 4].

    `targets` as in flatten_targets. `label_embedding`, an nn.Embedding, has C + 1 rows of D - 1 numbers: one
    for each class, and the last one, "unknown", for matching queries. Authors: prepare_for_dn.
    """
    # 1. All objects of the batch in a row, and slots for their copies.
    device = label_embedding.weight.device
    labels, boxes = flatten_targets(targets, device)                                 # [K], [K, 4]
    counts = [len(target["labels"]) for target in targets]
    slots = assign_slots(counts, config.dn_groups, config.dn_max_queries, device)
    # 2. Noise, drawn for every copy separately.
    noised_labels = noise_labels(labels[slots.source], config.num_classes, config.label_noise)   # [P*K]
    noised_boxes = noise_boxes(boxes[slots.source], config.center_noise, config.size_noise)      # [P*K, 4]
    # 3. The label becomes the content, and the box, as logits, the anchor. The last number of a content is
    #    the indicator: 1 in a denoising query, 0 in a matching query. It tells the shared decoder which task
    #    a query has (Sec. 4.5).
    content = F.pad(label_embedding(noised_labels), (0, 1), value=1.0)               # [P*K, D]
    anchor_logits = inverse_sigmoid(noised_boxes)                                    # [P*K, 4]
    # 4. Copy i moves to slot[i] of image[i]: [B, P*M, *]. Empty slots stay zero; query_mask blocks them.
    index, shape = (slots.image, slots.slot), slots.is_real.shape
    content = content.new_zeros(*shape, config.hidden_dim).index_put(index, content)
    anchor_logits = anchor_logits.new_zeros(*shape, 4).index_put(index, anchor_logits)
    return slots, content, anchor_logits


# ---- 5. Attention mask (Sec. 4.4, Eq. 7) ---------------------------------------------------------

def dn_attention_mask(num_groups, group_size, num_queries, device=None):
    """bool [Q, Q], Q = P*M + N, denoising queries first. True: this row may not attend to that column.

    P = 2 groups (0 and 1) of M = 2 slots, then N = 3 matching queries (m):

              0 0 1 1 m m m
            0 . . x x . . .       A denoising query may attend to its own group, where no other query is a
            0 . . x x . . .       copy of its object, and to matching queries, which hold no ground truth.
            1 x x . . . . .       It may not attend to another group: averaging several noised copies
            1 x x . . . . .       of an object would reveal the object.
            m x x x x . . .       Matching queries may not attend to denoising queries: they would copy
            m x x x x . . .       the answer, and fail at inference, when there is none to copy.
            m x x x x . . .

    The mask is needed in self-attention only, because queries meet nowhere else. It is Eq. 7, where
    a_ij = 1 means blocked, as in torch.nn.MultiheadAttention (scaled_dot_product_attention has it the
    other way round).
    """
    num_denoising = num_groups * group_size
    query = torch.arange(num_denoising + num_queries, device=device)                 # [Q]
    is_denoising = query < num_denoising
    # Denoising query q is in group q // M. Matching queries get P, which no group has. M may be 0.
    group = torch.where(is_denoising, query // max(group_size, 1), num_groups)
    # a_ij = 1 if j is a denoising query and i is not in the same group               (Eq. 7)
    return is_denoising[None, :] & (group[:, None] != group[None, :])                # [Q, Q]


def query_mask(slots, num_queries, dn_mask=True):
    """bool [B, 1, Q, Q] (1: for all heads): Eq. 7 (if `dn_mask`), and empty slots are blocked (D1)."""
    mask = dn_attention_mask(slots.num_groups, slots.group_size, num_queries, slots.is_real.device) & dn_mask
    is_empty = F.pad(~slots.is_real, (0, num_queries))                               # [B, Q]
    return (mask | is_empty[:, None, :])[:, None]                                    # [B, 1, Q, Q]


# ---- 6. Positions --------------------------------------------------------------------------------

def sine_encoding(coordinates, width, temperature, frequency=1.0):
    """Encode each coordinate in [0, 1] by `width` sines and cosines: [..., c] -> [..., c * width].

    For i = 0, 2, 4, ..., width - 2 the numbers i and i + 1 of the encoding of x are
        sin and cos of  2 pi f x / T^(i / width),   f = `frequency`, T = `temperature`.
    At equal temperatures, the dot product of two encodings is largest where the coordinates are equal. Those
    of image and anchors differ by default: the learned projections have to align them.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=coordinates.device) / width
    angle = coordinates[..., None] * (2 * math.pi * frequency) / temperature ** exponent  # [..., c, width/2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)                    # [..., c * width]


def cell_coordinates(cell_padding, cell_centers=False):
    """(y, x) in (0, 1] of every feature cell that is not padding: padding bool [B, h, w] -> [B, h, w, 2].

    Only such cells are counted, so that 1 is the border of the image. The authors place a cell at its
    bottom-right corner; `cell_centers` places it at its center.
    """
    valid = (~cell_padding).float()
    y, x = valid.cumsum(1), valid.cumsum(2)                                          # 1, 2, 3, ...
    shift = 0.5 if cell_centers else 0.0
    return torch.stack([(y - shift) / (y[:, -1:, :] + 1e-6), (x - shift) / (x[:, :, -1:] + 1e-6)], dim=-1)


# ---- 7. From image to tokens: backbone and encoder -----------------------------------------------

def build_backbone(config):
    """(module, channels): images [B, 3, H, W] -> features [B, channels, H / stride, W / stride]. Weights are
    random; pretrained ones are loaded by the caller."""
    if config.backbone == "small":
        # For every width two 3 x 3 convolutions, each with batch norm and ReLU. Three widths: stride 8.
        layers = [Conv2dNormActivation(inputs if stride == 2 else outputs, outputs, stride=stride)
                  for inputs, outputs in pairwise((3, *config.small_widths)) for stride in (2, 1)]
        return nn.Sequential(*layers), config.small_widths[-1]
    network = get_model(config.backbone, replace_stride_with_dilation=[False, False, config.dilation],
                        norm_layer=FrozenBatchNorm2d if config.frozen_norm else nn.BatchNorm2d)
    if config.frozen_norm:
        # Frozen batch norm needs pretrained weights. As in DETR, the stem and layer1 are not trained.
        network.conv1.requires_grad_(False)
        network.layer1.requires_grad_(False)
    *stages, _, _ = network.named_children()                  # all but the average pooling and the classifier
    return nn.Sequential(OrderedDict(stages)), network.fc.in_features


class MLP(nn.Module):
    """Linear layers with ReLU between them. MLP(D, D, 4) has two: [..., D] -> [..., 4]."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*ends) for ends in pairwise(widths))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class EncoderLayer(nn.Module):
    """Tokens exchange information (self-attention), and each updates its own features (feed-forward)."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_dim
        self.self_attn = nn.MultiheadAttention(width, config.num_heads, config.dropout, batch_first=True)
        self.linear1 = nn.Linear(width, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.activation, self.dropout = ACTIVATIONS[config.activation](), nn.Dropout(config.dropout)

    def forward(self, tokens, positions, token_padding):
        """tokens and positions [B, S, D], token_padding bool [B, S] or None -> tokens [B, S, D]."""
        # Positions steer attention, and are not read: they are in queries and keys, and not in values.
        query = key = tokens + positions
        attended, _ = self.self_attn(query, key, tokens, key_padding_mask=token_padding, need_weights=False)
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.linear2(self.dropout(self.activation(self.linear1(tokens))))
        return self.norm2(tokens + self.dropout(hidden))


class Encoder(nn.Module):
    """All encoder layers: [B, S, D] -> [B, S, D]. Before each of them, the position encoding is multiplied by
    a function of the token's current features."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        if self.layers:
            self.position_scale = MLP(config.hidden_dim, config.hidden_dim, config.hidden_dim)

    def forward(self, tokens, positions, token_padding):
        for layer in self.layers:
            tokens = layer(tokens, positions * self.position_scale(tokens), token_padding)
        return tokens


# ---- 8. Decoder layer ----------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention over inputs that are already projected, and split into heads."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, query, key, value, blocked=None):
        """query, key, value [B, heads, *, *], blocked bool [B, 1, Q, Q] or [B, 1, 1, S] -> [B, Q, D]."""
        allowed = None if blocked is None else ~blocked
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, allowed, dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Queries exchange information (self-attention), read the image (cross-attention), and each updates its
    own content (feed-forward). This is Conditional DETR's layer, as in DAB-DETR."""

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
        # In the first layer, where the content has seen nothing yet, positions are also added to it.
        self.cross_query_position = nn.Linear(width, width) if is_first else None
        self.linear1 = nn.Linear(width, config.dim_feedforward)
        self.activation = ACTIVATIONS[config.activation]()
        self.linear2 = nn.Linear(config.dim_feedforward, width)
        self.dropout = nn.Dropout(config.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, content, query_position, query_sine, memory, memory_position, blocked, token_padding):
        """content [B, Q, D]; query_position, query_sine [B, Q, D], encodings of the anchor (self-attention)
        and of its center (cross-attention); memory (the image tokens) and memory_position [B, S, D]; blocked
        bool [B, 1, Q, Q] or None; token_padding bool [B, S] or None -> content [B, Q, D]."""
        # Self-attention: query and key are content + position. `blocked` acts here and nowhere else.
        query = self.heads(self.self_query_content(content) + self.self_query_position(query_position))
        key = self.heads(self.self_key_content(content) + self.self_key_position(query_position))
        attended = self.self_attn(query, key, self.heads(self.self_value(content)), blocked)
        content = self.norm1(content + self.dropout(attended))

        # Cross-attention: content and position are concatenated, not added, so that in every head
        #     score = content . content + position . position = "looks right" + "is in the right place"
        query, key = self.cross_query_content(content), self.cross_key_content(memory)
        key_position = self.cross_key_position(memory_position)
        if self.cross_query_position is not None:
            query, key = query + self.cross_query_position(query_position), key + key_position
        query = torch.cat([self.heads(query), self.heads(self.cross_query_sine(query_sine))], dim=-1)
        key = torch.cat([self.heads(key), self.heads(key_position)], dim=-1)
        blocked_tokens = None if token_padding is None else token_padding[:, None, None]     # [B, 1, 1, S]
        attended = self.cross_attn(query, key, self.heads(self.cross_value(memory)), blocked_tokens)
        content = self.norm2(content + self.dropout(attended))

        hidden = self.linear2(self.dropout(self.activation(self.linear1(content))))
        return self.norm3(content + self.dropout(hidden))

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)                 # [B, heads, *, D/heads]


# ---- 9. Decoder: anchors, refined layer by layer (DAB-DETR) --------------------------------------

class Decoder(nn.Module):
    """All decoder layers. Each reads the image at its anchors, then corrects them for the next one.

    Corrections are added in float32 (`.float()`): under autocast, the linear layers return half precision,
    which is too coarse for the boxes themselves.
    """

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
        """content [B, Q, D], anchor_logits [B, Q, 4], box_head (an MLP, D -> 4), the rest as in DecoderLayer
        -> normalized outputs [L, B, Q, D], and the anchors that each layer started from, [L, B, Q, 4]."""
        anchors = anchor_logits.float().sigmoid()
        normed, anchors_per_layer = [], [anchors]
        for index, layer in enumerate(self.layers):
            query_position, query_sine = self.encode_anchors(anchors, content, is_first=index == 0)
            content = layer(content, query_position, query_sine, memory, memory_position,
                            blocked, token_padding)
            normed.append(self.norm(content))
            if index < len(self.layers) - 1:
                # box <- sigmoid(inverse_sigmoid(box) + delta). Here delta is computed from `content`, and in
                # DNDETR.forward from norm(content), as in the authors' code.
                refined = (box_head(content).float() + inverse_sigmoid(anchors)).sigmoid()
                # Without detach, this layer would also be trained to choose where later layers look.
                # `refined` keeps its gradient for the next layer's prediction, which is a correction of it.
                anchors = refined.detach()
                anchors_per_layer.append(refined)
        return torch.stack(normed), torch.stack(anchors_per_layer)

    def encode_anchors(self, anchors, content, is_first):
        """anchors [B, Q, 4] and content [B, Q, D] -> query_position for self-attention and query_sine for
        cross-attention, both [B, Q, D]. DAB-DETR's Sec. 4.2 to 4.4."""
        width = self.config.hidden_dim
        # query_position = MLP(PE(cy, cx, w, h)): where the anchor is, and how large
        cx, cy, w, h = anchors.unbind(-1)
        sine = sine_encoding(torch.stack([cy, cx, w, h], dim=-1), width // 2, self.config.anchor_temperature,
                             self.config.position_frequency)                         # [B, Q, 2D]
        query_position = self.anchor_mlp(sine)                                       # [B, Q, D]
        # query_sine = PE(cy, cx), to be compared with PE(y, x) of every image token. After the first layer,
        # the content rescales each frequency.
        query_sine = sine[..., :width]                                               # [B, Q, D]
        if not is_first:
            query_sine = query_sine * self.position_scale(content)
        # Modulated attention. Up to the learned projections,
        #     score = PE(x) . PE(cx) * w_ref / w + PE(y) . PE(cy) * h_ref / h
        # The larger w, the flatter the score along x: a wide anchor looks over a wide area.
        reference_size = self.reference_size(content).float().sigmoid()              # [B, Q, 2]: w_ref, h_ref
        height_then_width = (reference_size / anchors[..., 2:]).flip(-1)             # as y comes before x
        return query_position, query_sine * height_then_width.repeat_interleave(width // 2, dim=-1)


# ---- 10. The model -------------------------------------------------------------------------------

class DNDETR(nn.Module):
    """images [B, 3, H, W] (float, normalized), padding_mask bool [B, H, W] (True = padding) and, in training,
    targets -> dict of predictions.

    targets: a dict for each image, {"labels": long [n], 0 to C-1, "boxes": float [n, 4], cxcywh in [0, 1]}
    for its n objects. n may be 0, and the tensors may stay on the CPU.

    Returns pred_logits [B, N, C] and pred_boxes [B, N, 4] (cxcywh in [0, 1]) of the last layer, all_logits
    and all_boxes [L, B, N, *] of every layer. With denoising (targets given, training mode, dn_groups > 0)
    also dn_logits [L, B, P*M, C], dn_boxes [L, B, P*M, 4] and dn_slots. Raises ValueError for a wrong mask or
    wrong targets; their values are looked at only where they are on the CPU. Authors: DABDETR.
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
        self.label_embedding = nn.Embedding(config.num_classes + 1, width - 1)       # [DN]
        if config.num_patterns:
            self.patterns = nn.Embedding(config.num_patterns, width)

        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_head.bias, -math.log(99))   # every class starts at probability 0.01
        nn.init.zeros_(self.box_head.layers[-1].weight)          # every prediction starts at its anchor
        nn.init.zeros_(self.box_head.layers[-1].bias)

    def forward(self, images, padding_mask=None, targets=None):
        if padding_mask is not None:
            check_padding(padding_mask, images)
        if targets is not None:
            check_targets(targets, len(images), self.config.num_classes)
        # 1. The image becomes S tokens with positions, both [B, S, D].
        memory, memory_position, token_padding = self.encode_image(images, padding_mask)
        # 2. The matching queries: content [B, N, D] and anchor logits [B, N, 4].
        content, anchor_logits = self.matching_queries(len(images))
        slots = blocked = None                                   # every query may attend to every other

        # [DN] In training, the denoising queries come first: Q = P*M + N.
        if self.training and targets is not None and self.config.dn_groups:
            slots, dn_content, dn_anchors = denoising_queries(targets, self.label_embedding, self.config)
            blocked = query_mask(slots, content.shape[1], self.config.dn_mask)       # [B, 1, Q, Q]
            content = torch.cat([dn_content, content], dim=1)                        # [B, Q, D]
            anchor_logits = torch.cat([dn_anchors, anchor_logits], dim=1)            # [B, Q, 4]

        # 3. Every decoder layer reads the image and refines the anchors: [L, B, Q, D] and [L, B, Q, 4].
        hidden, anchors = self.decoder(content, anchor_logits, memory, memory_position, blocked,
                                       token_padding, self.box_head)
        # 4. All layers share the heads: class logits, and box = sigmoid(inverse_sigmoid(anchor) + delta).
        logits = self.class_head(hidden).float()                                     # [L, B, Q, C]
        boxes = (self.box_head(hidden).float() + inverse_sigmoid(anchors)).sigmoid()     # [L, B, Q, 4]

        # [DN] The first P*M predictions are those of the denoising queries.
        outputs = {}
        if slots is not None:
            outputs["dn_slots"], num_denoising = slots, slots.is_real.shape[1]
            outputs["dn_logits"], logits = logits.tensor_split([num_denoising], dim=2)
            outputs["dn_boxes"], boxes = boxes.tensor_split([num_denoising], dim=2)

        return outputs | {"pred_logits": logits[-1], "pred_boxes": boxes[-1],
                          "all_logits": logits, "all_boxes": boxes}

    def encode_image(self, images, padding_mask):
        """-> tokens [B, S, D], their positions [B, S, D], and token_padding bool [B, S] or None."""
        features = self.input_projection(self.backbone(images))                      # [B, D, h, w]
        # Nearest neighbor, the default: a cell is padding if its top-left pixel is (or one near it, where the
        # stride does not divide the size). The batch stands in for interpolate's channels.
        padding = torch.zeros_like(images[:, 0]) if padding_mask is None else padding_mask    # [B, H, W]
        cell_padding = F.interpolate(padding[None].float(), features.shape[-2:])[0].bool()    # [B, h, w]
        coordinates = cell_coordinates(cell_padding, self.config.cell_centers)      # [B, h, w, 2]
        positions = sine_encoding(coordinates, self.config.hidden_dim // 2, self.config.image_temperature,
                                  self.config.position_frequency).flatten(1, 2)      # [B, S, D]
        tokens = features.flatten(2).transpose(1, 2)                                 # [B, S, D]
        # No mask without padding: attention is faster then.
        token_padding = None if padding_mask is None else cell_padding.flatten(1)    # [B, S]
        return self.encoder(tokens, positions, token_padding), positions, token_padding

    def matching_queries(self, batch_size):
        """The learned queries, the same for every image: content [B, N, D] and anchor logits [B, N, 4]."""
        anchor_logits = self.anchor_logits.weight                                    # [num_queries, 4]
        # [DN] The content is the embedding of the label "unknown" and the indicator 0; patterns are added.
        unknown = F.pad(self.label_embedding.weight[-1], (0, 1), value=0.0)          # [D]
        content = unknown.expand(len(anchor_logits), -1)                             # [num_queries, D]
        if self.config.num_patterns:
            # All anchors with the first pattern, then all with the second one, ...
            content = (content + self.patterns.weight[:, None]).flatten(0, 1)        # [N, D]
            anchor_logits = anchor_logits.repeat(self.config.num_patterns, 1)        # [N, 4]
        return content.expand(batch_size, -1, -1), anchor_logits.expand(batch_size, -1, -1)


# ---- 11. Matching: which query is responsible for which object -----------------------------------

def generalized_iou(boxes, others, eps=1e-6):
    """Generalized IoU, in (-1, 1], of cxcywh boxes [..., 4] and [..., 4], with broadcasting -> [...].

    GIoU = I / U - (E - U) / E, with intersection I, union U, and E the area of the smallest enclosing box.
    With the authors' eps. torchvision's generalized_box_iou_loss would wait for the GPU.
    """
    ax0, ay0, ax1, ay1 = box_convert(boxes, "cxcywh", "xyxy").unbind(-1)
    bx0, by0, bx1, by1 = box_convert(others, "cxcywh", "xyxy").unbind(-1)
    intersection = ((torch.min(ax1, bx1) - torch.max(ax0, bx0)).clamp(min=0)
                    * (torch.min(ay1, by1) - torch.max(ay0, by0)).clamp(min=0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    enclosing = (torch.max(ax1, bx1) - torch.min(ax0, bx0)) * (torch.max(ay1, by1) - torch.min(ay0, by0))
    return intersection / (union + eps) - (enclosing - union) / (enclosing + eps)


def matching_cost(logits, boxes, labels, true_boxes, config):
    """The cost of pairing every query with every object: predictions logits [L, B, N, C] and boxes
    [L, B, N, 4], objects labels [B, M] and true_boxes [B, M, 4] -> [L, B, N, M]."""
    # Focal cost, p being the predicted probability of the object's class. It is the loss of a positive minus
    # the loss of a negative,
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


@torch.no_grad()
def match(logits, boxes, targets, config):
    """Hungarian matching of logits [L, B, N, C] and boxes [L, B, N, 4] with the targets: in each layer and
    image, every object gets a query of its own, so that the sum of the costs is smallest.

    Returns image, query and source, long [L, R] each: in layer l, query[l, r] of image[l, r] is paired with
    object source[l, r], numbered through the batch. An image with n objects has min(N, n) of the R pairs.
    Raises ValueError if a cost is not finite. DETR, Sec. 3.1; authors: HungarianMatcher.
    """
    # All costs at once, with the objects of an image padded to M: one transfer to the CPU per training step.
    counts = [len(target["labels"]) for target in targets]
    labels, true_boxes = (nn.utils.rnn.pad_sequence(x.split(counts), batch_first=True)     # [B, M], [B, M, 4]
                          for x in flatten_targets(targets, boxes.device))
    cost = matching_cost(logits, boxes, labels, true_boxes, config).cpu().numpy()          # [L, B, N, M]
    require(np.isfinite(cost).all(), "the matching cost is not finite: predictions are NaN or infinite. Look "
            "for NaN in images or boxes, a fully padded image, or too high a learning rate")
    pairs = []
    for layer_cost in cost:
        first = 0                                                 # number of the image's first object
        for image, count in enumerate(counts):
            query, rank = linear_sum_assignment(layer_cost[image, :, :count])              # min(N, n) each
            pairs.append([np.full_like(query, image), query, first + rank])
            first += count
    pairs = torch.from_numpy(np.concatenate(pairs, axis=1)).unflatten(1, (len(cost), -1))  # [3, L, R]
    return to_device(pairs, boxes.device).unbind()


# ---- 12. Loss ------------------------------------------------------------------------------------

def mean_over_processes(number, device):
    """The mean of `number` over all training processes. As gradients are averaged over processes too, the
    loss does not depend on how a batch is split among them (D4)."""
    number = torch.full((), float(number), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(number)
        number /= torch.distributed.get_world_size()
    return number


def set_loss(logits, classes, boxes, true_boxes, num_objects, config):
    """logits and true classes (0 or 1) [L, ..., C], boxes [L, R, 4] and true_boxes [L, R, 4] or [R, 4]
    -> the weighted sum over all layers, a scalar, and the terms of the last layer."""
    # focal loss = -alpha (1 - p)^gamma log(p)          where the true class is 1,
    #              -(1 - alpha) p^gamma log(1 - p)      where it is 0
    focal = sigmoid_focal_loss(logits, classes, config.focal_alpha, config.focal_gamma)
    # Divided by the number of objects or copies, not of queries, most of which find nothing.
    normalizer = mean_over_processes(num_objects, logits.device).clamp(min=1)
    loss_class = focal.flatten(1).sum(1) / normalizer                                # [L]
    loss_box = (boxes - true_boxes).abs().sum((1, 2)) / normalizer
    loss_giou = (1 - generalized_iou(boxes, true_boxes)).sum(1) / normalizer
    # With the default weights, 1 * focal loss + 5 * L1 + 2 * (1 - GIoU)
    total = config.loss_class * loss_class + config.loss_box * loss_box + config.loss_giou * loss_giou
    return total.sum(), {"loss_ce": loss_class[-1], "loss_bbox": loss_box[-1], "loss_giou": loss_giou[-1]}


def training_loss(outputs, targets, config):
    """Outputs of DNDETR, and the targets that it was given (and has checked) -> dict of scalars.

    "loss" is what to backpropagate, "loss_matching" + "loss_denoising": weighted sums over all layers. The
    others are the unweighted terms of the last layer, under the authors' names: loss_ce (focal loss),
    loss_bbox (L1) and loss_giou, with "dn_" in front for denoising. Raises ValueError if a matching cost is
    not finite. Authors: SetCriterion, compute_dn_loss.
    """
    logits, boxes = outputs["all_logits"], outputs["all_boxes"]             # [L, B, N, C], [L, B, N, 4]
    labels, true_boxes = flatten_targets(targets, logits.device)                     # [K], [K, 4]
    # Matching: a paired query learns the class and the box of its object, all others that there is nothing.
    image, query, source = match(logits, boxes, targets, config)                     # [L, R] each
    layer = torch.arange(len(logits), device=logits.device)[:, None]                 # [L, 1], beside [L, R]
    classes = torch.zeros_like(logits)                                               # [L, B, N, C]
    classes[layer, image, query, labels[source]] = 1
    boxes = boxes[layer, image, query]                                               # [L, R, 4]
    matching, terms = set_loss(logits, classes, boxes, true_boxes[source], len(labels), config)

    # [DN] The same loss for the copies, without matching: the slots know their objects. It is divided by
    # the number of copies, so that more groups do not mean a larger loss. Empty slots learn nothing.
    denoising, slots = torch.zeros_like(matching), outputs.get("dn_slots")
    if slots is not None:
        logits, boxes = (outputs[name][:, slots.image, slots.slot] for name in ("dn_logits", "dn_boxes"))
        classes = F.one_hot(labels, config.num_classes)[slots.source]                # [P*K, C]
        denoising, dn_terms = set_loss(logits, classes.to(logits).expand_as(logits), boxes,
                                       true_boxes[slots.source], len(classes), config)
        terms |= {f"dn_{name}": term for name, term in dn_terms.items()}
    return {"loss": matching + denoising, "loss_matching": matching, "loss_denoising": denoising} | terms


# ---- 13. Predictions, and the instability of matching --------------------------------------------

@torch.no_grad()
def postprocess(outputs, image_sizes, num_select=300):
    """One dict per image, best first: "scores" [k], "labels" [k], "boxes" [k, 4] as xyxy in pixels.

    `image_sizes` holds the (height, width) of each image without its padding; k is min(`num_select`, N*C).
    As classes are independent (focal loss), a query may appear with several of them. There is no non-maximum
    suppression: self-attention lets queries avoid duplicates. Authors: PostProcess.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    sizes = torch.as_tensor(image_sizes, device=boxes.device).view(len(boxes), 2)    # [B, 2]
    scores, index = logits.sigmoid().flatten(1).topk(min(num_select, logits[0].numel()))     # [B, k]
    query, labels = index // logits.shape[2], index % logits.shape[2]
    boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query[..., None].expand(-1, -1, 4))
    boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]                              # times w, h, w, h
    return [dict(scores=score, labels=label, boxes=box) for score, label, box in zip(scores, labels, boxes)]


def matched_objects(outputs, targets, config):
    """The object that each query of the last layer is matched with, counted within its image, or -1: long
    [B, N], on the CPU. This is V of Eq. 1."""
    pairs = match(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets, config)
    image, query, source = (index[0].cpu() for index in pairs)                       # [R] each
    rank = torch.cat([torch.arange(len(target["labels"]), device="cpu") for target in targets])    # [K]
    matched = torch.full(outputs["pred_logits"].shape[:2], -1, device="cpu")
    matched[image, query] = rank[source]
    return matched


def matching_instability(previous, current):
    """IS, mean over the images (Sec. 3.1): the number of queries whose match changed between two epochs.

    IS of an image = sum over n of 1(V_n of this epoch != V_n of the epoch before)          (Eq. 2)
    `previous` and `current` [images, N] are from matched_objects. An object that moves to an unmatched query
    counts twice, so with n objects IS is between 0 and 2 n.
    """
    return (previous != current).sum(1).double().mean().item()


# ---- 14. Checks of what people most often get wrong ----------------------------------------------
# The method ends here. What follows is housekeeping.

def check_padding(padding_mask, images):
    """Raise ValueError unless the mask is bool [B, H, W] and leaves something of every image."""
    require(padding_mask.shape == images[:, 0].shape and padding_mask.dtype == torch.bool,
            f"padding_mask must be bool [B, H, W], not {padding_mask.dtype} {list(padding_mask.shape)}")
    is_seen = padding_mask.device.type != "cpu" or not padding_mask.flatten(1).all(1).any()
    require(is_seen, "padding_mask covers a whole image. True means padding: is the mask inverted?")


def check_targets(targets, num_images, num_classes):
    """Raise ValueError for unusable ground truth. Its values are looked at only where they are on the CPU,
    because reading them from a GPU would stall it."""
    require(len(targets) == num_images, f"{len(targets)} targets for a batch of {num_images} images")
    for index, target in enumerate(targets):
        labels, boxes = target["labels"], target["boxes"]                            # [n], [n, 4]
        is_right = labels.dtype == torch.long and labels.ndim == 1 and boxes.is_floating_point()
        require(is_right and boxes.shape == (len(labels), 4),
                f"targets[{index}] must have labels, long [n], and boxes, float [n, 4], not "
                f"{labels.dtype} {list(labels.shape)} and {boxes.dtype} {list(boxes.shape)}")
        if labels.device.type == boxes.device.type == "cpu":
            fits = ((boxes >= -0.001) & (boxes <= 1.001)).all(1)            # annotations are rounded
            is_right = fits & (boxes[:, 2:] > 0).all(1) & (labels >= 0) & (labels < num_classes)
            if not is_right.all():
                label, box = (values[~is_right][0].tolist() for values in (labels, boxes))
                rule = f"a label from 0 to {num_classes - 1}, and a box (cx, cy, w, h) in [0, 1] with an area"
                raise ValueError(f"targets[{index}] has label {label} and box {box}, not {rule}")


# ---- 15. The authors' released weights -----------------------------------------------------------

OFFICIAL_NAMES = {  # {a part of their names: ours}, replaced in this order
    "module.": "", "transformer.": "", "backbone.0.body.": "backbone.", "input_proj.": "input_projection.",
    "label_enc.": "label_embedding.", "class_embed": "class_head", "decoder.bbox_embed": "box_head",
    "bbox_embed": "box_head", "refpoint_embed": "anchor_logits", "ref_point_head": "anchor_mlp",
    "ref_anchor_head": "reference_size", "query_scale": "position_scale", ".sa_": ".self_", ".ca_": ".cross_",
    "qcontent_proj": "query_content", "qpos_proj": "query_position", "qpos_sine_proj": "query_sine",
    "kcontent_proj": "key_content", "kpos_proj": "key_position", "v_proj": "value"}
OFFICIAL_ARGS = {  # {our field: their option}
    "num_queries": "num_queries", "hidden_dim": "hidden_dim", "num_heads": "nheads",
    "num_encoder_layers": "enc_layers", "num_decoder_layers": "dec_layers",
    "dim_feedforward": "dim_feedforward", "dropout": "dropout", "activation": "transformer_activation",
    "num_patterns": "num_patterns", "backbone": "backbone", "dilation": "dilation", "dn_groups": "scalar",
    "label_noise": "label_noise_scale", "center_noise": "box_noise_scale", "size_noise": "box_noise_scale"}


def read_checkpoint(path):
    """The dict in a checkpoint file, read without running code from it. Raises ValueError if it can't be."""
    torch.serialization.add_safe_globals([argparse.Namespace])     # the authors' files hold their options
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:        # no such file, a folder, ...
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except Exception:               # of many types, whose texts advise to run code from the file
        raise ValueError(f"{path} is damaged, or not a dict of tensors and plain values") from None


def load_official(checkpoint, **overrides):
    """A DNDETR, on the CPU, with the authors' weights. `checkpoint` is the path of a file as they release it,
    its dict, or a bare state dict. Loading is strict.

    Fields of DNDETRConfig come from `overrides`, else from the options in the file, else they are as in the
    paper. Raises ValueError if the file is not theirs, with the tensors that do not fit.
    """
    content = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
    state = {}
    try:
        options = content.get("args", {})
        options = vars(options) if isinstance(options, argparse.Namespace) else options
        for name, tensor in content.get("model", content).items():
            for theirs, ours in OFFICIAL_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor    # their box head is stored under two names, which become one
        fields = {ours: options[theirs] for ours, theirs in OFFICIAL_ARGS.items() if theirs in options}
        fields["num_classes"] = len(state["class_head.weight"])
        model = DNDETR(DNDETRConfig(**fields | overrides))
        model.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError("this is not a DN-DETR checkpoint of the authors, or it needs other fields of "
                         f"DNDETRConfig: {type(error).__name__}: {error}") from error
    return model


if __name__ == "__main__":      # a tour, in a few seconds
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.7, 0.6, 0.4, 0.5]])
    print("An object (cx, cy, w, h), and three noised copies of it:", boxes[:1],
          noise_boxes(boxes[:1].repeat(3, 1), center_noise=0.4, size_noise=0.4),
          "The attention mask, 2 groups of 2 copies, then 3 matching queries (1 = blocked):",
          dn_attention_mask(num_groups=2, group_size=2, num_queries=3).int(), sep="\n")
    config = DNDETRConfig(num_classes=3, num_queries=6, hidden_dim=32, num_heads=4, num_encoder_layers=1,
                          num_decoder_layers=2, dim_feedforward=64, backbone="small", dn_groups=2)
    targets = [{"labels": torch.tensor([1, 2]), "boxes": boxes}] * 2
    outputs = DNDETR(config)(torch.randn(2, 3, 64, 64), targets=targets)
    for name, letters in (("dn_logits", "L, B, P*M, C"), ("dn_boxes", "L, B, P*M, 4"),
                          ("all_logits", "L, B, N, C"), ("all_boxes", "L, B, N, 4")):
        print(f"{name} [{letters}] = {list(outputs[name].shape)}")
    print({name: round(loss.item(), 3) for name, loss in training_loss(outputs, targets, config).items()})
