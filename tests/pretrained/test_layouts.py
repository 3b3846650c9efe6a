"""Other projects' checkpoints: the encoder that comes out of one computes what the module computed that went in.

Each module is built as its project builds it, and saved under the names and beside the things that the project saves.
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
from weights import lived_in, outputs

from fastsimclr import UserError, import_weights
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.models import encoder
from fastsimclr.pretrained import open_pretrained
from fastsimclr.pretrained.layouts import GOOGLE_AUGMENTATION, architecture_of, find_weights

State = dict[str, Any]
pytestmark = pytest.mark.usefixtures("one_thread")


def under(prefix: str, module: nn.Module | State) -> State:
    """The module's state dict, with `prefix` before each name."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return OrderedDict((prefix + name, value) for name, value in state.items())


def resnet(name: str = "resnet18", seed: int = 0, **options: Any) -> ResNet:
    """torchvision's, fc included."""
    torch.manual_seed(seed)
    return lived_in(getattr(torchvision.models, name)(num_classes=10, **options), seed)


def headless(model: ResNet) -> ResNet:
    model.fc = nn.Identity()
    return model


def for_cifar(model: ResNet, padding: int = 1) -> ResNet:
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=padding, bias=False)
    model.maxpool = nn.Identity()
    return model


# The projects' modules


def vissl_trunk(block: type[Any], blocks: list[int], width: int) -> nn.Module:
    """vissl/models/trunks/resnext.py: torchvision's layers, made again at another width, in a ModuleDict."""
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
    return lived_in(trunk)


class DownsampleFirst(Bottleneck):
    """tonylins' resnet_wider.py registers the downsample before all else, for the sake of its converter."""

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
    lived_in(model)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.num_batches_tracked.zero_()  # type: ignore[union-attr]
        if isinstance(part, nn.Conv2d):  # the converter permutes TensorFlow's order of dimensions
            part.weight.data = part.weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return model


def normalised(features: int, relu: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(features), nn.ReLU() if relu else nn.Identity())


