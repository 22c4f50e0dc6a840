"""`scatter-moe info` and `scatter-moe explain`: what they print, as tables and as JSON, and their exit codes."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig

from scatter_moe.cli import info, main

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run_json(capsys, *arguments: str) -> tuple[int, dict]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_info_names_the_versions_that_are_installed(capsys):
    code, found = run_json(capsys, "info")
    assert code == 0
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["transformers"] == metadata.version("transformers")
    assert found["devices"][-1]["device"] == "cpu"
    assert len(found["devices"]) == 1 + torch.cuda.device_count()


def test_info_says_which_architectures_take_an_implementation(capsys):
    experts = run_json(capsys, "info")[1]["transformers"]
    assert {"mixtral", "qwen3_moe", "deepseek_v3"} <= set(experts["interface"])
    assert {"jetmoe", "llama4"} <= set(experts["own_path"])
    assert "llama" not in experts["interface"] + experts["own_path"]
    assert "grouped_mm" in experts["implementations"]


def test_info_as_tables(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert metadata.version("torch") in printed
    assert "always on their own path" in printed


def test_info_without_transformers(capsys, monkeypatch):
    find = info.importlib.util.find_spec
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert main(["info"]) == 0
    assert "transformers is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "runs", "tuning"),
    [
        ((9, 0), "Triton kernels", "sm_90.json"),
        ((8, 6), "Triton kernels", "heuristic"),
        ((7, 5), "no kernels: needs Triton and an Ampere GPU or newer", "heuristic"),
    ],
)
def test_info_of_a_gpu(monkeypatch, capability, runs, tuning):
    class Properties:
        major, minor = capability
        name, total_memory = "a GPU", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    gpu = info._gpu(0)
    assert (gpu["runs"], gpu["tuning"], gpu["memory_gib"]) == (runs, tuning, 80.0)


def test_a_loop_that_is_rewritten_gives_0(capsys):
    code, outcome = run_json(capsys, "explain", "tests.cli.factories:rewritten")
    assert code == 0
    (region,) = outcome["rewritten"]
    assert (region["form"], region["num_experts"], region["top_k"]) == ("range_loop", 4, 2)
    assert outcome["left"] == [] and outcome["stopped"] is None


def test_a_loop_that_is_left_alone_gives_1_and_the_rule(capsys):
    code, outcome = run_json(capsys, "explain", "tests.cli.factories:left_alone")
    assert code == 1
    assert outcome["rewritten"] == []
    assert outcome["left"][0]["rule"] == "no_intermediate_escapes"
    assert outcome["left"][0]["source"].startswith(str(ROOT / "tests" / "cli" / "factories.py"))


def test_tables_show_what_json_says(capsys):
    assert main(["explain", "tests.cli.factories:left_alone"]) == 1
    printed = capsys.readouterr().out
    assert "0 rewritten, 1 left as they are" in printed and "no_intermediate_escapes" in printed
    torch.compiler.reset()
    assert main(["explain", "tests.cli.factories:rewritten"]) == 0
    assert "range_loop" in capsys.readouterr().out


def test_a_model_that_fails_gives_1_and_its_error(capsys):
    code, outcome = run_json(capsys, "explain", "tests.cli.factories:broken")
    assert code == 1
    assert "RuntimeError" in outcome["stopped"]


@pytest.mark.parametrize("form", ["model type", "file", "folder"])
def test_a_configuration_is_explained_at_full_size_without_weights(capsys, tmp_path, form):
    MixtralConfig().save_pretrained(tmp_path)
    target = {"model type": "mixtral", "file": str(tmp_path / "config.json"), "folder": str(tmp_path)}[form]
    code, outcome = run_json(capsys, "explain", target, "--experts", "eager", "--layers", "1")
    assert code == 0
    assert outcome["layers"] == "1 of 32"
    assert outcome["experts_implementation"] == "eager"
    assert [region["module_path"] for region in outcome["rewritten"]] == ["model.layers.0.mlp.experts"]


def test_what_transformers_runs_unless_told_otherwise_is_rewritten(capsys):
    code, outcome = run_json(capsys, "explain", "mixtral", "--layers", "1")
    assert (code, outcome["experts_implementation"]) == (0, "grouped_mm")
    assert [region["form"] for region in outcome["rewritten"]] == ["sorted_slots"]


def test_a_loop_that_cannot_run_without_values_says_so(capsys, monkeypatch):
    monkeypatch.setattr("fx_passes.capture.counts.is_of_experts", lambda _counts: False)  # numbers are left to Dynamo
    code, outcome = run_json(capsys, "explain", "jetmoe", "--layers", "1")
    assert code == 1
    assert "meta tensor" in outcome["stopped"]
    assert "--device cpu" in outcome["hint"]


@pytest.mark.parametrize(
    ("arguments", "experts", "hint"),
    [
        (["mixtral", "--experts", "scatter_moe"], "scatter_moe", "transformers calls the operators itself"),
        (["llama"], "own code", "no experts implementation applies"),
    ],
)
def test_a_model_without_a_loop_to_rewrite_says_why(capsys, arguments, experts, hint):
    code, outcome = run_json(capsys, "explain", *arguments, "--layers", "1")
    assert code == 1
    assert outcome["experts_implementation"] == experts
    assert outcome["rewritten"] == [] and outcome["hint"].startswith(hint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_module:make"], "can't import no_such_module"),
        (["tests.cli.factories:missing"], "tests.cli.factories has no function 'missing'"),
        ([":make"], "accepted is MODULE:FACTORY"),
        (["tests.cli.factories:model_alone"], "must return (model, inputs)"),
        (["no/such/config.json"], "can't load a configuration from 'no/such/config.json'"),
        (["vit"], "ViTConfig is no configuration of a language model"),
        (["dbrx"], "can't build dbrx: AttributeError: "),
        (["mixtral", "--experts", "none_such"], "none_such"),
        (["mixtral", "--device", "none_such"], "none_such"),
    ],
)
def test_what_the_user_can_mend_gives_2_and_one_line(capsys, arguments, message):
    assert main(["explain", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("scatter-moe: ") and message in error


@pytest.mark.parametrize("arguments", [[], ["explain"], ["explain", "mixtral", "--layers", "0"], ["nothing"]])
def test_wrong_usage_gives_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def run_process(*command: str, code: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "scatter_moe"]
    return subprocess.run([*start, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_as_a_process():
    result = run_process("info", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["versions"]["torch"]
    result = run_process("explain", "tests.cli.factories:left_alone", "--json")
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout)["left"]


@pytest.mark.parametrize("output", [[], ["--json"]])
def test_a_reader_that_has_seen_enough_gets_no_traceback(output):
    code = (
        "import os, sys; from scatter_moe.cli import main; os.close(0); r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
    )
    result = run_process(code=code + f"sys.exit(main({['info', *output]}))")
    assert (result.returncode, result.stderr) == (1, "")


def test_without_rich_json_works_and_tables_name_the_extra():
    code = "import sys; sys.modules['rich'] = sys.modules['rich.console'] = None; from scatter_moe.cli import main; "
    result = run_process(code=code + "sys.exit(main(['info', '--json']))")
    assert result.returncode == 0, result.stderr
    result = run_process(code=code + "sys.exit(main(['info']))")
    assert result.returncode == 2
    assert result.stderr.strip().endswith("tables need rich: pip install 'scatter-moe[cli]', or use --json")
