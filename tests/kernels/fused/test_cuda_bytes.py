"""What fused CUDA kernels take, as it was read off PyTorch's allocator on an H200 (132 processors, PyTorch 2.11)."""

from __future__ import annotations

import pytest
import torch

from slicemod.call import ASSUMED_PROCESSORS, AttentionShape, MaskShape, processors_of
from slicemod.kernels.fused.cuda_bytes import cuda_fused_peak, flash_splits

# Batch, heads, queries, keys, head dim, bytes of an element; the most that one of flash, memory-efficient and cuDNN
# attention took beyond inputs, output and gradients, in inference and in training.
MEASURED = {
    (2, 8, 4096, 4096, 40, 2): (263168, 17318400),
    (1, 8, 4096, 4096, 40, 4): (0, 8658944),
    (2, 8, 1024, 1024, 80, 2): (66560, 8521728),
    (2, 8, 256, 256, 160, 2): (12665856, 12665856),
    (2, 8, 256, 256, 160, 4): (0, 3180032),
    (2, 8, 64, 64, 160, 4): (0, 1582080),
    (2, 8, 4096, 77, 40, 2): (263168, 17318400),
    (2, 10, 4096, 4096, 64, 2): (328704, 21647360),
    (2, 10, 4096, 4096, 64, 4): (0, 21954560),
    (2, 20, 1024, 77, 64, 2): (164864, 10823680),
    (1, 8, 16384, 16384, 40, 2): (525312, 34635776),
    (1, 1, 4096, 4096, 512, 2): (8388608, 25202688),
    (1, 3, 1009, 997, 72, 2): (4711760, 4711760),
    (1, 1, 3001, 3001, 256, 2): (15438848, 15438848),
}


@pytest.mark.parametrize("sizes", MEASURED)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_kernel_was_seen_to_take_more(sizes: tuple[int, int, int, int, int, int], training: bool) -> None:
    measured = MEASURED[sizes][training]
    promised = cuda_fused_peak(AttentionShape(*sizes), training=training, processors=132)
    rounding = 1024  # of the allocator, to blocks of 512 bytes
    assert measured - rounding <= promised
    if measured > 0:  # what float32 keeps for a backward pass is counted in inference as well
        assert promised <= 1.05 * measured


def test_a_gpu_that_is_full_splits_no_keys() -> None:
    shape = AttentionShape(2, 8, 1009, 1009, 64, 2)  # 256 blocks of 64 rows
    assert flash_splits(shape, 108) == 1
    assert flash_splits(shape, 1000) == 4


@pytest.mark.parametrize("processors", [1, 20, 46, 132, 160])
def test_there_are_no_more_splits_than_blocks_of_keys(processors: int) -> None:
    for keys in (1, 255, 257, 4099, 10**6):
        assert 1 <= flash_splits(AttentionShape(1, 1, 61, keys, 64, 2), processors) <= min(128, -(-keys // 256))


def test_an_odd_width_costs_padded_copies() -> None:
    odd, even = (AttentionShape(2, 5, 1024, 1024, width, 2) for width in (61, 64))
    peaks = [cuda_fused_peak(shape, training=True, processors=1) for shape in (odd, even)]
    assert peaks[0] - peaks[1] >= 6 * 2 * 5 * 1024 * 64 * 2  # of q, k, v and their gradients


def test_a_mask_may_be_converted() -> None:
    shape = AttentionShape(2, 3, 67, 53, 8, 2, mask=MaskShape(1, 1, 67, 53, is_bool=True))
    plain = AttentionShape(2, 3, 67, 53, 8, 2)
    peaks = [cuda_fused_peak(shape, training=False, processors=1) for shape in (shape, plain)]
    assert peaks[0] - peaks[1] == 2 * 67 * 53 * 2


def test_a_gpu_that_is_not_there_is_assumed() -> None:
    assert processors_of(torch.device("cpu")) == ASSUMED_PROCESSORS
    if not torch.cuda.is_available():
        assert processors_of(torch.device("cuda")) == ASSUMED_PROCESSORS


@pytest.mark.cuda
def test_a_gpu_tells_its_processors() -> None:
    assert processors_of(torch.device("cuda")) == torch.cuda.get_device_properties(0).multi_processor_count
