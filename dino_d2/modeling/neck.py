"""Projects backbone features to a common width and appends coarser levels."""

from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..names import hint, plural
from ..ranges import require_whole


class ChannelMapper(nn.Module):
    """One 1x1 convolution per backbone feature, then stride-2 convolutions for further levels.

    Args:
        input_shape: channels of every backbone feature
        in_features: the features to use, finest first
        out_channels: C
        num_levels: L; the levels beyond `in_features` come from the last of them
        norm: whether a GroupNorm follows each convolution; DETR has none

    Raises:
        ValueError: a feature is unknown, there are fewer levels than features, or the channels do
            not divide into 32 groups
    """

    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        in_features: Sequence[str],
        out_channels: int = 256,
        num_levels: int = 4,
        norm: bool = True,
    ):
        super().__init__()
        require_whole(num_levels=num_levels, out_channels=out_channels)
        if not in_features:
            raise ValueError("in_features is empty: name features of the backbone")
        for name in in_features:
            if name not in input_shape:
                raise ValueError(
                    f"in_features has {name!r}, which the backbone does not have; "
                    f"{hint(str(name), input_shape)}"
                )
        if num_levels < len(in_features):
            raise ValueError(
                f"{plural(num_levels, 'level')} cannot hold the features {list(in_features)}: "
                f"num_levels has to be {len(in_features)} or more, or use fewer in_features"
            )
        if norm and out_channels % 32:
            raise ValueError(
                f"{plural(out_channels, 'channel')} (embed_dim) cannot be divided into "
                "GroupNorm's 32 groups: take a multiple of 32"
            )
        self.in_features = list(in_features)
        channels = [input_shape[name].channels for name in in_features]
        self.projections = nn.ModuleList(
            conv_norm(c, out_channels, kernel=1, norm=norm) for c in channels
        )
        widths = [channels[-1]] + [out_channels] * (num_levels - len(channels))
        self.downsamples = nn.ModuleList(
            conv_norm(width, out_channels, kernel=3, stride=2, norm=norm) for width in widths[:-1]
        )

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Returns one (B, C, H_l, W_l) map per level, finest first."""
        inputs = [features[name] for name in self.in_features]
        levels = [project(x) for project, x in zip(self.projections, inputs, strict=True)]
        coarse = inputs[-1]
        for downsample in self.downsamples:
            coarse = downsample(coarse)
            levels.append(coarse)
        return levels


def conv_norm(
    in_channels: int, out_channels: int, *, kernel: int, stride: int = 1, norm: bool = True
) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.get_parameter("bias"))
    return nn.Sequential(conv, nn.GroupNorm(32, out_channels)) if norm else nn.Sequential(conv)
