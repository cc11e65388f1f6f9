"""What words that are learnt cost: the text encoders stay, and keep what their backward pass needs."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from atelier_operator.planner import table_facts
from atelier_operator.planner.memory import TEXT_VALUES_PER_TOKEN, Choice, predict, trained_parameters
from planned_runs import run

INVERSION = {"type": "textual-inversion", "tokens": [{"token": "<fox>", "initializer": "fox", "vectors": 4}]}


def kept_per_unit(activation: str) -> float:
    """Values that a CLIP keeps for each token, layer and unit of width, with gradients into its rows alone."""
    width, layers, tokens = 256, 4, 77
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        eos_token_id=99,
    )
    encoder = CLIPTextModel(config).eval().requires_grad_(False)
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    rows = torch.zeros(1, tokens, width, requires_grad=True)
    encoder.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output + rows)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encoder(torch.zeros(2, tokens, dtype=torch.long), output_hidden_states=True)
    return sum(kept.values()) / (2 * tokens * layers * width * rows.element_size())


def test_what_the_encoders_keep_is_what_autograd_saves() -> None:
    first, second = kept_per_unit("quick_gelu"), kept_per_unit("gelu")
    measured = first * 12 * 768 + second * 32 * 1280
    assert measured <= TEXT_VALUES_PER_TOKEN <= 1.1 * measured


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("fp32", 4)])
def test_the_encoders_stay_beside_the_denoiser(precision: str, size: int) -> None:
    words = run("sdxl", adapter=INVERSION, hyperparameters__precision=precision).spec
    lora = run("sdxl", adapter={"type": "lora", "rank": 1}, hyperparameters__precision=precision).spec
    model, choice = table_facts(words.model), Choice("ddp", 2, 2, gradient_checkpointing=True)
    assert trained_parameters(words, model) == 4 * 2 * model.width >= 4 * (768 + 1280)
    alone, beside = (predict(spec, model, choice, "cuda").train for spec in (lora, words))
    assert beside.base_weights - alone.base_weights == model.encoder_parameters * size
    assert beside.activations - alone.activations == 2 * 77 * TEXT_VALUES_PER_TOKEN * size
