"""Types of lycoris-lora on real denoisers: nothing changes at the start, the adapter alone trains, the file is the library's own."""

import copy
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from lycoris.modules.base import LycorisBaseModule
from torch import Tensor, nn

from adapter_runs import FamilyCase, family_case, trained
from atelier_api.errors import ConfigError
from atelier_operator.planner.adapter_sizes import Linear, parameters
from atelier_runtime.adapters import install, trainable
from atelier_runtime.lycoris_layout import file_tensors
from lycoris_adapters import OPTIONS, lycoris_adapter, stock_modules

pytestmark = pytest.mark.sweep

FAMILIES = ("sd3", "sdxl", "wan", "sana")
"""Two image transformers, one of them with convolutions, a UNet, and a video transformer."""


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return family_case(request.param)


def modules_of(model: nn.Module) -> dict[str, Any]:
    """The library's modules by the name of their layer."""
    return {
        name.removesuffix(".lycoris"): module
        for name, module in model.named_modules()
        if isinstance(module, LycorisBaseModule)
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_output_does_not_change_at_the_start(case: FamilyCase, name: str) -> None:
    model = case.denoiser()
    base = case.predict(model)
    install(model, lycoris_adapter(name), case.family)
    if "dora" in name:  # the norm of a weight, divided out and multiplied in
        torch.testing.assert_close(case.predict(model), base, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(case.predict(model), base)


@pytest.mark.parametrize("name", OPTIONS)
def test_only_the_adapter_trains_and_all_of_it_gets_a_gradient(case: FamilyCase, name: str) -> None:
    model = case.denoiser()
    before = copy.deepcopy(dict(model.named_parameters()))
    install(model, lycoris_adapter(name), case.family)
    parameters = trained(model)
    assert parameters.keys() == trainable(model).keys()
    assert all(".lycoris." in name for name in parameters)
    case.disturb(model)
    case.predict(model, grad=True).square().sum().backward()
    assert [name for name, parameter in parameters.items() if parameter.grad is None or not parameter.grad.any()] == []
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    base = {name: parameter for name, parameter in model.named_parameters() if ".lycoris." not in name}
    assert base.keys() == before.keys()
    assert [
        name for name, value in base.items() if value.grad is not None or not torch.equal(value, before[name])
    ] == []


@pytest.mark.parametrize("way", ["apply_to", "merge_to"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_library_makes_the_same_of_the_file(case: FamilyCase, name: str, way: str) -> None:
    adapter = lycoris_adapter(name)
    model = case.denoiser()
    install(model, adapter, case.family)
    base = case.predict(model)
    case.disturb(model)
    ours = case.predict(model.eval())
    assert (ours - base).abs().max() > 1e-3
    stock = case.denoiser()
    modules = stock_modules(stock, file_tensors(weights_of(model), adapter, case.family))
    assert len(modules) == len(modules_of(model))
    for module in modules:
        getattr(module, way)()
    torch.testing.assert_close(case.predict(stock), ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_file_has_what_the_library_itself_would_write(case: FamilyCase, name: str) -> None:
    adapter = lycoris_adapter(name)
    model = case.denoiser()
    install(model, adapter, case.family)
    case.disturb(model)
    theirs = {
        f"{module.lora_name}.{key}": tensor
        for module in modules_of(model).values()
        for key, tensor in module.state_dict().items()
    }
    ours = file_tensors(weights_of(model), adapter, case.family)
    assert ours.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor.detach())] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_the_report_and_the_planner_count_what_is_there(case: FamilyCase, name: str) -> None:
    adapter = lycoris_adapter(name)
    model = case.denoiser()
    report = install(model, adapter, case.family)
    modules = modules_of(model)
    assert sum(report.modules.values()) == len(modules)
    assert report.trainable == sum(parameter.numel() for parameter in trainable(model).values())
    assert report.total == sum(parameter.numel() for parameter in model.parameters())
    for layer, module in modules.items():
        outputs, inputs = model.get_submodule(layer).weight.shape[:2]
        counted = sum(parameter.numel() for parameter in module.parameters())
        predicted = parameters(adapter, Linear(outputs, inputs))
        assert counted <= predicted if name == "ia3 on inputs" else counted == predicted, layer


@pytest.mark.parametrize("name", OPTIONS)
def test_recomputing_activations_changes_no_gradient(name: str) -> None:
    case = family_case("wan")
    model = case.denoiser()
    install(model, lycoris_adapter(name), case.family)
    case.disturb(model)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.enable_gradient_checkpointing()
        case.predict(model, grad=True).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in trainable(model).values()])
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, once, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_weights_have_the_asked_dtype_and_train_under_autocast(name: str, dtype: torch.dtype) -> None:
    case = family_case("wan")
    model = case.denoiser().to(torch.bfloat16)
    install(model, lycoris_adapter(name), case.family, dtype=dtype)
    assert {parameter.dtype for parameter in trainable(model).values()} == {dtype}
    frozen = {parameter.dtype for key, parameter in model.named_parameters() if ".lycoris." not in key}
    assert frozen == {torch.bfloat16}
    case.disturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        case.predict(model, grad=True).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "ia3"])  # its update is of the layer's output
