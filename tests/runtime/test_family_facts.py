"""The API's table against the real classes, built from the published configs without memory."""

from collections.abc import Callable
from importlib import import_module
from itertools import combinations
from typing import Any

import pytest
from torch import nn

from activation_bytes import bytes_per_token, bytes_with_control, copied_without_memory
from atelier_api.families import FAMILIES as TABLE
from atelier_api.families import FamilyFacts, Flavour
from atelier_operator.planner.memory import Choice, flavour_facts, predict
from atelier_operator.planner.techniques import few_step_parameters
from atelier_runtime import components
from atelier_runtime.families import FAMILIES
from atelier_runtime.family import Family
from atelier_runtime.techniques.picture_blocks import picture_blocks
from family_models import PUBLISHED, published_denoiser
from family_models.published_parts import without_memory
from planned_runs import run

pytestmark = pytest.mark.sweep

FLAVOURS = [
    pytest.param(facts, flavour, id=f"{facts.name} {flavour.name}")
    for facts in TABLE.values()
    for flavour in facts.flavours
]


def alike(facts: FamilyFacts, flavour: Flavour) -> list[Flavour]:
    """The flavours of the same sizes and activations, the first of which is measured: copies would only take time."""
    sizes = ("layers", "width", "mlp_width", "largest_block", "activation_bytes_per_token")
    return [each for each in facts.flavours if all(getattr(each, of) == getattr(flavour, of) for of in sizes)]


CONTROLLED_FLAVOURS = [each for each in FLAVOURS if not each.values[0].uncontrolled]
DISTINCT_FLAVOURS = [parameter for parameter in FLAVOURS if alike(*parameter.values)[0] is parameter.values[1]]
CONTROLLED_PASSES = [
    pytest.param(*each.values, recompute, id=f"{each.id} {'recompute' if recompute else 'keep'}")
    for each in CONTROLLED_FLAVOURS
    for recompute in (False, True)
    # With recompute the flavours of a family differ in how many blocks there are alone.
    if each in DISTINCT_FLAVOURS and (not recompute or each.values[1] is each.values[0].flavours[0])
]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_built(build: Callable[[], list[nn.Module]]) -> int:
    return count(without_memory(lambda: nn.ModuleList(build())))


def blocks_of(family: Family, model: nn.Module) -> list[nn.Module]:
    return [block for part in family.blocks for block in model.get_submodule(part.attribute).children()]


def layers_of(family: Family, model: nn.Module) -> int:
    """Transformer blocks: those of the family's lists, or, in a UNet, those inside them, or its blocks of attention."""
    kinds = ("BasicTransformerBlock", "SDCascadeAttnBlock")
    inner = [module for module in model.modules() if type(module).__name__ in kinds]
    return len(inner) or len(blocks_of(family, model))


def width_of(config: Any) -> int:
    if "block_out_channels" in config:
        return config.block_out_channels[-1]
    own = next((config[name] for name in ("dim", "model_dim", "hidden_size") if config.get(name)), None)
    return own or config.num_attention_heads * config.attention_head_dim


def mlp_widths_of(model: nn.Module) -> set[int]:
    """Inputs of the layers that feed-forwards and Flux's fused single blocks end with."""
    ends = (
        *(".net.2", ".w2", ".feed_forward.out_layer", ".conv_point", ".out_projection"),
        *(".linear_out", ".feed_forward.linear_2", ".down_proj", ".channelwise.4", ".point_conv.conv"),
    )
    return {
        module.weight.shape[1]
        for name, module in model.named_modules()
        if name.endswith(ends) and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }


def test_every_flavour_of_the_table_has_its_published_config() -> None:
    for facts in TABLE.values():
        assert list(PUBLISHED[facts.name].denoisers) == [flavour.name for flavour in facts.flavours]


@pytest.mark.cell("sizes")
@pytest.mark.parametrize(("facts", "flavour"), FLAVOURS)
def test_sizes_of_the_denoiser_are_those_of_the_published_config(facts: FamilyFacts, flavour: Flavour) -> None:
    family, model = FAMILIES[facts.name], published_denoiser(facts.name, flavour.name)
    assert flavour.parameters == pytest.approx(count(model), rel=0.01)
    assert flavour.layers == layers_of(family, model)
    assert flavour.picture_blocks == len(picture_blocks(model, family))
    assert flavour.width == width_of(model.config)
    assert flavour.mlp_width == max(mlp_widths_of(model))
    largest = max(count(block) for block in blocks_of(family, model))
    assert largest <= 1.01 * (flavour.largest_block or flavour.parameters / flavour.layers)
    if flavour.largest_block:
        assert flavour.largest_block == largest


@pytest.mark.cell("sizes")
@pytest.mark.parametrize("facts", TABLE.values(), ids=lambda facts: facts.name)
def test_sizes_of_encoders_and_autoencoder_are_those_of_the_published_configs(facts: FamilyFacts) -> None:
    published = PUBLISHED[facts.name]
    autoencoder = without_memory(published.autoencoder)
    sizes = {build: count_built(build) for build in (published.encoders, *published.encoders_of.values())}
    for flavour in facts.flavours:
        build = published.encoders_of.get(flavour.name, published.encoders)
        assert flavour.encoder_parameters == pytest.approx(sizes[build], rel=0.01)
        assert flavour.vae_parameters == pytest.approx(count(autoencoder), rel=0.01)


