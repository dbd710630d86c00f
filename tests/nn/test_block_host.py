"""The host's part of a block: less than eager's layers take, in three launches."""

from pathlib import Path

from support.processes import without_interpreter

# A third more than on a quiet machine, where a node of autograd that computes nothing takes 0.46 and 0.38.
AT_MOST = {
    "host time of a block: one forward": 1.0,
    "host time of a block: one with its backward": 1.2,
    "host time of a block: each of 8 forward": 0.9,
    "host time of a block: each of 8 with its backward": 1.0,
    # And 8 to 10 µs a call, whatever the number of blocks: Dynamo's guards and its way to the graph.
    "host time of a block in a model after fastnn.fuse: one forward": 1.4,
    "host time of a block in a model after fastnn.fuse: one with its backward": 1.5,
    "host time of a block in a model after fastnn.fuse: each of 8 forward": 1.0,
    "host time of a block in a model after fastnn.fuse: each of 8 with its backward": 1.1,
}


def test_host_time_of_a_block_against_eagers_layers():
    """Best turns against best turns, so that a busy machine does not decide."""
    for _ in range(3):
        found = without_interpreter(Path(__file__).with_name("block_host_time.py"))
        if all(found["ratios"][case] <= bound for case, bound in AT_MOST.items()):
            break
    assert found["kernels"] == ["whole_batch_forward_kernel", "columns_backward_kernel", "linear_backward_kernel"]
    assert found["ratios"].keys() == AT_MOST.keys()
    assert all(found["ratios"][case] <= bound for case, bound in AT_MOST.items()), found["ratios"]
