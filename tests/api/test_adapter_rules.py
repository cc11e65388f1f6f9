"""What an adapter must be to the model, the data and the layouts: one row for each rule, refused and accepted."""

from typing import Any

import pytest

from atelier_api.read import problems
from run_documents import document

SDXL = {"family": "sdxl", "source": "base"}
FOX = {"token": "<fox>", "initializer": "fox"}
CONTROLNET = {"type": "controlnet"}
CONDITIONED = [{"uri": "a", "conditioning": "edges"}]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kohya of a whole model": (
        {"adapter": {"type": "full"}, "publish__formats": ["kohya"]},
        "spec.publish.formats is ['kohya']; none of these holds an adapter of type full; must hold diffusers",
    ),
    "kohya of DoRA": (
        {"adapter": {"type": "lora", "dora": True}},
        "spec.publish.formats is ['diffusers', 'kohya', 'lycoris']; readers of kohya drop or misread the magnitudes of "
        "spec.adapter.dora; "
        "must be [diffusers]",
    ),
    "a LoRA in the layout of lycoris-lora alone": (
        {"publish__formats": ["lycoris"]},
        "spec.publish.formats is ['lycoris']; none of these holds an adapter of type lora; must hold diffusers or kohya",
    ),
    "a type of lycoris-lora without its layout": (
        {"adapter": {"type": "lokr"}, "publish__formats": ["diffusers", "kohya"]},
        "spec.publish.formats is ['diffusers', 'kohya']; none of these holds an adapter of type lokr; must hold lycoris",
    ),
    "a rotation in bf16": (
        {"adapter": {"type": "boft"}, "hyperparameters__optimizer__type": "adamw-bf16"},
        "spec.hyperparameters.optimizer.type is 'adamw-bf16'; with adapter type boft it would round the changed weights to bf16; "
        "set type adamw",
    ),
    "weight decomposition of lycoris-lora in bf16": (
        {"adapter": {"type": "loha", "dora": True}, "hyperparameters__optimizer__type": "adamw-bf16"},
        "spec.hyperparameters.optimizer.type is 'adamw-bf16'; with adapter type loha with dora it would round the changed weights",
    ),
    "a broken target of a type of lycoris-lora": (
        {"adapter": {"type": "locon", "targets": ["(to_q"]}},
        "spec.adapter.targets[0] is '(to_q'; must be a preset (attention, mlp, all) or a regular expression: missing )",
    ),
    "a block of ranks that does not divide them": (
        {"adapter": {"type": "dylora", "rank": 16, "rankBlock": 3}},
        "spec.adapter.rankBlock is 3; must divide spec.adapter.rank, which is 16",
    ),
    "a block of more ranks than there are": (
        {"adapter": {"type": "dylora", "rankBlock": 256}},
        "spec.adapter.rankBlock is 256; must divide spec.adapter.rank, which is 128",
    ),
    "textual inversion without a placeholder": (
        {"model": SDXL, "adapter": {"type": "textual-inversion"}},
        "spec.adapter.tokens is []; must have at least one placeholder, such as <pixel-knight>",
    ),
    "a placeholder twice": (
        {"model": SDXL, "adapter": {"type": "textual-inversion", "tokens": [FOX, FOX]}},
        "spec.adapter.tokens[1].token is '<fox>'; must differ from the others",
    ),
    "textual inversion of a family whose text no stock pipeline gives new words": (
        {"adapter": {"type": "textual-inversion", "tokens": [FOX]}},
        "spec.adapter.type is 'textual-inversion'; flux learns no new words; train sdxl",
    ),
    "dropped captions in textual inversion": (
        {
            "model": SDXL,
            "adapter": {"type": "textual-inversion", "tokens": [FOX]},
            "data__captions": {"dropout": "0.5"},
        },
        "spec.data.captions.dropout is '0.5'; only for type lora or full or controlnet or lokr or loha or locon or diag-oft or "
        "boft or dylora or ia3",
    ),
    "a broken target of inputs": (
        {"adapter": {"type": "ia3", "inputTargets": ["mlp", "(to_q"]}},
        "spec.adapter.inputTargets[1] is '(to_q'; must be a preset (attention, mlp, all) or a regular expression: missing )",
    ),
    "a target that is no expression": (
        {"adapter__targets": ["attention", "(to_q"]},
        "spec.adapter.targets[1] is '(to_q'; must be a preset (attention, mlp, all) or a regular expression: missing )",
    ),
    "conditioning pictures of another store": (
        {"model": SDXL, "adapter": CONTROLNET, "data__sources": [{"uri": "a", "conditioning": "gs://bucket/x"}]},
        "spec.data.sources[0].conditioning is 'gs://bucket/x'; must be a folder or s3://bucket/prefix",
    ),
    "a prompt's conditioning picture of another store": (
        {
            "model": SDXL,
            "adapter": CONTROLNET,
            "data__sources": CONDITIONED,
            "validation__prompts": [{"text": "a", "conditioning": "gs://bucket/x.png", "conditioningScale": "1"}],
        },
        "spec.validation.prompts[0].conditioning is 'gs://bucket/x.png'; must be a file or s3://bucket/key",
    ),
    "a source without its conditioning pictures": (
        {"model": SDXL, "adapter": CONTROLNET, "data__sources": [*CONDITIONED, {"uri": "b"}]},
        "spec.data.sources[1].conditioning is empty; adapter type controlnet needs it: the folder of the pictures that go with",
    ),
    "conditioning pictures for a LoRA": (
        {"data__sources": CONDITIONED},
        "spec.data.sources[0].conditioning is 'edges'; only for adapter type controlnet, not lora; remove it",
    ),
    "a prompt without its conditioning picture": (
        {
            "model": SDXL,
            "adapter": CONTROLNET,
            "data__sources": CONDITIONED,
            "validation__prompts": [{"text": "a", "conditioningScale": "1"}],
        },
        "spec.validation.prompts[0].conditioning is empty; adapter type controlnet needs it: the picture that this sample is",
    ),
    "a prompt that does not say how much its control counts": (
        {
            "model": SDXL,
            "adapter": CONTROLNET,
            "data__sources": CONDITIONED,
            "validation__prompts": [{"text": "a", "conditioning": "a.png"}],
        },
        "spec.validation.prompts[0].conditioningScale is empty; adapter type controlnet needs it: how much of the control network",
    ),
    "a conditioning picture for a LoRA": (
        {"validation__prompts": [{"text": "a", "conditioning": "a.png"}]},
        "spec.validation.prompts[0].conditioning is 'a.png'; only for adapter type controlnet, not lora; remove it",
    ),
    "a conditioning scale for a LoRA": (
        {"validation__prompts": [{"text": "a", "conditioningScale": "0.5"}]},
        "spec.validation.prompts[0].conditioningScale is 0.5; only for adapter type controlnet, not lora; remove it",
    ),
    "the copy of an fp32 model in bf16": (
        {
            "model": SDXL,
            "adapter": CONTROLNET,
            "data__sources": CONDITIONED,
            "hyperparameters": {"steps": 1, "precision": "fp32", "optimizer": {"type": "adamw-bf16"}},
        },
        "spec.hyperparameters.optimizer.type is 'adamw-bf16'; with adapter type controlnet it would round the copy of the fp32 model",
    ),
    "a control network in the layout of kohya": (
        {"model": SDXL, "adapter": CONTROLNET, "data__sources": CONDITIONED, "publish__formats": ["kohya"]},
        "spec.publish.formats is ['kohya']; none of these holds an adapter of type controlnet; must hold diffusers",
    ),
}


