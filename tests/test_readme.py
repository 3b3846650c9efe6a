"""What the README's first screen says is what happens, and links in the docs resolve."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from weights import outputs, randomize_norms, save_run

from fastsimclr import encoder


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)


def test_the_loss_is_equivalent_to_the_three_lines_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours = {"z1": z1, "z2": z2}
    exec(blocks()[0], ours)
    theirs = {"z1": z1, "z2": z2, "temperature": 0.1, "N": 5, "torch": torch, "F": F}
    exec(blocks()[1], theirs)
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-12, atol=0)
    assert z1.grad is not None


def test_the_encoder_of_a_run_loads_in_one_line(tmp_path: Path) -> None:
    trained = randomize_norms(encoder("resnet18"))
    save_run(tmp_path / "run", trained)
    code = next(block for block in blocks() if "load_encoder" in block)
    names: dict[str, torch.nn.Module] = {}
    exec(code.replace("runs/photos", str(tmp_path / "run")), names)
    assert torch.equal(outputs(names["encoder"]), outputs(trained))


@pytest.mark.parametrize("page", ["README.md", *map(str, Path("docs").glob("*.md"))])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)[)#]", Path(page).read_text())
    missing = [target for target in targets if not (Path(page).parent / target).exists()]
    assert not missing
