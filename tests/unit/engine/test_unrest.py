from __future__ import annotations

from services.worker.engine.unrest import Unrest


def test_it_is_quiet_once_the_last_one_has_ended():
    """In whatever order they end."""
    unrest = Unrest()
    first = unrest.quiet()
    with unrest:
        with unrest:
            assert unrest.quiet() is None
        assert unrest.quiet() is None
    assert unrest.quiet() not in {None, first}


def test_what_came_and_went_is_noticed():
    """Two looks between which something moved do not tell the same."""
    unrest = Unrest()
    assert unrest.quiet() == unrest.quiet()
    before = unrest.quiet()
    with unrest:
        pass
    assert unrest.quiet() != before
