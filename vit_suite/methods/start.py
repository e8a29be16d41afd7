"""A network takes the weights of the checkpoint that a training starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.models.lora import with_frozen_names
from vit_suite.models.positions import resize_position


def copy_backbone(to: Backbone, source: Backbone) -> None:
    """Copy the weights of `source` into `to`, of the same architecture.

    - Learned positions of another size are resized.
    - With another number of channels, every channel of `to` gets the mean of the patch embedding over the source's
      channels, times the ratio of the numbers. An image whose channels are equal then gives the same tokens.
    """
    state = source.vit.state_dict()
    mine, theirs = to.cfg.channels, source.cfg.channels
    if mine != theirs:
        kernel = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = kernel.mean(1, keepdim=True).repeat(1, mine, 1, 1) * (theirs / mine)
    if to.prefix_tokens != source.prefix_tokens:
        state = with_more_registers(state, to, source)
    if to.native_grid != source.native_grid and "pos_embed" in state:
        learned = "pos_embed" in dict(to.vit.named_parameters())
        prefix = 0 if to.vit.no_embed_class else to.prefix_tokens
        how = source.cfg.resize
        if not learned:
            state["pos_embed"] = to.vit.state_dict()["pos_embed"]
        elif how is not None and how != "sincos":
            state["pos_embed"] = resize_position(state["pos_embed"], source.native_grid, to.native_grid, prefix, how)
    if to.cfg.lora_rank:
        state = with_frozen_names(state, to.vit.state_dict())
    to.vit.load_state_dict(state)


def with_more_registers(state: dict[str, Tensor], to: Backbone, source: Backbone) -> dict[str, Tensor]:
    """The weights `state` of `source`, plus the registers that only `to` has (SiT's rotation token). These keep the
    values that they have in `to`.

    Raises:
        UserError: `source` has registers that `to` does not have.
    """
    more = to.prefix_tokens - source.prefix_tokens
    if more < 0 or to.has_cls != source.has_cls:
        raise UserError(
            f"the start has {source.prefix_tokens} tokens before the patches, and this method has a place for"
            f" {to.prefix_tokens}."
        )
    own = to.vit.state_dict()
    found = dict(state)
    tokens = [state["reg_token"]] if "reg_token" in state else []
    found["reg_token"] = torch.cat([*tokens, own["reg_token"][:, -more:]], dim=1)
    if "pos_embed" in state and not to.vit.no_embed_class:
        old, new = source.prefix_tokens, own["pos_embed"][:, to.prefix_tokens - more : to.prefix_tokens]
        found["pos_embed"] = torch.cat([state["pos_embed"][:, :old], new, state["pos_embed"][:, old:]], dim=1)
    return found
