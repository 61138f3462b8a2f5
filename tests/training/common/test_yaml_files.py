from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from slicemod.training.common.yaml_files import config_files, options, read_configs, require_plain_yaml
from slicemod.user_error import UserError
from tests.training.tiny import CONFIGS


def test_a_key_that_is_given_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("trainer:\n  max_steps: 3\n  devices: 1\n  max_steps: 5\n")
    with pytest.raises(UserError, match=r"twice\.yaml: the key 'max_steps' in line 4 was given in line 2 already"):
        read_configs([str(file)])


def test_one_key_in_two_blocks_is_no_duplicate() -> None:
    text = "a: {seed: 1}\nb: {seed: 2}\nc: [{seed: 1}, {seed: 2}]\n"
    require_plain_yaml(text, "text")  # or it would raise
    assert yaml.safe_load(text)["c"] == [{"seed": 1}, {"seed": 2}]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_say_each_key_once_and_are_read_whole(path: Path) -> None:
    assert read_configs([str(path)]) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_aliases_that_multiply_are_refused_before_they_are_written_out() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 7)}]" for level in range(1, 61)]  # 7 ** 61 values
    with pytest.raises(UserError, match=r"bomb is no configuration: got more than 100,000 values once its aliases"):
        require_plain_yaml("\n".join(lines), "bomb")


def test_a_block_that_holds_itself_is_refused() -> None:
    with pytest.raises(UserError, match="more than 100,000 values"):
        require_plain_yaml("a: &a [1, *a]", "loop")


def test_blocks_without_end_are_refused() -> None:
    with pytest.raises(UserError, match="nested deeper than 100"):
        require_plain_yaml("[" * 331 + "]" * 331, "deep")


def test_aliases_of_a_usual_size_are_read(tmp_path: Path) -> None:
    (file := tmp_path / "aliases.yaml").write_text("base: &base {lr: 1}\nfirst: {<<: *base, eps: 2}\nsecond: *base\n")
    assert read_configs([str(file)]) == {"base": {"lr": 1}, "first": {"lr": 1, "eps": 2}, "second": {"lr": 1}}


def test_later_files_come_over_earlier_ones_block_by_block(tmp_path: Path) -> None:
    (tmp_path / "1.yaml").write_text("model: {seed: 1, lora: {rank: 2}}\ntask: digits\n")
    (tmp_path / "2.yaml").write_text("model: {lora: {alpha: 3}}\n")
    merged = read_configs([str(tmp_path / "1.yaml"), str(tmp_path / "absent.yaml"), str(tmp_path / "2.yaml")])
    assert merged == {"task": "digits", "model": {"seed": 1, "lora": {"rank": 2, "alpha": 3}}}


def test_options_are_found_with_and_without_an_equals_sign() -> None:
    line = ["fit", "--config", "a.yaml", "--config=b.yaml", "--task=digits", "-c", "c.yaml", "--task", "other"]
    assert config_files(line) == ["a.yaml", "b.yaml", "c.yaml"]
    assert options(line, "--task") == ["digits", "other"]