ACCEPTED: dict[str, dict[str, Any]] = {
    "a whole model with every default": {"adapter": {"type": "full"}},
    "a LoRA in bf16 on an fp32 model": {
        "hyperparameters": {"steps": 1, "precision": "fp32", "optimizer": {"type": "adamw-bf16"}}
    },
    "a rotation with every default": {"adapter": {"type": "diag-oft"}},
    "a type of lycoris-lora in its layout": {
        "adapter": {"type": "lokr", "dora": True},
        "publish__formats": ["lycoris"],
    },
    "DyLoRA in blocks, in bf16": {
        "adapter": {"type": "dylora", "rank": 32, "rankBlock": 8},
        "hyperparameters__optimizer__type": "adamw-bf16",
    },
    "words learnt in bf16": {
        "model": SDXL,
        "adapter": {"type": "textual-inversion", "tokens": [FOX | {"vectors": 4}, FOX | {"token": "<red-fox>"}]},
        "hyperparameters__optimizer__type": "adamw-bf16",
    },
    "(IA)³ in bf16": {"adapter": {"type": "ia3"}, "hyperparameters__optimizer__type": "adamw-bf16"},
    "LoKr in bf16": {"adapter": {"type": "lokr"}, "hyperparameters__optimizer__type": "adamw-bf16"},
    "a LoRA under DeepSpeed": {
        "parallelism": {"strategy": "deepspeed-zero3", "gpusPerNode": 2},
        "hyperparameters__globalBatchSize": 2,
    },
    "a rotation on a quantised base": {"adapter": {"type": "boft"}, "model__quantization": "fp8"},
    "DoRA for diffusers": {"adapter": {"type": "lora", "dora": True}, "publish__formats": ["diffusers"]},
    "regular expressions": {"adapter__targets": [r"transformer_blocks\.\d+\.attn\.to_[qkv]"]},
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_broken_rule_is_one_sentence_that_says_what_is_allowed(changes: dict[str, Any], sentence: str) -> None:
    found = [str(problem) for problem in problems(document(**changes))]
    assert len(found) == 1
    assert found[0].startswith(sentence)


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_a_sound_run_has_no_problem(changes: dict[str, Any]) -> None:
    assert problems(document(**changes)) == []
