"""How a result is loaded, and how a failure is told."""

import json
from pathlib import Path

import pytest

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.result import AgentResult
from atelier_cli.outcome import loading, made, stopped, tell_failure
from atelier_cli.plan import adapter_text
from atelier_runtime.observe.failure import record_failure
from atelier_runtime.observe.scratch import Scratch
from run_files import run_file


def test_a_lora_is_loaded_in_three_lines(tmp_path: Path) -> None:
    run = run_file(tmp_path, model={"family": "sd3", "source": "hf://owner/model@main"})
    lines = list(loading(run, ["exports/diffusers/pytorch_lora_weights.safetensors", "exports/kohya/demo.safetensors"]))
    assert lines == [
        "from diffusers import DiffusionPipeline",
        'pipe = DiffusionPipeline.from_pretrained("owner/model")',
        f'pipe.load_lora_weights("{run.store_uri}/exports/diffusers", weight_name="pytorch_lora_weights.safetensors")',
    ]


def test_the_base_of_a_pinned_run_is_loaded_at_its_revision(tmp_path: Path) -> None:
    run = run_file(tmp_path, model={"family": "sd3", "source": "hf://owner/model", "revision": "v1"})
    lines = list(loading(run, ["exports/diffusers/pytorch_lora_weights.safetensors"]))
    assert lines[1] == 'pipe = DiffusionPipeline.from_pretrained("owner/model", revision="v1")'


def test_a_result_in_a_bucket_is_fetched_first(tmp_path: Path) -> None:
    run = run_file(tmp_path, storage={"uri": "s3://bucket/runs"})
    lines = list(loading(run, ["exports/diffusers/pytorch_lora_weights.safetensors"]))
    assert lines[0] == "aws s3 cp --recursive s3://bucket/runs/default/demo-local/exports exports"
    assert lines[-1].startswith('pipe.load_lora_weights("./exports/diffusers"')


def test_what_is_predicted_otherwise_than_by_the_checkpoint_is_told_to_its_sampler(tmp_path: Path) -> None:
    run = run_file(tmp_path, model={"family": "sdxl", "source": str(tmp_path)}, objective={"prediction": "v"})
    lines = list(loading(run, ["exports/diffusers/pytorch_lora_weights.safetensors"]))
    assert lines[2] == (
        'pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")'
    )


def test_what_tells_of_few_steps_is_put_on_before_the_adapter(tmp_path: Path) -> None:
    spec = {"objective": {"twinFlow": {}}, "hyperparameters": {"steps": 4, "ema": {}}}
    run = run_file(tmp_path, model={"family": "sd3", "source": str(tmp_path)}, **spec)
    lines = list(
        loading(run, ["exports/diffusers/pytorch_lora_weights.safetensors", "exports/few_steps/demo.safetensors"])
    )
    assert lines[2:4] == [
        "from atelier_runtime.few_steps import few_step_pipeline",
        f'pipe = few_step_pipeline(pipe, "{run.store_uri}/exports/few_steps/demo.safetensors")',
    ]
    assert lines[4].startswith("pipe.load_lora_weights(")


def test_files_of_lycoris_lora_are_merged_into_the_denoisers_they_belong_to(tmp_path: Path) -> None:
    transformer = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": transformer, "transformer_2": transformer}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    run = run_file(tmp_path)
    files = [f"exports/lycoris/demo_{noise}_noise.safetensors" for noise in ("low", "high")]
    lines = list(loading(run, files))
    assert lines[:2] == [
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("{tmp_path}")',
    ]
    for place, noise, component in ((2, "high", "transformer"), (5, "low", "transformer_2")):
        assert lines[place : place + 3] == [
            "from lycoris import create_lycoris_from_weights",
            f'network, _ = create_lycoris_from_weights(1.0, "{run.store_uri}/exports/lycoris/demo_{noise}_noise.safetensors", '
            f"pipe.{component})",
            "network.merge_to(1.0)",
        ]


