"""Checkpoints of other projects: the imported encoder computes the same as the module that was saved.

Each module is built as its project builds it, and saved with the project's parameter names and other contents.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from weights import outputs, randomize_norms

from fastsimclr import UserError, encoder, import_weights
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.models.resnet import ENCODERS
from fastsimclr.pretrained import open_pretrained
from fastsimclr.pretrained.layouts import GOOGLE_AUGMENTATION, architecture_of, find_weights

State = dict[str, Any]
pytestmark = pytest.mark.usefixtures("one_thread")


def prefixed(prefix: str, module: nn.Module | State) -> State:
    """Return the module's state dict with `prefix` before each name."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return OrderedDict((prefix + name, value) for name, value in state.items())


def resnet(name: str = "resnet18", seed: int = 0, **options: Any) -> ResNet:
    """Return torchvision's ResNet with fc."""
    torch.manual_seed(seed)
    return randomize_norms(getattr(torchvision.models, name)(num_classes=10, **options), seed)


def without_fc(model: ResNet) -> ResNet:
    model.fc = nn.Identity()
    return model


def for_cifar(model: ResNet, padding: int = 1) -> ResNet:
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=padding, bias=False)
    model.maxpool = nn.Identity()
    return model


# Modules of the projects


def vissl_trunk(block: type[Any], blocks: list[int], width: int) -> nn.Module:
    """vissl/models/trunks/resnext.py: torchvision's layers, rebuilt with another width, in a ModuleDict."""
    model = ResNet(block, blocks)
    model.inplanes = 64 * width
    trunk = nn.Module()
    trunk._feature_blocks = nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 64 * width, kernel_size=7, stride=2, padding=3, bias=False),
            "bn1": nn.BatchNorm2d(64 * width),
            "conv1_relu": model.relu,
            "maxpool": model.maxpool,
            **{
                f"layer{n + 1}": model._make_layer(block, 64 * 2**n * width, blocks[n], stride=1 if n == 0 else 2)
                for n in range(4)
            },
            "avgpool": model.avgpool,
            "flatten": nn.Flatten(1),
        }
    )
    trunk.forward = lambda x: nn.Sequential(*trunk._feature_blocks.values())(x)  # type: ignore[method-assign]
    return randomize_norms(trunk)


class DownsampleFirst(Bottleneck):
    """resnet_wider.py of tonylins/simclr-converter registers the downsample first, because its converter needs that."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: Any = None, *others: Any, **more: Any):
        super().__init__(inplanes, planes, stride, downsample, *others, **more)
        if downsample is not None:
            registered = {"downsample": downsample} | dict(self._modules)
            self._modules.clear()
            self._modules.update(registered)


def tonylins(width: int) -> ResNet:
    torch.manual_seed(0)
    model = ResNet(DownsampleFirst, [3, 4, 6, 3], num_classes=10)
    model.inplanes = 64 * width
    model.conv1 = nn.Conv2d(3, 64 * width, kernel_size=7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(64 * width)
    for n, blocks in enumerate([3, 4, 6, 3]):
        layer = model._make_layer(DownsampleFirst, 64 * 2**n * width, blocks, stride=1 if n == 0 else 2)
        setattr(model, f"layer{n + 1}", layer)
    model.fc = nn.Linear(2048 * width, 10)
    randomize_norms(model)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.num_batches_tracked.zero_()  # type: ignore[union-attr]
        if isinstance(part, nn.Conv2d):  # the converter permutes TensorFlow's order of dimensions
            part.weight.data = part.weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return model


def batch_norm(features: int, relu: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(features), nn.ReLU() if relu else nn.Identity())


def conv(features: int, out: int, side: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(features, out, side, stride, (side - 1) // 2, bias=False)


class SimclrV2Block(nn.Module):
    """BottleneckBlock of Separius/SimCLRv2-Pytorch without selective kernels."""

    def __init__(self, features: int, planes: int, stride: int, project: bool) -> None:
        super().__init__()
        self.projection: nn.Module = nn.Identity()
        if project:
            self.projection = nn.Sequential()
            self.projection.shortcut = conv(features, 4 * planes, 1, stride)
            self.projection.bn = batch_norm(4 * planes, relu=False)
        self.net = nn.Sequential(
            *(conv(features, planes, 1), batch_norm(planes), conv(planes, planes, 3, stride), batch_norm(planes)),
            *(conv(planes, 4 * planes, 1), batch_norm(4 * planes, relu=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.projection(x) + self.net(x))


class SimclrV2(nn.Module):
    """ResNet of depth 50 of Separius/SimCLRv2-Pytorch, without fc."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        features = 64 * width
        stages: list[nn.Module] = [nn.Sequential(conv(3, features, 7, 2), batch_norm(features), nn.MaxPool2d(3, 2, 1))]
        for n, blocks in enumerate([3, 4, 6, 3]):
            stage, planes = nn.Sequential(), 64 * 2**n * width
            stage.blocks = nn.Sequential()
            for block in range(blocks):
                stride = 2 if block == 0 and n > 0 else 1
                stage.blocks.append(SimclrV2Block(features, planes, stride, project=block == 0))
                features = 4 * planes
            stages.append(stage)
        self.net = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.net(x).mean(dim=[2, 3])
        return h