def conv(features: int, out: int, side: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(features, out, side, stride, (side - 1) // 2, bias=False)


class SimclrV2Block(nn.Module):
    """Separius/SimCLRv2-Pytorch's BottleneckBlock without selective kernels."""

    def __init__(self, features: int, planes: int, stride: int, project: bool) -> None:
        super().__init__()
        self.projection: nn.Module = nn.Identity()
        if project:
            self.projection = nn.Sequential()
            self.projection.shortcut = conv(features, 4 * planes, 1, stride)
            self.projection.bn = normalised(4 * planes, relu=False)
        self.net = nn.Sequential(
            *(conv(features, planes, 1), normalised(planes), conv(planes, planes, 3, stride), normalised(planes)),
            *(conv(planes, 4 * planes, 1), normalised(4 * planes, relu=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.projection(x) + self.net(x))


class SimclrV2(nn.Module):
    """Separius/SimCLRv2-Pytorch's ResNet of depth 50, its fc apart."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        features = 64 * width
        stages: list[nn.Module] = [nn.Sequential(conv(3, features, 7, 2), normalised(features), nn.MaxPool2d(3, 2, 1))]
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
    """The basic block of SupContrast's ResNets, of lightly's ResNetGenerator, and of many for CIFAR."""

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
    """Their ResNet-18, whose ReLU after the stem is in forward()."""

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


# What each project saves


class Saved(NamedTuple):
    """The module that the encoder has to be equal to, what is saved of it, and what is to be found."""

    module: nn.Module
    contents: Any
    origin: str
    built: tuple[str, int, str] = ("resnet18", 1, "imagenet")
    augmentation: Augmentation | None = None


def saved_by_torchvision() -> Saved:
    model = resnet("resnet50")
    state = model.state_dict()
    return Saved(headless(model), state, "a ResNet's state dict", ("resnet50", 1, "imagenet"))


def saved_by_vissl(block: type[Any] = BasicBlock, width: int = 1) -> Saved:
    trunk = vissl_trunk(block, [3, 4, 6, 3], width)
    heads = [{"clf.0.weight": torch.zeros(2, 2)}]
    base_model = {"model": {"trunk": trunk.state_dict(), "heads": heads}, "meta": {}}
    classy = {"base_model": base_model, "train": True, "phase_idx": 99, "losses": [1.0], "optimizer": {}, "hooks": {}}
    contents = {"phase_idx": 100, "iteration": 5, "loss": {"pos_mask": torch.zeros(2)}, "classy_state_dict": classy}
    name = "resnet50" if block is Bottleneck else "resnet34"
    return Saved(trunk, contents, "VISSL", (name, width, "imagenet"))


def lightning(state: State) -> State:
    """What Lightning's save_checkpoint writes around a module's state dict."""
    beside: State = {"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.1.0", "optimizer_states": []}
    return beside | {"state_dict": state, "hyper_parameters": {"knn_k": 200}, "callbacks": {}}


def saved_by_lightly_in_a_sequential() -> Saved:
    """lightly's examples and tutorials."""
    backbone = nn.Sequential(*list(resnet().children())[:-1])
    head = under("projection_head.", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    return Saved(backbone, lightning(under("backbone.", backbone) | head), "lightly")


def saved_by_lightly_for_cifar() -> Saved:
    """The same with the small stem, whose nn.Identity() takes the place of the max-pool."""
    backbone = nn.Sequential(*list(lived_in(for_cifar(resnet())).children())[:-1])
    return Saved(backbone, lightning(under("backbone.", backbone)), "lightly", ("resnet18", 1, "small"))


def saved_by_lightlys_generator() -> Saved:
    """lightly's CIFAR-10 benchmark: its own ResNet in a Sequential, which so loses the ReLU of its stem."""
    model = lived_in(ShortcutResNet())
    backbone = nn.Sequential(*model.children())
    return Saved(backbone, lightning(under("backbone.", backbone)), "lightly", ("resnet18", 1, "small"))


def saved_by_lightlys_benchmark() -> Saved:
    model = headless(resnet("resnet50"))
    head = under("projection_head.layers.", nn.Sequential(nn.Linear(4, 4)))
    contents = lightning(under("backbone.", model) | head | {"online_classifier.linear.weight": torch.zeros(2, 2)})
    return Saved(model, contents, "lightly", ("resnet50", 1, "imagenet"))


def saved_by_solo_learn(prefix: str = "backbone.") -> Saved:
    model = headless(resnet())
    others = under("classifier.", nn.Linear(4, 4)) | under("projector.", nn.Sequential(nn.Linear(4, 4)))
    momentum = under(f"momentum_{prefix}", resnet(seed=1))
    return Saved(model, lightning(momentum | under(prefix, model) | others), "solo-learn")


def saved_by_solo_learn_for_cifar() -> Saved:
    model = lived_in(for_cifar(headless(resnet()), padding=2))
    state = under("backbone.", model) | under("classifier.", nn.Linear(4, 4))
    origin = "solo-learn, with its stem for CIFAR, padded by 2"
    return Saved(model, lightning(state), origin, ("resnet18", 1, "small"))


def saved_by_tonylins(width: int) -> Saved:
    model = tonylins(width)
    contents = {"state_dict": model.state_dict()}
    origin = "google-research's SimCLR by tonylins/simclr-converter"
    return Saved(headless(model), contents, origin, ("resnet50", width, "imagenet"), GOOGLE_AUGMENTATION)


def saved_by_separius() -> Saved:
    torch.manual_seed(0)
    model = lived_in(SimclrV2())
    head = {"layers.0.weight": torch.zeros(4, 4)}
    contents = {"resnet": model.state_dict() | under("fc.", nn.Linear(2048, 10)), "head": head}
    origin = "google-research's SimCLRv2 by Separius/SimCLRv2-Pytorch"
    return Saved(model, contents, origin, ("resnet50", 1, "imagenet"), GOOGLE_AUGMENTATION)


def saved_by_moco() -> Saved:
    query, key = resnet(), resnet(seed=1)
    query.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), query.fc)
    state = under("module.encoder_k.", key) | under("module.encoder_q.", query) | {"module.queue": torch.zeros(4, 4)}
    contents = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    return Saved(headless(query), contents, "MoCo")


def saved_by_moco_v3() -> Saved:
    base, momentum = resnet(), resnet(seed=1)
    predictor = under("module.predictor.", nn.Sequential(nn.Linear(4, 4)))
    state = under("module.base_encoder.", base) | under("module.momentum_encoder.", momentum) | predictor
    return Saved(headless(base), {"epoch": 300, "arch": "resnet18", "state_dict": state}, "MoCo v3")


def saved_by_supcontrast() -> Saved:
    model = lived_in(ShortcutResNet())
    contents = {"epoch": 1000, "model": under("encoder.module.", model) | {"head.0.weight": torch.zeros(2, 2)}}
    return Saved(model, contents, "a ResNet under encoder", ("resnet18", 1, "small"))


def saved_by_sthalles() -> Saved:
    model = resnet()
    model.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), model.fc)
    state = under("backbone.", model)
    return Saved(headless(model), {"epoch": 100, "arch": "resnet18", "state_dict": state}, "a ResNet under backbone")


def saved_by_leftthomas() -> Saved:
    """Its children in a Sequential, the max-pool left out."""
    model = lived_in(for_cifar(resnet()))
    children = [child for name, child in model.named_children() if name not in ("maxpool", "fc")]
    f = nn.Sequential(*children)
    state = under("f.", f) | {"g.0.weight": torch.zeros(2, 2)}
    return Saved(f, state, "a ResNet's Sequential under f", ("resnet18", 1, "small"))


def saved_from_ddp_and_compile() -> Saved:
    model = headless(resnet())
    return Saved(model, {"model": under("_orig_mod.module.net.", model)}, "a ResNet under net")


SAVED: dict[str, Callable[[], Saved]] = {
    "torchvision": saved_by_torchvision,
    "VISSL": saved_by_vissl,
    "VISSL, bottlenecks": lambda: saved_by_vissl(Bottleneck),
    "VISSL, width 2": lambda: saved_by_vissl(width=2),
    "lightly, Sequential": saved_by_lightly_in_a_sequential,
    "lightly, CIFAR": saved_by_lightly_for_cifar,
    "lightly, ResNetGenerator": saved_by_lightlys_generator,
    "lightly, benchmark": saved_by_lightlys_benchmark,
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
def test_the_encoder_computes_what_the_projects_module_does(project: str, tmp_path: Path) -> None:
    saved = SAVED[project]()
    torch.save(saved.contents, tmp_path / "theirs.pth")
    opened = open_pretrained(tmp_path / "theirs.pth")
    found = opened.encoder
    assert (found.name, found.width, found.stem) == saved.built
    assert (opened.origin, opened.augmentation, opened.config) == (saved.origin, saved.augmentation, None)
    # The same operations, but for the mean of Separius' and where memory is laid out otherwise.
    torch.testing.assert_close(outputs(found), outputs(saved.module), rtol=1e-5, atol=1e-5)


def test_lightlys_own_modules_have_the_names_that_are_tested_here(tmp_path: Path) -> None:
    models = pytest.importorskip("lightly.models", reason="lightly is not installed")
    theirs = models.ResNetGenerator("resnet-18")
    assert list(theirs.state_dict())[:-2] == list(ShortcutResNet().state_dict())  # linear.* apart
    torch.manual_seed(0)
    backbone = lived_in(nn.Sequential(*list(theirs.children())[:-1], nn.AdaptiveAvgPool2d(1)))
    torch.save(lightning(under("backbone.", backbone)), tmp_path / "theirs.ckpt")
    torch.testing.assert_close(outputs(import_weights(tmp_path / "theirs.ckpt")), outputs(backbone))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("small", [False, True])
def test_shapes_say_the_architecture(name: str, width: int, small: bool) -> None:
    built = (name, width, "small" if small else "imagenet")
    with torch.device("meta"):
        assert architecture_of(encoder(*built).state_dict()) == built


def test_only_the_converters_own_file_is_taken_for_googles() -> None:
    """The recipe would be wrong for any other with the same names."""
    converted = tonylins(1).state_dict()
    assert find_weights(converted).augmentation == GOOGLE_AUGMENTATION
    trained = {name: value + 5 if name.endswith("num_batches_tracked") else value for name, value in converted.items()}
    assert find_weights(trained).augmentation is None
    in_torchvisions_order = resnet("resnet50").state_dict()
    for name, value in converted.items():
        in_torchvisions_order[name] = value
    assert find_weights(in_torchvisions_order).augmentation is None


def of_timm(name: str) -> Callable[[], State]:
    return lambda: timm.create_model(name).state_dict()


def without(name: str) -> State:
    state = resnet().state_dict()
    del state[name]
    return state


def with_one(name: str, value: Tensor) -> State:
    return resnet().state_dict() | {name: value}


def numbered(model: nn.Module, leave_out: tuple[str, ...]) -> State:
    return nn.Sequential(*(child for name, child in model.named_children() if name not in leave_out)).state_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (of_timm("vit_tiny_patch16_224"), ["cls_token, pos_embed", "expected a ResNet's"]),
        (of_timm("resnext50_32x4d"), ["32 groups", "without groups"]),
        (of_timm("wide_resnet50_2"), ["64 channels", "128", "wide ResNet"]),
        (of_timm("resnet26"), ["(2, 2, 2, 2) bottlenecks", "resnet18, resnet34"]),
        (of_timm("resnet50d"), ["conv1.0.weight", "conv1.weight"]),
        (of_timm("seresnet50"), ["layer1.0.se.fc1.weight", "resnet50"]),
        (of_timm("resnet50_gn"), ["without bn1.running_mean", "resnet50"]),
        (lambda: with_one("conv1.weight", torch.zeros(64, 1, 7, 7)), ["7x7, from 1 to 64 channels", "from 3"]),
        (lambda: with_one("conv1.weight", torch.zeros(96, 3, 7, 7)), ["to 96", "a multiple of 64"]),
        (lambda: with_one("conv1.weight", torch.zeros(0, 3, 7, 7)), ["to 0"]),
        (lambda: with_one("conv1.weight", torch.zeros(())), ["conv1.weight"]),
        (lambda: with_one("layer1.0.conv2.weight", torch.zeros(64, 0, 3, 3)), ["groups"]),
        (lambda: with_one("bn1.bias", torch.zeros(32)), ["bn1.bias of shape (32,)", "expected (64,)"]),
        (lambda: with_one("layer1.0.extra", torch.zeros(1)), ["with unexpected layer1.0.extra", "resnet18 of width 1"]),
        (lambda: without("layer3.1.bn2.running_var"), ["without layer3.1.bn2.running_var", "resnet18"]),
        (lambda: under("a.", resnet()) | under("b.", resnet()), ["2 ResNets, under a., b.", "alone"]),
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
def test_what_is_no_encoder_of_ours_is_refused_by_what_it_is(
    make: Callable[[], Any], words: list[str], tmp_path: Path
) -> None:
    torch.save(make(), tmp_path / "theirs.pth")
    with pytest.raises(UserError, match=r"theirs\.pth: got .*expected") as caught:
        import_weights(tmp_path / "theirs.pth")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