def test_each_word_is_loaded_into_both_encoders(tmp_path: Path) -> None:
    tokens = [{"token": f"<{name}>", "initializer": name} for name in ("fox", "red-hat")]
    adapter = {"type": "textual-inversion", "tokens": tokens}
    run = run_file(tmp_path, model={"family": "sdxl", "source": str(tmp_path)}, adapter=adapter)
    lines = list(loading(run, ["exports/diffusers/fox.safetensors", "exports/diffusers/red-hat.safetensors"]))
    assert f'vectors = load_file("{run.store_uri}/exports/diffusers/red-hat.safetensors")' in lines
    loaders = [line for line in lines if line.startswith("pipe.load_textual_inversion")]
    assert loaders == [
        f'pipe.load_textual_inversion(vectors["{key}"], token="<{name}>", text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer})'
        for name in ("fox", "red-hat")
        for key, encoder, tokenizer in (
            ("clip_l", "text_encoder", "tokenizer"),
            ("clip_g", "text_encoder_2", "tokenizer_2"),
        )
    ]
    assert adapter_text(run.spec.adapter) == "textual inversion of <fox> (1 vector), <red-hat> (1 vector)"


def test_the_plan_names_a_slider(tmp_path: Path) -> None:
    run = run_file(tmp_path, adapter={"type": "boft", "slider": True})
    assert adapter_text(run.spec.adapter) == "BOFT of blocks up to 64, on attention, a slider"


def test_trained_components_are_put_into_the_pipeline(tmp_path: Path) -> None:
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "image_encoder": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    lines = list(loading(run_file(tmp_path), ["exports/diffusers/transformer/config.json"]))
    assert lines[0] == "from diffusers import DiffusionPipeline, WanTransformer3DModel"
    assert lines[1].startswith('transformer = WanTransformer3DModel.from_pretrained("')
    assert lines[2] == f'pipe = DiffusionPipeline.from_pretrained("{tmp_path}", transformer=transformer)'


def test_weights_for_comfyui_alone_say_where_they_belong(tmp_path: Path) -> None:
    assert list(loading(run_file(tmp_path), ["exports/kohya/demo.safetensors"])) == [
        "ComfyUI: put the weights into models/loras"
    ]


def test_a_run_without_a_store_that_can_be_listed_is_still_done(tmp_path: Path) -> None:
    (line,) = made(run_file(tmp_path, storage={"uri": "ftp://x"}))
    assert line.startswith("done; ftp://x/default/demo-local cannot be listed just now: ")


def _result(code: ExitCode, message: str, **fields: object) -> AgentResult:
    return AgentResult(exit_code=code, reason=MEANINGS[code].reason, message=message, attempt="1.0", time=0.0, **fields)  # type: ignore[arg-type]


def test_a_stopped_run_says_how_it_goes_on() -> None:
    result = _result(ExitCode.STOPPED, "stopped by SIGINT", step=7, checkpoint_step=7)
    assert list(stopped(result, Path("run.yaml"))) == [
        "stopped at step 7: stopped by SIGINT",
        "checkpoint at step 7; `atelier run run.yaml` goes on from there",
    ]


def test_a_users_mistake_is_told_without_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell_failure(run_file(tmp_path), _result(ExitCode.DATA, "no pictures\nnone at all", rank=0, step=3))
    assert capsys.readouterr().err == "error: rank 0: no pictures\nerror: rank 0: none at all\n"


def test_a_bug_shows_its_traceback_and_the_end_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = Scratch(tmp_path)
    try:
        raise KeyError("no such thing")
    except KeyError as error:
        record_failure(scratch.failures("1.0"), 1, error)
    log = scratch.logs("1.0", 0) / "group" / "attempt_0" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("the last word\n")
    tell_failure(run_file(tmp_path, processes=2), _result(ExitCode.INTERNAL, "'no such thing'", rank=1, step=5))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"last lines of rank 1 ({log}):", "  the last word"]
    assert "KeyError: 'no such thing'" in lines
    assert (
        lines[-1]
        == "error: rank 1: 'no such thing' (step 5); this is a bug of atelier, please report it with the lines above"
    )


def test_a_lost_process_shows_the_log_and_blames_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell_failure(run_file(tmp_path), _result(ExitCode.INTERNAL, "killed by SIGKILL", rank=0))
    assert capsys.readouterr().err == "error: rank 0: killed by SIGKILL\n"


def test_a_pipeline_of_ours_is_loaded_by_its_own_name(tmp_path: Path) -> None:
    run = run_file(tmp_path, model={"family": "longcat_video", "source": "hf://owner/model@main"})
    lines = list(loading(run, ["exports/diffusers/pytorch_lora_weights.safetensors"]))
    assert lines[:2] == [
        "from atelier_runtime.networks import LongCatVideoPipeline",
        'pipe = LongCatVideoPipeline.from_pretrained("owner/model")',
    ]
