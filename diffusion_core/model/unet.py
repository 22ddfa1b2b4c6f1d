"""The U-Net of Ho et al. 2020 (Denoising Diffusion Probabilistic Models, appendix B), with class conditioning.

The label embedding is added to the time embedding. The sum enters every residual block, by default as a bias per
channel. Attention has separate query, key and value projections, so that structured pruning can narrow each of them.

Axes: B batch, C channels, H height, W width, E embedding width, N = H*W positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion_core.config import CoreConfig, ModelConfig
from diffusion_core.model.norm import group_norm, normalised
from diffusion_core.model.timesteps import sinusoidal_embedding
from diffusion_core.model.watch import Watch
from diffusion_core.randomness import Purpose, stream_seed

NO_LABEL = -1
"""The label that means "no class", for which the network makes an unconditional prediction."""


def activated(x: Tensor) -> Tensor:
    """Return the SiLU of a tensor that is not used again. Without gradients, it is computed in place."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """norm-SiLU-conv, the embedding, norm-SiLU-dropout-conv, plus a skip connection.

    The embedding is added per channel (``bias``), or scales and shifts the output of the second norm (``scale_shift``).
    """

    def __init__(self, in_channels: int, out_channels: int, embedding: int, model: ModelConfig) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, model.norm_groups, model.norm_epsilon)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embedding, out_channels)
        # Two projections instead of one of twice the width, so that structured pruning can narrow each.
        self.embed_scale = nn.Linear(embedding, out_channels) if model.conditioning == "scale_shift" else None
        self.norm2 = group_norm(out_channels, model.norm_groups, model.norm_epsilon)
        self.dropout = nn.Dropout(model.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        """Map x, ``(B, C_in, H, W)``, and the embedding, ``(B, E)``, to ``(B, C_out, H, W)``."""
        h_BCHW = self.conv1(activated(normalised(self.norm1, x_BCHW)))
        shift_BCHW = self.embed(embedding_BE)[:, :, None, None]
        if self.embed_scale is None:
            h_BCHW = normalised(self.norm2, h_BCHW.add_(shift_BCHW))  # The convolution's output is not used again.
        else:
            h_BCHW = (
                normalised(self.norm2, h_BCHW) * (1.0 + self.embed_scale(embedding_BE)[:, :, None, None]) + shift_BCHW
            )
        h_BCHW = self.conv2(self.dropout(activated(h_BCHW)))
        return h_BCHW.add_(self.skip(x_BCHW))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, model: ModelConfig) -> None:
        super().__init__()
        self.heads = model.heads(channels)
        self.norm = group_norm(channels, model.norm_groups, model.norm_epsilon)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Attend over all H * W positions. The shape, ``(B, C, H, W)``, does not change."""
        height = x_BCHW.shape[2]
        h_BNC = rearrange(normalised(self.norm, x_BCHW), "b c h w -> b (h w) c")
        query, key, value = (
            rearrange(project(h_BNC), "b n (heads d) -> b heads n d", heads=self.heads)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        h_BNC = self.out(rearrange(attended, "b heads n d -> b n (heads d)"))
        return x_BCHW + rearrange(h_BNC, "b (h w) c -> b c h w", h=height)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution, padded at the end only (TensorFlow's "SAME") or all around."""

    def __init__(self, channels: int, model: ModelConfig) -> None:
        super().__init__()
        self.around = model.downsample_padding == "both"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=int(self.around))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Halve the resolution: ``(B, C, H, W)`` to ``(B, C, H/2, W/2)``."""
        return self.conv(x_BCHW if self.around else F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Double the resolution: ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""
        return self.conv(doubled(x_BCHW))


def doubled(x_BCHW: Tensor) -> Tensor:
    """Double height and width by repeating every pixel."""
    # The compiler turns the gradient of interpolate into atomic additions on a GPU, and that of expand into sums.
    return expanded(x_BCHW) if x_BCHW.is_cuda else F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


def expanded(x_BCHW: Tensor) -> Tensor:
    """Double height and width by repeating every pixel, in channels-last memory."""
    batch, channels, height, width = x_BCHW.shape
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return x_BHWC.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Level(nn.Module):
    """The layers of one resolution, on the way down or up: residual blocks, optional attention, and resampling."""

    def __init__(
        self,
        widths: Sequence[tuple[int, int]],
        attention: bool,
        resample: nn.Module | None,
        model: ModelConfig,
        embedding: int,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(inner, outer, embedding, model) for inner, outer in widths)
        self.attentions = nn.ModuleList(AttentionBlock(outer, model) for _, outer in widths if attention)
        self.resample = resample

    def run_block(
        self, index: int, x_BCHW: Tensor, embedding_BE: Tensor, features: list[Tensor] | None = None
    ) -> Tensor:
        """Run a residual block and its attention. The last residual block appends its output to ``features``."""
        x_BCHW = self.blocks[index](x_BCHW, embedding_BE)
        if features is not None and index == len(self.blocks) - 1:
            features.append(x_BCHW)
        return self.attentions[index](x_BCHW) if len(self.attentions) else x_BCHW


def _embedding(rows: int, features: int) -> nn.Embedding:
    """Return ``nn.Embedding(rows, features)``. On the meta device no numbers are drawn: that imports the compiler."""
    embedding = nn.Embedding.from_pretrained(torch.empty(rows, features), freeze=False)
    if not embedding.weight.is_meta:
        embedding.reset_parameters()
    return embedding


class UNet(nn.Module):
    """The U-Net: predicts from noisy images, their timesteps and their classes.

    Args:
        model: widths, depths, attention, dropout.
        image_size: height and width of the images; a multiple of ``2 ** (levels - 1)``.
        in_channels: channels of the images. With self-conditioning, the input has twice as many. With a learned
            variance, the output has twice as many.
        num_classes: number of classes; 0 builds a network without labels.
        given_channels: further channels of the input, for upsampling.

    Attributes:
        watch: the record that every call fills; None records nothing.
    """

    def __init__(
        self, model: ModelConfig, image_size: int, in_channels: int, num_classes: int, given_channels: int = 0
    ) -> None:
        super().__init__()
        self.watch: Watch | None = None
        self.in_channels = in_channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.given_channels = given_channels
        width = model.channels
        embedding = model.embedding_channels or 4 * width
        self.width = width
        self.frequency_shift = model.frequency_shift
        self.cosine_first = model.time_order == "cos_sin"

        self.time_mlp = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        # One more row than classes: the last one means "no class".
        self.label_embedding = _embedding(num_classes + 1, embedding) if num_classes else None

        taken = in_channels * (1 + model.self_conditioning) + given_channels
        self.conv_in = nn.Conv2d(taken, width, 3, padding=1)
        channels, size = width, image_size
        skips = [channels]
        self.down = nn.ModuleList()
        for depth, out in enumerate(model.widths):
            widths = [(channels if i == 0 else out, out) for i in range(model.num_res_blocks)]
            last = depth == len(model.widths) - 1
            attention = size in model.attention_resolutions
            self.down.append(Level(widths, attention, None if last else Downsample(out, model), model, embedding))
            channels = out
            skips += [out] * (model.num_res_blocks + (not last))
            size = size if last else size // 2

        self.middle = nn.ModuleList(
            [
                ResidualBlock(channels, channels, embedding, model),
                AttentionBlock(channels, model),
                ResidualBlock(channels, channels, embedding, model),
            ]
        )

        self.up = nn.ModuleList()
        for depth, out in reversed(list(enumerate(model.widths))):
            widths = []
            for _ in range(model.num_res_blocks + 1):
                widths.append((channels + skips.pop(), out))
                channels = out
            attention = size in model.attention_resolutions
            self.up.append(Level(widths, attention, Upsample(out) if depth else None, model, embedding))
            size = size * 2 if depth else size

        self.norm_out = group_norm(channels, model.norm_groups, model.norm_epsilon)
        self.conv_out = nn.Conv2d(channels, in_channels * (1 + model.learned_variance), 3, padding=1)
        self.reset_parameters()

    @property
    def input_channels(self) -> int:
        """Number of channels of the input of ``forward``."""
        return self.conv_in.in_channels

    @property
    def time_features(self) -> int:
        """Number of features of the timestep: ``width``, or fewer if pruning has removed some."""
        first = self.time_mlp[0]
        assert isinstance(first, nn.Linear)
        return first.in_features

    def reset_parameters(self) -> None:
        """Initialise as Ho et al. 2020 do: Glorot-uniform weights, zero biases, zero last layers.

        The last layers are those of residual and attention blocks, and the network's output layer.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, AttentionBlock):
                nn.init.zeros_(module.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def embed(self, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        """Return the conditioning of a batch, ``(B, E)``: the SiLU of time embedding plus label embedding."""
        time_BE = sinusoidal_embedding(
            t_B,
            self.width,
            kept=self.time_features,
            shift=self.frequency_shift,
            cosine_first=self.cosine_first,
        )
        embedding_BE = self.time_mlp(time_BE.to(self.conv_in.weight.dtype))
        if self.label_embedding is not None:
            if labels_B is None:
                labels_B = torch.full_like(t_B, NO_LABEL, dtype=torch.long)
            embedding_BE = embedding_BE + self.label_embedding(torch.where(labels_B < 0, self.num_classes, labels_B))
        return F.silu(embedding_BE)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Predict from noisy images.

        Args:
            x_BCHW: noisy images, float; with self-conditioning, followed by an estimate of the clean ones along C; for
                upsampling, followed by ``given_channels`` more (:mod:`diffusion_core.diffusion.upsampling`).
            t_B: timesteps, 0..T-1; floats may lie between two timesteps.
            labels_B: classes, 0..num_classes-1, or ``NO_LABEL``; None means ``NO_LABEL`` for all. A network
                without labels ignores them.

        Returns:
            The prediction, with the shape of the images; with a learned variance, with twice the channels.
        """
        embedding_BE = self.embed(t_B, labels_B)
        asked = (x_BCHW, t_B, labels_B)
        features: list[Tensor] | None = None if self.watch is None else []
        x_BCHW = self.conv_in(x_BCHW)
        skips = [x_BCHW]
        for level in self.down:
            assert isinstance(level, Level)
            for index in range(len(level.blocks)):
                x_BCHW = level.run_block(index, x_BCHW, embedding_BE, features)
                skips.append(x_BCHW)
            if level.resample is not None:
                x_BCHW = level.resample(x_BCHW)
                skips.append(x_BCHW)
        first, attention, second = self.middle
        x_BCHW = second(attention(first(x_BCHW, embedding_BE)), embedding_BE)
        if features is not None:
            features.append(x_BCHW)
        for level in self.up:
            assert isinstance(level, Level)
            for index in range(len(level.blocks)):
                x_BCHW = level.run_block(index, torch.cat([x_BCHW, skips.pop()], dim=1), embedding_BE, features)
            if level.resample is not None:
                x_BCHW = level.resample(x_BCHW)
        answer_BCHW = self.conv_out(activated(normalised(self.norm_out, x_BCHW)))
        if self.watch is not None and features is not None:
            self.watch.asked, self.watch.answer, self.watch.features = asked, answer_BCHW, features
        return answer_BCHW


def build_network(config: CoreConfig, num_classes: int) -> UNet:
    """Return the network of a configuration, with weights drawn from the run's seed."""
    channels, size, _ = config.data.image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, Purpose.WEIGHTS))
        classes = num_classes if config.model.class_conditional else 0
        return UNet(config.model, size, channels, classes, config.upsample.channels(channels))
