"""The laws of state.py, checked: in tests, after every step."""

from __future__ import annotations

from services.worker.core.state import WorkerState


def check(state: WorkerState) -> None:
    """Raises `AssertionError` where one does not hold."""
    loading = state.loading()
    state.device.validate()
    state.host.validate()
    assert state.overrun or not state.device.over or not state.engine_up, state
    assert not state.host.over or not state.engine_up, state
    assert len(loading) <= state.max_loading, state
    assert state.incomplete or not state.kept_out, state
    suspect = any(model.suspect for model in loading)
    assert not suspect or len(loading) == 1, state
    models = list(state.models.values())
    assert set(state.device) == {m.id for m in models if m.on_device}, state
    assert set(state.host) == {m.id for m in models if m.in_host}, state
    assert set(state.claims) == {m.id for m in models if m.admitted}, state
    assert {m.id for m in loading} == {m.id for m in models if m.stage == "loading"}, state
    for model in models:
        model.validate()
        assert not model.on_device or state.device[model.id] == model.footprint, model
        assert not model.in_host or state.host[model.id] == model.as_copy, model
        assert state.engine_up or not model.known_to_engine, f"{model.id} without an engine"
        assert not model.admitted or model.id in state.wanted, model
        assert model.copy == "none" or state.swapping, model
        if model.stage == "evicting" and not state.swapping:
            assert not model.consumers, model
            assert not model.unanswered, model
