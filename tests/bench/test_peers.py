"""Every peer computes the same layer, the same UNet and the same call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slicemod.bench import peers as peers_module
from slicemod.bench.peers import SDPA, Peer, all_peers, find_peers
from slicemod.bench.work import Exact, Work
from slicemod.feed_forward.layer import SlicedFeedForward
from slicemod.on_cpu import prepare
from slicemod.on_cpu.prepared import Prepared
from slicemod.user_error import UserError
from tests.bench.tiny import CALL, every_work

CPU = torch.device("cpu")
HERE = [peer for peer in all_peers("1MiB") if peer.missing(CPU) is None]
WITHOUT_COMPILER = [peer for peer in HERE if peer.name != "flex"]


def worst_error(peer: Peer, work: Work, base: torch.nn.Module, checks: list[Exact]) -> float:
    module = work.computed_by(peer, base)
    assert module is not None
    with torch.no_grad():
        found = [module.get_submodule(check.path)(*check.args)[..., check.rows, :] for check in checks]
    return max(float((one - check.wanted).abs().max()) for one, check in zip(found, checks, strict=True))


def test_every_peer_computes_every_work(tmp_path: Path) -> None:
    for work in every_work(tmp_path):
        base, inputs = work.build(), work.inputs()
        checks = work.exact(base, inputs)
        for peer in WITHOUT_COMPILER:
            if work is CALL and peer.alone() is None:
                continue
            assert worst_error(peer, work, base, checks) < 1e-5, (peer.name, work.name)


@pytest.mark.slow
def test_flex_attention_computes_the_call() -> None:
    (flex,) = (peer for peer in HERE if peer.name == "flex")
    base = CALL.build()
    assert worst_error(flex, CALL, base, CALL.exact(base, CALL.inputs())) < 1e-5


def test_a_whole_unet_gives_the_same_with_every_peer(tmp_path: Path) -> None:
    work = every_work(tmp_path)[2]
    base, inputs = work.build(), work.inputs()
    with torch.no_grad():
        wanted = base(*inputs).sample
        for peer in WITHOUT_COMPILER:
            module = work.computed_by(peer, base)
            assert module is not None
            torch.testing.assert_close(module(*inputs).sample, wanted, rtol=1e-4, atol=1e-4)


def test_the_whole_of_a_unet_is_prepared_for_the_cpu(tmp_path: Path) -> None:
    work = every_work(tmp_path)[2]
    (whole,) = find_peers(["slicemod-whole"], "1MiB")[1:]
    module = work.computed_by(whole, work.build().to(torch.bfloat16))
    assert module is not None
    assert any(isinstance(part, Prepared) for part in module.modules())
    assert any(isinstance(part, SlicedFeedForward) for part in module.modules())


def test_without_onednn_the_whole_of_a_unet_has_plain_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (peers_module, prepare):
        monkeypatch.setattr(module, "has_onednn", False)
    work = every_work(tmp_path)[2]
    (whole,) = find_peers(["slicemod-whole"], "1MiB")[1:]
    unet = work.computed_by(whole, work.build())
    assert unet is not None
    assert not any(isinstance(part, Prepared) for part in unet.modules())


def test_all_the_kernels_and_policies_of_ours_are_there() -> None:
    ours = {
        peer.name.removeprefix("slicemod").removeprefix("-") for peer in all_peers("1MiB") if "slicemod" in peer.name
    }
    assert ours == {"", "whole", "fused", "triton", "heuristic", "doggettx", "invokeai", "mps", "exact"}


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "find_spec", lambda name: None)
    missing = {peer.name: peer.missing(CPU) for peer in all_peers("1MiB")}
    assert missing["xformers"] == "xformers is not installed"
    assert missing["ldm"] == "ldm is not installed"
    assert missing["sdpa-cudnn"] == "has no kernel for cpu"
    assert missing["slicemod"] is None


def test_patterns_choose_peers_and_sdpa_is_always_there() -> None:
    assert [peer.name for peer in find_peers(["slicemod-[fi]*", "ldm"], "1MiB")] == [
        "sdpa", "ldm", "slicemod-fused", "slicemod-invokeai"
    ]  # fmt: skip
    assert find_peers(["*"], "1MiB")[0] is SDPA
    with pytest.raises(UserError, match=r"--peers: expected names or patterns out of sdpa, .*got 'flash'"):
        find_peers(["flash"], "1MiB")
