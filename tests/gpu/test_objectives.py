"""Training steps of flow matching on a GPU."""

from flow_matching_training import assert_fused_and_compiled_trains_as_the_reference, dit


def test_fused_and_compiled_trains_as_the_reference_in_eager_mode(monkeypatch):
    assert_fused_and_compiled_trains_as_the_reference(dit, "cuda", "inductor", monkeypatch)
