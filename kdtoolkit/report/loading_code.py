"""The code that loads the student of a run folder, or what that needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from kdtoolkit.models.describe import class_name

OWN_PACKAGES = ("timm", "kdtoolkit")  # whose networks timm builds without further imports
TOLERANCE = 1e-4  # of logits, relative and absolute

TIMM_CODE = """From this folder:

```python
import kdtoolkit  # registers its own networks with timm
import timm
from timm.data import create_transform, resolve_data_config
{imports}
student = timm.create_model("local-dir:student", pretrained=True).eval()
transform = create_transform(**resolve_data_config({{}}, model=student))  # of an RGB PIL image
label_names = student.pretrained_cfg.get("label_names")  # by class id, where the data has them
```
"""
OWN_CODE = """{why} Build it as for the run, in place of `make_student()`, and load its weights. From this folder:

```python
import json
from pathlib import Path

from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

student = make_student()  # your own code: makes the network as it was made for the run
student.load_state_dict(load_file("student/model.safetensors"))
student.eval()
config = json.loads(Path("student/config.json").read_text(encoding="utf-8"))
settings = resolve_data_config({{}}, pretrained_cfg=config["pretrained_cfg"])
transform = create_transform(**settings)  # of an RGB PIL image
label_names = config.get("label_names")  # by class id, where the data has them
```
"""  # noqa: E501 - a paragraph of the page
NO_STUDENT = "The run folder has no `student/` yet, so there is nothing to load."


def loading_section(folder: Path, student: nn.Module | None = None) -> str:
    """How to load the student.

    Args:
        folder: The run folder.
        student: The student itself, with which what timm builds is compared.

    Returns:
        Heading, text and a block of code, markdown.
    """
    config = _read_config(folder / "student" / "config.json")
    if config is None:
        return NO_STUDENT
    return f"## Load the student\n\n{_code(folder / 'student', config, student)}"


def _read_config(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _code(folder: Path, config: dict[str, Any], student: nn.Module | None) -> str:
    architecture = config.get("architecture")
    if not architecture:
        own = config.get("class", "of an unknown class")
        return OWN_CODE.format(why=f"timm cannot build this student, an `nn.Module` ({own}).")
    problem = _find_problem(folder, student)
    if problem is not None:
        own = "" if student is None else f", an `nn.Module` ({class_name(student)})"
        why = f"timm's `{architecture}` is not this student{own}: {problem}."
        return OWN_CODE.format(why=why)
    module = timm.models.model_entrypoint(architecture).__module__
    imports = ""
    if module.partition(".")[0] not in OWN_PACKAGES:
        imports = f"import {module}  # your own code: registers {architecture} with timm\n"
    return TIMM_CODE.format(imports=imports)


def _find_problem(folder: Path, student: nn.Module | None) -> str | None:
    """Why what timm builds from a folder is not the student; None where it is."""
    try:
        with torch.random.fork_rng(devices=[]):
            built: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm's constructors and loaders may raise anything
        return f"timm cannot load it ({_first_line(error)})"
    if student is None:
        return None
    size = built.pretrained_cfg["input_size"]  # type: ignore[index]
    modes = [(module, module.training) for module in student.modules()]
    try:
        parameter = next(student.parameters())
        image = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = student.eval()(image.to(parameter.device, parameter.dtype)).float().cpu()
            theirs = built(image)
    except Exception as error:
        return f"the two could not be compared ({_first_line(error)})"
    finally:
        for module, mode in modes:
            module.training = mode
    if ours.shape == theirs.shape and torch.allclose(ours, theirs, TOLERANCE, TOLERANCE):
        return None
    return "what timm builds from its arguments gives other logits"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
