"""The command line as a user meets it: real processes, one-line errors, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogvideo import Clip, cli


def cogvideo(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cogvideo", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, env=environment)


def test_help_names_the_commands_and_imports_no_torch():
    done = cogvideo("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("generate", "train", "models"))
    code = "import sys, cogvideo.cli; sys.exit(any(m in sys.modules for m in ('torch', 'av', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_opening_a_model_imports_no_compiler(nano):
    """Two seconds that no one who generates should wait for."""
    code = (
        "import sys; from cogvideo import CogVideo; before = set(sys.modules); "
        f"pipe = CogVideo.from_pretrained({str(nano)!r}); parts = pipe.parts; "
        "parts.stage2, parts.refiner, parts.vqvae; assert pipe.estimate().fits; "
        "new = set(sys.modules) - before; "
        "assert not [n for n in new if n.startswith(('torch._dynamo', 'sympy'))], new"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generate_writes_a_video_that_reads_back(nano, tmp_path):
    arguments = ("generate", "a dogg runs to the right", "--model", nano, "--seed", 3, "-o")
    done, again = (cogvideo(*arguments, name, cwd=tmp_path) for name in ("a.mp4", "again.mp4"))
    assert done.returncode == again.returncode == 0, done.stderr
    assert "hint: the model never saw the word 'dogg'" in done.stderr and "seed 3" in done.stdout
    clip = Clip.load(tmp_path / "a.mp4")
    assert clip.frames.shape == (33, 32, 32, 3) and clip.fps == 8
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()


def test_generate_many_from_a_file(nano, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog runs\n\na cat in the snow\n")
    done = cogvideo(
        "generate",
        "--prompts",
        "prompts.txt",
        "-o",
        "x.gif",
        "--model",
        nano,
        "--num-frames",
        5,
        "--num-videos",
        2,
        "--quiet",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert sorted(p.name for p in tmp_path.glob("*.gif")) == [f"x-{i}.gif" for i in range(4)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", ""], "the prompt is empty"),
        (["generate"], "give either a prompt or --prompts FILE"),
        (["generate", "a dog", "-o", "a.avi3"], ".mp4"),
        (["generate", "a dog", "-o", "/proc/nowhere/a.mp4"], "/proc"),
        (["generate", "a dog", "--model", "nonesuch"], "unknown model 'nonesuch'"),
        (["generate", "a dog", "--seed", "-5"], "out of range"),
        (["generate", "a dog", "--num-frames", "6"], "choose one of 1, 5, 9, 17, 33"),
        (["generate", "a dog", "--image", "none.png"], "none.png"),
        (["generate", "a dog", "--device", "quantum"], "choose one of cpu"),
        (["generate", "a dog", "--keep", "k"], "--keep needs --seed"),
        (["generate", "a dog", "--guidance-scale", "nan"], "guidance_scale must be from 1 to 1000"),
        (["generate", "a dog", "--imag.steps", "3"], "Unrecognized options: --imag.steps"),
        (["generate", "a dog", "--seed", "1.5"], "Error parsing --seed"),
        (["train", "tiny", "--imagee.steps", "3"], "its phases are crops, tokenizer, image"),
        (["train", "tiny", "--phases", "decoder", "--out", "new"], "needs the part vqvae"),
        (["train", "tiny", "--save-every", "0"], "--save-every must be from 1 to"),
        (["train", "nonesuch"], "choose one of tiny"),
        (["train", "tiny", "--phases", "stage7"], "tokenizer, image"),
        (["train", "tiny", "--stage1.colour", "3"], "choose one of"),
        (["train", "tiny", "--stage1.steps", "many"], "--stage1.steps needs int"),
        (["models", "nonesuch"], "unknown model"),
        (["generat", "a dog"], "cogvideo has no command 'generat'; choose one of generate, train"),
        (
            ["data", "tokenise"],
            "cogvideo data has no command 'tokenise'; choose one of check, tokenize, world",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(nano, complaint, arguments, message):
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments = [*arguments, "--model", nano]
    assert message in complaint(*arguments)


def test_a_reader_who_has_enough_is_no_error():
    command = f"{sys.executable} -m cogvideo generate --help"
    with subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(60) == 141 and process.stderr.read() == b""


def test_a_mistake_ends_the_process_with_exit_code_2(tmp_path):
    done = cogvideo("generate", "", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("cogvideo: the prompt is empty")


def test_models_tells_what_a_folder_knows(nano):
    done = cogvideo("models", nano)
    assert done.returncode == 0
    assert "64 codes" in done.stdout and "refiner" in done.stdout and "dog" in done.stdout


def test_estimate_tells_the_cost_without_any_weights():
    done = cogvideo("estimate", "cogvideo-9b")
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line.split()[-4:] for line in done.stdout.splitlines()}
    assert rows["key frames"][:2] == ["1600", "3200"] and rows["to 2 fps"][1] == "1600"
    assert all(float(rows[name][-1]) > 0 for name in ("first frame", "larger frames", "decode", "all"))


def test_a_model_that_does_not_fit_is_refused_with_the_table(nano, tmp_path, monkeypatch, capsys):
    from cogvideo import hardware

    monkeypatch.setattr(hardware, "free_memory", lambda device="cpu": 1000.0)
    arguments = ["generate", "a dog", "-o", str(tmp_path / "a.gif"), "--model", str(nano), "--quiet"]
    monkeypatch.setattr(sys, "argv", ["cogvideo", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    told = capsys.readouterr().err
    assert exit.value.code == 2 and "--ignore-memory" in told and "caches" in told
    assert not (tmp_path / "a.gif").exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--ignore-memory", "--num-frames", "5"])
    cli.main()
    assert (tmp_path / "a.gif").exists()


def test_processes_generate_the_same_files(nano, tmp_path, monkeypatch):
    """Video i has seed + i, whoever generates it."""
    (tmp_path / "prompts.txt").write_text("a dog runs to the right\na cat spins\na horse jumps\n")

    def generate(name, *more):
        (tmp_path / name).mkdir()
        command = ["cogvideo", "generate", "--prompts", str(tmp_path / "prompts.txt"), "--model", str(nano)]
        command += ["-o", str(tmp_path / name / "v.png"), "--seed", "5", "--quiet", *more]
        monkeypatch.setattr(sys, "argv", command)
        cli.main()
        return [file.read_bytes() for file in sorted((tmp_path / name).iterdir())]

    alone = generate("alone")
    assert len(alone) == 3 and generate("processes", "--workers", "2") == alone
    with pytest.raises(SystemExit):
        generate("kept", "--workers", "2", "--keep", str(tmp_path / "drafts"))
    with pytest.raises(SystemExit):
        generate("many", "--workers", "1000")