@pytest.mark.cell("controlnet")
@pytest.mark.parametrize(("facts", "flavour"), CONTROLLED_FLAVOURS)
def test_sizes_of_the_control_network_are_those_of_its_copy_of_the_published_denoiser(
    facts: FamilyFacts, flavour: Flavour
) -> None:
    family, base = FAMILIES[facts.name], published_denoiser(facts.name, flavour.name)
    assert family.control is not None
    network = copied_without_memory(family.control, base)
    assert flavour.control_parameters == count(network)
    inner = [module for module in network.modules() if type(module).__name__ == "BasicTransformerBlock"]
    lists = ("transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks", "double_stream_blocks")
    assert flavour.control_layers == (len(inner) or sum(len(getattr(network, name, ())) for name in lists))


@pytest.mark.parametrize(("facts", "flavour", "recompute"), CONTROLLED_PASSES)
def test_what_a_control_network_and_its_base_keep_is_what_the_planner_counts(
    facts: FamilyFacts, flavour: Flavour, recompute: bool
) -> None:
    base = published_denoiser(facts.name, flavour.name)
    features = PUBLISHED[facts.name].features
    measured = bytes_with_control(FAMILIES[facts.name], flavour, base, features, recompute=recompute)
    references = ["c"] if facts.references else []
    adapter, data = {"type": "controlnet"}, [{"uri": "a", "conditioning": "b", "references": references}]
    planned = run(facts.name, model__flavour=flavour.name, adapter=adapter, data__sources=data)
    choice = Choice("single", 1, 1, recompute)
    counted = predict(planned.spec, flavour_facts(facts, flavour), choice, "cuda").train.activations
    # With recompute, what one block needs comes to it in the backward pass.
    assert measured <= counted <= (1.25 if not recompute else 3.5) * measured


@pytest.mark.parametrize(("facts", "flavour"), DISTINCT_FLAVOURS)
def test_activation_bytes_are_what_a_forward_pass_keeps(facts: FamilyFacts, flavour: Flavour) -> None:
    model, published = published_denoiser(facts.name, flavour.name), PUBLISHED[facts.name]
    measured = bytes_per_token(FAMILIES[facts.name], flavour, model, published.features, shared=published.shared)
    assert flavour.activation_bytes_per_token == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("facts", TABLE.values(), ids=lambda facts: facts.name)
def test_flavours_of_the_same_config_have_the_same_activations(facts: FamilyFacts) -> None:
    configs = PUBLISHED[facts.name].denoisers
    for one, other in combinations(facts.flavours, 2):
        if configs[one.name] == configs[other.name]:
            assert one.activation_bytes_per_token == other.activation_bytes_per_token


@pytest.mark.parametrize("facts", TABLE.values(), ids=lambda facts: facts.name)
def test_the_registry_and_the_table_name_the_same_families(facts: FamilyFacts) -> None:
    family = FAMILIES[facts.name]
    assert family.name == facts.name
    assert family.facts is facts
    assert family.pipeline in facts.pipelines
    assert list(FAMILIES) == list(TABLE)
    assert facts.kohya == (family.lora_layout is not None)
    pipeline = components.class_named(family.pipeline)
    assert getattr(import_module(facts.library), family.pipeline) is pipeline


@pytest.mark.parametrize("facts", TABLE.values(), ids=lambda facts: facts.name)
def test_a_lora_goes_on_a_component_only_where_the_pipeline_has_no_loader(facts: FamilyFacts) -> None:
    family = FAMILIES[facts.name]
    loads = hasattr(components.class_named(family.pipeline), "load_lora_weights")
    assert facts.lora_component == (None if loads else family.denoisers[0])


@pytest.mark.parametrize("facts", TABLE.values(), ids=lambda facts: facts.name)
def test_only_video_families_have_a_rule_for_frames(facts: FamilyFacts) -> None:
    video = facts.modality == "video"
    assert (facts.frame_rule is not None) == (facts.frame_rate is not None) == (facts.temporal_factor > 1) == video
    assert (facts.sample_rate is not None) == (facts.modality == "audio")
    assert facts.modality == "audio" or facts.pixel_multiple % facts.latent_factor == 0
    if facts.frame_rule is not None:
        assert facts.frame_rule == (facts.temporal_factor, 1)


def test_every_flow_family_and_no_other_has_a_time_embedder() -> None:
    for name, family in FAMILIES.items():
        assert (family.time_embedder is not None) == (family.facts.objective == "flow"), name


@pytest.mark.parametrize("name", [name for name, facts in TABLE.items() if facts.objective == "flow"])
def test_a_second_time_embedder_is_counted_and_by_at_most_20_million_parameters_too_high(name: str) -> None:
    facts, family = TABLE[name], FAMILIES[name]
    assert family.time_embedder is not None
    for flavour in (each for each in facts.flavours if alike(facts, each)[0] is each):
        embedder = published_denoiser(name, flavour.name).get_submodule(family.time_embedder.module)
        made = run(name, objective__twinFlow={}, hyperparameters__ema={}).spec
        assert 0 <= few_step_parameters(made, facts, flavour.width) - count(embedder) < 20e6
