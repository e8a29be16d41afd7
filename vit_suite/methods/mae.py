"""Masked autoencoders: MAE (He et al. 2021, arXiv 2111.06377; facebookresearch/mae) and CrossMAE (arXiv 2401.14391;
TonyLianLong/CrossMAE).

An encoder sees a quarter of the patches, and a decoder predicts the pixels of the hidden ones. Deliberate differences
from the official code:

- Masks are drawn per image from the run's own random numbers, so that the number of ranks does not matter.
- The encoder may have registers, or no CLS token. The decoder treats registers like the CLS token.
- CrossMAE's encoder has no final LayerNorm. Here there is one with its initial weights, for kNN, probes and
  fine-tuning.

Axes: B images, C channels, N patches, p side of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_suite import distributed
from vit_suite.config import BackboneConfig
from vit_suite.config.limits import pair, spell_sides
from vit_suite.config.mae import MAEConfig, MAEOptimConfig, MAEViewsConfig
from vit_suite.errors import UserError
from vit_suite.hardware import send
from vit_suite.losses.reconstruction import at, masked_mse, patch_statistics, patchify, psnr, unpatchify
from vit_suite.methods.base import Losses, Method
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import check_image_size
from vit_suite.models.masked import CrossDecoder, SelfDecoder, encode_visible, init_mae_
from vit_suite.models.stem import check_hidden
from vit_suite.views.draw import Draw, alone
from vit_suite.views.masks import Split, random_patches


class Network(nn.Module):
    """Encoder and decoder."""

    def __init__(self, backbone: BackboneConfig, method: MAEConfig):
        super().__init__()
        if backbone.init != BackboneConfig.init:
            raise UserError(f"backbone.init {backbone.init}: method mae has first weights of its own; leave it out.")
        self.backbone = Backbone(backbone)
        kind = CrossDecoder if method.decoder == "cross" else SelfDecoder
        self.decoder = kind(
            self.backbone,
            method.decoder_dim,
            method.decoder_depth,
            method.decoder_heads,
            method.decoder_mlp_ratio,
        )
        init_mae_(self.decoder if backbone.pretrained else self)
        if isinstance(self.decoder, CrossDecoder):  # unused by the loss, and DDP would wait for its gradient
            self.backbone.vit.norm.requires_grad_(False)

    def forward(self, images: Tensor, split: Split, kept: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) -> pixels (B, N, p p C) of all patches, or of the predicted ones (cross).

        `kept` (2 depth, B): which paths drop path keeps in the encoder's blocks (`Backbone.drawn_paths`).
        """
        levels = encode_visible(self.backbone, images, split.visible, kept)
        if isinstance(self.decoder, CrossDecoder):
            return self.decoder(levels, split)
        return self.decoder(self.backbone.vit.norm(levels[-1]), split)


