"""Small networks, one per way in which layers can read each other's channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVS, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCH_NORMS, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)


def conv(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, **{"padding": kernel // 2, **options})


class Net(nn.Module):
    """Modules by keyword, and a forward function of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        return self._forward(self, x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn_flatten() -> nn.Module:
    return nn.Sequential(
        conv(2, 6), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 3)
    )


def conv_without_bias() -> nn.Module:
    return nn.Sequential(
        conv(2, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 7, bias=False, stride=2), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3, bias=False),
    )  # fmt: skip


class Block(nn.Module):
    """Residual block with BatchNorm and a 1x1 shortcut where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c_out, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv(c_out, c_out, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if c_in != c_out:
            self.shortcut = nn.Sequential(conv(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


def residual() -> nn.Module:
    return nn.Sequential(
        conv(2, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Block(6, 6), Block(6, 8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def densenet() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = torch.cat([x, net.conv1(F.relu(net.bn1(x)))], 1)
        x = torch.cat([x, net.conv2(F.relu(net.bn2(x)))], dim=1)
        return net.fc(F.adaptive_avg_pool2d(F.relu(net.bn3(x)), 1).flatten(1))

    return Net(
        forward, stem=conv(2, 5), bn1=nn.BatchNorm2d(5), conv1=conv(5, 4), bn2=nn.BatchNorm2d(9), conv2=conv(9, 4),
        bn3=nn.BatchNorm2d(13), fc=nn.Linear(13, 3),
    )  # fmt: skip


def concat_of_flattened() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc(torch.cat([F.relu(net.a(x)).flatten(1), F.relu(net.b(x)).flatten(1)], 1))

    return Net(forward, a=conv(2, 4), b=conv(2, 5), fc=nn.Linear(9 * 36, 3))


def concat_over_examples() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        both = F.relu(torch.cat([net.a(x), net.b(x)], 0))
        return net.fc(both.mean((2, 3)))

    return Net(forward, a=conv(2, 6), b=conv(2, 6), fc=nn.Linear(6, 3))


def depthwise_separable() -> nn.Module:
    return nn.Sequential(
        conv(2, 6), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 6, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
        conv(6, 8, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 3),
    )  # fmt: skip


def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(
        conv(2, 5), nn.ReLU(), conv(5, 10, groups=5), nn.BatchNorm2d(10), nn.ReLU(), conv(10, 4, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 36, 3),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        conv(2, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12, groups=2), nn.ReLU(), conv(12, 6, groups=3, bias=False),
        nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(6 * 4, 3),
    )  # fmt: skip


def functional() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.conv1(x))
        x = F.max_pool2d(x, 2)
        x = F.leaky_relu(net.conv2(x), 0.1, inplace=True)
        x = F.adaptive_avg_pool2d(F.pad(x, (1, 0, 1, 1)), (2, 1))
        x = torch.relu(net.fc1(x.view(x.size(0), -1)))
        return net.fc2(torch.sigmoid(x) * 2 - 1)

    return Net(forward, conv1=conv(2, 6), conv2=conv(6, 5), fc1=nn.Linear(10, 9), fc2=nn.Linear(9, 3))


def mean_pooled() -> nn.Module:
    return Net(lambda net, x: net.fc(F.gelu(net.conv(x)).mean((2, 3))), conv=conv(2, 8), fc=nn.Linear(8, 3))


def torch_flatten() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc(torch.flatten(net.pool(F.relu(net.conv(x))), start_dim=1))

    return Net(forward, conv=conv(2, 8), pool=nn.AdaptiveMaxPool2d((2, 1)), fc=nn.Linear(16, 3))


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = conv(width, 4, 1), conv(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


def squeeze_excite() -> nn.Module:
    return nn.Sequential(conv(2, 8), nn.ReLU(), Gate(8), conv(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def in_place_sums() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        y = net.b(x)
        y += x
        y.add_(net.c(x)).relu_()
        return net.fc(y.flatten(1))

    return Net(forward, a=conv(2, 6), b=conv(6, 6), c=conv(6, 6, 1), fc=nn.Linear(6 * 36, 3))


def called_twice() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = F.relu(net.shared(x))
        return net.fc(F.relu(net.shared(x)).mean((2, 3)))

    return Net(forward, stem=conv(2, 7), shared=conv(7, 7), fc=nn.Linear(7, 3))


def tied_linears() -> nn.Module:
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    net[4].weight = net[2].weight
    return net


def permuted_flatten() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc(F.relu(net.conv(x)).permute(0, 2, 3, 1).flatten(1))

    return Net(forward, conv=conv(2, 6), fc=nn.Linear(6 * 36, 3))


def tokens() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.embed(x)).flatten(2).transpose(1, 2)
        x = x + net.down(F.gelu(net.up(x)))
        return net.head(x.mean(1))

    embed = conv(2, 6, 2, padding=0, stride=2)
    return Net(forward, embed=embed, up=nn.Linear(6, 10), down=nn.Linear(10, 6), head=nn.Linear(6, 3))


def batchnorm1d() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8, bias=False), nn.BatchNorm1d(8, affine=False),
        nn.ELU(), nn.Linear(8, 3),
    )  # fmt: skip


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 5, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 4, 3),
    )  # fmt: skip


def auxiliary_head() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        x = F.relu(net.conv1(x))
        y = net.fc(F.relu(net.conv2(x)).mean((2, 3)))
        return (y, net.aux(x.flatten(1))) if net.training else y

    return Net(forward, conv1=conv(2, 6), conv2=conv(6, 7), aux=nn.Linear(6 * 36, 3), fc=nn.Linear(7, 3))


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(8, 7), nn.Sequential(nn.Sigmoid(), nn.Linear(7, 5)))),
        nn.Sequential(nn.Sequential(), nn.Identity(), nn.ReLU(), nn.Linear(5, 3)),
    )


class Keywords(nn.Module):
    """Two inputs by name, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.fc = conv(2, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, image: Tensor, vector: Tensor, scale: float = 2.0) -> Tensor:
        return self.fc(F.relu(self.image(image).mean((2, 3)) * scale + self.vector(vector)))


