"""The optimizer of an encoder's family, and the parameters that it does not decay."""

import pytest
import torch
from torch import nn

from fastsimclr import SimCLR, encoder, projector
from fastsimclr.models import as_encoder
from fastsimclr.optim import build_optimizer, choose_recipe, excluded_from_decay, is_transformer


def layers(*modules: nn.Module) -> nn.Module:
    return as_encoder(nn.Sequential(nn.Conv2d(3, 4, 1), *modules), image_size=8, channels=3)


@pytest.mark.parametrize(
    ("made", "optimizer", "why"),
    [
        (lambda: encoder("resnet18"), "lars", "convolutional encoder with BatchNorm"),
        (lambda: encoder("timm/test_efficientnet"), "lars", "convolutional encoder with BatchNorm"),
        (lambda: encoder("torchvision/mobilenet_v3_small"), "lars", "convolutional encoder with BatchNorm"),
        (lambda: encoder("timm/test_vit"), "adamw", "encoder with LayerNorm"),
        (lambda: encoder("timm/test_convnext"), "adamw", "encoder with LayerNorm"),
        (lambda: encoder("timm/test_nfnet"), "adamw", "encoder without BatchNorm"),
        (lambda: encoder("timm/levit_128s"), "adamw", "encoder with attention"),
        (lambda: layers(nn.BatchNorm2d(4)), "lars", "convolutional encoder with BatchNorm"),
        (lambda: layers(nn.GroupNorm(2, 4)), "adamw", "encoder without BatchNorm"),
    ],
)
def test_automatic_optimizer(made: object, optimizer: str, why: str) -> None:
    recipe = choose_recipe(made(), "auto", "auto", "auto", "auto", 512)  # type: ignore[operator]
    assert (recipe.optimizer, recipe.why_optimizer) == (optimizer, f" (auto: {why})")
    published = {"adamw": (1.5e-4 * 512 / 256, 0.1), "lars": (0.075 * 512**0.5, 1e-6)}
    assert (recipe.lr, recipe.weight_decay) == pytest.approx(published[optimizer])


def test_options_override_the_recipe_and_its_reasons() -> None:
    vit, resnet = encoder("timm/test_vit"), encoder("resnet18")
    assert str(choose_recipe(vit, "auto", "auto", "auto", "auto", 4096)) == (
        "adamw (auto: encoder with LayerNorm), lr 0.0024 (auto: linear rule of MoCo v3 at batch 4096), "
        "weight decay 0.1 (auto: MoCo v3)"
    )
    assert str(choose_recipe(vit, "lars", "auto", "auto", "auto", 4096)) == (
        "lars, lr 4.8 (auto: sqrt rule at batch 4096), weight decay 1e-06 (auto: SimCLR)"
    )
    assert choose_recipe(vit, "adamw", "auto", "sqrt", 0.05, 1024).lr == pytest.approx(1.2e-3)
    assert str(choose_recipe(resnet, "adamw", 0.001, "auto", 0.0, 512)) == "adamw, lr 0.001, weight decay 0"
    assert choose_recipe(resnet, "adamw", "auto", "auto", "auto", 512).lr == 1e-3


@pytest.mark.parametrize(
    ("name", "image_size", "excluded"),
    [
        ("timm/test_vit", 32, {"pos_embed", "cls_token"}),
        ("timm/swin_tiny_patch4_window7_224", 32, {"layers.0.blocks.0.attn.relative_position_bias_table"}),
        ("torchvision/vit_b_16", 32, {"class_token", "encoder.pos_embedding"}),
        ("torchvision/convnext_tiny", 32, {"features.1.0.layer_scale"}),
        ("torchvision/swin_t", 32, {"features.1.0.attn.relative_position_bias_table"}),
        ("resnet18", 32, set()),
    ],
)
@pytest.mark.slow
def test_what_is_not_decayed(name: str, image_size: int, excluded: set[str]) -> None:
    made = encoder(name, image_size=image_size)
    model = SimCLR(made, projector(made.out_features, 8, 8))
    parameters = dict(model.named_parameters())
    prefix = "encoder." if name == "resnet18" else "encoder.module."
    undecayed = excluded_from_decay(model)
    found = {path for path, parameter in parameters.items() if parameter in undecayed}
    assert {prefix + path for path in excluded} <= found
    assert all(path in found for path, parameter in parameters.items() if parameter.ndim <= 1)
    weights = {f"{path}.weight" for path, each in model.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}
    assert weights
    assert not weights & found


def test_names_and_shapes_of_a_user_module() -> None:
    module = nn.Module()
    module.head = nn.Linear(5, 1)  # a weight with the shape of a scale
    module.blur = nn.Conv1d(1, 1, 3)
    module.scale = nn.Parameter(torch.ones(4, 1, 1))
    module.pos_embed = nn.Embedding(7, 4)
    module.register_tokens = nn.Parameter(torch.zeros(1, 4, 8))
    module.queries = nn.Parameter(torch.zeros(1, 4, 8))
    module.no_weight_decay = lambda: {"queries"}
    module.matrix = nn.Parameter(torch.zeros(4, 8))
    excluded = excluded_from_decay(nn.Sequential(module))
    names = {name for name, parameter in module.named_parameters() if parameter in excluded}
    assert names == {"head.bias", "blur.bias", "scale", "pos_embed.weight", "register_tokens", "queries"}


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_excluded_parameters_get_no_decay_and_no_adaptation(name: str) -> None:
    torch.manual_seed(0)
    model = encoder("timm/test_vit", image_size=32)
    parameters = dict(model.module.named_parameters())
    before = {path: parameter.detach().clone() for path, parameter in parameters.items()}
    excluded = excluded_from_decay(model).__contains__
    optimizer = build_optimizer(name, model.parameters(), 0.1, 0.9, 0.5, exclude=excluded)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {path for path, parameter in parameters.items() if not torch.equal(parameter, before[path])}
    assert changed == {path for path, parameter in parameters.items() if parameter.ndim > 1} - {
        "pos_embed",
        "cls_token",
    }


def test_attention_needs_no_layer_norm() -> None:
    assert is_transformer(nn.Sequential(nn.BatchNorm1d(4), nn.MultiheadAttention(4, 1))) == (
        True,
        "encoder with attention",
    )