class ShortcutBlock(nn.Module):
    """The basic block of SupContrast's ResNets, lightly's ResNetGenerator and many CIFAR ResNets."""

    def __init__(self, features: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(features, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or features != planes:
            self.shortcut = nn.Sequential(conv(features, planes, 1, stride), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class ShortcutResNet(nn.Module):
    """ResNet-18 of these blocks, with the stem's ReLU in forward()."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = conv(3, 64), nn.BatchNorm2d(64)
        for n in range(4):
            planes, stride = 64 * 2**n, 1 if n == 0 else 2
            first = ShortcutBlock(max(64, planes // 2), planes, stride)
            setattr(self, f"layer{n + 1}", nn.Sequential(first, ShortcutBlock(planes, planes, 1)))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return nn.Sequential(self.layer1, self.layer2, self.layer3, self.layer4, self.avgpool, nn.Flatten())(x)


# Contents of the projects' checkpoints


class Saved(NamedTuple):
    """A module, the contents of its checkpoint, and the expected result of importing it."""

    module: nn.Module
    contents: Any
    origin: str
    architecture: tuple[str, int, str] = ("resnet18", 1, "imagenet")
    augmentation: Augmentation | None = None


def saved_by_torchvision() -> Saved:
    model = resnet("resnet50")
    state = model.state_dict()
    return Saved(without_fc(model), state, "a ResNet's state dict", ("resnet50", 1, "imagenet"))


def saved_by_vissl(block: type[Any] = BasicBlock, width: int = 1) -> Saved:
    trunk = vissl_trunk(block, [3, 4, 6, 3], width)
    heads = [{"clf.0.weight": torch.zeros(2, 2)}]
    base_model = {"model": {"trunk": trunk.state_dict(), "heads": heads}, "meta": {}}
    classy = {"base_model": base_model, "train": True, "phase_idx": 99, "losses": [1.0], "optimizer": {}, "hooks": {}}
    contents = {"phase_idx": 100, "iteration": 5, "loss": {"pos_mask": torch.zeros(2)}, "classy_state_dict": classy}
    name = "resnet50" if block is Bottleneck else "resnet34"
    return Saved(trunk, contents, "VISSL", (name, width, "imagenet"))


def lightning(state: State) -> State:
    """Return the contents of a checkpoint as Lightning's save_checkpoint writes it for this state dict."""
    others: State = {"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.1.0", "optimizer_states": []}
    return others | {"state_dict": state, "hyper_parameters": {"knn_k": 200}, "callbacks": {}}


def saved_by_lightly_in_a_sequential() -> Saved:
    """As in lightly's examples and tutorials."""
    backbone = nn.Sequential(*list(resnet().children())[:-1])
    head = prefixed("projection_head.", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    return Saved(backbone, lightning(prefixed("backbone.", backbone) | head), "lightly")


def saved_by_lightly_for_cifar() -> Saved:
    """As in lightly's examples, with the small stem and nn.Identity() instead of the max-pool."""
    backbone = nn.Sequential(*list(randomize_norms(for_cifar(resnet())).children())[:-1])
    return Saved(backbone, lightning(prefixed("backbone.", backbone)), "lightly", ("resnet18", 1, "small"))


def saved_by_lightly_generator() -> Saved:
    """As in lightly's CIFAR-10 benchmark: its own ResNet in a Sequential, which drops the stem's ReLU."""
    model = randomize_norms(ShortcutResNet())
    backbone = nn.Sequential(*model.children())
    return Saved(backbone, lightning(prefixed("backbone.", backbone)), "lightly", ("resnet18", 1, "small"))


def saved_by_lightly_benchmark() -> Saved:
    model = without_fc(resnet("resnet50"))
    head = prefixed("projection_head.layers.", nn.Sequential(nn.Linear(4, 4)))
    contents = lightning(prefixed("backbone.", model) | head | {"online_classifier.linear.weight": torch.zeros(2, 2)})
    return Saved(model, contents, "lightly", ("resnet50", 1, "imagenet"))


def saved_by_solo_learn(prefix: str = "backbone.") -> Saved:
    model = without_fc(resnet())
    others = prefixed("classifier.", nn.Linear(4, 4)) | prefixed("projector.", nn.Sequential(nn.Linear(4, 4)))
    momentum = prefixed(f"momentum_{prefix}", resnet(seed=1))
    return Saved(model, lightning(momentum | prefixed(prefix, model) | others), "solo-learn")


def saved_by_solo_learn_for_cifar() -> Saved:
    model = randomize_norms(for_cifar(without_fc(resnet()), padding=2))
    state = prefixed("backbone.", model) | prefixed("classifier.", nn.Linear(4, 4))
    origin = "solo-learn, with its stem for CIFAR, padded by 2"
    return Saved(model, lightning(state), origin, ("resnet18", 1, "small"))


def saved_by_tonylins(width: int) -> Saved:
    model = tonylins(width)
    contents = {"state_dict": model.state_dict()}
    origin = "google-research's SimCLR by tonylins/simclr-converter"
    return Saved(without_fc(model), contents, origin, ("resnet50", width, "imagenet"), GOOGLE_AUGMENTATION)


def saved_by_separius() -> Saved:
    torch.manual_seed(0)
    model = randomize_norms(SimclrV2())
    head = {"layers.0.weight": torch.zeros(4, 4)}
    contents = {"resnet": model.state_dict() | prefixed("fc.", nn.Linear(2048, 10)), "head": head}
    origin = "google-research's SimCLRv2 by Separius/SimCLRv2-Pytorch"
    return Saved(model, contents, origin, ("resnet50", 1, "imagenet"), GOOGLE_AUGMENTATION)


def saved_by_moco() -> Saved:
    query, key = resnet(), resnet(seed=1)
    query.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), query.fc)
    state = (
        prefixed("module.encoder_k.", key) | prefixed("module.encoder_q.", query) | {"module.queue": torch.zeros(4, 4)}
    )
    contents = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    return Saved(without_fc(query), contents, "MoCo")


def saved_by_moco_v3() -> Saved:
    base, momentum = resnet(), resnet(seed=1)
    predictor = prefixed("module.predictor.", nn.Sequential(nn.Linear(4, 4)))
    state = prefixed("module.base_encoder.", base) | prefixed("module.momentum_encoder.", momentum) | predictor
    return Saved(without_fc(base), {"epoch": 300, "arch": "resnet18", "state_dict": state}, "MoCo v3")


def saved_by_supcontrast() -> Saved:
    model = randomize_norms(ShortcutResNet())
    contents = {"epoch": 1000, "model": prefixed("encoder.module.", model) | {"head.0.weight": torch.zeros(2, 2)}}
    return Saved(model, contents, "a ResNet under encoder", ("resnet18", 1, "small"))


def saved_by_sthalles() -> Saved:
    model = resnet()
    model.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), model.fc)
    state = prefixed("backbone.", model)
    return Saved(without_fc(model), {"epoch": 100, "arch": "resnet18", "state_dict": state}, "a ResNet under backbone")