def test_an_update_below_the_resolution_of_a_bf16_base_reaches_the_output(name: str) -> None:
    """The library adds updates to the weight in the base's precision by default: most of this one would be rounded away."""
    case = family_case("wan")
    layer = r"blocks\.0\.attn1\.to_q"
    changes = {"inputTargets": [layer]} if name == "ia3 on inputs" else {}
    outputs = []
    for scale in (0.0, 1.0):
        model = case.denoiser().to(torch.bfloat16)
        torch.manual_seed(0)
        install(model, lycoris_adapter(name, targets=[layer], **changes), case.family)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for key, parameter in trainable(model).items():
                if "dora_scale" not in key:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator) * scale)
        module: Any = model.get_submodule("blocks.0.attn1.to_q")
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
        wide = copy.deepcopy(module).float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            # The sum with the layer's output would round: the update alone is looked at.
            module.lycoris.org_forward = wide.lycoris.org_forward = lambda inputs: torch.zeros(())
            outputs.append((module.lycoris.forward(x).float(), wide.lycoris.forward(x).float()))
    found, exact = outputs[1][0] - outputs[0][0], outputs[1][1] - outputs[0][1]
    assert exact.abs().max() > 0
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_no_class_of_the_library_is_changed() -> None:
    """`create_lycoris` keeps the targets of a process in attributes of LycorisNetwork."""
    before = copy.deepcopy({key: value for key, value in vars(LycorisNetwork).items() if key.isupper()})
    install(family_case("wan").denoiser(), lycoris_adapter("lokr"), family_case("wan").family)
    assert {key: value for key, value in vars(LycorisNetwork).items() if key.isupper()} == before


def test_a_target_without_a_match_names_the_nearest_modules() -> None:
    case = family_case("wan")
    with pytest.raises(
        ConfigError, match=r"'to_q': no linear layer .* blocks\.\*\.attn1\.to_q, blocks\.\*\.attn2\.to_q"
    ):
        install(case.denoiser(), lycoris_adapter("lokr", targets=["to_q"]), case.family)


REFUSED = {
    "decomposeBoth of a large rank": (
        ("lokr", {"decomposeBoth": True}),
        r"spec\.adapter\.decomposeBoth is true, and with spec\.adapter\.rank 1024 .* their longest side is 4: .* below 2$",
    ),
    "alpha of two whole factors": (
        ("lokr", {"alpha": "2"}),
        r"spec\.adapter\.alpha is 2, and with spec\.adapter\.rank 1024 both factors of every layer are whole",
    ),
    "inputs of layers that are no target": (
        ("ia3 on inputs", {"targets": [r".*\.to_k"]}),
        r"spec\.adapter\.inputTargets has 'mlp': none of the layers .* the nearest are blocks\.\*\.attn1\.to_k",
    ),
    "inputs of a layer that is not there": (
        ("ia3", {"inputTargets": [r".*\.ff\.out"]}),
        r"spec\.adapter\.inputTargets has '\.\*\\\\\.ff\\\\\.out': none of the layers that spec\.adapter\.targets names",
    ),
    "blocks that are too small for a butterfly": (
        ("boft", {"blockSize": 4, "targets": [r"blocks\.0\.ffn\.net\.0\.proj"]}),
        r"spec\.adapter\.blockSize is 4; BOFT cannot cut the 48 outputs of blocks\.0\.ffn\.net\.0\.proj .* set it to 6 or more",
    ),
}


@pytest.mark.parametrize(("adapter", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_do_nothing_or_could_not_be_loaded_is_refused(
    adapter: tuple[str, dict[str, Any]], message: str
) -> None:
    case = family_case("wan")
    name, changes = adapter
    with pytest.raises(ConfigError, match=message):
        install(case.denoiser(), lycoris_adapter(name, **changes), case.family)


def test_a_factor_that_the_library_would_not_find_out_is_refused() -> None:
    """It is not in the file: the reader guesses it from the shapes, here 3 x 5 and 16 x 8."""
    layers = nn.ModuleDict({"odd": nn.Linear(40, 48)})
    adapter = lycoris_adapter("lokr", factor=16, targets=["odd"])
    message = (
        r"spec\.adapter\.factor is 16; lycoris-lora could not load the result, .* odd \(48 x 40\); set it to 2 or 4, or"
    )
    with pytest.raises(ConfigError, match=message):
        install(layers, adapter, family_case("wan").family)
    install(layers, lycoris_adapter("lokr", factor=4, targets=["odd"]), family_case("wan").family)


def test_the_start_values_are_those_of_the_seed() -> None:
    drawn = []
    for _ in range(2):
        model = family_case("wan").denoiser()
        torch.manual_seed(4)
        install(model, lycoris_adapter("lokr low-rank"), family_case("wan").family)
        drawn.append(weights_of(model))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert any(weight.any() for weight in drawn[0].values())


def test_the_librarys_reader_of_whole_files_fails_on_ia3() -> None:
    """When it no longer does, the lines that users are shown (`model_files.lycoris_loading`) can be those of the other types."""
    case = family_case("wan")
    model = case.denoiser()
    install(model, lycoris_adapter("ia3"), case.family)
    file = file_tensors(weights_of(model), lycoris_adapter("ia3"), case.family)
    with pytest.raises(TypeError, match="make_module_from_state_dict"):
        create_lycoris_from_weights(1.0, "", case.denoiser(), weights_sd=file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ia3_scales_what_the_weight_gives_and_not_the_bias(dtype: torch.dtype) -> None:
    """A merged weight could not hold a scaled bias."""
    layers = nn.ModuleDict({"layer": nn.Linear(32, 48)}).to(dtype)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(dtype)
    install(layers, lycoris_adapter("ia3", targets=["layer"]), family_case("wan").family)
    layer: Any = layers["layer"]
    factors = torch.linspace(-0.5, 0.5, 48)
    with torch.no_grad():
        layer.lycoris.weight.copy_(factors)
        found = layer(x)
    assert found.dtype == dtype
    expected = x.float() @ layer.weight.float().T * (1 + factors) + layer.bias.float()
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=1e-5)
