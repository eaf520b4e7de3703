"""Settings of every test run, those of the packages' own examples included."""

# Lightning, timm and transformers import torchvision where it is installed, which fails beside some builds of torch.
import examples.torchvision_models  # noqa: F401