def saved_by_leftthomas() -> Saved:
    """The ResNet's children in a Sequential, without the max-pool."""
    model = randomize_norms(for_cifar(resnet()))
    children = [child for name, child in model.named_children() if name not in ("maxpool", "fc")]
    f = nn.Sequential(*children)
    state = prefixed("f.", f) | {"g.0.weight": torch.zeros(2, 2)}
    return Saved(f, state, "a ResNet's Sequential under f", ("resnet18", 1, "small"))


def saved_from_ddp_and_compile() -> Saved:
    model = without_fc(resnet())
    return Saved(model, {"model": prefixed("_orig_mod.module.net.", model)}, "a ResNet under net")


SAVED: dict[str, Callable[[], Saved]] = {
    "torchvision": saved_by_torchvision,
    "VISSL": saved_by_vissl,
    "VISSL, bottlenecks": lambda: saved_by_vissl(Bottleneck),
    "VISSL, width 2": lambda: saved_by_vissl(width=2),
    "lightly, Sequential": saved_by_lightly_in_a_sequential,
    "lightly, CIFAR": saved_by_lightly_for_cifar,
    "lightly, ResNetGenerator": saved_by_lightly_generator,
    "lightly, benchmark": saved_by_lightly_benchmark,
    "solo-learn": saved_by_solo_learn,
    "solo-learn, older": lambda: saved_by_solo_learn("encoder."),
    "solo-learn, CIFAR": saved_by_solo_learn_for_cifar,
    "tonylins": lambda: saved_by_tonylins(1),
    "tonylins, width 2": lambda: saved_by_tonylins(2),
    "Separius": saved_by_separius,
    "MoCo": saved_by_moco,
    "MoCo v3": saved_by_moco_v3,
    "SupContrast": saved_by_supcontrast,
    "sthalles": saved_by_sthalles,
    "leftthomas": saved_by_leftthomas,
    "DDP and compile": saved_from_ddp_and_compile,
}


