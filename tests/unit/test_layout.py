"""How the package is laid out: its names, what an import costs, and constants that are written down twice."""

import subprocess
import sys
from pathlib import Path

import pytest

from modes_fx import modality
from modes_fx.kernels import masked_moe as op
from modes_fx.passes import PIPELINE

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd="/", check=True, text=True, capture_output=True)
    return run.stdout.strip()


def test_installing_adds_no_global_names():
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('passes', 'kernels')])"
    assert str(ROOT) not in fresh(code)


def test_kernels_never_shadows_the_pypi_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_passes_and_kernels_are_importable_under_the_package():
    assert fresh("import modes_fx.passes, modes_fx.kernels.masked_moe; print('ok')") == "ok"


def test_importing_the_package_does_not_import_what_only_compiling_drawing_or_loading_a_model_needs():
    heavy = {"triton", "transformers", "matplotlib", "torch._dynamo", "torch._inductor", "rich"}
    assert fresh(f"import sys, modes_fx; print(sorted({heavy} & sys.modules.keys()))") == "[]"


def test_the_op_can_be_traced_without_triton():
    code = (
        "import sys, torch; from modes_fx.kernels.masked_moe import masked_moe as op; "
        "x = torch.empty(3, 4, device='meta'); w = torch.empty(2, 8, 4, device='meta'); "
        "op(x, x, x, x.long(), None, w, w, None, None, "
        "alpha_text=1., alpha_vision=1., tau_text=0., tau_vision=0.); "
        "print('triton' in sys.modules)"
    )
    assert fresh(code) == "False"


def test_op_and_package_mean_the_same_by_a_modality():
    assert (op.TEXT, op.VISION, op.OTHER) == (modality.TEXT, modality.VISION, modality.OTHER)
    names = {modality.TEXT: "text", modality.VISION: "vision", modality.OTHER: "other"}
    assert dict(enumerate(modality.MODALITY_NAMES)) == names


@pytest.mark.parametrize("each", PIPELINE, ids=lambda each: each.__name__)
def test_each_pass_lives_in_a_file_of_its_name(each):
    assert Path(each.__code__.co_filename).resolve() == ROOT / "passes" / f"{each.__name__}.py"
    assert each.__module__ == f"modes_fx.passes.{each.__name__}"


def test_every_public_name_of_the_package_is_there():
    import modes_fx

    for name in ("backend", "calibrate", "search", "explain", "Profile", "ModesError", "RewriteError"):
        assert callable(getattr(modes_fx, name)), name
