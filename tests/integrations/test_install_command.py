from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import slicemod
from slicemod.cli import BAD_INPUT, main
from slicemod.integrations import install_command, program_python
from slicemod.integrations.installed_folder import MARKER
from slicemod.integrations.programs import PROGRAMS
from tests.integrations import program_folders
from tests.integrations.program_folders import ATTENTION, forge, webui, written


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    return program_folders.comfyui(tmp_path / "My ComfyUI")


def files_in(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must fail, and returns its paragraph."""
    assert main([str(argument) for argument in arguments]) == BAD_INPUT
    return capsys.readouterr().err


def test_comfyui_gets_a_folder_that_is_taken_out_again(comfyui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(comfyui)
    assert main(["install", "comfyui", str(comfyui)]) == 0
    said = capsys.readouterr().out
    assert "custom_nodes/comfyui-slicemod" in said.replace("\\", "/")
    assert '"Sliced attention"' in said
    added = files_in(comfyui).keys() - before.keys()
    assert added == {f"custom_nodes/comfyui-slicemod/{name}" for name in ("__init__.py", MARKER)}
    assert main(["uninstall", "comfyui", str(comfyui)]) == 0
    assert files_in(comfyui) == before
    assert list((comfyui / "custom_nodes").iterdir()) == []


@pytest.mark.parametrize("make", [webui, forge])
def test_a_webui_gets_an_extension_that_is_taken_out_again(make: object, tmp_path: Path) -> None:
    root = make(tmp_path / "webui")  # type: ignore[operator]
    before = files_in(root)
    assert main(["install", "webui", str(root)]) == 0
    assert (root / "extensions" / "sd-webui-slicemod" / "scripts" / "slicemod_attention.py").is_file()
    assert main(["uninstall", "webui", str(root)]) == 0
    assert files_in(root) == before


def test_a_second_install_updates_what_an_older_slicemod_wrote(
    comfyui: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_command, "__version__", "0.0.7")
    main(["install", "comfyui", str(comfyui)])
    marker = comfyui / "custom_nodes" / "comfyui-slicemod" / MARKER
    assert json.loads(marker.read_text(encoding="utf-8"))["slicemod"] == "0.0.7"
    monkeypatch.undo()
    assert main(["install", "comfyui", str(comfyui)]) == 0
    assert "Updated" in capsys.readouterr().out
    assert json.loads(marker.read_text(encoding="utf-8"))["slicemod"] == slicemod.__version__


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_a_folder_of_anothers_stays_as_it_is(command: str, comfyui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(comfyui, {"custom_nodes/comfyui-slicemod/__init__.py": "mine = True\n"})
    before = files_in(comfyui)
    assert "it is another's" in refused(capsys, command, "comfyui", comfyui, "--discard-changes")
    assert files_in(comfyui) == before


def test_a_link_to_a_folder_elsewhere_stays_as_it_is(comfyui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["install", "comfyui", str(comfyui)])
    folder = comfyui / "custom_nodes" / "comfyui-slicemod"
    folder.rename(comfyui / "elsewhere")
    folder.symlink_to(comfyui / "elsewhere", target_is_directory=True)
    assert "it is another's" in refused(capsys, "uninstall", "comfyui", comfyui)
    assert len(files_in(comfyui / "elsewhere")) == 2


@pytest.mark.parametrize("command", ["install", "uninstall"])
@pytest.mark.parametrize("changed", ["__init__.py", "notes.txt"])
def test_files_that_the_user_changed_are_named_and_stay(
    changed: str, command: str, comfyui: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["install", "comfyui", str(comfyui)])
    folder = comfyui / "custom_nodes" / "comfyui-slicemod"
    written(folder, {changed: "mine\n", "__pycache__/__init__.cpython-311.pyc": "a cache is no change"})
    before = files_in(comfyui)
    said = refused(capsys, command, "comfyui", comfyui)
    assert f"changed or added were {changed}. " in said
    assert f'`slicemod {command} comfyui "{comfyui}" --discard-changes`' in said
    assert files_in(comfyui) == before
    assert main([command, "comfyui", str(comfyui), "--discard-changes"]) == 0
    assert folder.exists() == (command == "install")
    assert (folder / "notes.txt").exists() is False


def test_what_is_not_there_cannot_be_taken_out(comfyui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it is not there" in refused(capsys, "uninstall", "comfyui", comfyui)


def test_a_folder_that_is_no_such_program_is_refused_with_what_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "install", "comfyui", tmp_path)
    assert f"the folder of ComfyUI, which has {ATTENTION} and custom_nodes and main.py" in said
    assert f"got {tmp_path}, which has not" in said
    assert "which is no folder" in refused(capsys, "install", "webui", tmp_path / "missing")
    assert "modules/script_callbacks.py" in refused(capsys, "uninstall", "webui", tmp_path)
    assert files_in(tmp_path) == {}


def test_a_version_without_the_hook_is_refused_but_left_by_uninstall(
    comfyui: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["install", "comfyui", str(comfyui)])
    (comfyui / ATTENTION).write_text("def attention(): ...\n", encoding="utf-8")
    assert "has no optimized_attention_override" in refused(capsys, "install", "comfyui", comfyui)
    assert main(["uninstall", "comfyui", str(comfyui)]) == 0


def test_a_webui_without_a_choice_of_attention_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "install", "webui", webui(tmp_path, "def apply_optimizations(): ...\n"))
    assert "it has no list_optimizers" in said


def test_the_folder_that_packages_for_windows_unpack_to_is_taken(comfyui: Path, tmp_path: Path) -> None:
    portable = tmp_path / "ComfyUI_windows_portable"
    portable.mkdir()
    comfyui.rename(portable / "ComfyUI")
    assert main(["install", "comfyui", str(portable)]) == 0
    assert (portable / "ComfyUI" / "custom_nodes" / "comfyui-slicemod" / "__init__.py").is_file()


def test_the_folder_of_the_desktop_version_is_taken(tmp_path: Path) -> None:
    written(tmp_path, {f"{name}/": "" for name in ("custom_nodes", "models", "user", "input", "output")})
    assert main(["install", "comfyui", str(tmp_path)]) == 0
    assert (tmp_path / "custom_nodes" / "comfyui-slicemod" / "__init__.py").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="makes a program by a script with #!")
@pytest.mark.parametrize(
    ("answer", "said"), [("[True, True]", "has slicemod"), ("[False, True]", "has no slicemod yet"), (None, "started")]
)
@pytest.mark.parametrize("place", ["venv/bin/python", "../python_embeded/python.exe"])
def test_the_programs_own_python_is_looked_at(
    place: str, answer: str | None, said: str, comfyui: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = (comfyui / place).resolve()
    written(python.parent, {python.name: f"#!/bin/sh\necho '{answer}'\n" if answer else "#!/missing\n"})
    python.chmod(0o755)
    main(["install", "comfyui", str(comfyui)])
    line = capsys.readouterr().out.splitlines()[1]
    assert said in line
    command = f'python{python.suffix}" -m pip install --no-deps "{Path(slicemod.__file__).parents[1]}" einops'
    assert (command in line) == (answer != "[True, True]")


@pytest.mark.skipif(sys.platform == "win32", reason="makes a link to a program")
def test_a_python_that_runs_answers_and_a_program_may_have_none(tmp_path: Path) -> None:
    assert program_python.python_of(tmp_path) is None
    place = tmp_path / "venv" / "bin" / "python"
    place.parent.mkdir(parents=True)
    place.symlink_to(sys.executable)
    found = program_python.python_of(tmp_path)
    assert found is not None
    assert found.path == place
    assert found.has_slicemod is not None


def test_the_code_of_each_program_names_where_slicemod_can_be_installed_from() -> None:
    for program in PROGRAMS.values():
        template = (Path(install_command.__file__).parent / program.template).read_text(encoding="utf-8")
        assert template.count('\nSOURCE = "slicemod"\n') == 1


def test_a_python_without_slicemod_is_told_how_to_get_it_by_the_nodes(
    comfyui: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["install", "comfyui", str(comfyui)])
    monkeypatch.setitem(sys.modules, "slicemod.integrations.comfyui.nodes", None)
    code = runpy.run_path(str(comfyui / "custom_nodes" / "comfyui-slicemod" / "__init__.py"))
    command = f'"{sys.executable}" -m pip install --no-deps "{Path(slicemod.__file__).parents[1]}" einops'
    assert command in capsys.readouterr().err
    assert set(code["NODE_CLASS_MAPPINGS"]) == {"SlicemodAttention", "SlicemodPlans"}
    for node in code["NODE_CLASS_MAPPINGS"].values():
        assert "model" in node.INPUT_TYPES()["required"]
        with pytest.raises(RuntimeError, match="cannot be imported by the Python that ComfyUI runs in") as raised:
            getattr(node(), node.FUNCTION)(model=None, budget="auto")
        assert command in str(raised.value)


def test_the_stand_ins_of_the_nodes_take_and_give_what_the_nodes_do(comfyui: Path) -> None:
    from slicemod.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS

    main(["install", "comfyui", str(comfyui)])
    path = comfyui / "custom_nodes" / "comfyui-slicemod" / "__init__.py"
    assert runpy.run_path(str(path))["NODE_CLASS_MAPPINGS"] is NODE_CLASS_MAPPINGS
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "slicemod.integrations.comfyui.nodes", None)
        missing = runpy.run_path(str(path))["NODE_CLASS_MAPPINGS"]
    for name, node in NODE_CLASS_MAPPINGS.items():
        declared = missing[name].INPUT_TYPES()
        assert node.INPUT_TYPES()["required"].keys() <= declared["required"].keys() | declared["optional"].keys()
        assert node.RETURN_TYPES == missing[name].RETURN_TYPES


def test_a_webui_without_slicemod_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["install", "webui", str(webui(tmp_path))])
    monkeypatch.setitem(sys.modules, "slicemod.integrations.webui.extension", None)
    with pytest.raises(ImportError, match="cannot be imported by the Python that the webui runs in") as raised:
        runpy.run_path(str(tmp_path / PROGRAMS["webui"].folder / PROGRAMS["webui"].code))
    assert f'"{sys.executable}" -m pip install --no-deps' in str(raised.value)


def test_installing_needs_no_pytorch(comfyui: Path) -> None:
    code = f"""
import sys
from slicemod.cli import main
assert main(["install", "comfyui", {str(comfyui)!r}]) == 0
assert main(["uninstall", "comfyui", {str(comfyui)!r}]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(slicemod.__file__).parents[1])