@pytest.mark.parametrize("project", SAVED)
@pytest.mark.slow
def test_imported_encoder_computes_the_same_as_the_saved_module(project: str, tmp_path: Path) -> None:
    saved = SAVED[project]()
    torch.save(saved.contents, tmp_path / "theirs.pth")
    opened = open_pretrained(tmp_path / "theirs.pth")
    imported = opened.encoder
    assert (imported.spec.name, imported.spec.width, imported.spec.stem) == saved.architecture
    assert (opened.origin, opened.augmentation, opened.config) == (saved.origin, saved.augmentation, None)
    # Not bit-identical: Separius' pooling is a mean, and memory layouts differ.
    torch.testing.assert_close(outputs(imported), outputs(saved.module), rtol=1e-5, atol=1e-5)


def test_lightly_modules_have_the_names_of_these_copies(tmp_path: Path) -> None:
    models = pytest.importorskip("lightly.models", reason="lightly is not installed")
    theirs = models.ResNetGenerator("resnet-18")
    assert list(theirs.state_dict())[:-2] == list(ShortcutResNet().state_dict())  # without linear.*
    torch.manual_seed(0)
    backbone = randomize_norms(nn.Sequential(*list(theirs.children())[:-1], nn.AdaptiveAvgPool2d(1)))
    torch.save(lightning(prefixed("backbone.", backbone)), tmp_path / "theirs.ckpt")
    torch.testing.assert_close(outputs(import_weights(tmp_path / "theirs.ckpt")), outputs(backbone))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("small", [False, True])
def test_architecture_from_shapes(name: str, width: int, small: bool) -> None:
    expected = (name, width, "small" if small else "imagenet")
    with torch.device("meta"):
        spec = architecture_of(encoder(*expected).state_dict())
        assert (spec.name, spec.width, spec.stem, spec.channels) == (*expected, 3)


