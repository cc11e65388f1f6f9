"""Stable Diffusion 3 where a checkpoint comes without T5, and the length of its text."""

from pathlib import Path

import torch

from atelier_runtime import components
from atelier_runtime.families import get_family
from family_cases import PROMPTS, Case, record, sampling_arguments, walk
from family_models import tiny_pipeline

FAMILY = get_family("sd3")


def without_t5() -> Case:
    pipe = tiny_pipeline("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    return Case("sd3", pipe, FAMILY)


@torch.no_grad()
def test_a_checkpoint_without_t5_follows_the_pipeline_as_well() -> None:
    case = without_t5()
    recording = record(case.pipe, sampling_arguments(case, guided=True))
    for ours, theirs in walk(case, recording, guided=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_is_encoded_without_t5_while_no_transformer_is_loaded(tmp_path: Path) -> None:
    case = without_t5()
    case.pipe.save_pretrained(tmp_path)
    pipe = components.load_encoders(FAMILY, tmp_path, torch.float32, torch.device("cpu"))
    (features,) = FAMILY.encode_text(pipe, PROMPTS[:1])
    whole, _, pooled, _ = case.pipe.encode_prompt(PROMPTS[0], None, None, do_classifier_free_guidance=False)
    width = features["embeds"].shape[-1]
    torch.testing.assert_close(features["embeds"], whole[0, :16, :width])
    torch.testing.assert_close(features["pooled"], pooled[0])
    assert not whole[0, 16:].any()


def test_text_has_the_length_of_the_pipeline_or_of_a_shorter_tokenizer() -> None:
    case = Case("sd3", tiny_pipeline("sd3"), FAMILY)
    assert FAMILY.sampling_arguments(case.pipe, case.request(None))["max_sequence_length"] == 16
    case.pipe.tokenizer_3.model_max_length = 512
    assert FAMILY.sampling_arguments(case.pipe, case.request(None))["max_sequence_length"] == 256
    assert FAMILY.encode_text(case.pipe, ["a"])[0]["embeds"].shape[0] == 16 + 256


def test_only_the_queries_of_the_last_text_stream_are_dead() -> None:
    assert FAMILY.dead_modules(tiny_pipeline("sd3").transformer) == ("transformer_blocks.2.attn.add_q_proj",)
