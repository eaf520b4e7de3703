"""Whole networks as people write them, small: generators, U-Nets, mixers, language models, recurrent ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, LENGTH, WIDTH, HEADS = 13, 6, 16, 4


def generator() -> nn.Module:
    """DCGAN: up-convolutions from noise to an image."""

    def up(c_in: int, c_out: int, **options: int) -> list[nn.Module]:
        conv = nn.ConvTranspose2d(c_in, c_out, 4, bias=False, **options)
        return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *up(8, 24), *up(24, 16, stride=2, padding=1), *up(16, 10, stride=2, padding=1),
        nn.ConvTranspose2d(10, 3, 4, stride=2, padding=1, bias=False), nn.Tanh(),
    )  # fmt: skip


class UNet(nn.Module):
    """Two levels down and up again, each level handed over and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.middle, self.bottom = self.twice(3, 8), self.twice(8, 12), self.twice(12, 16)
        self.up1, self.up2 = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.join1, self.join2 = self.twice(24, 12), self.twice(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def twice(c_in: int, c_out: int) -> nn.Module:
        modules: list[nn.Module] = []
        for a in (c_in, c_out):
            modules += [nn.Conv2d(a, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        return nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        top = self.top(x)
        middle = self.middle(F.max_pool2d(top, 2))
        bottom = self.bottom(F.max_pool2d(middle, 2))
        x = self.join1(torch.cat([self.up1(bottom), middle], dim=1))
        return self.head(self.join2(torch.cat([self.up2(x), top], dim=1)))


class Mixer(nn.Module):
    """MLPs over patches and over channels in turn."""

    class Block(nn.Module):
        def __init__(self, patches: int, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.patches = nn.Sequential(nn.Linear(patches, 20), nn.GELU(), nn.Linear(20, patches))
            self.channels = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.blocks = nn.Sequential(self.Block(9, WIDTH), self.Block(9, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))


class GPT(nn.Module):
    """A causal language model; its head may share its weight with the embedding."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_head, self.head_dim = HEADS, WIDTH // 2
            self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv = nn.Linear(WIDTH, 3 * HEADS * self.head_dim)
            self.proj = nn.Linear(HEADS * self.head_dim, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

        def attend(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            q, k, v = (s.view(n, t, self.n_head, self.head_dim).transpose(1, 2) for s in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.proj(y.transpose(1, 2).reshape(n, t, -1))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


class Recurrent(nn.Module):
    """A classifier of sequences by an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.before = nn.Embedding(VOCABULARY, 10), nn.Linear(10, 12)
        self.lstm = nn.LSTM(12, 9, batch_first=True, bidirectional=True)
        self.after = nn.Sequential(nn.Linear(18, 14), nn.ReLU(), nn.Linear(14, 11), nn.ReLU(), nn.Linear(11, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.lstm(torch.tanh(self.before(self.tokens(tokens))))
        return self.after(outputs.mean(dim=1))


class Transformer(nn.Module):
    """An encoder of torch's own attention; where padding is True, there is no token."""

    class Block(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

        def forward(self, x: Tensor, padding: Tensor, hidden: Tensor) -> Tensor:
            y, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False, attn_mask=hidden)
            x = self.norm1(x + y)
            return self.norm2(x + self.down(F.relu(self.up(x))))

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(self.Block(batch_first) for _ in range(2))
        self.register_buffer("hidden", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.embed(x)
        x = x if self.batch_first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x, padding, self.hidden)
        return self.head(x.mean(dim=1 if self.batch_first else 0))


def noise(n: int) -> Tensor:
    return torch.randn(n, 8, 1, 1, dtype=torch.float64)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 12, 12, dtype=torch.float64)


def texts(n: int) -> Tensor:
    return torch.randint(VOCABULARY, (n, LENGTH))


def padded(n: int) -> tuple[Tensor, Tensor]:
    padding = torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (n, 1))
    return torch.randn(n, LENGTH, 5, dtype=torch.float64), padding


@dataclass(frozen=True)
class Specimen:
    """A network and how it is called.

    Attributes:
        make: Builds it.
        inputs: What so many examples of it are.
        share: The share of its neurons that can go, to two digits.
        reasons: What is said of the others, in part, by the layers' names.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    share: float
    reasons: dict[str, str]


OUTPUT, NORM = "forms the model's output", "takes its statistics over all neurons"
TIED = "goes together with what is no neuron"  # an embedding, or what a LayerNorm made

MIXER = {f"blocks.{i}.{part}.2": NORM for i in range(2) for part in ("patches", "channels")}
LANGUAGE = {f"blocks.{i}.{part}": TIED for i in range(2) for part in ("proj", "mlp.2")}
ENCODER = {
    "embed": NORM, "blocks.0.attention.out_proj": NORM, "blocks.0.down": TIED, "blocks.1.attention.out_proj": TIED,
    "blocks.1.down": TIED,
}  # fmt: skip

ZOO = {
    "generator": Specimen(generator, noise, 1.0, {"9": OUTPUT}),
    "unet": Specimen(UNet, images, 1.0, {"head": OUTPUT}),
    "mixer": Specimen(Mixer, images, 0.61, {"head": OUTPUT, "embed": NORM, **MIXER}),
    "gpt": Specimen(lambda: GPT(tied=False), texts, 0.83, {"head": OUTPUT, **LANGUAGE}),
    "gpt_tied": Specimen(lambda: GPT(tied=True), texts, 0.83, {"head": OUTPUT, **LANGUAGE}),
    "lstm": Specimen(Recurrent, texts, 0.68, {"before": "lstm (LSTM) has no rule", "after.4": OUTPUT}),
    "transformer": Specimen(Transformer, padded, 0.71, {"head": OUTPUT, **ENCODER}),
    "transformer_batch_second": Specimen(lambda: Transformer(False), padded, 0.71, {"head": OUTPUT, **ENCODER}),
}
