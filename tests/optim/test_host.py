"""The host's part of a step: one launch, uploads of changed numbers alone, no recompilation, a fraction of the time."""

from pathlib import Path

from support.processes import without_interpreter


def test_host_time_launches_uploads_and_compilations():
    """Best turns against best turns of torch's fused Adam, so that a busy machine does not decide."""
    for _ in range(3):
        found = without_interpreter(Path(__file__).with_name("host_time.py"))
        ratios = {count: row["ours"] / row["theirs"] for count, row in found["tensors"].items()}
        if ratios["60"] <= 1 / 5:
            break
    assert {count: row["launches"] for count, row in found["tensors"].items()} == {"10": 1, "60": 1, "300": 1}
    assert ratios["60"] <= 1 / 5, ratios
    assert ratios["300"] <= 1 / 5, ratios
    assert ratios["10"] <= 1 / 2, ratios
    assert found["clipped"] == ["norm_kernel", "step_kernel"]
    schedule = found["schedule"]
    assert schedule["uploads"] == ["groups"] * 10  # one small copy a change, and none of addresses
    assert schedule["bytes"] <= 4096
    assert schedule["idle"] == []
    assert schedule["compiled"] == 1
    assert schedule["steps"] == 15