class FromDict(nn.Module):
    """One argument, a dict of tensors; a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.fc = conv(2, 5), nn.Linear(6, 4), nn.Linear(9, 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = torch.cat((self.image(batch["image"]).amax((2, 3)), self.vector(batch["vector"])), dim=-1)
        return {"logits": self.fc(F.relu(features))}


@dataclass(frozen=True)
class Case:
    """A network and how it is called."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]

    def build(self, seed: int = 0, n: int = 6) -> tuple[nn.Module, Any]:
        """Return the network in float64 with everything random, BatchNorm statistics calibrated, and its inputs."""
        torch.manual_seed(seed)
        model, inputs = self.make().double(), self.inputs(n)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, NORMS) and module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.5)
                elif isinstance(module, LAYERS):
                    module.weight.mul_(2)  # few units that never fire
                    if module.bias is not None:
                        module.bias.normal_(0, 0.1)
            model.train()
            for _ in range(3):
                call(model, inputs)
        return model, inputs


def call(model: nn.Module, inputs: Any) -> Any:
    """Call the model the way NeuronPruner reads example_inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def vectors(n: int) -> Tensor:
    return torch.randn(n, 6, dtype=torch.float64)


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 6, 6, dtype=torch.float64)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 2, 10, dtype=torch.float64)


def keywords(n: int) -> dict[str, Any]:
    return {"vector": vectors(n), "image": images(n)}


def channel_shuffle() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        left, right = F.relu(net.stem(x)).chunk(2, dim=1)
        x = torch.cat([left, F.relu(net.branch(right))], 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    return Net(forward, stem=conv(2, 8), branch=conv(4, 4), last=conv(8, 6), head=nn.Linear(6, 3))


def unet() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        top = F.relu(net.norm(net.down(x)))
        low = F.relu(net.low(F.max_pool2d(top, 2)))
        up = torch.cat([F.relu(net.up(low)), F.interpolate(low, scale_factor=2), top], 1)
        return net.head(F.adaptive_avg_pool2d(net.last(up), 1).flatten(1))

    return Net(
        forward, down=conv(2, 6), norm=nn.InstanceNorm2d(6, affine=True), low=conv(6, 5),
        up=nn.ConvTranspose2d(5, 4, 2, stride=2), last=nn.Sequential(conv(15, 7), nn.PReLU(7)), head=nn.Linear(7, 3),
    )  # fmt: skip


def gate_by_expand_as() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        gate = torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True))).expand_as(x)
        return net.head(F.relu(net.b(x * gate + torch.zeros_like(x))).mean((2, 3)))

    return Net(forward, a=conv(2, 8), gate=conv(8, 8, 1), b=conv(8, 6), head=nn.Linear(6, 3))


def group_norms() -> nn.Module:
    return nn.Sequential(
        *(conv(2, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 6), nn.GroupNorm(6, 6, affine=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def pixel_shuffles() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.up(net.a(x)))
        return net.head(F.relu(net.b(F.pixel_unshuffle(x, 2))).mean((2, 3)))

    return Net(forward, a=conv(2, 16), up=nn.PixelShuffle(2), b=conv(16, 6), head=nn.Linear(6, 3))


class Attention(nn.Module):
    """Heads as people write them: ``attend`` says how, from what ``qkv`` projects."""

    def __init__(self, attend: Callable[[Any, Tensor], Tensor], qkv: bool = True, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.all_heads, self.attend = heads, 3, 3 * heads, attend
        if qkv:
            self.qkv = nn.Linear(8, 9 * heads)
        else:
            self.q, self.k, self.v = (nn.Linear(8, 3 * heads) for _ in range(3))
        self.proj = nn.Linear(3 * heads, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self, x))


def chunked_heads(net: Any, x: Tensor) -> Tensor:
    q, k, v = net.qkv(x).chunk(3, dim=-1)
    q, k, v = (t.view(x.shape[0], x.shape[1], -1, net.head_dim).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def packed_heads(net: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = net.qkv(x).reshape(n, t, 3, net.num_heads, net.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q * net.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(n, t, -1)


def heads_by_attributes(net: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, net.num_heads, net.head_dim) for layer in (net.q, net.k, net.v))
    weights = F.softmax(torch.einsum("nthd, nshd -> nhts", q, k) / net.head_dim**0.5, dim=-1)
    return torch.einsum("nhts,nshd->nthd", weights, v).contiguous().view(n, t, net.all_heads)


def transformer(attend: Callable[[Any, Tensor], Tensor], qkv: bool = True) -> Callable[[], nn.Module]:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.embed(x.transpose(1, 2))
        x = x + net.attention(net.norm1(x))
        x = x + net.mlp(net.norm2(x))
        return net.head(x.mean(1))

    return lambda: Net(
        forward, embed=nn.Linear(2, 8), norm1=nn.LayerNorm(8), attention=Attention(attend, qkv), norm2=nn.LayerNorm(8),
        mlp=nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), head=nn.Linear(8, 3),
    )  # fmt: skip


CASES = {
    "group_norms": Case(group_norms, images),
    "pixel_shuffles": Case(pixel_shuffles, images),
    "chunked_heads": Case(transformer(chunked_heads), sequences),
    "packed_heads": Case(transformer(packed_heads), sequences),
    "heads_by_attributes": Case(transformer(heads_by_attributes, qkv=False), sequences),
    "channel_shuffle": Case(channel_shuffle, images),
    "unet": Case(unet, images),
    "gate_by_expand_as": Case(gate_by_expand_as, images),
    "mlp": Case(mlp, vectors),
    "cnn_flatten": Case(cnn_flatten, images),
    "conv_without_bias": Case(conv_without_bias, images),
    "residual": Case(residual, images),
    "densenet": Case(densenet, images),
    "concat_of_flattened": Case(concat_of_flattened, images),
    "concat_over_examples": Case(concat_over_examples, images),
    "depthwise_separable": Case(depthwise_separable, images),
    "depthwise_multiplier": Case(depthwise_multiplier, images),
    "grouped": Case(grouped, images),
    "functional": Case(functional, images),
    "mean_pooled": Case(mean_pooled, images),
    "torch_flatten": Case(torch_flatten, images),
    "squeeze_excite": Case(squeeze_excite, images),
    "in_place_sums": Case(in_place_sums, images),
    "called_twice": Case(called_twice, images),
    "tied_linears": Case(tied_linears, vectors),
    "permuted_flatten": Case(permuted_flatten, images),
    "tokens": Case(tokens, images),
    "batchnorm1d": Case(batchnorm1d, vectors),
    "conv1d": Case(conv1d, sequences),
    "auxiliary_head": Case(auxiliary_head, images),
    "nested": Case(nested, vectors),
    "keywords": Case(Keywords, keywords),
    "dict_of_inputs": Case(FromDict, lambda n: (keywords(n),)),
}
