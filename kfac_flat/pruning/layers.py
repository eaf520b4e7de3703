"""Modules that have channels: those whose outputs are neurons, and those that have numbers for each channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kfac_flat import attention

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCERS = (nn.Linear, *CONVS, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
PASSING = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.PReLU)
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(nn.LogSigmoid, nn.Threshold, nn.RReLU),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)

# Subclasses in other packages whose own forward computes what torch's does, and then calls these activations of theirs;
# by their full name, so that they need not be installed.
_LIKE_TORCHS: dict[str, tuple[str, ...]] = {
    "timm.layers.linear.Linear": (),
    "timm.layers.norm_act.BatchNormAct2d": ("drop", "act"),
}


def _is(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Tell whether the module is one of ``kinds``, or a subclass that computes the same, from plain parameters."""
    if not isinstance(module, kinds) or "weight" not in module._parameters:
        return False
    return any(isinstance(module, kind) and _runs_as(module, kind) for kind in kinds)


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether the module's forward is that of the class, or one known to do the same up to an activation."""
    own = type(module)
    if own.forward is kind.forward:
        return True
    then = _LIKE_TORCHS.get(f"{own.__module__}.{own.__qualname__}")
    return then is not None and all(type(getattr(module, name)) in ACTIVATIONS for name in then)


def is_producer(module: nn.Module | SizeAttribute) -> bool:
    """Tell whether the module's output channels are neurons: Linear, convolutions, the projections of attention."""
    if isinstance(module, SizeAttribute):
        return False
    plain = _is(module, PRODUCERS) and not (isinstance(module, TRANSPOSED) and module.groups > 1)
    return plain or is_attention(module)


def is_attention(module: nn.Module) -> bool:
    """Tell whether the module is torch's multi-head attention over sequences of one width."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and attention.is_attention(module)
        and module._parameters.get("in_proj_weight") is not None  # asked of no attribute: that would be traced
        and module.bias_k is None
        and not module.add_zero_attn
    )


@dataclass(frozen=True)
class SizeAttribute:
    """A number that a module holds and that is to follow the number of neurons, such as that of attention heads."""

    module: nn.Module
    name: str

    @property
    def value(self) -> int:
        """The number."""
        value: int = getattr(self.module, self.name)
        return value


def part(model: nn.Module, path: str) -> nn.Module | SizeAttribute:
    """Return what is cut under this name: a module, or a number that one holds.

    Raises:
        AttributeError: if there is none.
    """
    holder, _, name = path.rpartition(".")
    owner = model.get_submodule(holder)
    if isinstance(vars(owner).get(name), int):
        return SizeAttribute(owner, name)
    return owner.get_submodule(name)


def is_depthwise(module: nn.Module | SizeAttribute) -> bool:
    """Tell whether every output channel of a convolution reads a single input channel, with which it goes."""
    return isinstance(module, CONVS) and module.groups == module.in_channels > 1


def passes_channels(module: nn.Module) -> bool:
    """Tell whether the module has a number or two for each channel and hands the channels on: norms, PReLU."""
    return _is(module, PASSING) and not (isinstance(module, nn.PReLU) and module.num_parameters == 1)


def has_channels(module: nn.Module) -> bool:
    """Tell whether the module's tensors are cut along with the neurons."""
    return is_producer(module) or passes_channels(module)


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the weight by which a producer reads: ``[C_out, C_in / groups, *kernel]``, unless it is TRANSPOSED."""
    weight: nn.Parameter = module.in_proj_weight if is_attention(module) else module.weight  # type: ignore[assignment]
    return weight


def channel_counts(module: nn.Module | SizeAttribute) -> tuple[int, int]:
    """Number of input and output channels of a module that has channels; an attribute has outputs only.

    Raises:
        TypeError: if it has none.
    """
    if isinstance(module, SizeAttribute):
        return 0, module.value
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight.shape[1], module.in_proj_weight.shape[0]
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, module.num_channels
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return module.in_channels, module.out_channels
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        return module.num_features, module.num_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters, module.num_parameters
    raise TypeError(f"{type(module).__name__} has no channels that could be cut")


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """Axis of a module's input along which its channels lie."""
    if isinstance(module, nn.Linear):
        return x.dim() - 1
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return x.dim() - 1 - len(module.kernel_size)
    spatial = [i + 1 for i, kind in enumerate(INSTANCE_NORMS) if isinstance(module, kind)]
    return x.dim() - 1 - spatial[0] if spatial else 1


def positions(module: nn.Module, x: Tensor, result: Tensor) -> int:
    """Return how often a layer's weight is applied: for each output position, or input position if it is TRANSPOSED."""
    over = x if isinstance(module, TRANSPOSED) else result
    return over.numel() // max(1, over.shape[channel_axis(module, over)])