class MAE(Method):
    """A masked autoencoder as a LightningModule. The encoder is scored and exported.

    Logged: loss (mean squared error of normalized pixels), and PSNR in dB of the predicted patches.
    """

    config_class = MAEConfig
    views_class = MAEViewsConfig
    optim_class = MAEOptimConfig
    method: MAEConfig
    pixel_std: Tensor

    def build(self, backbone: BackboneConfig) -> None:
        check_options(self.method, backbone)
        size = self.views_config.global_size
        self.student = Network(backbone, self.method)
        self.patch: int = self.student.backbone.patch_size
        check_image_size(size, self.patch, "views.global_size")
        height, width = pair(size)
        self.grid = (height // self.patch, width // self.patch)
        check_masks(self.method, self.student.backbone, self.grid)
        self.register_buffer("pixel_std", torch.tensor(self.std), persistent=False)

    def trained(self) -> nn.Module:
        return self.student

    def evaluation_backbone(self) -> Backbone:
        return self.student.backbone

    def gathered_parts(self) -> list[nn.Module]:
        return [self.student.decoder]

    @property
    def sheet_every_epochs(self) -> int:
        return self.method.sheet_every_epochs

    def sheet(self, clean: Tensor) -> list[Tensor]:
        """Three rows: the clean images, the visible patches, and the images with the predicted patches. The cross
        decoder adds a fourth: where one hidden patch looks (`looks`). The masks are the same each time, so that epochs
        can be compared."""
        rows = [clean, *self.reconstruct(clean, alone(len(clean), self.seed))]
        if isinstance(self.student.decoder, CrossDecoder):
            rows.append(self.looks(clean, alone(len(clean), self.seed)))
        return rows

    def split_patches(self, device: torch.device, draw: Draw, predict_ratio: float | None) -> Split:
        """Which patches of each image are visible, and which are predicted."""
        noise = draw.uniform(self.grid[0] * self.grid[1], purpose="mae patches")
        return random_patches(send(noise, device), self.method.mask_ratio, predict_ratio)

    def losses(
        self, crops: list[Tensor], labels: Tensor | None = None, draw: Draw | None = None, logged: bool = False
    ) -> Losses:
        """The reconstruction loss of one view of each image."""
        images = crops[0]
        draw = draw or alone(len(images), self.seed)
        split = self.split_patches(images.device, draw, self.method.predict_ratio)
        kept = self.student.backbone.drawn_paths(draw, 1)
        output = self.student(images, split, None if kept is None else kept.flatten(1))
        patches = patchify(images, self.patch)
        mean, std = patch_statistics(patches) if self.method.norm_pix_loss else (0.0, 1.0)
        values = {"loss": masked_mse(output, (patches - mean) / std, split.asked)}
        if logged:
            values["psnr"] = self.psnr(output.detach(), patches, split)
        return Losses(values)

    def psnr(self, output: Tensor, patches: Tensor, split: Split) -> Tensor:
        """PSNR in dB of the predicted patches in the image's own colors. Where the loss normalizes patches, the
        prediction gets the true mean and contrast of its patch."""
        target = at(patches, split.asked)  # (B, m, p p C)
        if output.shape[1] == patches.shape[1]:
            output = at(output, split.asked)
        if self.method.norm_pix_loss:
            mean, std = patch_statistics(target)
            output = output.float() * std + mean
        pixels = (values.unflatten(-1, (-1, len(self.pixel_std))).movedim(-1, 1) for values in (output, target))
        guessed, true = pixels
        return psnr(guessed, true, self.pixel_std, distributed.mean_over_ranks)

    @torch.no_grad()
    def reconstruct(self, clean: Tensor, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
        """Views (B, C, S, S) with hidden patches as 0, and the same views with the hidden patches as predicted.

        All hidden patches are predicted, even if the training predicts only a part of them (method.predict_ratio).
        """
        split = self.split_patches(clean.device, draw or alone(len(clean), self.seed), None)
        patches = patchify(clean, self.patch)
        training = self.student.training
        output = self.student.eval()(clean, split).float()
        self.student.train(training)
        if self.method.norm_pix_loss:
            mean, std = patch_statistics(patches)
            if output.shape[1] < patches.shape[1]:
                mean, std = at(mean, split.asked), at(std, split.asked)
            output = output * std + mean
        hidden = split.predicted.unsqueeze(-1)
        if output.shape[1] == patches.shape[1]:
            filled = torch.where(hidden, output, patches)
        else:
            places = split.asked.unsqueeze(-1).expand_as(output)
            filled = patches.scatter(1, places, output)
        shown = torch.where(hidden, 0, patches)
        return unpatchify(shown, self.patch, self.grid), unpatchify(filled, self.patch, self.grid)

    @torch.no_grad()
    def decoder_attention(self, clean: Tensor, draw: Draw | None = None, index: int = -1) -> tuple[Tensor, Split]:
        """The attention of hidden patches to visible ones in block `index` of the cross decoder, for views
        (B, C, S, S).

        Returns:
            The attention (B, heads, N, N) in fp32, and the masks. A row is the hidden patch that asks, a column the
            visible patch that it looks at; rows of visible patches and columns of hidden ones are 0. Attention to CLS
            and registers is left out, so a row may sum to less than 1.

        Raises:
            UserError: the decoder has no cross-attention.
        """
        if not isinstance(self.student.decoder, CrossDecoder):
            raise UserError("method.decoder is self: only the cross decoder has cross-attention to show.")
        split = self.split_patches(clean.device, draw or alone(len(clean), self.seed), None)
        levels = encode_visible(self.student.backbone, clean, split.visible)
        found = self.student.decoder.attention(levels, split, index)[..., self.student.backbone.prefix_tokens :]
        count, heads, _, visible = found.shape
        patches = split.predicted.shape[1]
        columns = split.visible[:, None, None, :].expand(-1, heads, found.shape[2], -1)
        wide = found.new_zeros(count, heads, found.shape[2], patches).scatter(3, columns, found)
        rows = split.asked[:, None, :, None].expand_as(wide)
        return found.new_zeros(count, heads, patches, patches).scatter(2, rows, wide), split

    @torch.no_grad()
    def looks(self, clean: Tensor, draw: Draw | None = None) -> Tensor:
        """Views (B, C, S, S) in the light of the cross decoder's last block. The hidden patch nearest to the middle of
        the image is white. A visible patch is as bright as that patch's attention to it, averaged over the heads; the
        one that it attends to most keeps its colors. The rest is black."""
        maps, split = self.decoder_attention(clean, draw)
        middle = [(side - 1) / 2 for side in self.grid]
        places = torch.cartesian_prod(*(torch.arange(side, device=clean.device) for side in self.grid))  # (N, 2)
        distance = (places - torch.tensor(middle, device=clean.device)).square().sum(1)
        asks = distance.masked_fill(~split.predicted, torch.inf).argmin(1)  # (B,)
        rows = torch.arange(len(clean), device=clean.device)
        light = maps.mean(1)[rows, asks]  # (B, N)
        light = light / light.amax(1, keepdim=True)
        std = self.pixel_std.view(-1, 1, 1)
        mean = torch.tensor(self.mean, device=clean.device).view(-1, 1, 1)
        patches = patchify(clean * std + mean, self.patch) * light.unsqueeze(-1)
        patches[rows, asks] = 1.0
        return (unpatchify(patches, self.patch, self.grid) - mean) / std


def check_options(method: MAEConfig, backbone: BackboneConfig) -> None:
    """UserError for options that exclude each other."""
    if backbone.causal:
        raise UserError("backbone.causal needs all patches in order, and method mae shows the encoder some: use sit.")
    check_hidden(backbone, "method mae")
    if method.predict_ratio is not None and method.decoder == "self":
        raise UserError(
            "method.predict_ratio is for method.decoder cross; the self decoder predicts all hidden patches."
        )
    if method.predict_ratio is not None and method.predict_ratio > method.mask_ratio:
        raise UserError(
            f"method.predict_ratio {method.predict_ratio:g} is more than method.mask_ratio {method.mask_ratio:g}:"
            " visible patches need no prediction."
        )


def check_masks(method: MAEConfig, backbone: Backbone, grid: tuple[int, int]) -> None:
    """UserError where the decoder has positions for another number of patches, or a ratio leaves no patch visible or
    none to predict."""
    if grid != backbone.native_grid:
        size = [side * backbone.patch_size for side in backbone.native_grid]
        views = spell_sides(side * backbone.patch_size for side in grid)
        raise UserError(
            f"backbone.image_size {size} is not views.global_size {views}: method mae decodes the patches of one size;"
            " leave backbone.image_size out."
        )
    patches = grid[0] * grid[1]
    split = random_patches(torch.rand(1, patches, device="cpu"), method.mask_ratio, method.predict_ratio)
    if not split.visible.shape[1] or not split.predicted.any():
        what = "visible" if not split.visible.shape[1] else "to predict"
        raise UserError(
            f"method.mask_ratio {method.mask_ratio:g} of {patches} patches leaves none {what}: change it, or use"
            " smaller patches."
        )