def test_google_recipe_is_only_used_for_the_converters_file() -> None:
    """The recipe would be wrong for other checkpoints with the same parameter names."""
    converted = tonylins(1).state_dict()
    assert find_weights(converted).augmentation == GOOGLE_AUGMENTATION
    trained = {name: value + 5 if name.endswith("num_batches_tracked") else value for name, value in converted.items()}
    assert find_weights(trained).augmentation is None
    in_torchvision_order = resnet("resnet50").state_dict()
    for name, value in converted.items():
        in_torchvision_order[name] = value
    assert find_weights(in_torchvision_order).augmentation is None


def timm_state(name: str) -> Callable[[], State]:
    return lambda: timm.create_model(name).state_dict()


def without(name: str) -> State:
    state = resnet().state_dict()
    del state[name]
    return state


def with_tensor(name: str, value: Tensor) -> State:
    return resnet().state_dict() | {name: value}


def numbered(model: nn.Module, without: tuple[str, ...]) -> State:
    """Return the state dict of the model's children in a Sequential."""
    return nn.Sequential(*(child for name, child in model.named_children() if name not in without)).state_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (timm_state("vit_tiny_patch16_224"), ["cls_token, pos_embed", "expected a ResNet's"]),
        (timm_state("resnext50_32x4d"), ["32 groups", "without groups"]),
        (timm_state("wide_resnet50_2"), ["64 channels", "128", "wide ResNet"]),
        (timm_state("resnet26"), ["(2, 2, 2, 2) bottlenecks", "resnet18, resnet34"]),
        (timm_state("resnet50d"), ["conv1.0.weight", "conv1.weight"]),
        (timm_state("seresnet50"), ["layer1.0.se.fc1.weight", "resnet50"]),
        (timm_state("resnet50_gn"), ["without bn1.running_mean", "resnet50"]),
        (lambda: with_tensor("conv1.weight", torch.zeros(64, 3, 9, 9)), ["9x9, from 3 to 64", "7x7, 5x5 or 3x3"]),
        (lambda: with_tensor("conv1.weight", torch.zeros(96, 3, 7, 7)), ["to 96", "a multiple of 64"]),
        (lambda: with_tensor("conv1.weight", torch.zeros(0, 3, 7, 7)), ["to 0"]),
        (lambda: with_tensor("conv1.weight", torch.zeros(())), ["conv1.weight"]),
        (lambda: with_tensor("layer1.0.conv2.weight", torch.zeros(64, 0, 3, 3)), ["groups"]),
        (lambda: with_tensor("bn1.bias", torch.zeros(32)), ["bn1.bias of shape (32,)", "expected (64,)"]),
        (
            lambda: with_tensor("layer1.0.extra", torch.zeros(1)),
            ["with unexpected layer1.0.extra", "those of resnet18"],
        ),
        (lambda: without("layer3.1.bn2.running_var"), ["without layer3.1.bn2.running_var", "resnet18"]),
        (lambda: prefixed("a.", resnet()) | prefixed("b.", resnet()), ["2 ResNets, under a., b.", "alone"]),
        (lambda: numbered(resnet(), ("maxpool",)), ["7x7 stem and no max-pool"]),
        (lambda: numbered(resnet(), ("layer4",)), ["blocks at [4, 5, 6]", "four layers"]),
        (
            lambda: {
                "resnet": {
                    "net.0.0.weight": torch.zeros(32, 3, 3, 3),
                    "net.1.blocks.0.net.2.main_conv.0.weight": torch.zeros(128, 64, 3, 3),
                }
            },
            ["selective kernels", "sk0"],
        ),
        (lambda: {"type": "shard_list", "shards": ["a.torch"]}, ["a dict of type, shards", "state dict"]),
        (lambda: {}, ["a dict of nothing"]),
        (lambda: [torch.zeros(1)], ["a list", "state dict"]),
        (lambda: torch.zeros(3), ["a Tensor", "state dict"]),
    ],
)
@pytest.mark.slow
def test_unsupported_checkpoint_error_names_its_contents(
    make: Callable[[], Any], words: list[str], tmp_path: Path
) -> None:
    torch.save(make(), tmp_path / "theirs.pth")
    with pytest.raises(UserError, match=r"theirs\.pth: got .*expected") as caught:
        import_weights(tmp_path / "theirs.pth")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
