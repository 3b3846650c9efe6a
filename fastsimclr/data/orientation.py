"""Vertical flips and quarter turns of a batch of square crops."""

import numpy as np
import torch
from torch import Tensor

from fastsimclr.data import native
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import ViewParams


def orient(crops: Tensor, params: ViewParams, recipe: Augmentation) -> Tensor:
    """Flip crops (B, S, S, C) vertically, then rotate them counterclockwise, as sampled in params (B,).

    recipe: the recipe of the view. Returns `crops` itself if it does neither.
    """
    if recipe.vertical_flip_prob == recipe.rotate90_prob == 0:
        return crops
    flips, turns = params["vertical_flip"], params["quarter_turns"]
    out = torch.empty_like(crops)
    for flip in (False, True):
        for turn in range(4):
            rows = np.flatnonzero((flips == flip) & (turns == turn))
            if len(rows) == 0:
                continue
            index = native.on_device(rows, crops.device)
            part = crops.index_select(0, index)
            out.index_copy_(0, index, torch.rot90(part.flip(1) if flip else part, turn, (1, 2)))
    return out
