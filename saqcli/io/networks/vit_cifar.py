"""A small vision transformer for 32 x 32 images, for which CIFAR-10 weights circulate.

Patches of 4 x 4 pixels, a class token, six encoder layers of torch's own kind: 8 heads over 128 features, a hidden
layer of 256 with ReLU, and normalization *behind* each addition. timm's transformers normalize in front, so these
weights fit none of them.

Source: ``vit_cifar10.pth`` of github.com/smmk47/CIFAR10-Classification, whose parameter names these are.
"""

import torch
from torch import Tensor, nn

SIDE = 8  # patches


class ViTCifar(nn.Module):
    """Vision transformer with normalization behind additions, 32 x 32 images to class scores."""

    def __init__(
        self, num_classes: int, in_chans: int = 3, dim: int = 128, depth: int = 6, heads: int = 8
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, 4, 4)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + SIDE**2, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.1, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, 32, 32) to (N, num_classes)."""
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (N, 64, dim)
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), patches), 1) + self.pos_embed
        scores: Tensor = self.mlp_head(self.transformer(tokens)[:, 0])
        return scores
